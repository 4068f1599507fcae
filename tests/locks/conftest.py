"""What the tests of locks share."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import anyio
import pytest

from pgstructured.driver import open_connection
from pgstructured.errors import LockLost
from pgstructured.locks import HeldLock, LockKey, Locks, open_locks
from pgstructured.locks._fencing import FenceTable
from pgstructured.locks._keys import as_lock_key
from pgstructured.locks._lock import find_source
from pgstructured.locks._opening import new_request, open_held
from pgstructured.locks._options import LockOptions
from pgstructured.observe import instrumented
from pgstructured.pool import Pool, open_pool

# Small enough for a test; but a machine that stands still for seconds loses nothing by it.
PATIENT = LockOptions(
    heartbeat=0.15, lost_after=20.0, server_timeout=40.0, release_timeout=0.8, connect_timeout=5.0
)
# Where a silence is to be noticed.
HASTY = replace(PATIENT, lost_after=0.6, server_timeout=3.0)

SOON = 25  # seconds that nothing here takes on any machine


async def wait_until(condition):
    """Wait until a condition is true."""
    with anyio.fail_after(SOON):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.01)


async def hold(block, losses=None, *, task_status=anyio.TASK_STATUS_IGNORED):
    """Hold a lock, given by its block, until it is lost or this is cancelled.

    Its loss is added to ``losses``, or raised if nobody collects them.
    """
    try:
        async with block as lock:
            task_status.started(lock)
            await anyio.sleep_forever()
    except LockLost as exc:
        if losses is None:
            raise
        losses.append(exc)


def _open_locks(defaults, dsn, **options):
    names = ("heartbeat", "lost_after", "server_timeout", "release_timeout", "connect_timeout")
    return open_locks(dsn, **{**{name: getattr(defaults, name) for name in names}, **options})


def _open_lock(defaults, source, key, *, options=None, ttl=None, **kwargs):
    request = new_request(as_lock_key(key), **kwargs)
    return open_held(find_source(source, options or defaults), request, HeldLock, ttl=ttl)


@pytest.fixture
def open_quick():
    """`open_locks` with short figures: ``open_quick(dsn, **options of open_locks)``."""
    return partial(_open_locks, PATIENT)


@pytest.fixture
def open_hasty():
    """`open_quick`, with locks that are lost after a short silence."""
    return partial(_open_locks, HASTY)


@pytest.fixture
def settled():
    """Wait until a `Locks` has nothing under way and nothing held."""

    async def check(locks, *, within=20.0):
        deadline = time.monotonic() + within
        while True:
            told = locks.statistics()
            lanes = [lane for lane in locks._fleet.lanes if not lane.is_unused]
            left = (told.held, told.tasks_waiting, told.waiting_sessions)
            if left == (0, 0, 0) and not locks._source._queues and not lanes:
                return
            assert time.monotonic() < deadline, f"left: {told}, {locks._source._queues}, {lanes}"
            await anyio.sleep(0.01)

    return check


@pytest.fixture
def quick():
    """`pg_lock` with short figures: ``quick(source, key, **options of pg_lock)``."""
    return partial(_open_lock, PATIENT)


@pytest.fixture
def hasty():
    """`quick`, with a lock that is lost after a short silence."""
    return partial(_open_lock, HASTY)


@pytest.fixture
def events():
    """The names and facts of the lock events of the test, but for those of sessions."""
    seen = []

    def note(event):
        if event.name.startswith("lock.") and not event.name.startswith("lock.session_"):
            seen.append((event.name, dict(event.facts)))

    with instrumented(note):
        yield seen


@pytest.fixture(params=["conninfo", "connection", "unwatched connection", "locks", "pool"])
async def source(request, pg_dsn):
    """Each kind of source."""
    if request.param == "conninfo":
        yield pg_dsn
    elif request.param == "locks":
        async with open_locks(pg_dsn) as locks:
            # A second session before the test: its task is then none that the test has left.
            async with locks._reserve_whole(), locks._reserve_whole():
                pass
            yield locks
    elif request.param == "connection":
        async with open_connection(pg_dsn) as conn:
            yield conn
    elif request.param == "pool":
        async with open_pool(pg_dsn, min_size=1) as pool:
            await pool.wait_ready()
            yield pool
    else:
        from pgstructured.driver import connect

        conn = await connect(pg_dsn)
        yield conn
        await conn.aclose()


@pytest.fixture
def gone(pg_cluster, pg_dsn):
    """Wait until the server shows no advisory lock, and no session but the given ones.

    ``beside`` is a source, whose own sessions may stay.
    """

    async def check(*, within=20.0, sessions=0, beside=""):
        deadline = time.monotonic() + within
        while True:
            locks = pg_cluster.advisory_locks(pg_dsn)
            left = pg_cluster.sessions(pg_dsn)
            if isinstance(beside, Locks):
                own = beside.statistics().sessions
            elif isinstance(beside, Pool):
                own = beside.statistics().size
            else:
                own = 0 if isinstance(beside, str) else 1
            if not locks and len(left) <= sessions + own:
                return
            assert time.monotonic() < deadline, f"left on the server: {locks}, {left}"
            await anyio.sleep(0.02)

    return check


@pytest.fixture
def unlocked(pg_cluster, pg_dsn):
    """Wait until the server shows no advisory lock."""

    async def check():
        with anyio.fail_after(20):
            while pg_cluster.advisory_locks(pg_dsn):  # noqa: ASYNC110 - the server's
                await anyio.sleep(0.02)

    return check


@pytest.fixture
def waiting(pg_cluster, pg_dsn):
    """Wait until so many sessions wait for an advisory lock."""

    async def check(count=1):
        with anyio.fail_after(30):  # for a process to start, too
            while True:
                waiters = [x for x in pg_cluster.advisory_locks(pg_dsn) if not x.granted]
                if len(waiters) == count:
                    return waiters
                await anyio.sleep(0.01)

    return check


@pytest.fixture
async def guarded(pg_dsn):
    """A transaction that is guarded by the first token of key 1: the second has to wait for it."""
    key = LockKey.bigint(1)
    async with open_locks(pg_dsn) as locks:
        await locks.create_fence_table()
        async with locks.lock(key, fenced=True):
            pass
    async with open_connection(pg_dsn) as conn:
        async with conn.transaction(force_rollback=True):
            await FenceTable().guard(conn, key, 1)
            yield conn


@pytest.fixture
def bumping(pg_cluster, pg_dsn):
    """Wait until a session waits for the guarded transaction, and return its process id."""
    statement = (
        "SELECT pid FROM pg_stat_activity WHERE datname = %s"
        " AND wait_event_type = 'Lock' AND wait_event = 'transactionid'"
    )

    values = [pg_dsn.rsplit("/", 1)[1]]

    async def check() -> int:
        with anyio.fail_after(20):
            while not (  # noqa: ASYNC110 - it is the server's
                found := pg_cluster.execute(statement, values)
            ):
                await anyio.sleep(0.01)
        return int(found[0][0])

    return check
