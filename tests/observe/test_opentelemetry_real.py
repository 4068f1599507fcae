"""Spans and metrics of real locks, pools and buses."""

from __future__ import annotations

import anyio
import psycopg
import pytest
from opentelemetry.trace import StatusCode

from pgstructured import (
    Backoff,
    open_locks,
    open_notify_bus,
    open_pool,
    open_publisher,
    pg_lock,
)
from pgstructured.errors import LockAlreadyHeldError, LockLost, LockTimeout, PoolTimeoutError
from pgstructured.notify import Gap
from pgstructured.observe import instrumented

OUTCOME = "pgstructured.lock.outcome"
STATE = "db.client.connection.state"
REASON = "pgstructured.pool.reason"


@pytest.fixture
def watched(telemetry):
    with instrumented(telemetry.instrument):
        yield telemetry


def end_sessions(dsn, *pids):
    with psycopg.connect(dsn, autocommit=True) as conn:
        for pid in pids:
            conn.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))


async def test_a_lock_that_is_held_well(watched, pg_dsn):
    async with open_locks(pg_dsn) as locks:
        with watched.tracer.start_as_current_span("around") as around:
            async with locks.lock("a key"):
                pass
        assert watched.totals("pgstructured.lock.sessions") >= 1
    assert watched.totals("pgstructured.lock.sessions") == 0
    assert watched.totals("pgstructured.lock.acquires", OUTCOME) == {("acquired",): 1}
    assert watched.totals("pgstructured.lock.wait_time", OUTCOME) == {("acquired",): 1}
    assert watched.totals("pgstructured.lock.hold_time", OUTCOME) == {("released",): 1}
    (acquire,), (hold,) = watched.spans("lock.acquire"), watched.spans("lock.hold")
    for span in (acquire, hold):
        assert span.parent == around.get_span_context()
        assert span.attributes["pgstructured.lock.key"] == "a key"
        assert span.status.status_code is StatusCode.UNSET
    assert acquire.attributes["pgstructured.lock.shared"] is False
    assert acquire.attributes["pgstructured.lock.backend_pid"] > 0


async def test_locks_that_are_not_to_be_had(watched, pg_dsn):
    async with open_locks(pg_dsn) as locks, pg_lock(pg_dsn, "a key"):

        async def want():
            async with locks.try_lock("a key") as lock:
                assert lock is None
            with pytest.raises(LockTimeout):
                async with locks.lock("a key", acquire_timeout=0):
                    raise AssertionError
            contentions = "pgstructured.lock.contentions"
            async with anyio.create_task_group() as tasks:

                async def wait():
                    async with locks.lock("a key"):
                        raise AssertionError

                tasks.start_soon(wait)
                await watched.eventually(lambda: watched.totals(contentions) == 1)
                tasks.cancel_scope.cancel()

        with watched.tracer.start_as_current_span("around"):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(want)
        async with locks.lock("another"):
            with pytest.raises(LockAlreadyHeldError):
                async with locks.lock("another"):
                    raise AssertionError
    error = "error.type"
    assert watched.totals("pgstructured.lock.acquires", OUTCOME, error) == {
        ("acquired", None): 2,
        ("refused", None): 1,
        ("timed_out", None): 1,
        ("cancelled", None): 1,
        ("failed", "pgstructured.errors.LockAlreadyHeldError"): 1,
    }
    spans = watched.spans("lock.acquire")
    assert {span.attributes[OUTCOME]: span.attributes.get(error) for span in spans} == {
        "acquired": None,
        "refused": None,
        "timed_out": "pgstructured.errors.LockTimeout",
        "cancelled": None,
        "failed": "pgstructured.errors.LockAlreadyHeldError",
    }
    (around,) = watched.spans("around")
    assert [note.name for note in around.events] == ["lock.contended"]


