"""Creating, appending and reading."""

from __future__ import annotations

import math
import pickle
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import IsolationLevel

from pgstructured import connect, open_publisher
from pgstructured.errors import CursorExpiredError, NotPrimaryError
from pgstructured.log import Cursor, Event, EventId, EventLog, Page, _appending
from pgstructured.log._cursors import parts_of
from pgstructured.testing import assert_cancellable

BEGINNING = Cursor.beginning()


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("table", "schema", "complaint"),
    [
        ("", None, "1 to 55 bytes"),
        ("x" * 56, None, "1 to 55 bytes"),
        ("ü" * 28, None, "1 to 55 bytes"),
        ("a\0b", None, "no NUL"),
        ("\ud800", None, "no valid text"),
        ("app.events", None, "schema="),
        ("events", "", "1 to 63 bytes"),
        ("events", "x" * 64, "1 to 63 bytes"),
    ],
)
def test_names_that_the_server_would_not_take(table, schema, complaint):
    with pytest.raises(ValueError, match=complaint):
        EventLog(table, schema=schema)


def test_what_is_no_name():
    with pytest.raises(TypeError, match="must be a str"):
        EventLog(7)  # type: ignore[arg-type]


def test_what_a_log_is_called():
    assert repr(EventLog()) == "<EventLog pgstructured_event>"
    assert repr(EventLog("e", schema="s").cursors) == "<CursorStore of s.e>"
    assert EventLog().channel == "pgstructured_log:pgstructured_event"
    assert EventLog("e", schema="s").channel == "pgstructured_log:s.e"
    long = {EventLog("e" * 55, schema="s" * 63).channel, EventLog("e" * 55).channel}
    assert len(long) == 2
    assert all(len(each.encode()) <= 63 for each in long)


@pytest.mark.parametrize("name", ['we"ird % name', "naïve-Δ", "%s", "x" * 55, "select", "A b"])
async def test_odd_names(pg_dsn, kit, name):
    async with await connect(pg_dsn) as conn:
        await conn.execute(psycopg.sql.SQL("CREATE SCHEMA {}").format(psycopg.sql.Identifier(name)))
        log = EventLog(name, schema=name)
        await log.create(conn)
        await log.create(conn)
        await log.append(conn, "t", 1)
        await log.append_many(conn, [("t", 2), ("t", b"3")])
        payloads, cursor = await kit.read_all(log, conn, limit=1)
        assert payloads == [1, 2, b"3"]
        async with conn.transaction():
            await log.cursors.load(conn, name)
            await log.cursors.save(conn, name, cursor)
        assert [each.name for each in await log.cursors.list(conn)] == [name]
        assert await log.trim(conn, 0) == 3
        assert await log.cursors.delete(conn, name)


# ---------------------------------------------------------------- creating


async def test_many_create_at_once(pg_dsn, log, kit):
    connections = [await connect(pg_dsn) for _ in range(8)]
    try:
        async with anyio.create_task_group() as tasks:
            for each in connections:
                tasks.start_soon(log.create, each)
        conn = connections[0]
        await log.append(conn, "t", 1)
        await log.create(conn)  # it is all there, and stays
        assert (await kit.read_all(log, conn))[0] == [1]
    finally:
        for each in connections:
            await each.aclose()


async def test_another_one_creates_meanwhile(conn, other, kit):
    new = EventLog("new")
    async with anyio.create_task_group() as tasks, other.transaction():
        await new.create(other)
        tasks.start_soon(new.create, conn)  # nothing is there yet that it could see
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        with anyio.fail_after(kit.soon):
            while not await kit.fetch(other, waiting):  # noqa: ASYNC110 - it is the server's
                await anyio.sleep(0.005)
        await new.append(other, "t", 1)
    assert (await kit.read_all(new, conn))[0] == [1]


async def test_creating_is_the_transactions(pg_dsn, log):
    async with await connect(pg_dsn) as conn:
        async with conn.transaction(force_rollback=True):
            await log.create(conn)
            await log.append(conn, "t", 1)
        with pytest.raises(psycopg.errors.UndefinedTable):
            await log.append(conn, "t", 1)
        await log.create(conn)


