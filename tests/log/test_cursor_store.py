"""Stored cursors: everything exactly once."""

from __future__ import annotations

from datetime import timedelta

import anyio
import psycopg
import pytest
from psycopg import IsolationLevel

from pgstructured import connect
from pgstructured.errors import CursorExpiredError
from pgstructured.log import Cursor, CursorStore, StoredCursor

BEGINNING = Cursor.beginning()


@pytest.fixture
async def conn(pg_dsn, log, request):
    """A session; the log is created, with partitions of so many ids if the test asks for it."""
    async with await connect(pg_dsn) as conn:
        await log.create(conn, partition_size=getattr(request, "param", None))
        yield conn


async def test_a_cursor_is_kept(conn, other, log, kit):
    store = log.cursors
    assert isinstance(store, CursorStore)
    await log.append_many(conn, [("t", n) for n in range(4)])
    async with conn.transaction():
        cursor = await store.load(conn, "mailer")
        page = await log.read(conn, cursor, limit=3)
        await store.save(conn, "mailer", str(page.cursor))
    assert await store.load(other, "mailer", for_update=False) == page.cursor
    assert (await kit.read_all(log, other, page.cursor))[0] == [3]
    await store.save(conn, "auditor", await log.now(conn))
    before = await kit.fetch(conn, "SELECT clock_timestamp()")
    stored = await store.list(conn)
    assert [each.name for each in stored] == ["auditor", "mailer"]
    assert all(isinstance(each, StoredCursor) for each in stored)
    assert stored[1].cursor == page.cursor
    assert timedelta(0) <= before - stored[1].saved_at < timedelta(seconds=kit.soon)
    assert await store.delete(conn, "mailer")
    assert not await store.delete(conn, "mailer")


async def test_a_new_name_begins_at_the_beginning_and_keeps_from_then_on(conn, log, kit):
    await log.append(conn, "t", "before")
    await log.trim(conn, 0)
    async with conn.transaction():
        await log.cursors.load(conn, "a")
    await log.append(conn, "t", 1)
    assert await log.trim(conn, 0) == 0  # it has not seen it
    cursor = await log.cursors.load(conn, "a", for_update=False)
    assert cursor != BEGINNING
    assert (await kit.read_all(log, conn, cursor))[0] == [1]


async def test_a_new_name_begins_elsewhere(conn, log, kit):
    await log.append(conn, "t", "before")
    now = await log.now(conn)
    async with conn.transaction():
        assert await log.cursors.load(conn, "a", initial=str(now)) == now
        assert await log.cursors.load(conn, "a", initial=BEGINNING) == now
    assert await log.trim(conn, 0) == 1
    with pytest.raises(ValueError, match="not the text of"):
        await log.cursors.load(conn, "b", for_update=False, initial="nonsense")
    with pytest.raises(ValueError, match="not the text of"):
        await log.cursors.save(conn, "b", "nonsense")


def whole_and_in_partitions(test):
    sizes = pytest.mark.parametrize("conn", [None, 2], ids=["whole", "partitions"], indirect=True)
    return sizes(test)


