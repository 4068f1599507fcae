"""Partitions of a log: which there are, and making them.

They follow each other without a gap, each of as many ids; the last one takes all that come
after, so appending never fails for want of one. When the ids come near it is given an end, and
others are made behind: there are always `AHEAD` whole ones that no event has come to.

How many ids a partition has is kept in the bounds alone: the last that has an end always has
so many. (One that was the last for too long has several times as many.)
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from psycopg import sql

from . import _partition_statements as statements

if TYPE_CHECKING:
    from psycopg import AsyncCursor

    from ._names import Names

AHEAD: Final = 2
"""Partitions with an end to which no event has come."""
NO_END: Final = 2**63 - 1
"""The end of the last one."""
_MOST: Final = 10**12
_BOUND: Final = re.compile(r"FOR VALUES FROM \('(-?\d+)'\) TO \((?:'(-?\d+)'|MAXVALUE)\)")
_IDENTIFIER_BYTES: Final = 63
_FROZEN: Final = ("repeatable read", "serializable")


@final
class Partition(NamedTuple):
    """One of them: ids from ``first``, below ``end``."""

    table: sql.Identifier
    first: int
    end: int


@final
class Partitions(NamedTuple):
    """All of them, at an instant."""

    schema: str
    bounded: tuple[Partition, ...]
    """Those that have an end, in order."""
    last: Partition
    last_id: int
    """No greater id has been given out."""
    is_frozen: bool
    """The transaction that looks does not see what others commit."""

    @property
    def size(self) -> int:
        """How many ids each has."""
        _, first, end = self.bounded[-1]
        return end - first

    @property
    def full(self) -> tuple[Partition, ...]:
        """Those whose ids have all been given out; never the last that has an end."""
        return tuple(each for each in self.bounded[:-1] if each.end <= self.last_id + 1)

    @property
    def ahead(self) -> int:
        """How many have an end, and none of their ids was given out."""
        return sum(each.first > self.last_id for each in self.bounded)


def check_partition_size(size: int | None) -> int | None:
    """Return ``size`` if partitions can have so many ids."""
    given: Any = size
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= _MOST:
        raise ValueError(f"partition_size must be a whole number from 1 to 10**12, not {given!r}")
    return given


async def look(cursor: AsyncCursor[Any], names: Names) -> Partitions | None:
    """Return the partitions of a log; None for a log without, or that was made otherwise."""
    await cursor.execute(names.fill(statements.LOOK), ())
    found: list[Partition] = []
    schema, last_id, isolation = "", 0, ""
    for schema, name, bound, last_id, isolation in await cursor.fetchall():  # noqa: B007 - the same in all
        match = _BOUND.fullmatch(bound or "")
        if match is not None:
            first, end = match.groups()
            table = sql.Identifier(schema, name)
            found.append(Partition(table, int(first), NO_END if end is None else int(end)))
    found.sort(key=lambda each: each.first)
    if len(found) < 2 or found[-1].end != NO_END:  # noqa: PLR2004 - one with an end, and the last
        return None
    return Partitions(schema, tuple(found[:-1]), found[-1], last_id, isolation in _FROZEN)


async def make_first(cursor: AsyncCursor[Any], names: Names, size: int) -> None:
    """Make the first partitions of a log, if it has none."""
    await cursor.execute(names.fill(statements.IS_BARE), ())
    row = await cursor.fetchone()
    if row is not None:
        await _make(cursor, names, row[0], [1 + number * size for number in range(AHEAD + 2)])


async def make_more(cursor: AsyncCursor[Any], names: Names, found: Partitions) -> None:
    """Give the last partition an end, and make others behind it; nobody else is at the table.

    The end is beyond all ids that were given out. So it may hold any number of events, and the
    server looks through it, as it wants to see that they are all within.
    """
    last, size = found.last, found.size
    end = last.first + size * (max(0, found.last_id - last.first) // size + 1)
    parent = sql.Identifier(found.schema, names.table)
    alter = sql.SQL("ALTER TABLE {} {} PARTITION {}").format
    await cursor.execute(alter(parent, sql.SQL("DETACH"), last.table))
    attach = alter(parent, sql.SQL("ATTACH"), last.table)
    await cursor.execute(attach + _bounds(last.first, end))
    ahead = found.ahead + (last.first > found.last_id)
    firsts = [end + number * size for number in range(AHEAD - ahead + 1)]
    await _make(cursor, names, found.schema, firsts)


async def _make(cursor: AsyncCursor[Any], names: Names, schema: str, firsts: list[int]) -> None:
    """Make partitions that begin there, of which the last one has no end."""
    parent = sql.Identifier(schema, names.table)
    for first, end in zip(firsts, [*firsts[1:], NO_END], strict=True):
        table = sql.Identifier(schema, _name(names, first))
        create = sql.SQL("CREATE TABLE {} PARTITION OF {}").format(table, parent)
        await cursor.execute(create + _bounds(first, end))


def _bounds(first: int, end: int) -> sql.Composed:
    last = sql.SQL("MAXVALUE") if end == NO_END else sql.Literal(end)
    return sql.SQL(" FOR VALUES FROM ({}) TO ({})").format(sql.Literal(first), last)


def _name(names: Names, first: int) -> str:
    """Return what a partition is called; nothing is known by that."""
    name = f"{names.table}_p{first}"
    if len(name.encode()) <= _IDENTIFIER_BYTES:
        return name
    digest = hashlib.blake2b(names.table.encode(), digest_size=8).hexdigest()
    return f"pgstructured_log_{digest}_p{first}"
