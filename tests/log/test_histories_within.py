"""Random histories, read from within transactions too: savepoints, frozen snapshots, topics.

As `test_histories`, with what that leaves out. Writers also read: in READ COMMITTED everything
that is committed but their own, in REPEATABLE READ what was committed when they began. They
set savepoints and go back to them. Some readers want one topic only, and all go on from wherever
another one was.
"""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from typing import NamedTuple

import pytest

from pgstructured import connect

LEVELS = ("READ COMMITTED", "READ COMMITTED", "REPEATABLE READ")
STEPS = ("append", "append", "many", "xid", "save", "back", "release", "read", "read", "end", "end")


class Place(NamedTuple):
    """A cursor, and which events of its topics it has seen."""

    cursor: str
    seen: frozenset[int]
    topics: tuple[str, ...] | None


class World:
    """What has happened: events are known by their ids."""

    def __init__(self, log, lots):
        self.log = log
        self.lots = lots
        self.committed: set[int] = set()
        self.topics: dict[int, str] = {}
        self.places = [Place("beginning", frozenset(), each) for each in (None, None, ("a",))]

    def is_behind(self, place, visible):
        return any(
            place.topics is None or self.topics[event_id] in place.topics
            for event_id in visible - place.seen
        )

    async def read(self, conn, place, visible, *, is_frozen=False):
        """Read a page from a place; the next place."""
        limit = self.lots.choice((1, 2, 3, 1000))
        page = await self.log.read(conn, place.cursor, topics=place.topics, limit=limit)
        got = [event.id for event in page.events]
        assert got == sorted(set(got))
        assert len(got) <= limit
        assert not place.seen & set(got)
        assert visible >= set(got)
        if is_frozen and str(page.cursor) == place.cursor:  # it is newer than the snapshot
            assert not got
            return place
        assert got or not self.is_behind(place, visible)
        seen = place.seen
        for event in page.events:
            seen |= {event.id}
            self.places.append(Place(str(event.cursor), seen, place.topics))
        return Place(str(page.cursor), seen, place.topics)

    async def read_on(self, conn, visible, *, is_frozen=False):
        """Read from where somebody was."""
        place = self.lots.choice(self.places[-20:])
        self.places.append(await self.read(conn, place, visible, is_frozen=is_frozen))


class Writer:
    """A session with a transaction, or none."""

    def __init__(self, world, conn):
        self.world = world
        self.conn = conn
        self.levels: list[list[int]] = []
        self.frozen: frozenset[int] | None = None

    async def step(self):
        world, conn, lots = self.world, self.conn, self.world.lots
        if not self.levels:
            level = lots.choice(LEVELS)
            await conn.execute(f"BEGIN ISOLATION LEVEL {level}")
            await conn.execute("SELECT 1")
            self.levels = [[]]
            self.frozen = frozenset(world.committed) if level == "REPEATABLE READ" else None
        what = lots.choice(STEPS)
        if what == "append":
            topic = lots.choice("ab")
            self.note(topic, [await world.log.append(conn, topic, 1)])
        elif what == "many":
            topics = lots.choice(("a", "b", "ab", "bba"))
            self.note(topics, await world.log.append_many(conn, [(each, 1) for each in topics]))
        elif what == "xid":
            await conn.execute("SELECT pg_current_xact_id()")
        elif what == "save":
            await conn.execute("SAVEPOINT s")
            self.levels.append([])
        elif what == "back" and len(self.levels) > 1:
            await conn.execute("ROLLBACK TO s")
            await conn.execute("RELEASE s")
            self.levels.pop()
        elif what == "release" and len(self.levels) > 1:
            await conn.execute("RELEASE s")
            self.levels[-2:] = [self.levels[-2] + self.levels[-1]]
        elif what == "read":
            visible = world.committed if self.frozen is None else self.frozen
            await world.read_on(conn, visible, is_frozen=self.frozen is not None)
        elif what == "end":
            await self.end(lots.choice(("COMMIT", "COMMIT", "ROLLBACK")))

    def note(self, topics, ids):
        self.world.topics.update(zip(ids, topics, strict=True))
        self.levels[-1] += ids

    async def end(self, how):
        await self.conn.execute(how)
        if how == "COMMIT":
            self.world.committed.update(*self.levels)
        self.levels = []


@pytest.mark.parametrize("seed", range(4))
async def test_any_history_read_within(pg_dsn, conn, log, seed):
    lots = random.Random(seed)
    async with AsyncExitStack() as stack:
        world = World(log, lots)
        writers = [
            Writer(world, await stack.enter_async_context(await connect(pg_dsn))) for _ in range(5)
        ]
        for _ in range(250):
            if lots.random() < 0.7:
                await lots.choice(writers).step()
            else:
                await world.read_on(conn, world.committed)
        for writer in writers:
            if writer.levels:
                await writer.end("COMMIT")
        # From any place that a reader has been at to the end.
        for place in lots.sample(world.places, 30):
            while world.is_behind(place, world.committed):
                place = await world.read(conn, place, world.committed)  # noqa: PLW2901 - goes on
            last = await log.read(conn, place.cursor, topics=place.topics)
            assert last.events == []
        assert world.committed
