"""Trimming, and what it means for those who have not read yet."""

from __future__ import annotations

import math

import anyio
import psycopg
import pytest

from pgstructured import connect
from pgstructured.errors import CursorExpiredError
from pgstructured.log import Cursor
from pgstructured.log._cursors import parts_of

BEGINNING = Cursor.beginning()


@pytest.fixture
async def conn(pg_dsn, log, request):
    """A session; the log is created, with partitions of so many ids if the test asks for it."""
    async with await connect(pg_dsn) as conn:
        await log.create(conn, partition_size=getattr(request, "param", None))
        yield conn


def whole_and_in_partitions(size):
    """Run a test twice."""
    ids = ["whole", "partitions"]
    return pytest.mark.parametrize("conn", [None, size], ids=ids, indirect=True)


async def age(conn, seconds, where="true"):
    await conn.execute(
        psycopg.sql.SQL(
            "UPDATE events SET appended_at = appended_at - make_interval(secs => {})"
        ).format(seconds)
        + psycopg.sql.SQL(" WHERE " + where)
    )


@whole_and_in_partitions(5)
async def test_what_is_old_goes(conn, log, kit):
    await log.append_many(conn, [("t", n) for n in range(5)])
    await age(conn, 100)
    await log.append_many(conn, [("t", n) for n in range(5, 8)])
    assert await log.trim(conn, 200) == 0
    with kit.noted() as events:
        assert await log.trim(conn, 50) == 5
        assert await log.trim(conn, 50) == 0
    assert events == [("log.trimmed", {"log": "events", "count": 5})]
    assert (await kit.read_all(log, conn))[0] == [5, 6, 7]
    assert await log.trim(conn, 0) == 3
    assert (await kit.read_all(log, conn))[0] == []


async def test_it_goes_in_batches(conn, other, log, kit):
    """Each is a transaction in autocommit; else all are the caller's."""
    await log.append_many(conn, [("t", n) for n in range(25)])
    async with conn.transaction(force_rollback=True):
        assert await log.trim(conn, 0, batch_size=10) == 25
        assert len((await kit.read_all(log, other))[0]) == 25
    assert await log.trim(conn, 0, batch_size=10) == 25
    assert (await kit.read_all(log, other))[0] == []


async def test_a_batch_that_ends_in_a_transaction(conn, log, kit):
    await log.append_many(conn, [("t", n) for n in range(4)])
    first = await log.read(conn, BEGINNING, limit=2)
    second = await log.read(conn, first.cursor, limit=1)
    await age(conn, 100, "id <= 2")
    assert await log.trim(conn, 50) == 2
    # Both have seen what is gone.
    assert (await kit.read_all(log, conn, first.cursor))[0] == [2, 3]
    await age(conn, 100)
    assert await log.trim(conn, 50, batch_size=1) == 2
    for cursor in (first.cursor, second.cursor, second.events[0].cursor):
        with pytest.raises(CursorExpiredError, match="trimmed"):
            await log.read(conn, cursor)
    assert (await kit.read_all(log, conn))[0] == []


@whole_and_in_partitions(1)
async def test_a_cursor_that_has_seen_all_that_goes_stays_good(conn, other, log, kit):
    """Also one from a time when a transaction was running that had nothing to do with it."""
    async with other.transaction():
        await other.execute("SELECT pg_current_xact_id()")  # unrelated, and older
        await log.append(conn, "t", 1)
        payloads, cursor = await kit.read_all(log, conn)
        assert payloads == [1]
        assert await log.trim(conn, 0) == 0  # nobody knows what the open one will append
    assert await log.trim(conn, 0) == 1
    assert (await kit.read_all(log, conn, cursor))[0] == []
    await log.append(conn, "t", 2)
    assert (await kit.read_all(log, conn, cursor))[0] == [2]


@whole_and_in_partitions(1)
async def test_a_cursor_that_has_not_expires(conn, other, log, kit):
    async with other.transaction():
        await log.append(other, "t", "late")
        await log.append(conn, "t", 1)
        _, cursor = await kit.read_all(log, conn)
    _, newer = await kit.read_all(log, conn)
    assert await log.trim(conn, 0) == 2
    for _ in range(2):  # and stays so
        with pytest.raises(CursorExpiredError, match="trimmed of events"):
            await log.read(conn, cursor)
    assert (await kit.read_all(log, conn, newer))[0] == []
    assert (await kit.read_all(log, conn))[0] == []
    await log.append(conn, "t", 2)
    assert (await kit.read_all(log, conn, newer))[0] == [2]
    with pytest.raises(CursorExpiredError):
        await log.read(conn, cursor, limit=1)


@whole_and_in_partitions(1)
async def test_an_old_cursor_of_a_quiet_log_stays_good(conn, log, kit):
    await log.append(conn, "t", 1)
    _, cursor = await kit.read_all(log, conn)
    for _ in range(50):
        await conn.execute("SELECT pg_current_xact_id()")
    assert await log.trim(conn, 0) == 1
    assert (await kit.read_all(log, conn, cursor))[0] == []