async def test_creating_needs_no_right_where_it_is_there(pg_dsn, conn, log, kit):
    await conn.execute("CREATE ROLE log_reader")
    try:
        await conn.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO log_reader")
        async with await connect(pg_dsn, options="-c role=log_reader") as reader:
            await log.create(reader)
            assert (await kit.read_all(log, reader))[0] == []
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await log.append(reader, "t", 1)
    finally:
        await conn.execute("DROP OWNED BY log_reader; DROP ROLE log_reader")


async def test_a_schema_that_is_missing(pg_dsn):
    async with await connect(pg_dsn) as conn:
        with pytest.raises(psycopg.errors.InvalidSchemaName):
            await EventLog("events", schema="missing").create(conn)


async def test_two_logs_are_two(conn, log, kit):
    second = EventLog("more")
    await second.create(conn)
    await log.append(conn, "t", 1)
    await second.append(conn, "t", 2)
    payloads, cursor = await kit.read_all(log, conn)
    assert payloads == [1]
    with pytest.raises(CursorExpiredError, match="of another event log"):
        await second.read(conn, cursor)


async def test_a_log_that_is_created_anew(conn, log, kit):
    await log.append(conn, "t", 1)
    _, cursor = await kit.read_all(log, conn)
    await conn.execute("DROP TABLE events, events_state, events_trimmed, events_cursor")
    await log.create(conn)
    with pytest.raises(CursorExpiredError):
        await log.read(conn, str(cursor))


async def test_a_state_that_is_gone(conn, log, kit):
    await log.append(conn, "t", 1)
    _, cursor = await kit.read_all(log, conn)
    await conn.execute("TRUNCATE events_state")
    for attempt in (
        lambda: log.read(conn, BEGINNING),
        lambda: log.now(conn),
        lambda: log.cursors.load(conn, "a", for_update=False),
        lambda: log.cursors.save(conn, "a", cursor),
        lambda: log.cursors.save(conn, "a", BEGINNING),
    ):
        with pytest.raises(CursorExpiredError, match=r"run create\(\)"):
            await attempt()
    await log.create(conn)
    assert (await kit.read_all(log, conn))[0] == [1]
    with pytest.raises(CursorExpiredError):
        await log.read(conn, cursor)


# ---------------------------------------------------------------- appending

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1.5,
    10**30,
    "",
    'quotes " and \\ and é and 𝄞',
    [],
    [1, [2, {"x": None}]],
    {},
    {"a": {"b": ["c", None]}},
    b"",
    b"\0\xff\x80 bytes",
    "x" * 3_000_000,
    bytes(range(256)) * 10_000,
)


async def test_payloads_come_as_they_were_given(conn, log, kit):
    ids = [await log.append(conn, f"topic {n}", value) for n, value in enumerate(VALUES)]
    ids += await log.append_many(conn, ((f"topic {n}", value) for n, value in enumerate(VALUES)))
    assert ids == sorted(set(ids))
    page = await log.read(conn, BEGINNING)
    assert [event.id for event in page.events] == ids
    expected = [(f"topic {n}", value) for n, value in enumerate(VALUES)] * 2
    for event, (topic, value) in zip(page.events, expected, strict=True):
        assert event.topic == topic
        assert event.payload == value
        assert type(event.payload) is type(value)


@pytest.mark.parametrize(
    "kind",
    [
        bytearray,
        memoryview,
        lambda body: memoryview(b"-".join(body[n : n + 1] for n in range(3)))[::2],
    ],
    ids=["bytearray", "memoryview", "with gaps"],
)
async def test_what_is_like_bytes(conn, log, kit, kind):
    await log.append(conn, "t", kind(b"abc"))
    await log.append_many(conn, [("t", kind(b"def"))])
    assert (await kit.read_all(log, conn))[0] == [b"abc", b"def"]