async def wait_until_it_waits(kit, conn, is_done):
    """Wait until some session waits for a row, unless nothing is left that could."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with anyio.fail_after(kit.soon):
        while not is_done() and not await kit.fetch(conn, waiting):  # noqa: ASYNC110 - the server's
            await anyio.sleep(0.005)


@whole_and_in_partitions
async def test_a_new_name_while_the_log_is_trimmed(pg_dsn, conn, other, log, kit):
    """It began before what was just removed, and had expired at the first read."""
    await log.append_many(conn, [("t", n) for n in range(5)])
    payloads: list[object] = []
    is_loaded = False
    trimmed = anyio.Event()

    async def consume():
        nonlocal is_loaded
        async with other.transaction():
            cursor = await log.cursors.load(other, "a")
            is_loaded = True
            await trimmed.wait()
            payloads.extend((await kit.read_all(log, other, cursor))[0])
            await log.cursors.save(other, "a", cursor)

    async with await connect(pg_dsn) as watcher, anyio.create_task_group() as tasks:
        async with conn.transaction():
            assert await log.trim(conn, 0) == 5
            tasks.start_soon(consume)
            await wait_until_it_waits(kit, watcher, lambda: is_loaded)
        await log.append(conn, "t", 5)
        trimmed.set()
    assert payloads == [5]
    cursor = await log.cursors.load(conn, "a", for_update=False)
    assert (await kit.read_all(log, conn, cursor))[0] == [5]


@whole_and_in_partitions
@pytest.mark.parametrize("way", ["load", "load elsewhere", "save"])
async def test_trimming_while_a_consumer_begins(pg_dsn, conn, other, log, kit, way):
    """What came after its cursor was removed: nobody else could see the cursor yet."""
    start = await log.now(conn) if way == "load elsewhere" else BEGINNING
    await log.append_many(conn, [("t", n) for n in range(5)])
    if way == "save":  # to begin anew
        await log.cursors.save(conn, "a", await log.now(conn))
    counts: list[int] = []

    async def trim():
        counts.append(await log.trim(conn, 0))

    async with await connect(pg_dsn) as watcher, anyio.create_task_group() as tasks:
        async with other.transaction():
            if way == "save":
                await log.cursors.save(other, "a", start)
            cursor = await log.cursors.load(other, "a", initial=start)
            tasks.start_soon(trim)
            await wait_until_it_waits(kit, watcher, lambda: counts)
            page = await log.read(other, cursor, limit=2)
            assert [event.payload for event in page.events] == [0, 1]
            await log.cursors.save(other, "a", page.cursor)
    cursor = await log.cursors.load(conn, "a", for_update=False)
    assert (await kit.read_all(log, conn, cursor))[0] == [2, 3, 4]
    assert counts == [2]


async def test_a_consumer_that_goes_on_is_not_waited_for(conn, other, log):
    await log.append_many(conn, [("t", n) for n in range(3)])
    await log.cursors.save(conn, "a", BEGINNING)
    async with other.transaction():
        cursor = await log.cursors.load(other, "a")
        page = await log.read(other, cursor, limit=2)
        await log.cursors.save(other, "a", page.cursor)
        assert await log.trim(conn, 0) == 0
    assert await log.trim(conn, 0) == 2


@pytest.mark.parametrize("way", ["load", "save"])
async def test_a_frozen_consumer_that_begins_is_told_of_a_trim(conn, other, log, way):
    """What it could see is gone: what it has not read of it nobody would have again."""
    await log.append_many(conn, [("t", n) for n in range(3)])
    await other.set_isolation_level(IsolationLevel.REPEATABLE_READ)
    with pytest.raises(psycopg.errors.SerializationFailure):
        async with other.transaction():
            await other.execute("SELECT 1")
            assert await log.trim(conn, 0) == 3
            if way == "load":
                await log.cursors.load(other, "a")
            else:
                await log.cursors.save(other, "a", BEGINNING)


async def test_what_a_consumer_has_to_be_granted(pg_dsn, conn, log, kit):
    role = f"consumer_{await kit.fetch(conn, 'SELECT pg_backend_pid()')}"
    grants = (
        f"GRANT SELECT ON events, events_state, events_trimmed TO {role}",
        f"GRANT SELECT, INSERT, UPDATE ON events_cursor TO {role}",
        f"GRANT UPDATE (is_only) ON events_state TO {role}",
    )
    await conn.execute(f"CREATE ROLE {role}")
    try:
        for grant in grants:
            await conn.execute(grant)
        await log.append(conn, "t", 1)
        async with await connect(pg_dsn, options=f"-c role={role}") as consumer:
            await log.cursors.save(consumer, "b", BEGINNING)
            async with consumer.transaction():
                cursor = await log.cursors.load(consumer, "a")
                payloads, cursor = await kit.read_all(log, consumer, cursor)
                await log.cursors.save(consumer, "a", cursor)
            assert payloads == [1]
    finally:
        await conn.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_rollback_takes_it_back(conn, log):
    async with conn.transaction():
        first = await log.cursors.load(conn, "a")
    await log.append(conn, "t", 1)
    async with conn.transaction(force_rollback=True):
        await log.cursors.save(conn, "a", await log.now(conn))
    assert await log.cursors.load(conn, "a", for_update=False) == first


async def test_locking_needs_a_transaction(pg_dsn, conn, log):
    with pytest.raises(psycopg.ProgrammingError, match="for_update=False"):
        await log.cursors.load(conn, "a")
    async with await connect(pg_dsn, autocommit=False) as implicit:
        await log.cursors.load(implicit, "a")
        await implicit.rollback()


async def test_consumers_of_one_name_take_turns(pg_dsn, conn, log, kit):
    """New ones too: there is no row yet that could be locked."""
    await log.append_many(conn, [("t", n) for n in range(30)])
    await conn.execute("CREATE TABLE done (n int, who int)")

    async def consume(who):
        async with await connect(pg_dsn) as consumer:
            while True:
                async with consumer.transaction():
                    cursor = await log.cursors.load(consumer, "a")
                    page = await log.read(consumer, cursor, limit=1)
                    for event in page.events:
                        await consumer.execute(
                            "INSERT INTO done VALUES (%s, %s)", (event.payload, who)
                        )
                    await log.cursors.save(consumer, "a", page.cursor)
                if not page.events:
                    return

    async with anyio.create_task_group() as tasks:
        for who in range(4):
            tasks.start_soon(consume, who)
    found = await (await conn.execute("SELECT n FROM done")).fetchall()
    assert sorted(n for (n,) in found) == list(range(30))


async def test_a_frozen_consumer_is_told_that_it_is_late(conn, other, log):
    async with conn.transaction():
        await log.cursors.load(conn, "a")
    await other.set_isolation_level(IsolationLevel.REPEATABLE_READ)
    with pytest.raises(psycopg.errors.SerializationFailure):
        async with other.transaction():
            await other.execute("SELECT 1")
            await log.append(conn, "t", 1)
            await log.cursors.save(conn, "a", await log.now(conn))
            await log.cursors.load(other, "a")


async def test_what_a_stored_cursor_has_not_seen_is_kept(conn, log, kit):
    await log.append_many(conn, [("t", n) for n in range(3)])
    page = await log.read(conn, BEGINNING, limit=2)
    await log.cursors.save(conn, "slow", page.cursor)
    await log.append(conn, "t", 3)
    await log.cursors.save(conn, "quick", await log.now(conn))
    assert await log.trim(conn, 0) == 2
    slow = await log.cursors.load(conn, "slow", for_update=False)
    assert (await kit.read_all(log, conn, slow))[0] == [2, 3]
    with kit.noted("log.cursors_expired") as events:
        assert await log.trim(conn, 0, expire_cursors=True, batch_size=1) == 2
        assert await log.trim(conn, 0, expire_cursors=True) == 0
    assert events == [("log.cursors_expired", {"log": "events", "names": ["slow"]})]
    with pytest.raises(CursorExpiredError):
        await log.read(conn, await log.cursors.load(conn, "slow", for_update=False))
    quick = await log.cursors.load(conn, "quick", for_update=False)
    assert (await kit.read_all(log, conn, quick))[0] == []
    # What has expired keeps something nevertheless, until its owner has been told.
    await log.append(conn, "t", 4)
    assert await log.trim(conn, 0) == 0
    assert await log.cursors.delete(conn, "slow")
    await log.cursors.save(conn, "quick", await log.now(conn))
    assert await log.trim(conn, 0) == 1


async def test_one_that_never_began_is_told_too(conn, log, kit):
    """`Cursor.beginning` never expires; stored, it is a place, and does."""
    await log.cursors.save(conn, "a", BEGINNING)
    await log.append(conn, "t", 1)
    assert await log.trim(conn, 0) == 0
    with kit.noted("log.cursors_expired") as events:
        assert await log.trim(conn, 0, expire_cursors=True) == 1
    assert events[0][1]["names"] == ["a"]
    with pytest.raises(CursorExpiredError):
        await log.read(conn, await log.cursors.load(conn, "a", for_update=False))
    await log.cursors.save(conn, "a", BEGINNING)
    cursor = await log.cursors.load(conn, "a", for_update=False)
    assert (await kit.read_all(log, conn, cursor))[0] == []