async def test_a_young_event_keeps_what_is_behind_it(conn, other, log, kit):
    """Of a transaction that began early: what is removed is always before what is kept."""
    async with other.transaction():
        await other.execute("SELECT pg_current_xact_id()")
        await log.append(conn, "t", "old")
        await age(conn, 100)
        await log.append(other, "t", "young")
    assert await log.trim(conn, 50) == 0
    await age(conn, 100)
    assert await log.trim(conn, 50) == 2


@whole_and_in_partitions(7)
async def test_little_is_remembered_of_what_was_removed(conn, log, kit):
    for n in range(50):
        await log.append(conn, "t", n)
    assert await log.trim(conn, 0, batch_size=7) == 50
    assert await kit.fetch(conn, "SELECT count(*) FROM events_trimmed") == 1


@pytest.mark.parametrize("knows", [False, True], ids=["new", "analyzed"])
async def test_reading_does_not_look_at_what_is_remembered(conn, other, log, kit, knows):
    """While a transaction stays open whatever others append has to be remembered."""
    await conn.execute("ALTER TABLE events_trimmed SET (autovacuum_enabled = false)")
    async with other.transaction():
        await other.execute("SELECT pg_current_xact_id()")
        await conn.execute(
            "DO $$ BEGIN FOR n IN 1..3000 LOOP"
            " INSERT INTO events (topic, payload) VALUES ('t', '1'); COMMIT; END LOOP; END $$"
        )
        early = await log.now(conn)  # the open one is among those that run
    cursor = await log.now(conn)
    assert await log.trim(conn, 0) == 3000
    assert await kit.fetch(conn, "SELECT count(*) FROM events_trimmed") == 3000
    if knows:
        await conn.execute("ANALYZE events_trimmed")
    await log.append_many(conn, [("t", n) for n in range(3)])
    starts = (early, cursor, BEGINNING)
    pages = [await log.read(conn, each, limit=1) for each in starts]
    for place in (early, cursor, *(each.cursor for each in pages)):
        assert (await kit.read_all(log, conn, place))[0][-1] == 2
        statement, values = log._reader.prepare(parts_of(place), topics=None, limit=1000)
        found = await conn.execute("EXPLAIN (ANALYZE, FORMAT JSON)" + statement, values)
        assert kit.looked_at(await found.fetchone(), "events_trimmed") <= 3


@whole_and_in_partitions(1)
async def test_trimming_from_the_transaction_that_appends(conn, log, kit):
    async with conn.transaction():
        await log.append(conn, "t", 1)
        assert await log.trim(conn, 0) == 0
    assert (await kit.read_all(log, conn))[0] == [1]


@whole_and_in_partitions(40)
async def test_many_trim_append_and_read_at_once(pg_dsn, conn, log, kit):
    """A reader that pages has every event, or is told; those that trim take turns."""
    received: list[int] = []
    expired = 0
    done = anyio.Event()

    async def write(first):
        async with await connect(pg_dsn) as writer:
            for n in range(60):
                async with writer.transaction():
                    await log.append_many(writer, [("t", first + 10 * n + k) for k in range(3)])

    async def trim():
        async with await connect(pg_dsn) as trimmer:
            while not done.is_set():
                await log.trim(trimmer, 0, batch_size=5)
                await anyio.lowlevel.checkpoint()

    async def read(is_stored):
        nonlocal expired
        async with await connect(pg_dsn) as reader:
            cursor, is_last = BEGINNING, False
            while True:
                try:
                    if is_stored:
                        async with reader.transaction():
                            cursor = await log.cursors.load(reader, "a")
                            page = await log.read(reader, cursor, limit=4)
                            await log.cursors.save(reader, "a", page.cursor)
                    else:
                        page = await log.read(reader, cursor, limit=4)
                except CursorExpiredError:
                    assert not is_stored
                    expired += 1
                    cursor = BEGINNING
                    continue
                cursor = page.cursor
                if is_stored:
                    received.extend(event.payload for event in page.events)
                if not page.events and is_last:
                    return
                is_last = done.is_set() and not page.events

    await log.cursors.save(conn, "a", BEGINNING)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(trim)
        tasks.start_soon(trim)
        tasks.start_soon(read, True)
        tasks.start_soon(read, False)
        async with anyio.create_task_group() as writers:
            for number in range(3):
                writers.start_soon(write, 1000 * number)
        done.set()
    # The stored one has had every event once, whatever was trimmed meanwhile.
    assert sorted(received) == sorted(
        1000 * number + 10 * n + k for number in range(3) for n in range(60) for k in range(3)
    )


@pytest.mark.parametrize("older_than", [-1, math.nan, math.inf, "1", None])
async def test_what_is_no_age(conn, log, older_than):
    with pytest.raises(ValueError, match="older_than"):
        await log.trim(conn, older_than)


