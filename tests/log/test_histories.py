"""Random histories, against a model: who reads what, and whose cursors expire.

Sessions begin, append, take a transaction id for something else, roll back and commit, in
any order; readers read pages of any size at any time, and keep some of the cursors that they
pass; now and then the log is trimmed. The model knows which events each cursor has seen. Reading
on from it has to give exactly the others, or say that it expired exactly if one of them is gone.
"""

from __future__ import annotations

import random
from contextlib import AsyncExitStack

import pytest

from pgstructured import connect
from pgstructured.errors import CursorExpiredError
from pgstructured.log import Cursor

WHOLE = None


@pytest.fixture
async def conn(pg_dsn, log, size):
    """A session; the log is created, in partitions of so many ids."""
    async with await connect(pg_dsn) as conn:
        await log.create(conn, partition_size=size)
        yield conn


class Writer:
    """A session with a transaction, or none."""

    def __init__(self, conn):
        self.conn = conn
        self.is_open = False
        self.appended: list[int] = []
        self.since: dict[int, set[int]] = {}


class World:
    """What has happened: events are known by their ids."""

    def __init__(self, log, lots):
        self.log = log
        self.lots = lots
        self.committed: set[int] = set()
        self.removed: set[int] = set()
        self.after: dict[int, set[int]] = {}  # what was committed before each was appended
        self.places: list[tuple[str, frozenset[int]]] = []  # cursors, and what they have seen

    async def write(self, writer):
        conn, lots = writer.conn, self.lots
        if not writer.is_open:
            await conn.execute("BEGIN")
            writer.is_open = True
        what = lots.choice(("append", "append", "append", "many", "other", "commit", "rollback"))
        if what == "append":
            writer.appended.append(await self._note(writer, self.log.append(conn, "t", 1)))
        elif what == "many":
            items = [("t", n) for n in range(lots.randrange(1, 5))]
            writer.appended += await self._note(writer, self.log.append_many(conn, items))
        elif what == "other":
            await conn.execute("SELECT pg_current_xact_id()")
        else:
            await self.end(writer, "COMMIT" if what == "commit" else "ROLLBACK")

    async def _note(self, writer, appending):
        ids = await appending
        for event_id in ids if isinstance(ids, list) else [ids]:
            writer.since[event_id] = set(self.committed)
        return ids

    async def end(self, writer, how):
        await writer.conn.execute(how)
        if how == "COMMIT":
            self.committed.update(writer.appended)
            self.after.update(writer.since)
        writer.is_open, writer.appended, writer.since = False, [], {}

    async def read(self, conn, place, limit):
        """Read a page; return it, or None where the cursor has expired, rightly."""
        cursor, seen = place
        is_new = cursor == "beginning"
        try:
            page = await self.log.read(conn, cursor, limit=limit)
        except CursorExpiredError:
            assert not is_new
            assert self.removed - seen
            return None
        assert is_new or not self.removed - seen
        if is_new:
            seen = frozenset(self.removed)
        got = [event.id for event in page.events]
        assert got == sorted(set(got))
        assert not seen & set(got)
        assert len(got) <= limit
        if not got:
            assert seen >= self.committed
        for event in page.events:
            # Nothing comes before what whoever appended it could have seen.
            assert self.after[event.id] <= seen
            seen |= {event.id}
            self.places.append((str(event.cursor), seen))
        assert seen <= self.committed
        return str(page.cursor), seen

    async def trim(self, conn, **options):
        before = await self._kept(conn)
        count = await self.log.trim(conn, 0, lock_timeout=0.001, **options)
        kept = await self._kept(conn)
        assert count == len(before - kept)
        assert kept <= before
        self.removed |= before - kept

    async def trim_somehow(self, conn, writers, *, in_partitions):
        if in_partitions and self.lots.random() < 0.5:
            await self.trim_partitions(conn, writers)
        else:
            await self.trim(conn, batch_size=self.lots.choice((1, 3, 1000)))

    async def trim_partitions(self, conn, writers):
        """Trim, where nobody has appended who is still there; else nothing would be dropped."""
        for writer in writers:
            if writer.is_open:
                await self.end(writer, self.lots.choice(("COMMIT", "ROLLBACK")))
        # The last event is young, so that the others don't go one by one.
        async with writers[0].conn.transaction():
            (event_id,) = await self.log.append_many(writers[0].conn, [("t", "young")])
            await writers[0].conn.execute(
                "UPDATE events SET appended_at = 'infinity' WHERE id = %s", (event_id,)
            )
        self.after[event_id] = set(self.committed)
        self.committed.add(event_id)
        await self.trim(conn)
        await conn.execute("UPDATE events SET appended_at = now() WHERE id = %s", (event_id,))

    async def _kept(self, conn):
        found = await conn.execute("SELECT id FROM events")
        return {event_id for (event_id,) in await found.fetchall()}


