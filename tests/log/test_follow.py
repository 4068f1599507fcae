"""Following: at once, from anywhere, and through whatever breaks."""

from __future__ import annotations

import math
from contextlib import nullcontext

import anyio
import psycopg
import pytest

from pgstructured import connect, open_notify_bus, open_pool, open_publisher
from pgstructured.errors import (
    BusUnavailableError,
    CursorExpiredError,
    NotPrimaryError,
    PoolClosedError,
    PoolNestedAcquireError,
    PoolTimeoutError,
    TooManyWaitingError,
)
from pgstructured.log import Cursor, EventLog, Following, WakeUps, _following
from pgstructured.testing import assert_cancellable

BEGINNING = Cursor.beginning()


@pytest.fixture
async def bus(pg_dsn, conn, kit):
    async with open_notify_bus(pg_dsn, backoff=kit.quick) as bus:
        yield bus


@pytest.fixture
async def pool(pg_dsn, conn):
    async with open_pool(pg_dsn, max_size=2) as pool:
        yield pool


async def test_what_was_there_and_what_comes(conn, log, bus, pool, kit):
    await log.append_many(conn, [("t", n) for n in range(5)])
    async with log.follow(bus, pool, BEGINNING, limit=2) as following:
        assert isinstance(following, Following)
        assert following.cursor == BEGINNING
        assert await kit.take(following, 5) == list(range(5))
        await log.append(conn, "t", 5)
        assert await kit.take(following, 1) == [5]
        async with conn.transaction():
            await log.append(conn, "t", 6)
            await log.append(conn, "t", 7)
        assert await kit.take(following, 2) == [6, 7]
        cursor = following.cursor
    await log.append(conn, "t", 8)
    async with log.follow(bus, pool, str(cursor)) as following:
        assert await kit.take(following, 1) == [8]


@pytest.mark.parametrize("limit", [1, 2, 1000])
async def test_from_the_middle_of_a_page_to_what_came_before_it_began(
    conn, log, bus, pool, kit, limit
):
    """Of that nobody tells any more: it came at the next poll, or with the next event."""
    await log.append_many(conn, [("t", n) for n in range(4)])
    page = await log.read(conn, BEGINNING, limit=2)
    await log.append(conn, "t", 4)
    for cursor, rest in ((page.events[0].cursor, [1, 2, 3, 4]), (page.cursor, [2, 3, 4])):
        async with log.follow(bus, pool, cursor, limit=limit, poll=1000) as following:
            assert await kit.take(following, len(rest)) == rest
            await log.append(conn, "other", "the next event")
            assert await kit.take(following, 1) == ["the next event"]
        await conn.execute("DELETE FROM events WHERE topic = 'other'")


async def test_its_cursor_is_after_what_was_received(conn, log, bus, pool, kit):
    await log.append_many(conn, [("t", n) for n in range(5)])
    async with log.follow(bus, pool, BEGINNING, limit=3) as following:
        for n in range(5):
            rest, _ = await kit.read_all(log, conn, following.cursor)
            assert rest == list(range(n, 5))
            assert (await following.receive()).payload == n
        first = following.cursor
        # Caught up, it goes on with the log, though there is nothing to receive.
        await log.append(conn, "other", "of no interest")
    async with log.follow(bus, pool, first, topics=["t"]) as following:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(following.receive)
            await kit.eventually(lambda: following.cursor != first)
            tasks.cancel_scope.cancel()
        assert (await kit.read_all(log, conn, following.cursor))[0] == []


async def test_many_at_a_time(conn, log, bus, pool, kit):
    await log.append_many(conn, [("t", n) for n in range(7)])
    async with log.follow(bus, pool, BEGINNING, limit=5) as following:
        batch = await following.receive_many(2)
        assert [event.payload for event in batch] == [0, 1]
        assert (await kit.read_all(log, conn, following.cursor))[0] == [2, 3, 4, 5, 6]
        assert [event.payload for event in await following.receive_many()] == [2, 3, 4]
        assert (await kit.read_all(log, conn, following.cursor))[0] == [5, 6]
        assert [event.payload for event in await following.receive_many(10)] == [5, 6]
        with pytest.raises(ValueError, match="max_items"):
            await following.receive_many(0)


