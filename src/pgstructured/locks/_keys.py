"""Lock keys: what Postgres locks, and how names become numbers.

Postgres knows two spaces of advisory keys that never meet: one ``bigint``, or two
``integer``. What a key is called, and by which scheme its number was made, is for
people; two names of one number are one lock.

Manual: "Advisory Lock Functions", and ``pg_locks`` for how the numbers are shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, final

from psycopg.rows import tuple_row

from pgstructured.errors import LockKeyError

from . import _derivations

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

_MOST_DIGITS: Final = 40
_WORD: Final = 0xFFFF_FFFF
_BIGINT: Final = re.compile(r"-?[0-9]+")
_PAIR: Final = re.compile(r"(-?[0-9]+),(-?[0-9]+)")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LockKey:
    """A key as Postgres sees it, and where it came from.

    Equal where Postgres sees one lock: ``name`` and ``scheme`` take no part in it. Made by
    its class methods.

    Raises:
        LockKeyError: if it is neither or both of the two kinds, or out of range.
    """

    as_bigint: int | None = None
    """The number, for a key of one ``bigint``; else None."""
    as_pair: tuple[int, int] | None = None
    """The two numbers, for a key of two ``integer``; else None."""
    name: str | None = field(default=None, compare=False)
    """What it is called, where it was made from a name."""
    scheme: str = field(default="number", compare=False)
    """How the numbers were made."""
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.as_bigint is not None and self.as_pair is None:
            _check_range(self.as_bigint, 64)
        elif self.as_pair is not None and self.as_bigint is None:
            for number in self.as_pair:
                _check_range(number, 32)
        else:
            raise LockKeyError("a lock key is one bigint or one pair of integers")
        # A key is looked up a dozen times on the way of one lock.
        object.__setattr__(self, "_hash", hash((self.as_bigint, self.as_pair)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        numbers = (self.as_bigint,) if self.as_pair is None else self.as_pair
        shown = ",".join(str(number) for number in numbers)
        return shown if self.name is None else f"{self.name!r} ({shown})"

    @property
    def pg_locks_ids(self) -> tuple[int, int, int]:
        """The columns ``classid``, ``objid`` and ``objsubid`` that ``pg_locks`` shows for it."""
        if self.as_pair is not None:
            first, second = self.as_pair
            return first & _WORD, second & _WORD, 2
        number = self.as_bigint or 0
        return (number >> 32) & _WORD, number & _WORD, 1

    @classmethod
    def named(cls, name: str, *, namespace: str = "") -> Self:
        """Make a key from a name, by this library's own scheme.

        HKDF-SHA256 (RFC 5869) of the name's UTF-8, without salt, with the information
        ``pgstructured lock v1``, a zero byte and the namespace; 8 bytes, little-endian, ``bigint``.

        Args:
            name: Any text but the empty one.
            namespace: Keeps equal names of different uses apart.

        Raises:
            LockKeyError: if the name is empty, or not expressible in UTF-8.
        """
        _refuse_empty(name)
        number = _derivations.named(_utf8(name), _utf8(namespace))
        return cls(as_bigint=number, name=name, scheme="named")

    @classmethod
    def bigint(cls, n: int) -> Self:
        """Make the key of one ``bigint``.

        Raises:
            LockKeyError: if it is out of range.
        """
        return cls(as_bigint=n)

    @classmethod
    def pair(cls, a: int, b: int) -> Self:
        """Make the key of two ``integer``.

        Raises:
            LockKeyError: if one is out of range.
        """
        return cls(as_pair=(a, b))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a key as a person writes it.

        Args:
            text: ``"123"`` for a ``bigint``, ``"1,2"`` for a pair, and else a name, see `named`.

        Raises:
            LockKeyError: if it is empty or a number is out of range.
        """
        if _BIGINT.fullmatch(text):
            return cls.bigint(_number(text))
        if match := _PAIR.fullmatch(text):
            return cls.pair(_number(match[1]), _number(match[2]))
        return cls.named(text)

    # ------------------------------------------------------------ other people's keys

    @classmethod
    def sqlx(cls, name: str) -> Self:
        """Make the key of Rust's ``sqlx::postgres::PgAdvisoryLock::new(name)``."""
        return cls(as_bigint=_derivations.sqlx(_utf8(name)), name=name, scheme="sqlx")

    @classmethod
    def platform_go(cls, name: str, namespace: int = 0) -> Self:
        """Make the key of Go's ``platform-go`` distributed lock.

        Raises:
            LockKeyError: if the name is empty or the namespace is no ``integer``.
        """
        _refuse_empty(name)
        _check_range(namespace, 32)
        number = _derivations.platform_go(_utf8(name), namespace)
        return cls(as_bigint=number, name=name, scheme="platform_go")

    @classmethod
    def madelson(cls, name: str, allow_hashing: bool = False) -> Self:  # noqa: FBT001, FBT002 - as there
        """Make the key of .NET's ``DistributedLock.Postgres``.

        Up to 9 ASCII characters are themselves, ``XXXXXXXX,XXXXXXXX`` and 16 hexadecimal
        digits are numbers.

        Args:
            name: The name.
            allow_hashing: Hash any other name.

        Raises:
            LockKeyError: if it is another name, and may not be hashed.
        """
        _utf8(name)
        found = _derivations.madelson(name, allow_hashing=allow_hashing)
        if found is None:
            raise LockKeyError(f"{name!r} has to be hashed; pass allow_hashing=True")
        if isinstance(found, tuple):
            return cls(as_pair=found, name=name, scheme="madelson")
        return cls(as_bigint=found, name=name, scheme="madelson")

    @classmethod
    def pals(cls, name: str, app_name: str | None) -> Self:
        """Make the key of Python's ``pals``."""
        _utf8(f"{app_name}.{name}")
        return cls(as_bigint=_derivations.pals(name, app_name), name=name, scheme="pals")

    @classmethod
    def django_pglock(cls, id: str | int) -> Self:  # noqa: A002 - its name in the contract
        """Make the key of Python's ``django-pglock``; an `int` is itself."""
        if isinstance(id, str):
            number = _derivations.django_pglock(_utf8(id))
            return cls(as_bigint=number, name=id, scheme="django_pglock")
        return cls(as_bigint=id, scheme="django_pglock")

    @classmethod
    def sqlalchemy_dlock(cls, key: str | bytes | int) -> Self:
        """Make the key of Python's ``sqlalchemy-dlock``; an `int` is itself."""
        if isinstance(key, int):
            return cls(as_bigint=key, scheme="sqlalchemy_dlock")
        name = key if isinstance(key, str) else None
        number = _derivations.sqlalchemy_dlock(_utf8(key) if isinstance(key, str) else key)
        return cls(as_bigint=number, name=name, scheme="sqlalchemy_dlock")

    @classmethod
    def with_advisory_lock(cls, name: str | int, prefix: str | None = None) -> Self:
        """Make the key of Ruby's ``with_advisory_lock``.

        Args:
            name: The name, or a number for Ruby's numerics.
            prefix: Its ``WITH_ADVISORY_LOCK_PREFIX``, of which only leading digits count.
        """
        shown = name if isinstance(name, str) else None
        _utf8(shown or "")
        pair = _derivations.with_advisory_lock(name, prefix)
        return cls(as_pair=pair, name=shown, scheme="with_advisory_lock")

    @classmethod
    def river(cls, key: str, prefix: int = 0) -> Self:
        """Make the key of Go's ``riverqueue/river``.

        Args:
            key: What River hashes.
            prefix: Its ``AdvisoryLockPrefix``.

        Raises:
            LockKeyError: if the prefix is no ``integer``.
        """
        _check_range(prefix, 32)
        return cls(as_bigint=_derivations.river(_utf8(key), prefix), name=key, scheme="river")

    @classmethod
    async def hashtextextended(
        cls, conn: psycopg.AsyncConnection[Any], name: str, seed: int = 0
    ) -> Self:
        """Make the key of SQL's ``hashtextextended(name, seed)``, which the server computes.

        It is the same on one major version; the manual promises no more.

        Args:
            conn: A connection to the server.
            name: The text.
            seed: The second argument.

        Raises:
            LockKeyError: if the seed is out of range, or the name no text of Postgres.
            psycopg.Error: what the server says.

        Cancellation:
            A checkpoint; nothing is left behind.
        """
        _check_range(seed, 64)
        if b"\0" in _utf8(name):
            raise LockKeyError("a text of Postgres has no zero byte")
        async with conn.cursor(row_factory=tuple_row) as cursor:
            await cursor.execute("SELECT pg_catalog.hashtextextended(%s, %s)", [name, seed])
            ((number,),) = await cursor.fetchall()
        return cls(as_bigint=number, name=name, scheme="hashtextextended")