async def test_a_lock_that_is_lost(watched, pg_dsn):
    with pytest.raises(LockLost):
        async with open_locks(pg_dsn) as locks, locks.lock("a key") as lock:
            end_sessions(pg_dsn, lock.backend_pid)
            await anyio.sleep(30)
    (span,) = watched.spans("lock.hold")
    assert span.parent is None
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "pgstructured.errors.LockLost"
    assert span.attributes["db.response.status_code"] == "57P01"
    reason = span.attributes["pgstructured.lock.reason"]
    assert watched.totals("pgstructured.lock.hold_time", OUTCOME) == {("lost",): 1}
    labels = ("pgstructured.lock.reason", "db.response.status_code")
    assert watched.totals("pgstructured.lock.losses", *labels) == {(reason, "57P01"): 1}
    assert watched.totals("pgstructured.driver.losses", "error.type") == {("57P01",): 1}


def connections(telemetry):
    return telemetry.totals("db.client.connection.count", STATE)


async def test_the_connections_of_a_pool_are_counted_as_it_counts_them(watched, pg_dsn):
    def agrees():
        told = pool.statistics()
        return connections(watched) == {("idle",): told.idle, ("used",): told.in_use}

    async with open_pool(pg_dsn, name="web", max_size=2, acquire_timeout=30) as pool:
        async with pool.acquire() as conn:
            assert agrees()
            ours = conn.pgconn.backend_pid
        assert agrees()
        async with pool.acquire() as conn:
            end_sessions(pg_dsn, conn.pgconn.backend_pid)
        assert agrees()
        async with pool.acquire() as conn:
            assert conn.pgconn.backend_pid != ours
            await conn.aclose()
        assert agrees()
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(borrow, pool)
        assert agrees()
        await pool.drain()
        async with pool.acquire():
            await pool.drain()
        assert agrees()
    assert connections(watched) == {("idle",): 0, ("used",): 0}
    opened = pool.statistics().opened
    closed = watched.totals("pgstructured.pool.closed_connections", REASON)
    assert sum(closed.values()) == opened
    assert watched.totals("db.client.connection.create_time") == opened
    acquired = pool.statistics().acquired
    assert watched.totals("db.client.connection.wait_time") == acquired
    assert watched.totals("db.client.connection.use_time") == acquired
    names = {x.attributes["db.client.connection.pool.name"] for x in metrics_of_pool(watched)}
    assert names == {"web"}
    assert len(watched.spans("connect")) == opened


def metrics_of_pool(telemetry):
    return [
        point
        for name in telemetry.metrics()
        if name.startswith("db.client.")
        for point in telemetry.points(name)
    ]


async def borrow(pool):
    async with pool.acquire() as conn:
        await conn.execute("SELECT 1")


async def test_a_pool_under_a_hook_that_fails(watched, pg_dsn):
    async def refuse(conn):
        raise RuntimeError("a hook's own fault")

    async with open_pool(pg_dsn, name="web", on_release=refuse) as pool:
        with pytest.raises(RuntimeError):
            async with pool.acquire():
                pass
    assert connections(watched) == {("idle",): 0, ("used",): 0}
    error = "error.type"
    assert watched.totals("pgstructured.pool.hook_failures", error) == {("RuntimeError",): 1}
    assert watched.totals("pgstructured.pool.closed_connections", REASON) == {("unusable",): 1}


async def test_a_connection_that_a_lock_has_borrowed(watched, pg_dsn):
    async with open_pool(pg_dsn, name="web") as pool:
        async with pg_lock(pool, "a key"):
            assert connections(watched) == {("idle",): 0, ("used",): 1}
        assert connections(watched) == {("idle",): 1, ("used",): 0}
    assert connections(watched) == {("idle",): 0, ("used",): 0}


async def test_a_pool_that_has_none_to_give(watched, pg_dsn):
    async with open_pool(pg_dsn, name="web", max_size=1, acquire_timeout=0.3) as pool:
        # The first connection may take longer than that.
        while True:
            try:
                async with pool.acquire(), anyio.create_task_group() as tasks:
                    tasks.start_soon(fail_to_borrow, watched, pool)
                break
            except PoolTimeoutError:
                pass
    assert watched.totals("db.client.connection.timeouts") >= 1
    (around,) = watched.spans("around")
    assert [note.name for note in around.events] == ["pool.acquire_timed_out"]