async def test_topics(conn, log, bus, pool, kit):
    async with log.follow(bus, pool, BEGINNING, topics=["b"]) as following:
        await log.append_many(conn, [("a", 1), ("b", 2)])
        assert await kit.take(following, 1) == [2]
        await log.append_many(conn, [("a", 3), ("b", 4)])
        assert await kit.take(following, 1) == [4]


@pytest.mark.parametrize("way", ["notify", "publisher"])
async def test_it_is_woken(pg_dsn, conn, bus, pool, kit, way):
    """By the transaction or after it; nobody has to wait for the poll."""
    async with open_publisher(pg_dsn, interval=0.001) as publisher:
        log = EventLog("events", publisher=publisher if way == "publisher" else None)
        async with log.follow(bus, pool, await log.now(conn), poll=1000) as following:
            for n in range(20):
                async with conn.transaction():
                    await log.append(conn, "t", n)
                assert await kit.take(following, 1) == [n]


async def test_polling_finds_what_the_bus_did_not_tell(conn, log, bus, pool, kit):
    insert = "INSERT INTO events (topic, payload) VALUES ('t', '1')"
    async with log.follow(bus, pool, await log.now(conn), poll=0.02) as following:
        for _ in range(3):
            await conn.execute(insert)  # as a trigger would, and without a word
            assert await kit.take(following, 1) == [1]


async def test_it_has_a_connection_only_while_it_reads(conn, log, bus, pool, kit):
    """Not while it waits, nor while the consumer is busy; and reads nothing then."""
    await log.append_many(conn, [("t", n) for n in range(10)])
    async with log.follow(bus, pool, BEGINNING, limit=3) as following:
        with kit.noted("pool.acquired") as loans:
            assert await kit.take(following, 1) == [0]
            assert pool.statistics().in_use == 0
            assert await kit.take(following, 2) == [1, 2]
            assert len(loans) == 1
            assert await kit.take(following, 7) == list(range(3, 10))
            assert len(loans) == 4
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(following.receive)
                await kit.eventually(lambda: following._scope is not None)
                await anyio.sleep(0.05)
                assert pool.statistics().in_use == 0
                assert len(loans) == 4
                tasks.cancel_scope.cancel()


async def test_wake_ups_are_coalesced(conn, log, bus, pool, kit):
    async with log.follow(bus, pool, BEGINNING) as following:
        await log.append(conn, "t", -1)
        assert await kit.take(following, 1) == [-1]
        for n in range(100):
            await log.append(conn, "t", n)
        await kit.eventually(lambda: bus.statistics().received >= 100)
        with kit.noted("pool.acquired") as loans:
            assert await kit.take(following, 100) == list(range(100))
        assert len(loans) <= 3


async def test_other_tasks_get_their_turn(conn, log, bus, pool, kit):
    await log.append_many(conn, [("t", n) for n in range(200)])
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with (
        log.follow(bus, pool, BEGINNING) as following,
        anyio.create_task_group() as tasks,
    ):
        await following.receive()
        tasks.start_soon(count)
        assert await kit.take(following, 199) == list(range(1, 200))
        tasks.cancel_scope.cancel()
    assert turns >= 5


# ---------------------------------------------------------------- wake-ups alone


async def test_wake_ups(conn, log, bus, kit):
    async with log.wake_ups(bus) as wakes:
        assert isinstance(wakes, WakeUps)
        with anyio.fail_after(kit.soon):
            await wakes.receive()  # at once, for what is there
            for _ in range(3):
                await log.append(conn, "t", 1)
                await wakes.receive()
        await log.append(conn, "t", 1)
        await log.append(conn, "t", 1)
        await kit.eventually(lambda: bus.statistics().received >= 5)
        with anyio.fail_after(kit.soon):
            await wakes.receive()
        with anyio.move_on_after(0.05) as scope:
            await wakes.receive()
        assert scope.cancelled_caught
        await wakes.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await wakes.receive()


