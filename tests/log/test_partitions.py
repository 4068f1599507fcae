"""Partitions: made ahead, dropped as a whole, and in nobody's way."""

from __future__ import annotations

from functools import partial

import anyio
import psycopg
import pytest
from psycopg import IsolationLevel

from pgstructured import connect, open_notify_bus, open_pool
from pgstructured.errors import CursorExpiredError
from pgstructured.log import Cursor, EventLog
from pgstructured.log._cursors import parts_of
from pgstructured.testing import assert_cancellable

BEGINNING = Cursor.beginning()
SIZE = 4
BRIEF = 0.001
"""Seconds for a lock that can't be had."""


@pytest.fixture
async def conn(pg_dsn, log):
    """A session; the log is created with partitions."""
    async with await connect(pg_dsn) as conn:
        await log.create(conn, partition_size=SIZE)
        yield conn


async def bounds(conn, table="events"):
    """Return where partitions begin; and see that there is no gap, and no end."""
    found = await conn.execute(
        "SELECT pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits AS i"
        " JOIN pg_class AS c ON c.oid = i.inhrelid WHERE i.inhparent = %s::regclass",
        (f'"{table}"',),
    )
    pairs = []
    for (bound,) in await found.fetchall():
        _, first, _, end, _ = bound.replace("(MAXVALUE)", "('0')").split("'")
        pairs.append((int(first), int(end)))
    pairs.sort()
    assert [end for _, end in pairs] == [*(first for first, _ in pairs[1:]), 0]
    return [first for first, _ in pairs]


async def append(log, conn, count):
    return await log.append_many(conn, [("t", n) for n in range(count)])


async def age(conn, seconds, where="true"):
    await conn.execute(
        psycopg.sql.SQL(
            "UPDATE events SET appended_at = appended_at - make_interval(secs => {}) WHERE "
        ).format(seconds)
        + psycopg.sql.SQL(where)
    )


def left(reason):
    return ("log.partitions_left", {"log": "events", "reason": reason})


async def waits_for_the_table(conn, kit):
    query = (
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation ="
        " (SELECT oid FROM pg_class WHERE relname = 'events')"
    )
    with anyio.fail_after(kit.soon):
        while not await kit.fetch(conn, query):  # noqa: ASYNC110 - it is the server's
            await anyio.sleep(0.005)


# ---------------------------------------------------------------- creating


@pytest.mark.parametrize("size", [0, -1, 1.5, "1000", True, 10**12 + 1])
async def test_what_is_no_size(conn, log, size):
    with pytest.raises(ValueError, match="partition_size must be a whole number"):
        await log.create(conn, partition_size=size)


async def test_created_once(conn, log, kit):
    assert await bounds(conn) == [1, 5, 9, 13]
    await append(log, conn, 3)
    await log.create(conn, partition_size=SIZE)
    await log.create(conn)
    assert await bounds(conn) == [1, 5, 9, 13]
    assert (await kit.read_all(log, conn))[0] == [0, 1, 2]


async def test_a_log_is_not_converted(conn, log):
    with pytest.raises(ValueError, match="partition_size=4, and keeps it: 5"):
        await log.create(conn, partition_size=5)
    whole = EventLog("whole")
    await whole.create(conn)
    with pytest.raises(ValueError, match="without partitions"):
        await whole.create(conn, partition_size=SIZE)
    await conn.execute("DROP TABLE whole_state")  # a part of it is made anew
    with pytest.raises(ValueError, match="without partitions"):
        await whole.create(conn, partition_size=SIZE)
    await whole.create(conn)
    assert await kit_tables(conn, "whole") == 4
    await conn.execute("DROP TABLE events_state")
    await log.create(conn, partition_size=SIZE)
    assert await bounds(conn) == [1, 5, 9, 13]


async def kit_tables(conn, name):
    found = await conn.execute(
        "SELECT count(*) FROM pg_tables WHERE tablename LIKE %s", (name + "%",)
    )
    (count,) = await found.fetchone()
    return count


async def test_many_create_at_once(pg_dsn, conn):
    new = EventLog("new")
    connections = [await connect(pg_dsn) for _ in range(5)]
    try:
        async with anyio.create_task_group() as tasks:
            for each in connections:
                tasks.start_soon(partial(new.create, each, partition_size=10))
    finally:
        for each in connections:
            await each.aclose()
    assert await bounds(conn, "new") == [1, 11, 21, 31]