async def test_bytes_that_no_reader_could_get(conn, log, monkeypatch):
    """The server stores them, and fails whenever it is to send them: nobody would get past that."""
    monkeypatch.setattr(_appending, "MOST_BYTES", 10)
    await log.append(conn, "t", bytes(10))
    for payload in (bytes(11), bytearray(11), memoryview(bytes(22)).cast("H")):
        with pytest.raises(ValueError, match="10 bytes at most"):
            await log.append(conn, "t", payload)
        with pytest.raises(ValueError, match="10 bytes at most"):
            await log.append_many(conn, [("t", 1), ("t", payload)])
    assert len((await log.read(conn, BEGINNING)).events) == 1


@pytest.mark.parametrize("topic", [None, 7, b"t"])
async def test_what_is_no_topic(conn, log, topic):
    """Many at once were taken whatever their topics were, and these made text of."""
    with pytest.raises(TypeError, match="a topic must be a str"):
        await log.append(conn, topic, 1)
    with pytest.raises(TypeError, match="a topic must be a str"):
        await log.append_many(conn, [("t", 1), (topic, 1)])
    with pytest.raises(TypeError, match="a topic must be a str"):
        await log.read(conn, BEGINNING, topics=["t", topic])
    assert (await log.read(conn, BEGINNING)).events == []


async def test_what_is_no_payload(conn, log, kit):
    for value in (object(), {1, 2}, {"at": datetime.now(UTC)}):
        with pytest.raises(TypeError):
            await log.append(conn, "t", value)
        with pytest.raises(TypeError):
            await log.append_many(conn, [("t", 1), ("t", value)])
    with pytest.raises(psycopg.DataError):
        await log.append(conn, "t", math.nan)
    with pytest.raises(psycopg.DataError):
        await log.append(conn, "t", "a\0b")
    assert (await kit.read_all(log, conn))[0] == []


async def test_nothing_to_append(conn, log):
    assert await log.append_many(conn, []) == []
    await assert_cancellable(lambda: log.append_many(conn, []))


async def test_many_keep_their_order(conn, log, kit):
    ids = await log.append_many(conn, [("t", n) for n in range(5000)])
    assert ids == sorted(set(ids))
    assert (await kit.read_all(log, conn))[0] == list(range(5000))


async def test_a_rollback_takes_them_back(conn, other, log, kit):
    async with conn.transaction(force_rollback=True):
        await log.append(conn, "t", "gone")
    async with conn.transaction():
        await log.append(conn, "t", 1)
        async with conn.transaction(force_rollback=True):
            await log.append(conn, "t", "gone too")
        async with conn.transaction():
            await log.append(conn, "t", 2)
        assert (await kit.read_all(log, other))[0] == []
    assert (await kit.read_all(log, other))[0] == [1, 2]


async def test_a_connection_of_psycopgs_own(pg_dsn, conn, log, kit, anyio_backend_name):
    if anyio_backend_name == "trio":
        pytest.skip("psycopg's connections need asyncio")
    async with open_publisher(pg_dsn) as publisher:
        publishing = EventLog("events", publisher=publisher)
        await conn.execute(f'LISTEN "{log.channel}"')
        async with await psycopg.AsyncConnection.connect(pg_dsn) as theirs:
            await publishing.append(theirs, "t", 1)
            assert (await log.read(theirs, BEGINNING)).events == []
            await theirs.commit()
            assert [event.payload for event in (await log.read(theirs, BEGINNING)).events] == [1]
        # It can't say when it has committed, so its transaction notifies.
        assert publisher.statistics().delivered == 0
        with anyio.fail_after(kit.soon):
            async for notification in conn.notifies():
                assert notification.channel == log.channel
                break