async def make_world(stack, dsn, log, seed, count):
    writers = [Writer(await stack.enter_async_context(await connect(dsn))) for _ in range(count)]
    return World(log, random.Random(seed)), writers


@pytest.mark.parametrize(
    ("seed", "size"),
    # The last are rare cases.
    [*((seed, WHOLE) for seed in (0, 1, 2, 3, 5, 7, 15, 19, 25)), (1, 3), (3, 7), (5, 1), (7, 20)],
)
async def test_any_history(pg_dsn, conn, log, seed, size):
    async with AsyncExitStack() as stack:
        world, writers = await make_world(stack, pg_dsn, log, seed, 5)
        lots = world.lots
        readers = [("beginning", frozenset[int]()) for _ in range(3)]
        trims = seed % 2
        for step in range(250):
            what = lots.random()
            if what < 0.6:
                await world.write(lots.choice(writers))
            elif what < 0.95 or not trims:
                index = lots.randrange(len(readers))
                page = await world.read(conn, readers[index], lots.choice((1, 2, 3, 1000)))
                readers[index] = page or ("beginning", frozenset())
                if page is not None:
                    world.places.append(page)
            else:
                await world.trim_somehow(conn, writers, in_partitions=size is not None)
            if step % 25 == 0:
                for place in lots.sample(world.places, min(3, len(world.places))):
                    await world.read(conn, place, 1000)
        for writer in writers:
            if writer.is_open:
                await world.end(writer, lots.choice(("COMMIT", "ROLLBACK")))
        # From any place that a reader has been at, in pages of any size, to the end.
        for place in lots.sample(world.places, min(40, len(world.places))):
            limit = lots.choice((1, 4, 1000))
            now = await world.read(conn, place, limit)
            while now is not None and now != place:
                place, now = now, await world.read(conn, now, limit)  # noqa: PLW2901 - goes on
                if now is not None and now[1] == place[1]:
                    assert now[1] >= world.committed
                    break
        assert world.committed


@pytest.mark.parametrize(("seed", "size"), [(0, WHOLE), (1, WHOLE), (2, WHOLE), (3, 3), (4, 8)])
async def test_any_history_with_stored_cursors(pg_dsn, conn, log, seed, size):
    """What a stored cursor has not seen is never removed, unless that is asked for and told."""
    async with AsyncExitStack() as stack:
        world, writers = await make_world(stack, pg_dsn, log, seed + 100, 4)
        lots, store = world.lots, log.cursors
        readers = {f"reader {n}": ("beginning", frozenset[int]()) for n in range(3)}
        for name in readers:
            await store.save(conn, name, Cursor.beginning())
        for _ in range(250):
            what = lots.random()
            if what < 0.6:
                await world.write(lots.choice(writers))
            elif what < 0.9:
                name = lots.choice(sorted(readers))
                cursor = await store.load(conn, name, for_update=False)
                seen = readers[name][1]
                page = await world.read(conn, (str(cursor), seen), lots.choice((1, 2, 5)))
                assert page is not None
                await store.save(conn, name, page[0])
                readers[name] = page
            else:
                await world.trim_somehow(conn, writers, in_partitions=size is not None)
                for _, seen in readers.values():
                    assert world.removed <= seen
        for writer in writers:
            if writer.is_open:
                await world.end(writer, "COMMIT")
        await log.append(conn, "t", "kept for nobody")
        await log.trim(conn, 0, expire_cursors=True)
        for name in readers:
            with pytest.raises(CursorExpiredError):
                await log.read(conn, await store.load(conn, name, for_update=False))