LockKeyLike: TypeAlias = LockKey | str | int | tuple[int, int]
"""What stands for a key: a `LockKey`, a name, a ``bigint``, or a pair of ``integer``."""


def as_lock_key(key: LockKeyLike, make_named: Callable[[str], LockKey] = LockKey.named) -> LockKey:
    """Return the `LockKey` that ``key`` stands for.

    Args:
        key: What the caller gave.
        make_named: Makes a key from a name.

    Raises:
        LockKeyError: if it is empty or out of range.
        TypeError: if it is none of the kinds.
    """
    match key:
        case LockKey():
            return key
        case str():
            _refuse_empty(key)
            return make_named(key)
        case int():
            return LockKey.bigint(key)
        case (first, second):
            return LockKey.pair(first, second)
        case _:
            raise TypeError(f"a lock key is a LockKey, str, int or pair of int, not {key!r}")


def _check_range(number: object, bits: int) -> None:
    if not isinstance(number, int) or isinstance(number, bool):
        raise LockKeyError(f"a lock key takes integers, not {number!r}")
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if not lowest <= number <= highest:
        raise LockKeyError(f"{number} is out of range: {lowest} to {highest}")


def _number(digits: str) -> int:
    # Python refuses to convert thousands of digits with a message about its own settings.
    if len(digits) > _MOST_DIGITS:
        raise LockKeyError("a lock key has at most 19 digits")
    return int(digits)


def _refuse_empty(name: str) -> None:
    if not name:
        raise LockKeyError("a lock's name must not be empty")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise LockKeyError("a lock's name must be expressible in UTF-8") from None