async def test_wake_ups_after_the_commit(pg_dsn, conn, kit):
    async with open_publisher(pg_dsn, interval=0) as publisher:
        log = EventLog("events", publisher=publisher)

        def delivered():
            told = publisher.statistics()
            return told.delivered + told.pending + told.in_flight

        async with conn.transaction(force_rollback=True):
            await log.append(conn, "t", 1)
        async with conn.transaction():
            await log.append(conn, "t", 1)
            await log.append_many(conn, [("t", 2), ("t", 3)])
            assert delivered() == 0
        assert delivered() == 1
        await publisher.flush()
        await log.append(conn, "t", 4)
        assert delivered() == 2
        await publisher.flush()
    with kit.noted() as events:
        await log.append(conn, "t", 5)  # it is closed; the event is committed nevertheless
    ((name, facts),) = events
    assert (name, facts["log"]) == ("log.wake_lost", "events")
    assert isinstance(facts["error"], anyio.ClosedResourceError)
    assert (await kit.read_all(log, conn))[0] == [1, 2, 3, 4, 5]


async def test_one_wake_up_in_line_is_enough(pg_dsn, conn, kit):
    """Else a transaction with many appends fills the line, and tells of wake-ups that are lost."""
    async with open_publisher(pg_dsn, interval=60, max_pending=5) as publisher:
        log = EventLog("events", publisher=publisher)

        def crowd():
            for _ in range(5):
                publisher.publish_nowait("others")

        with kit.noted("log.wake_lost") as lost:
            async with conn.transaction():
                for n in range(10):
                    await log.append(conn, "t", n)
            await log.append(conn, "t", 10)
            assert publisher.statistics().pending == 1
            await publisher.flush()
            await log.append(conn, "t", 11)  # that one has gone: another one
            assert publisher.statistics().pending == 1
            assert lost == []
            await publisher.flush()
            async with conn.transaction():
                conn.after_commit(crowd)
                await log.append(conn, "t", 12)
        ((name, facts),) = lost
        assert name == "log.wake_lost"
        assert isinstance(facts["error"], anyio.WouldBlock)
    assert publisher.statistics().delivered == 7


# ---------------------------------------------------------------- events


async def test_an_event(conn, log, kit):
    before = await kit.fetch(conn, "SELECT clock_timestamp()")
    event_id = await log.append(conn, "orders", {"id": 42})
    page = await log.read(conn, BEGINNING)
    (event,) = page.events
    assert isinstance(page, Page)
    assert isinstance(event, Event)
    assert (event.id, event.topic, event.payload) == (event_id, "orders", {"id": 42})
    assert timedelta(0) <= event.appended_at - before < timedelta(seconds=kit.soon)
    (again,) = (await log.read(conn, BEGINNING)).events
    assert again == event
    assert hash(again) == hash(event)
    assert event != (await log.append(conn, "orders", 1))
    assert "orders" in repr(event)
    assert str(event.cursor) in repr(event)
    assert pickle.loads(pickle.dumps(event)) == event
    with pytest.raises(AttributeError):
        event.topic = "another"  # type: ignore[misc]


def test_an_event_of_a_programs_own():
    at = datetime(2026, 11, 22, tzinfo=UTC)
    event = Event(id=EventId(7), topic="t", payload=[1], appended_at=at, cursor=BEGINNING)
    assert (event.id, event.topic, event.payload, event.appended_at) == (7, "t", [1], at)
    assert event.cursor == BEGINNING


async def test_an_event_of_a_programs_own_is_equal_to_one_that_was_read(conn, log):
    await log.append_many(conn, [("t", payload) for payload in (b"x", b"", "x", None)])
    for event in (await log.read(conn, BEGINNING)).events:
        own = Event(
            id=event.id,
            topic=event.topic,
            payload=event.payload,
            appended_at=event.appended_at,
            cursor=event.cursor,
        )
        assert own == event
        assert hash(own) == hash(event)
        assert own.payload == event.payload