async def fail_to_borrow(telemetry, pool):
    with telemetry.tracer.start_as_current_span("around"):
        with pytest.raises(PoolTimeoutError):
            async with pool.acquire():
                raise AssertionError


async def test_a_task_that_waits_for_a_connection(watched, pg_dsn):
    async with open_pool(pg_dsn, name="web", max_size=1) as pool:

        async def wait():
            with watched.tracer.start_as_current_span("around"):
                async with pool.acquire():
                    pass

        async with anyio.create_task_group() as tasks:
            async with pool.acquire():
                tasks.start_soon(wait)
                await watched.eventually(lambda: pool.statistics().tasks_waiting)
                await anyio.sleep(0.01)
    (around,) = watched.spans("around")
    waits = [span for span in watched.spans("pool.acquire") if span.parent]
    assert [span.parent for span in waits] == [around.context]
    assert waits[0].attributes["db.client.connection.pool.name"] == "web"


async def test_a_bus_that_is_away_for_a_while(watched, pg_dsn):
    backoff = Backoff(initial=0.01, maximum=0.05, reset_after=0.05)
    async with (
        open_notify_bus(pg_dsn, backoff=backoff) as bus,
        bus.subscribe("news") as news,
    ):
        end_sessions(pg_dsn, bus.backend_pid)
        with anyio.fail_after(30):
            gap = await news.receive()
        assert isinstance(gap, Gap)
    assert watched.totals("pgstructured.bus.losses", "error.type") == {("57P01",): 1}
    assert watched.totals("pgstructured.bus.outage_time") == 1
    reason = "pgstructured.bus.reason"
    assert watched.totals("pgstructured.bus.gaps", reason) == {("reconnected",): 1}
    assert watched.points("pgstructured.bus.lost_notifications") == []
    what = "pgstructured.supervise.what"
    assert list(watched.totals("pgstructured.supervise.failures", what)) == [
        ("pgstructured/notify",)
    ]
    (outage,) = watched.spans("bus.outage")
    assert outage.parent is None
    assert outage.attributes["pgstructured.bus.generation"] == 2
    assert outage.attributes["pgstructured.bus.channels"] == 1


async def test_a_subscriber_that_is_too_slow(watched, pg_dsn):
    async with open_notify_bus(pg_dsn) as bus, bus.subscribe("news", buffer=2) as news:
        with psycopg.connect(pg_dsn, autocommit=True) as conn:
            conn.execute("SELECT pg_notify('news', n::text) FROM generate_series(1, 10) AS n")
        await watched.eventually(lambda: bus.statistics().received == 10)
        with anyio.fail_after(30):
            first = await news.receive()
        assert isinstance(first, Gap)
        lost = first.lost
    overflow = "pgstructured.bus.overflow"
    assert list(watched.totals("pgstructured.bus.lags", overflow)) == [("drop_oldest",)]
    assert watched.totals("pgstructured.bus.lost_notifications") == lost


async def test_a_publisher(watched, pg_dsn):
    with watched.tracer.start_as_current_span("around"):
        async with open_publisher(pg_dsn, interval=30, flush_timeout=20) as publisher:
            for number in range(10):
                publisher.publish_nowait("news", str(number))
            await publisher.flush()
    (batch,) = watched.spans("publisher.batch")
    assert batch.parent is None
    assert batch.attributes["messaging.batch.message_count"] == 10
    assert watched.totals("pgstructured.publisher.batch_time") == 1
    (size,) = watched.points("pgstructured.publisher.batch_size")
    assert (size.count, size.sum) == (1, 10)


async def test_a_session_that_cannot_be_had(watched):
    with pytest.raises(PoolTimeoutError):
        async with open_pool("host=127.0.0.1 port=1", acquire_timeout=0.2) as pool:
            await pool.wait_ready()
    error = "error.type"
    failures = watched.totals("pgstructured.driver.connect_failures", error)
    assert set(failures) == {("psycopg.OperationalError",)}
    assert set(watched.totals("pgstructured.pool.connect_failures", error)) == set(failures)