@pytest.mark.parametrize("name", ["we\"ird %s {0} '\\", "naïve-Δ", "x" * 55, "ü" * 27, "A b"])
async def test_odd_names(pg_dsn, kit, name):
    async with await connect(pg_dsn) as conn:
        await conn.execute(psycopg.sql.SQL("CREATE SCHEMA {}").format(psycopg.sql.Identifier(name)))
        log = EventLog(name, schema=name)
        await log.create(conn, partition_size=3)
        await log.create(conn, partition_size=3)
        await append(log, conn, 20)
        payloads, cursor = await kit.read_all(log, conn, limit=7)
        assert payloads == list(range(20))
        assert await log.trim(conn, 0, expire_cursors=True) == 20
        assert (await kit.read_all(log, conn, cursor))[0] == []


async def test_names_that_would_be_too_long(pg_dsn, kit):
    async with await connect(pg_dsn) as conn:
        logs = [EventLog("x" * 55), EventLog("x" * 54 + "y")]
        for each in logs:
            await each.create(conn, partition_size=10**12)
            assert await bounds(conn, repr(each)[10:-1]) == [1 + n * 10**12 for n in range(4)]
            await append(each, conn, 2)
            assert await each.trim(conn, 0) == 2


async def test_partitions_are_where_their_table_is(pg_dsn, kit):
    """Not where the path would have them."""
    async with await connect(pg_dsn) as conn:
        await conn.execute("CREATE SCHEMA app")
        await EventLog("events", schema="app").create(conn, partition_size=3)
        await conn.execute("SET search_path = public, app")
        log = EventLog("events")
        await append(log, conn, 20)
        assert await log.trim(conn, 0) == 20
        assert await bounds(conn) == [10, 22, 25, 28]
        assert (
            await kit.fetch(conn, "SELECT count(*) FROM pg_tables WHERE schemaname='public'") == 0
        )


async def test_created_anew(conn, log, kit):
    await append(log, conn, 20)
    _, cursor = await kit.read_all(log, conn)
    await conn.execute("DROP TABLE events, events_state, events_trimmed, events_cursor")
    await log.create(conn, partition_size=SIZE)
    with pytest.raises(CursorExpiredError):
        await log.read(conn, cursor)
    assert await append(log, conn, 2) == [1, 2]


# ---------------------------------------------------------------- dropping


async def test_what_is_old_is_dropped(conn, log, kit):
    await append(log, conn, 6)
    early = await log.now(conn)
    await append(log, conn, 5)
    late = await log.now(conn)
    await age(conn, 100)
    await append(log, conn, 1)
    assert await log.trim(conn, 200) == 0
    with kit.noted() as events:
        # Those that are old in the third one wait for the young one with them.
        assert await log.trim(conn, 50) == 8
        assert await log.trim(conn, 50) == 0
    assert events == [("log.trimmed", {"log": "events", "count": 8})]
    assert await bounds(conn) == [9, 13, 17, 21]
    assert (await kit.read_all(log, conn))[0] == [2, 3, 4, 0]
    payloads, cursor = await kit.read_all(log, conn, late)
    assert payloads == [0]
    with pytest.raises(CursorExpiredError, match="trimmed"):
        await log.read(conn, early)
    # Nothing comes any more: all that is old goes.
    await age(conn, 100)
    assert await log.trim(conn, 50) == 4
    assert (await kit.read_all(log, conn, cursor))[0] == []
    with pytest.raises(CursorExpiredError, match="trimmed"):
        await log.read(conn, late)


async def test_a_partition_without_events(conn, log, kit):
    async with conn.transaction(force_rollback=True):
        await append(log, conn, 10)
    cursor = await log.now(conn)
    assert await log.trim(conn, 50) == 0
    assert await bounds(conn) == [9, 13, 17, 21]
    await append(log, conn, 3)
    assert (await kit.read_all(log, conn, cursor))[0] == [0, 1, 2]


async def test_an_old_event_behind_a_young_one(conn, log, kit):
    """The last of a partition is old; one before it is not."""
    await append(log, conn, 6)
    await age(conn, 100, "id <> 2")
    assert await log.trim(conn, 50) == 0
    await age(conn, 100, "id = 2")
    assert await log.trim(conn, 50) == 6