async def test_each_events_cursor_resumes_after_it(conn, other, log):
    """Also in the middle of a page, of a transaction, and where others come late."""
    async with conn.transaction():
        await log.append_many(conn, [("t", "late 1"), ("t", "late 2")])
        await log.append_many(other, [("t", n) for n in range(4)])
        seen = (await log.read(other, BEGINNING)).cursor
    await log.append_many(other, [("t", n) for n in range(4, 7)])
    for start in (BEGINNING, seen):
        page = await log.read(other, start)
        payloads = [event.payload for event in page.events]
        assert sorted(map(str, payloads)) == sorted(map(str, dict.fromkeys(payloads)))
        for index, event in enumerate(page.events):
            for limit in (1, 2, 1000):
                rest, cursor = [], event.cursor
                while True:
                    following = await log.read(other, str(cursor), limit=limit)
                    if not following.events:
                        break
                    rest += [each.payload for each in following.events]
                    cursor = following.cursor
                assert rest == payloads[index + 1 :]
    # Who had seen the others gets the late ones first: they were appended first.
    assert payloads == ["late 1", "late 2", 4, 5, 6]


# ---------------------------------------------------------------- reading


async def test_an_empty_page_means_caught_up(conn, log):
    page = await log.read(conn, BEGINNING)
    assert page.events == []
    await log.append_many(conn, [("t", n) for n in range(4)])
    cursor = page.cursor
    sizes: list[int] = []
    while page.events or not sizes:
        page = await log.read(conn, cursor, limit=2)
        cursor = page.cursor
        sizes.append(len(page.events))
        if len(sizes) == 2:  # the snapshot is done, which the reader can't know, and there is more
            await log.append(conn, "t", 4)
    assert sizes == [2, 2, 1, 0]


async def test_now_has_seen_what_is_committed_and_nothing_else(conn, other, log, kit):
    await log.append(conn, "t", "before")
    async with conn.transaction():
        await log.append(conn, "t", "open")
        cursor = await log.now(other)
        own = await log.now(conn)
    await log.append(conn, "t", "after")
    assert (await kit.read_all(log, other, cursor))[0] == ["open", "after"]
    assert (await kit.read_all(log, other, own))[0] == ["open", "after"]


async def test_a_slower_transaction_comes_when_it_commits(conn, other, log, kit):
    """The reason for all this: its ids are below what the reader has seen."""
    async with conn.transaction():
        await log.append(conn, "t", "slow")
        await log.append(other, "t", "fast")
        payloads, cursor = await kit.read_all(log, other)
        assert payloads == ["fast"]
        await log.append(other, "t", "fast again")
        payloads, cursor = await kit.read_all(log, other, cursor)
        assert payloads == ["fast again"]
    payloads, cursor = await kit.read_all(log, other, cursor)
    assert payloads == ["slow"]
    assert (await kit.read_all(log, other, cursor))[0] == []
    assert (await kit.read_all(log, other))[0] == ["slow", "fast", "fast again"]


async def test_an_unrelated_transaction_delays_nothing(conn, other, log, kit):
    await conn.execute("CREATE TABLE unrelated (n int)")
    _, cursor = await kit.read_all(log, other)
    async with conn.transaction():
        await conn.execute("INSERT INTO unrelated VALUES (1)")
        for n in range(3):
            await log.append(other, "t", n)
            payloads, cursor = await kit.read_all(log, other, cursor)
            assert payloads == [n]


async def test_who_waited_for_a_lock_comes_after_who_had_it(conn, other, log, kit):
    """Though its transaction is the older one."""
    await conn.execute("CREATE TABLE account (n int)")
    await conn.execute("INSERT INTO account VALUES (0)")
    await conn.execute("CREATE TABLE audit (n int)")

    async def withdraw():
        async with conn.transaction():
            await conn.execute("INSERT INTO audit VALUES (1)")  # it has its transaction id now
            audited.set()
            await deposited.wait()
            await conn.execute("UPDATE account SET n = n - 1")
            await log.append(conn, "t", "withdrawn")

    audited, deposited = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(withdraw)
        await audited.wait()
        async with other.transaction():
            await other.execute("UPDATE account SET n = n + 1")
            deposited.set()
            await log.append(other, "t", "deposited")
    assert (await kit.read_all(log, conn))[0] == ["deposited", "withdrawn"]