@pytest.mark.parametrize("poll", [0, -1, math.nan, math.inf, None, "1"])
async def test_what_is_no_poll(log, bus, pool, poll):
    with pytest.raises(ValueError, match="poll"):
        log.follow(bus, pool, BEGINNING, poll=poll)
    with pytest.raises(ValueError, match="poll"):
        log.wake_ups(bus, poll=poll)


async def test_arguments_that_can_not_be(log, bus, pool):
    with pytest.raises(ValueError, match="not the text of"):
        log.follow(bus, pool, "nonsense")
    with pytest.raises(ValueError, match="limit"):
        log.follow(bus, pool, BEGINNING, limit=0)
    with pytest.raises(TypeError, match="topics"):
        log.follow(bus, pool, BEGINNING, topics="t")


# ---------------------------------------------------------------- its ends


async def test_closed(conn, log, bus, pool, kit):
    await log.append_many(conn, [("t", n) for n in range(3)])
    async with log.follow(bus, pool, BEGINNING) as following:
        await following.receive()
    with pytest.raises(anyio.ClosedResourceError):
        await following.receive()
    async with log.follow(bus, pool, await log.now(conn)) as following:

        async def wait():
            with pytest.raises(anyio.ClosedResourceError):
                await following.receive()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await kit.eventually(lambda: following._scope is not None)
            with pytest.raises(anyio.BusyResourceError):
                await following.receive()
            with pytest.raises(anyio.BusyResourceError):
                await following.receive_many()
            await following.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await following.receive_many()
        await following.aclose()


async def test_a_bus_that_was_closed(pg_dsn, conn, log, pool, kit):
    """What was committed before is read first."""
    async with open_notify_bus(pg_dsn) as bus, anyio.create_task_group() as tasks:
        ending = log.follow(bus, pool, BEGINNING, limit=2)
        following = await ending.__aenter__()
        await log.append_many(conn, [("t", n) for n in range(4)])
        assert await kit.take(following, 1) == [0]
        tasks.cancel_scope.cancel()
    assert await kit.take(following, 3) == [1, 2, 3]
    with pytest.raises(anyio.EndOfStream), anyio.fail_after(kit.soon):
        await following.receive()
    await ending.__aexit__(None, None, None)


INSERT = "INSERT INTO events (topic, payload) SELECT 't', to_jsonb(n) FROM generate_series(1, 3) n"
"""Nobody tells of it, as where a notification is still on its way."""


@pytest.mark.parametrize("ends", ["closed", "dead"])
@pytest.mark.parametrize("limit", [2, 1000])
async def test_what_an_ended_bus_has_not_told_of(
    pg_dsn, conn, log, pool, kit, fault_proxy, ends, limit
):
    """What had been committed by then is read before the end is raised."""
    end: type[Exception] = anyio.EndOfStream
    with pytest.raises(BusUnavailableError) if ends == "dead" else nullcontext():
        async with open_notify_bus(fault_proxy.dsn(pg_dsn), backoff=kit.quick, max_outage=3) as bus:
            ending = log.follow(bus, pool, BEGINNING, limit=limit, poll=1000)
            following = await ending.__aenter__()
            await conn.execute(INSERT)
            assert await kit.take(following, 3) == [1, 2, 3]
            await conn.execute(INSERT)
            if ends == "dead":
                end = BusUnavailableError
                fault_proxy.refuse()
                fault_proxy.reset()
                await anyio.sleep(kit.soon)
    assert await kit.take(following, 3) == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(end), anyio.fail_after(kit.soon):
            await following.receive()
    cursor = following.cursor
    await ending.__aexit__(None, None, None)
    assert (await kit.read_all(log, conn, cursor))[0] == []


async def test_it_is_told_while_it_waits_that_its_bus_has_ended(pg_dsn, conn, log, pool, kit):
    received = []

    async def receive_all(following):
        with pytest.raises(anyio.EndOfStream):
            while True:
                received.append((await following.receive()).payload)

    async with anyio.create_task_group() as tasks, open_notify_bus(pg_dsn) as bus:
        ending = log.follow(bus, pool, BEGINNING, poll=1000)
        following = await ending.__aenter__()
        tasks.start_soon(receive_all, following)
        await kit.eventually(lambda: pool.statistics().acquired and not pool.statistics().in_use)
        await conn.execute(INSERT)
    assert received == [1, 2, 3]
    await ending.__aexit__(None, None, None)