async def test_what_stored_cursors_have_not_seen(conn, log, kit):
    await append(log, conn, 10)
    page = await log.read(conn, BEGINNING, limit=5)
    await log.cursors.save(conn, "slow", page.cursor)
    await log.cursors.save(conn, "quick", await log.now(conn))
    assert await log.trim(conn, 0) == 4
    assert await log.trim(conn, 0) == 0
    slow = await log.cursors.load(conn, "slow", for_update=False)
    assert (await kit.read_all(log, conn, slow))[0] == [5, 6, 7, 8, 9]
    with kit.noted() as events:
        assert await log.trim(conn, 0, expire_cursors=True) == 6
    assert events == [
        ("log.trimmed", {"log": "events", "count": 6}),
        ("log.cursors_expired", {"log": "events", "names": ["slow"]}),
    ]
    with pytest.raises(CursorExpiredError):
        await log.read(conn, slow)
    quick = await log.cursors.load(conn, "quick", for_update=False)
    assert (await kit.read_all(log, conn, quick))[0] == []


async def test_in_a_transaction(conn, other, log, kit):
    """It is the caller's, with its settings."""
    await append(log, conn, 10)
    await conn.execute("SET lock_timeout = '7s'")
    async with conn.transaction(force_rollback=True):
        assert await log.trim(conn, 0) == 10
        assert await kit.fetch(conn, "SHOW lock_timeout") == "7s"
    assert await bounds(conn) == [1, 5, 9, 13]
    assert len((await kit.read_all(log, other))[0]) == 10
    async with conn.transaction():
        assert await log.trim(conn, 0) == 10
    assert await kit.fetch(conn, "SHOW lock_timeout") == "7s"
    assert (await kit.read_all(log, other))[0] == []


async def test_without_autocommit(pg_dsn, conn, log, kit):
    await append(log, conn, 10)
    async with await connect(pg_dsn, autocommit=False) as strange:
        assert await log.trim(strange, 0) == 10
        assert strange.info.transaction_status.name == "IDLE"
    assert (await kit.read_all(log, conn))[0] == []


# ---------------------------------------------------------------- the last one


async def test_nobody_looks_after_it(conn, other, log, kit):
    """Appending goes on in the last one, which is given an end when somebody does."""
    await append(log, conn, 30)
    await append(log, conn, 3)
    assert await bounds(conn) == [1, 5, 9, 13]
    await age(conn, 100)
    await append(log, conn, 1)
    assert await log.trim(conn, 50) == 12
    assert await bounds(conn) == [13, 37, 41, 45]
    await append(log, conn, 3)
    assert await bounds(conn) == [13, 37, 41, 45]
    _, cursor = await kit.read_all(log, conn)
    await age(conn, 100)
    await append(log, conn, 1)
    assert await log.trim(conn, 50) == 24
    assert (await kit.read_all(log, conn, cursor))[0] == [0]


async def test_so_much_that_looking_through_it_would_take_long(conn, log, kit):
    await append(log, conn, 20_000)
    await age(conn, 100)
    await append(log, conn, 1)
    with kit.noted() as events:
        assert await log.trim(conn, 50, lock_timeout=BRIEF) == 8
    assert events == [left("size"), ("log.trimmed", {"log": "events", "count": 8})]
    assert await bounds(conn) == [9, 13]
    with kit.noted() as events:
        assert await log.trim(conn, 50, lock_timeout=kit.soon) == 4
    assert events == [("log.trimmed", {"log": "events", "count": 4})]
    assert await bounds(conn) == [13, 20_005, 20_009, 20_013]
    await append(log, conn, SIZE)
    await age(conn, 100, f"id < {20_005}")
    assert await log.trim(conn, 50, lock_timeout=kit.soon) == 20_004 - 12


async def test_all_is_old_and_in_the_last_one(conn, log, kit):
    """Where it can't be given an end it goes by rows."""
    await append(log, conn, 20_000)
    assert await log.trim(conn, 0, lock_timeout=BRIEF) == 20_000
    assert await bounds(conn) == [9, 13]


async def test_partitions_that_were_dropped_by_hand(conn, log, kit):
    """How many ids they have is not known any more; what is old goes by rows."""
    await append(log, conn, 20)
    await conn.execute("DROP TABLE events_p1, events_p5, events_p9")
    assert await log.trim(conn, 0) == 8
    with pytest.raises(ValueError, match="without partitions"):
        await log.create(conn, partition_size=SIZE)


async def test_tables_that_are_not_ours(conn, log, kit):
    await conn.execute("CREATE TABLE mine PARTITION OF events DEFAULT")
    await append(log, conn, 8)
    assert await log.trim(conn, 0) == 8
    assert await kit.fetch(conn, "SELECT count(*) FROM pg_tables WHERE tablename = 'mine'") == 1