async def test_ones_own_transaction_has_not_seen_its_events(conn, other, log, kit):
    """It may go on appending; in the server's own snapshot they would count as seen."""
    _, cursor = await kit.read_all(log, conn)
    async with conn.transaction():
        await log.append(conn, "t", 1)
        await log.append(other, "t", "other")  # a greater transaction id, which has ended
        assert (await kit.read_all(log, conn))[0] == ["other"]
        payloads, within = await kit.read_all(log, conn, cursor)
        assert payloads == ["other"]
        await log.append(conn, "t", 2)
        payloads, within = await kit.read_all(log, conn, within, limit=1)
        assert payloads == []
    assert (await kit.read_all(log, conn, within))[0] == [1, 2]


async def test_savepoints_are_of_their_transaction(conn, other, log, kit):
    async with conn.transaction():
        await log.append(conn, "t", 1)
        async with conn.transaction():
            await log.append(conn, "t", 2)
            _, cursor = await kit.read_all(log, other)
            async with conn.transaction():
                await log.append(conn, "t", 3)
        _, cursor = await kit.read_all(log, other, cursor)
    assert (await kit.read_all(log, other, cursor))[0] == [1, 2, 3]


async def test_topics(conn, other, log, kit):
    async with other.transaction():
        await log.append_many(other, [("a", "late"), ("b", "late")])
        await log.append_many(conn, [("a", 1), ("b", 2), ("c", 3), ("a", 4)])
        payloads, cursor = await kit.read_all(log, conn, topics=["a", "c"], limit=1)
        assert payloads == [1, 3, 4]
    assert (await kit.read_all(log, conn, cursor, topics={"b"}))[0] == ["late"]
    assert (await kit.read_all(log, conn, cursor, topics=("a",), limit=1))[0] == ["late"]
    assert (await kit.read_all(log, conn, cursor))[0] == ["late", "late"]
    assert (await kit.read_all(log, conn, topics=["none"]))[0] == []


async def test_arguments_that_can_not_be(conn, log):
    for limit in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="whole number"):
            await log.read(conn, BEGINNING, limit=limit)
    with pytest.raises(TypeError, match="collection of topics"):
        await log.read(conn, BEGINNING, topics="orders")
    with pytest.raises(TypeError, match="a topic must be a str, not int"):
        await log.read(conn, BEGINNING, topics=b"orders")
    with pytest.raises(ValueError, match="at least one"):
        await log.read(conn, BEGINNING, topics=[])
    with pytest.raises(ValueError, match="not the text of"):
        await log.read(conn, "nonsense")
    with pytest.raises(TypeError):
        await log.read(conn, None)


async def test_row_factories_and_autocommit_are_the_callers(pg_dsn, conn, log, kit):
    async with await connect(
        pg_dsn, row_factory=psycopg.rows.dict_row, autocommit=False
    ) as strange:
        await log.create(strange)
        await log.append(strange, "t", 1)
        await log.append_many(strange, [("t", 2)])
        await strange.commit()
        assert (await kit.read_all(log, strange))[0] == [1, 2]
        await strange.rollback()
        assert await log.cursors.load(strange, "a") == Cursor.parse(
            str(await log.cursors.load(strange, "a"))
        )
        assert [each.name for each in await log.cursors.list(strange)] == ["a"]
        await strange.rollback()
        assert await log.trim(strange, 0) == 2


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
async def test_a_frozen_snapshot(conn, other, log, kit, level):
    """It sees what it saw first, whatever cursors are read from; nothing is skipped by it."""
    await conn.execute("CREATE TABLE unrelated (n int)")
    await log.append_many(other, [("t", n) for n in range(4)])
    _, early = await kit.read_all(log, other)
    await conn.set_isolation_level(level)
    async with conn.transaction():
        assert (await kit.read_all(log, conn))[0] == [0, 1, 2, 3]
        await log.append_many(other, [("t", n) for n in range(4, 8)])
        page = await log.read(other, early, limit=2)  # in the middle of what it can't see
        later = await log.now(other)
        for cursor in (early, page.cursor, later):
            frozen = await log.read(conn, cursor)
            assert frozen.events == []
            if cursor != early:
                assert frozen.cursor == cursor
        _, after = await kit.read_all(log, conn, early, limit=1)
        # What it has read before goes on page by page.
        assert (await kit.read_all(log, conn, limit=3))[0] == [0, 1, 2, 3]
    assert (await kit.read_all(log, other, after))[0] == [4, 5, 6, 7]
    assert (await kit.read_all(log, other, page.cursor))[0] == [6, 7]