@pytest.mark.parametrize("lock_timeout", [0, -1, math.nan, math.inf, 100_000, "1", None])
async def test_what_is_no_timeout(conn, log, lock_timeout):
    with pytest.raises(ValueError, match="lock_timeout"):
        await log.trim(conn, 0, lock_timeout=lock_timeout)


async def test_what_is_no_batch(conn, log):
    with pytest.raises(ValueError, match="whole number"):
        await log.trim(conn, 0, batch_size=0)


# ---------------------------------------------------------------- set back, restored


async def restore_to_a_younger_server(conn):
    """Give the events, and what was removed, transaction ids that have not begun here yet."""
    await conn.execute("UPDATE events SET xid = ((xid::text::int8) + 1000000000)::text::xid8")
    await conn.execute(
        "UPDATE events_trimmed SET xid = ((xid::text::int8) + 1000000000)::text::xid8"
    )


@whole_and_in_partitions(2)
@pytest.mark.parametrize("emptied", [False, True])
async def test_a_dump_that_was_restored_to_a_younger_server(conn, log, kit, emptied):
    """Its transaction ids mean nothing here: every reader is told, until the events are adopted."""
    await log.append_many(conn, [("t", n) for n in range(3)])
    _, seen_all = await kit.read_all(log, conn)
    await log.cursors.save(conn, "a", seen_all)
    if emptied:
        await log.trim(conn, 0)
    await restore_to_a_younger_server(conn)
    for cursor in (BEGINNING, seen_all):
        with pytest.raises(CursorExpiredError, match=r"run create\(\)"):
            await log.read(conn, cursor)
    with pytest.raises(CursorExpiredError):
        await log.now(conn)
    with kit.noted() as events:
        await log.create(conn)
        await log.create(conn)
    assert events == [("log.adopted", {"log": "events"})]
    kept = [] if emptied else [0, 1, 2]
    assert (await kit.read_all(log, conn))[0] == kept
    payloads, cursor = await kit.read_all(log, conn, limit=1)
    assert payloads == kept
    with pytest.raises(CursorExpiredError, match="created anew or restored"):
        await log.read(conn, seen_all)
    with pytest.raises(CursorExpiredError):
        await log.read(conn, await log.cursors.load(conn, "a", for_update=False))
    await log.append(conn, "t", 3)
    assert (await kit.read_all(log, conn, cursor))[0] == [3]
    # A cursor of before keeps nothing: it is of no use any more.
    assert await log.trim(conn, 0) == len(kept) + 1


@whole_and_in_partitions(1)
async def test_a_server_that_was_set_back(conn, log, kit):
    """To a backup, or a standby that was behind: the cursor has seen what is not there."""
    await log.append_many(conn, [("t", n) for n in range(3)])
    page = await log.read(conn, BEGINNING, limit=2)
    _, cursor = await kit.read_all(log, conn)
    await conn.execute("DELETE FROM events WHERE id = 3")
    for place in (cursor, page.cursor):
        with pytest.raises(CursorExpiredError, match="restored to an earlier state"):
            await log.read(conn, place)


async def test_a_server_that_was_set_back_and_statements_in_repeatable_read(pg_dsn, conn, log, kit):
    """Outside of a transaction the snapshot is no older for that: the follower was deaf."""
    await log.append_many(conn, [("t", n) for n in range(3)])
    _, cursor = await kit.read_all(log, conn)
    await conn.execute("DELETE FROM events WHERE id = 3")
    frozen = r"-c default_transaction_isolation=repeatable\ read"
    async with await connect(pg_dsn, options=frozen) as reader:
        with pytest.raises(CursorExpiredError, match="restored to an earlier state"):
            await log.read(reader, cursor)


async def test_transaction_ids_that_a_crash_takes_back(pg_cluster_private, log, kit):
    """A snapshot counts transactions as ended of which the server knows nothing after a crash.

    It gives their ids out again; what is appended under them is new to the reader all the same.
    """
    cluster = pg_cluster_private
    cluster.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
    cluster.execute("ALTER SYSTEM SET fsync = on")
    cluster.restart()
    dsn = cluster.dsn()
    async with await connect(dsn) as conn:
        await log.create(conn)
    for attempt in range(5):  # a checkpoint may come between, and write it down
        async with await connect(dsn) as conn:
            await log.append(conn, "t", "before")
            for _ in range(5):
                async with conn.transaction(force_rollback=True):  # nothing of it is written down
                    await log.append(conn, "t", "never")
            _, cursor = await kit.read_all(log, conn)
            ended = await kit.fetch(
                conn, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8"
            )
        cluster.stop("immediate")
        cluster.start()
        async with await connect(dsn) as conn:
            async with conn.transaction():
                await log.append(conn, "t", attempt)
                xid = await kit.fetch(conn, "SELECT pg_current_xact_id()::text::int8")
            assert (await kit.read_all(log, conn, cursor))[0] == [attempt]
        if xid < ended:  # the server has given it out before
            return
    raise AssertionError("no transaction id was given out again")