@pytest.mark.parametrize("why", ["slow", "closed"])
async def test_a_last_read_that_can_not_be_done(pg_dsn, conn, log, kit, monkeypatch, why):
    """Not in time, or not any more; the cursor tells where to go on."""
    monkeypatch.setattr(_following, "LAST_READ", 0.1)
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with open_notify_bus(pg_dsn) as bus:
            ending = log.follow(bus, pool, BEGINNING)
            following = await ending.__aenter__()
            await conn.execute(INSERT)
            assert await kit.take(following, 3) == [1, 2, 3]
            await conn.execute(INSERT)
        if why == "slow":
            async with conn.transaction():
                await conn.execute("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
                with pytest.raises(anyio.EndOfStream) as ended:
                    with anyio.fail_after(kit.soon):
                        await following.receive()
            assert isinstance(ended.value.__cause__, TimeoutError)
    if why == "closed":
        with pytest.raises(anyio.EndOfStream) as ended:
            await following.receive()
        assert isinstance(ended.value.__cause__, PoolClosedError)
    with pytest.raises(anyio.EndOfStream):
        await following.receive()
    assert (await kit.read_all(log, conn, following.cursor))[0] == [1, 2, 3]
    await ending.__aexit__(None, None, None)


async def test_a_last_read_that_is_cancelled(pg_dsn, conn, log, pool, kit):
    async with open_notify_bus(pg_dsn) as bus:
        ending = log.follow(bus, pool, BEGINNING)
        following = await ending.__aenter__()
        await conn.execute(INSERT)
        assert await kit.take(following, 3) == [1, 2, 3]
        await conn.execute(INSERT)
    async with conn.transaction():
        await conn.execute("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
        with anyio.move_on_after(0.1) as scope:
            await following.receive()
        assert scope.cancelled_caught
    assert await kit.take(following, 3) == [1, 2, 3]
    with pytest.raises(anyio.EndOfStream):
        await following.receive()
    await ending.__aexit__(None, None, None)


async def test_the_last_wake_up(pg_dsn, conn, log, kit):
    """Who reads in transactions of their own look once more, too."""
    async with open_notify_bus(pg_dsn) as bus:
        ending = log.wake_ups(bus)
        wakes = await ending.__aenter__()
        await wakes.receive()
    with anyio.fail_after(kit.soon):
        await wakes.receive()
        for _ in range(2):
            with pytest.raises(anyio.EndOfStream):
                await wakes.receive()
    await wakes.aclose()
    with pytest.raises(anyio.ClosedResourceError):
        await wakes.receive()
    await ending.__aexit__(None, None, None)


async def test_a_pool_that_was_closed(pg_dsn, conn, log, bus):
    async with open_pool(pg_dsn) as pool:
        pass
    await log.append(conn, "t", 1)
    async with log.follow(bus, pool, BEGINNING) as following:
        for _ in range(2):
            with pytest.raises(PoolClosedError):
                await following.receive()


async def test_an_expired_cursor_comes_out(conn, log, bus, pool, kit):
    await log.append_many(conn, [("t", n) for n in range(3)])
    page = await log.read(conn, BEGINNING, limit=1)
    async with log.follow(bus, pool, page.cursor, limit=1) as following:
        assert await kit.take(following, 1) == [1]
        await log.trim(conn, 0)
        for _ in range(2):
            with pytest.raises(CursorExpiredError):
                await following.receive()


async def test_what_does_not_heal_comes_out(pg_dsn, conn, log, bus, pool):
    async with EventLog("missing").follow(bus, pool, BEGINNING) as following:
        with pytest.raises(psycopg.errors.UndefinedTable):
            await following.receive()
    dsn = pg_dsn + ("&" if "?" in pg_dsn else "?") + "dbname=there_is_none"
    async with open_pool(dsn) as wrong:
        async with log.follow(bus, wrong, BEGINNING) as following:
            with pytest.raises(psycopg.OperationalError):
                await following.receive()


# ---------------------------------------------------------------- what breaks


async def test_killed_sessions(pg_dsn, conn, log, kit):
    """The bus's and the pool's, while it waits and while it reads."""
    async with (
        open_notify_bus(pg_dsn, backoff=kit.quick) as bus,
        open_pool(pg_dsn, max_size=1, check_after_idle=None) as pool,
        log.follow(bus, pool, BEGINNING, poll=1000) as following,
    ):
        for n in range(10):
            async with pool.acquire() as pooled:
                pid = pooled.info.backend_pid
            generation = bus.generation
            if n % 2:
                kit.kill(pg_dsn, pid)
            else:
                kit.kill(pg_dsn, bus.backend_pid)
            await log.append(conn, "t", n)
            assert await kit.take(following, 1) == [n]
            if not n % 2:
                await bus.wait_generation(generation)


async def test_a_session_that_dies_while_it_reads(pg_dsn, conn, log, bus, kit):
    await log.append_many(conn, [("t", n) for n in range(3)])
    async with open_pool(pg_dsn, max_size=1) as pool, conn.transaction():
        await conn.execute("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
        with kit.noted("log.read_failed") as failures:
            async with (
                log.follow(bus, pool, BEGINNING) as following,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(kit.take, following, 3)
                for count in range(1, 3):
                    await kit.eventually(lambda: pool.statistics().in_use == 1)
                    async with await connect(pg_dsn) as admin:
                        await admin.execute(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                            " WHERE wait_event_type = 'Lock'"
                        )
                        while len(failures) < count:
                            await admin.execute(
                                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                                " WHERE wait_event_type = 'Lock'"
                            )
                            await anyio.sleep(0.01)
                await conn.execute("ROLLBACK")
                await conn.execute("BEGIN")
        assert failures[0][1]["log"] == "events"
        assert failures[0][1]["delay"] >= 0
        assert isinstance(failures[0][1]["error"], psycopg.OperationalError)


async def test_a_frozen_network(pg_dsn, conn, log, bus, kit, fault_proxy, monkeypatch):
    """A read has its bound; a longer one each time, in case it is only slow."""
    monkeypatch.setattr(_following, "READ_TIMEOUT", 0.1)
    async with open_pool(
        fault_proxy.dsn(pg_dsn), max_size=1, cancel_timeout=0.1, check_after_idle=None
    ) as pool:
        await pool.wait_ready()
        with kit.noted("log.read_failed") as failures:
            async with (
                log.follow(bus, pool, BEGINNING) as following,
                anyio.create_task_group() as tasks,
            ):
                fault_proxy.freeze()
                await log.append(conn, "t", 1)
                tasks.start_soon(kit.take, following, 1)
                await kit.eventually(lambda: failures)
                fault_proxy.thaw()
        assert isinstance(failures[0][1]["error"], TimeoutError)


async def test_a_server_that_restarts(pg_cluster_private, log, kit):
    """However it stops: in order, at once, or by a crash."""
    cluster = pg_cluster_private
    dsn = cluster.dsn()
    async with await connect(dsn) as conn:
        await log.create(conn)
    async with (
        open_notify_bus(dsn, backoff=kit.quick) as bus,
        open_pool(dsn, max_size=1) as pool,
        log.follow(bus, pool, BEGINNING, poll=1000) as following,
    ):
        for n, mode in enumerate(("fast", "immediate", "fast")):
            async with await connect(dsn) as conn:
                await log.append(conn, "t", n)
                async with conn.transaction(force_rollback=True):
                    await log.append(conn, "t", "never")
            assert await kit.take(following, 1) == [n]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kit.take, following, 1)
                await kit.eventually(lambda: following._scope is not None)
                await anyio.to_thread.run_sync(cluster.stop, mode)
                await anyio.to_thread.run_sync(cluster.start)
                async with await connect(dsn) as conn:
                    await log.append(conn, "t", -n)


async def test_a_pool_without_a_server_or_room(pg_dsn, conn, log, bus, kit, fault_proxy):
    await log.append(conn, "t", 1)
    async with open_pool(
        fault_proxy.dsn(pg_dsn), max_size=1, acquire_timeout=1, max_waiting=0
    ) as pool:
        with kit.noted("log.read_failed") as failures:
            async with (
                log.follow(bus, pool, BEGINNING) as following,
                anyio.create_task_group() as tasks,
            ):
                fault_proxy.refuse()
                tasks.start_soon(kit.take, following, 1)
                await kit.eventually(lambda: failures)
                fault_proxy.accept()
        kinds = {type(facts["error"]) for _, facts in failures}
        assert kinds <= {PoolTimeoutError, TooManyWaitingError}

        with kit.noted("log.read_failed") as failures:
            async with log.follow(bus, pool, BEGINNING) as following:
                async with anyio.create_task_group() as tasks, pool.acquire():
                    tasks.start_soon(kit.take, following, 1)
                    await kit.eventually(lambda: failures)


async def test_a_standby_at_first_and_later(pg_cluster_private, log, kit):
    """At first it is a mistake; later a failover, which ends."""
    dsn = pg_cluster_private.dsn()
    async with await connect(dsn) as conn:
        await log.create(conn)
        await log.append(conn, "t", 1)
        with pg_cluster_private.standby() as standby:
            where = standby.dsn()

            async def find():
                return where

            async with open_notify_bus(dsn) as bus, open_pool(find, max_size=1) as pool:
                async with await connect(where) as reader, log.follow(bus, pool, BEGINNING) as f:
                    with anyio.fail_after(kit.soon):
                        while True:
                            found = await kit.fetch(reader, "SELECT to_regclass('events')")
                            if found:
                                break
                            await anyio.sleep(0.01)
                    with pytest.raises(NotPrimaryError):
                        await f.receive()
                    where = dsn
                    await pool.drain()
                    assert await kit.take(f, 1) == [1]
                    where = standby.dsn()
                    await pool.drain()
                    await log.append(conn, "t", 2)
                    with kit.noted("log.read_failed") as failures:
                        async with anyio.create_task_group() as tasks:
                            tasks.start_soon(kit.take, f, 1)
                            await kit.eventually(lambda: failures)
                            where = dsn
                            await pool.drain()
                    assert isinstance(failures[0][1]["error"], NotPrimaryError)


async def test_a_bus_that_dies(pg_dsn, conn, log, kit, fault_proxy):
    """It is told, once what can be read has been read."""
    has_lived = False
    async with open_pool(pg_dsn) as pool:
        with pytest.raises(BusUnavailableError):
            async with open_notify_bus(
                fault_proxy.dsn(pg_dsn), backoff=kit.quick, max_outage=3
            ) as bus:
                async with log.follow(bus, pool, BEGINNING, poll=1000) as following:
                    await log.append(conn, "t", 1)
                    assert await kit.take(following, 1) == [1]
                    has_lived = True
                    fault_proxy.refuse()
                    fault_proxy.reset()
                    with anyio.fail_after(kit.soon):
                        await following.receive()
    assert has_lived


async def test_a_bus_that_is_down_for_a_while(pg_dsn, conn, log, kit, fault_proxy):
    """Polling goes on without it."""
    async with (
        open_pool(pg_dsn) as pool,
        open_notify_bus(fault_proxy.dsn(pg_dsn), backoff=kit.quick) as bus,
        log.follow(bus, pool, BEGINNING, poll=0.02) as following,
    ):
        fault_proxy.refuse()
        fault_proxy.reset()
        await log.append(conn, "t", 1)
        assert await kit.take(following, 1) == [1]
        await log.append(conn, "t", 2)
        assert await kit.take(following, 1) == [2]
        fault_proxy.accept()
        await bus.wait_generation(1)


async def test_behind_a_transaction_pooler(pg_dsn, log, kit, pgbouncer_transaction):
    """Everything but the bus, which has a session."""
    async with (
        open_pool(pgbouncer_transaction.dsn(pg_dsn), direct_conninfo=pg_dsn, max_size=2) as pool,
        open_notify_bus(pool) as bus,
        open_publisher(pool, interval=0.001) as publisher,
    ):
        log = EventLog("events", publisher=publisher)
        async with pool.acquire() as pooled:
            await log.create(pooled)
        async with log.follow(bus, pool, BEGINNING, poll=1000) as following:
            for n in range(20):
                async with pool.transaction() as pooled:
                    await log.append(pooled, "t", n)
                    await log.append_many(pooled, [("t", -n)])
                assert await kit.take(following, 2) == [n, -n]
        async with pool.transaction() as pooled:
            cursor = await log.cursors.load(pooled, "a")
            page = await log.read(pooled, cursor, limit=7)
            await log.cursors.save(pooled, "a", page.cursor)
        async with pool.acquire() as pooled:
            assert await log.trim(pooled, 0) == 7


async def test_a_connection_of_the_same_pool(conn, log, bus, pool, kit):
    """One that is pinned is used; one that is borrowed would be waited for by itself."""
    await log.append_many(conn, [("t", n) for n in range(3)])
    async with log.follow(bus, pool, BEGINNING, limit=1) as following:
        async with pool.pin(), pool.acquire():
            assert await kit.take(following, 1) == [0]
        async with pool.acquire():
            with pytest.raises(PoolNestedAcquireError):
                await following.receive()
        assert await kit.take(following, 2) == [1, 2]


async def test_a_pinned_connection_that_is_lost(pg_dsn, conn, log, bus, pool, kit):
    """No other one is lent while it is pinned, so trying again would never end."""
    await log.append_many(conn, [("t", n) for n in range(2)])
    async with log.follow(bus, pool, BEGINNING, limit=1) as following:
        async with pool.pin() as pinned:
            assert await kit.take(following, 1) == [0]
            kit.kill(pg_dsn, pinned.info.backend_pid)
            for _ in range(2):
                with pytest.raises(psycopg.OperationalError):
                    await kit.take(following, 1)
        assert await kit.take(following, 1) == [1]


# ---------------------------------------------------------------- cancelled


async def test_a_pending_cancellation_is_noticed(conn, log, bus, pool):
    await log.append_many(conn, [("t", n) for n in range(3)])

    async def follow():
        async with log.follow(bus, pool, BEGINNING):
            raise AssertionError("entered")

    await assert_cancellable(follow)
    async with log.follow(bus, pool, BEGINNING) as following:
        await assert_cancellable(following.receive)
        await assert_cancellable(following.receive_many)
        assert (await following.receive()).payload == 0
    async with log.wake_ups(bus) as wakes:
        await assert_cancellable(wakes.receive)
        await wakes.receive()
        await assert_cancellable(wakes.receive)


async def test_cancelled_at_every_await(conn, log, bus, pool, kit):
    """Wherever a receive is cancelled, the next one goes on where it was."""
    await log.append_many(conn, [("t", n) for n in range(5)])
    number, is_over = 0, False
    while not is_over:
        assert number < 200

        async def receive_all(received, following):
            while len(received) < 5:
                received.append((await following.receive()).payload)

        received: list[int] = []
        async with log.follow(bus, pool, BEGINNING, limit=2) as following:
            with anyio.fail_after(kit.soon):
                with anyio.CancelScope() as scope:
                    await kit.cancel_at(receive_all(received, following), scope, number)
                is_over = not scope.cancel_called
                await receive_all(received, following)
        assert received == list(range(5))
        assert pool.statistics().in_use == 0
        number += 1
    assert number > 5


async def test_entering_and_leaving_cancelled_at_every_await(conn, log, bus, pool, kit):
    await log.append(conn, "t", 1)

    async def follow():
        async with log.follow(bus, pool, BEGINNING) as following:
            assert (await following.receive()).payload == 1

    number, is_over = 0, False
    while not is_over:
        with anyio.fail_after(kit.soon), anyio.CancelScope() as scope:
            await kit.cancel_at(follow(), scope, number)
        is_over = not scope.cancel_called
        assert bus.statistics().subscribers == 0
        assert pool.statistics().in_use == 0
        number += 1
    assert number > 2