async def test_prepared_transactions(pg_cluster_private, kit):
    cluster = pg_cluster_private
    with cluster.connect() as admin:
        admin.autocommit = True
        admin.execute("ALTER SYSTEM SET max_prepared_transactions = 5")
    cluster.restart()
    log = EventLog()
    async with await connect(cluster.dsn()) as conn:
        await log.create(conn)
        await conn.execute("BEGIN")
        await log.cursors.load(conn, "a")
        await log.append(conn, "t", "first")
        # A transaction that notifies can't be prepared; a trigger, say, only inserts.
        await conn.execute("ROLLBACK")
        await conn.execute("BEGIN")
        await conn.execute("INSERT INTO pgstructured_event (topic, payload) VALUES ('t', '1')")
        await conn.execute("PREPARE TRANSACTION 'p'")
        await log.append(conn, "t", 2)
        payloads, cursor = await kit.read_all(log, conn)
        assert payloads == [2]
        assert await log.trim(conn, 0) == 0  # it began before
        await conn.execute("COMMIT PREPARED 'p'")
        assert (await kit.read_all(log, conn, cursor))[0] == [1]
        assert await log.trim(conn, 0) == 2


async def test_a_standby(pg_cluster_private, kit):
    """It does not know which transactions are running, and so would skip some."""
    log = EventLog()
    with pg_cluster_private.standby() as standby:
        async with await connect(pg_cluster_private.dsn()) as conn:
            await log.create(conn)
            await log.append(conn, "t", 1)
            _, cursor = await kit.read_all(log, conn)
        async with await connect(standby.dsn()) as reader:

            async def is_there():
                try:
                    return await kit.fetch(reader, "SELECT count(*) FROM pgstructured_event") == 1
                except psycopg.errors.UndefinedTable:
                    return False

            with anyio.fail_after(kit.soon):
                while not await is_there():  # noqa: ASYNC110 - it is the server's
                    await anyio.sleep(0.01)
            for place in (BEGINNING, cursor):
                with pytest.raises(NotPrimaryError):
                    await log.read(reader, place)
            with pytest.raises(NotPrimaryError):
                await log.now(reader)
            pg_cluster_private.stop()
            standby.promote()
            # What was there has been seen; what comes has not.
            assert (await kit.read_all(log, reader))[0] == [1]
            await log.append(reader, "t", 2)
            assert (await kit.read_all(log, reader, cursor))[0] == [2]


@pytest.mark.parametrize("knows", [False, True], ids=["new", "analyzed"])
async def test_reading_does_not_look_at_what_was_seen(pg_dsn, conn, other, log, kit, knows):
    """Also where the planner knows nothing about the table, and a transaction stays open."""
    await conn.execute("ALTER TABLE events SET (autovacuum_enabled = false)")
    async with await connect(pg_dsn) as slow, slow.transaction():
        await log.append(slow, "t", "slow")
        insert = (
            "INSERT INTO events (topic, payload)"
            " SELECT 't', to_jsonb(n) FROM generate_series(1, 30000) AS n"
        )
        await conn.execute(insert)
        cursor = await log.now(conn)
        async with other.transaction():
            await log.append(other, "t", "late")
            await log.append(conn, "t", "new")
            page = await log.read(conn, cursor, limit=1)
    if knows:
        await conn.execute("ANALYZE events")
    for place in (cursor, page.cursor, page.events[0].cursor):
        statement, values = log._reader.prepare(parts_of(place), topics=None, limit=1000)
        found = await conn.execute("EXPLAIN (ANALYZE, FORMAT JSON)" + statement, values)
        assert 0 < kit.looked_at(await found.fetchone(), "events") < 20
