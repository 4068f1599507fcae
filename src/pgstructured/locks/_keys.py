"""Lock keys: what Postgres locks, and how names become numbers.

Postgres knows two spaces of advisory keys that never meet: one ``bigint``, or two
``integer``. What a key is called, and by which scheme its number was made, is for
people; two names of one number are one lock.

Manual: "Advisory Lock Functions", and ``pg_locks`` for how the numbers are shown.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self, TypeAlias, final

from pgstructured.errors import LockKeyError

if TYPE_CHECKING:
    from collections.abc import Callable

_INFO: Final = b"pgstructured lock v1\0"
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

    def __post_init__(self) -> None:
        if self.as_bigint is not None and self.as_pair is None:
            _check_range(self.as_bigint, 64)
        elif self.as_pair is not None and self.as_bigint is None:
            for number in self.as_pair:
                _check_range(number, 32)
        else:
            raise LockKeyError("a lock key is one bigint or one pair of integers")

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
        digest = _hkdf_sha256(_utf8(name), _INFO + _utf8(namespace), 8)
        return cls(as_bigint=_signed(digest, "little"), name=name, scheme="named")

    @classmethod
    def bigint(cls, number: int) -> Self:
        """Make the key of one ``bigint``.

        Raises:
            LockKeyError: if it is out of range.
        """
        return cls(as_bigint=number)

    @classmethod
    def pair(cls, first: int, second: int) -> Self:
        """Make the key of two ``integer``.

        Raises:
            LockKeyError: if one is out of range.
        """
        return cls(as_pair=(first, second))

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


def _signed(digest: bytes, order: str) -> int:
    return int.from_bytes(digest, "little" if order == "little" else "big", signed=True)


def _hkdf_sha256(secret: bytes, info: bytes, length: int) -> bytes:
    """Return up to 32 bytes of HKDF without salt (RFC 5869): its first block is enough."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")[:length]