async def test_a_state_that_is_gone(conn, log, kit):
    await append(log, conn, 10)
    await conn.execute("TRUNCATE events_state")
    assert await log.trim(conn, 50) == 0
    await log.create(conn, partition_size=SIZE)
    assert len((await kit.read_all(log, conn))[0]) == 10


# ---------------------------------------------------------------- others at the table


async def test_the_lock_can_not_be_had(conn, other, log, kit):
    """It is left, told, and done the next time; nobody waits for long."""
    await append(log, conn, 10)
    async with other.transaction():
        await log.read(other, BEGINNING)
        with kit.noted() as events:
            assert await log.trim(conn, 0, lock_timeout=BRIEF) == 0
        assert events == [left("lock")]
        await append(log, conn, 1)
    assert await log.trim(conn, 50) == 0
    async with other.transaction():
        await log.read(other, BEGINNING)
        with kit.noted() as events:
            assert await log.trim(conn, 0, lock_timeout=BRIEF) == 0  # here for dropping
        assert events == [left("lock")]
    assert await log.trim(conn, 0) == 11


async def test_ones_own_cursor_is_open(conn, log, kit):
    await append(log, conn, 5)
    async with conn.transaction():
        await conn.execute("DECLARE mine CURSOR FOR SELECT * FROM events_p1")
        await conn.execute("FETCH mine")
        with kit.noted() as events:
            assert await log.trim(conn, 0) == 0
        assert events[-1] == left("lock")
    assert await log.trim(conn, 0) == 5


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
async def test_an_appender_with_a_small_id_is_waited_for(conn, other, log, kit, outcome, pg_dsn):
    """It had its id before the partition was looked at, and commits after that."""
    await log.append(conn, "t", "first")
    trimmed = []

    async def trim():
        trimmed.append(await log.trim(conn, 0, lock_timeout=kit.soon))

    async with (
        await connect(pg_dsn) as third,
        anyio.create_task_group() as tasks,
        other.transaction(force_rollback=outcome == "rollback"),
    ):
        await log.append(other, "t", "slow")
        async with conn.transaction(force_rollback=True):
            await append(log, conn, 2)
        assert await bounds(conn) == [1, 5, 9, 13]
        tasks.start_soon(trim)
        await waits_for_the_table(third, kit)
    payloads, _ = await kit.read_all(log, conn)
    if outcome == "commit":
        assert trimmed == [0]
        assert payloads == ["first", "slow"]
    else:
        assert trimmed == [1]
        assert payloads == []


async def test_a_cursor_that_is_stored_meanwhile(conn, other, log, kit, pg_dsn):
    await append(log, conn, 10)
    assert await log.trim(conn, 50) == 0
    cursor = (await log.read(conn, BEGINNING, limit=1)).cursor

    async def trim():
        assert await log.trim(conn, 0, lock_timeout=kit.soon) == 0

    async with await connect(pg_dsn) as third, anyio.create_task_group() as tasks:
        async with other.transaction():
            await log.read(other, BEGINNING)
            tasks.start_soon(trim)
            await waits_for_the_table(third, kit)
            await log.cursors.save(third, "a", cursor)
    assert len((await kit.read_all(log, conn, cursor))[0]) == 9
    assert await log.trim(conn, 0) == 0


async def test_a_transaction_that_does_not_see_what_others_do_drops_nothing(conn, other, log, kit):
    await append(log, conn, 10)
    await other.set_isolation_level(IsolationLevel.REPEATABLE_READ)
    with kit.noted() as events:
        assert await log.trim(other, 0) == 0
    assert events == [left("isolation")]


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
async def test_a_reader_with_an_older_snapshot_is_told(conn, other, log, kit, level):
    """For it the partitions are gone as well, and what says so can't be seen."""
    await append(log, conn, 10)
    await log.trim(conn, 50)
    cursor = (await log.read(conn, BEGINNING, limit=1)).cursor
    await other.set_isolation_level(level)
    with pytest.raises(psycopg.errors.SerializationFailure, match="were dropped"):
        async with other.transaction():
            await other.execute("SELECT 1")
            assert await log.trim(conn, 0) == 10
            await log.read(other, cursor)
    async with other.transaction():
        with pytest.raises(CursorExpiredError):
            await log.read(other, cursor)


@pytest.mark.parametrize(
    ("level", "error"),
    [
        ("read committed", CursorExpiredError),
        ("repeatable read", psycopg.errors.SerializationFailure),
    ],
)
async def test_a_reader_that_waits_for_the_drop_is_told(conn, other, log, kit, level, error):
    """Its statement had begun before."""
    await append(log, conn, 10)
    await log.trim(conn, 50)
    cursor = (await log.read(conn, BEGINNING, limit=1)).cursor
    await other.execute(f"SET default_transaction_isolation = '{level}'")
    told = []

    async def read():
        with pytest.raises(error):
            await log.read(other, cursor)
        told.append(error)

    async with anyio.create_task_group() as tasks:
        async with conn.transaction():
            assert await log.trim(conn, 0) == 10
            tasks.start_soon(read)
            await waits_for_the_table(conn, kit)
    assert told == [error]
    await append(log, conn, 1)
    assert (await kit.read_all(log, other))[0] == [0]


async def test_partitions_made_are_no_matter_to_an_older_snapshot(conn, other, log, kit):
    await append(log, conn, 3)
    await other.set_isolation_level(IsolationLevel.REPEATABLE_READ)
    async with other.transaction():
        await other.execute("SELECT 1")
        await append(log, conn, 3)
        assert await log.trim(conn, 50) == 0
        assert await bounds(conn) == [1, 5, 9, 13, 17]
        assert (await kit.read_all(log, other))[0] == [0, 1, 2]


# ---------------------------------------------------------------- reading


async def test_reading_by_ids_looks_at_no_more_partitions_than_it_needs(conn, log):
    for _ in range(5):
        await append(log, conn, SIZE)
        await log.trim(conn, 50)
    assert len(await bounds(conn)) == 8
    statement, values = log._reader.prepare(parts_of(BEGINNING), topics=None, limit=SIZE)
    found = await conn.execute("EXPLAIN (ANALYZE, FORMAT JSON)" + statement, values)
    ((plan,),) = await found.fetchall()
    members = plan[0]["Plan"]["Plans"]
    (limit,) = [each for each in members if each.get("Parent Relationship") == "Member"][-1:]
    while limit["Node Type"] != "Append":
        (limit,) = limit["Plans"]
    looked_at = [each["Alias"] for each in limit["Plans"] if each["Actual Loops"]]
    assert looked_at == ["events_1"]


async def test_following_while_partitions_come_and_go(pg_dsn, conn, log, kit):
    async with (
        open_notify_bus(pg_dsn) as bus,
        open_pool(pg_dsn, max_size=1) as pool,
        log.follow(bus, pool, BEGINNING, limit=3) as following,
    ):
        for _ in range(8):
            await append(log, conn, 5)
            assert await kit.take(following, 5) == [0, 1, 2, 3, 4]
            await log.trim(conn, 0, lock_timeout=kit.soon)
    assert (await bounds(conn))[0] > 5 * SIZE


# ---------------------------------------------------------------- cancellation


async def test_a_pending_cancellation_is_noticed(conn, log):
    await append(log, conn, 10)
    for use in (
        lambda: log.create(conn, partition_size=SIZE),
        lambda: log.trim(conn, 0),
    ):
        await assert_cancellable(use)
        assert conn.info.transaction_status.name == "IDLE"
    assert len((await log.read(conn, BEGINNING)).events) == 10


@pytest.mark.parametrize("use", ["create", "trim"])
async def test_cancelled_at_every_await(conn, other, log, kit, use):
    """The connection is as usable as before; what was to be done is done, or is not."""
    new = EventLog("new")

    async def do():
        if use == "trim":
            await log.trim(conn, 0, expire_cursors=True)
        else:
            await new.create(conn, partition_size=SIZE)

    number, is_over = 0, False
    while not is_over:
        assert number < 400
        await other.execute("DROP TABLE IF EXISTS new, new_state, new_trimmed, new_cursor")
        if use == "trim":
            await other.execute("DROP TABLE events, events_state, events_trimmed, events_cursor")
            await log.create(other, partition_size=SIZE)
            await append(log, other, 6)
        with anyio.fail_after(kit.soon), anyio.CancelScope() as scope:
            await kit.cancel_at(do(), scope, number)
        is_over = not scope.cancel_called
        assert conn.info.transaction_status.name == "IDLE"
        if use == "trim":
            assert (await kit.read_all(log, conn))[0] in ([0, 1, 2, 3, 4, 5], [4, 5], [])
            await bounds(conn)
            await log.trim(conn, 0)
            assert (await kit.read_all(log, conn))[0] == []
        else:
            assert await kit_tables(other, "new") in (0, 8)
            await new.create(conn, partition_size=SIZE)
        number += 1
    assert number
