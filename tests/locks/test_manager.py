"""Many locks on few sessions: `open_locks` and what it promises."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from contextlib import AsyncExitStack, ExitStack
from typing import Any, cast

import anyio
import anyio.lowlevel
import psycopg
import pytest

from pgstructured import Backoff
from pgstructured.driver import open_connection, open_session
from pgstructured.errors import (
    ConninfoError,
    LockAlreadyHeldError,
    LockCapacityError,
    LockError,
    LockKeyError,
    LockLost,
    LockNotHeldError,
    LockTimeout,
    NotPrimaryError,
    SessionRequiredError,
)
from pgstructured.locks import HeldLock, LockKey, open_locks, pg_lock, pg_try_lock
from pgstructured.locks._fencing import FenceTable
from pgstructured.locks._options import LockOptions
from pgstructured.observe import instrumented
from pgstructured.testing import Cluster

SOON = 20  # seconds that nothing here takes on any machine

_TAKER = """
import anyio, sys
from pgstructured.locks import open_locks
async def main():
    async with open_locks(sys.argv[1], namespace="ns") as locks:
        async with locks.lock(sys.argv[2], shared=sys.argv[3] == "shared"):
            print("got it", flush=True)
            await anyio.to_thread.run_sync(sys.stdin.readline)
anyio.run(main)
"""


@pytest.fixture
def another_process(pg_dsn):
    """Start a process that takes a lock, and holds it until its input ends."""
    processes = []

    def start(name, mode="exclusive"):
        process = subprocess.Popen(
            [sys.executable, "-c", _TAKER, pg_dsn, name, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


async def hold(locks, key, *, task_status=anyio.TASK_STATUS_IGNORED, **options) -> None:
    """Hold a lock until cancelled."""
    async with locks.lock(key, **options) as lock:
        task_status.started(lock)
        await anyio.sleep_forever()


async def refused(locks, key, *, shared=False) -> None:
    """Try in another task, in vain: what a task holds itself it is refused with an error."""

    async def try_it() -> None:
        async with locks.try_lock(key, shared=shared) as lock:
            assert lock is None

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(try_it)


async def in_line(locks, count) -> None:
    """Wait until so many tasks want a lock."""
    with anyio.fail_after(SOON):
        while locks.statistics().tasks_waiting != count:
            await anyio.lowlevel.checkpoint()


# ---------------------------------------------------------------- few sessions


async def test_a_thousand_locks_on_few_sessions(pg_dsn, pg_cluster, settled):
    async with open_locks(pg_dsn) as locks:
        everybody = anyio.Event()
        pids: dict[int, int] = {}

        async def take(key) -> None:
            async with locks.lock(key) as lock:
                pids[lock.backend_pid] = pids.get(lock.backend_pid, 0) + 1
                await everybody.wait()

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for key in range(1000):
                    tasks.start_soon(take, key)
                while locks.statistics().held < 1000:  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.01)
                assert len(pg_cluster.advisory_locks(pg_dsn)) == 1000
                assert len(pg_cluster.sessions(pg_dsn)) <= 16
                assert sum(pids.values()) == 1000
                assert max(pids.values()) == 64
                everybody.set()
        assert locks.statistics().acquired == locks.statistics().released == 1000
        await settled(locks)


async def test_a_thousand_tasks_that_wait_are_one_waiter(pg_dsn, pg_cluster, settled):
    """And they are served first come, first served."""
    order: list[int] = []

    async def take(number) -> None:
        async with locks.lock("one"):
            order.append(number)

    async with open_session(pg_dsn) as other, open_locks(pg_dsn) as locks:
        await other.execute(f"SELECT pg_advisory_lock({locks.key('one').as_bigint})")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for number in range(1000):
                    tasks.start_soon(take, number)
                    await in_line(locks, number + 1)  # trio starts a batch in any order
                waiters = [x for x in pg_cluster.advisory_locks(pg_dsn) if not x.granted]
                assert len(waiters) == 1
                assert locks.statistics().waiting_sessions == 1
                await other.execute("SELECT pg_advisory_unlock_all()")
        assert order == list(range(1000))
        assert locks.statistics().contended == 1
        assert locks.statistics().sessions <= 2
        await settled(locks)


async def test_first_come_first_served_across_processes(pg_dsn, waiting):
    order: list[str] = []

    async def take(locks, name) -> None:
        async with locks.lock(1):
            order.append(name)

    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two:
        async with anyio.create_task_group() as tasks:
            async with one.lock(1):
                tasks.start_soon(take, two, "two")
                await waiting(1)
                tasks.start_soon(take, one, "one")
                await in_line(one, 1)
        assert order == ["two", "one"]


async def test_idle_sessions_are_given_back(pg_dsn, pg_cluster, open_quick):
    async with open_quick(pg_dsn, idle_session_ttl=0.2, max_locks_per_session=1) as locks:
        async with AsyncExitStack() as stack:
            for key in range(4):
                await stack.enter_async_context(locks.lock(key))
            assert locks.statistics().sessions == 4
        with anyio.fail_after(SOON):
            while (  # noqa: ASYNC110 - the server's, and nobody tells
                len(pg_cluster.sessions(pg_dsn)) + locks.statistics().sessions != 2
            ):
                await anyio.sleep(0.02)
        assert locks.statistics().sessions == 1
        await anyio.sleep(0.5)  # the last one stays
        assert locks.statistics().sessions == 1
        async with locks.lock(1):
            pass


async def test_fenced_acquires_at_once_open_few_sessions(pg_dsn, settled):
    async with open_locks(pg_dsn) as locks:
        await locks.create_fence_table()
        tokens: list[int | None] = []

        async def take(key) -> None:
            async with locks.lock(key, fenced=True) as lock:
                tokens.append(lock.fencing_token)

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for key in range(100):
                    tasks.start_soon(take, key)
        assert tokens == [1] * 100
        assert locks.statistics().sessions_opened <= 16
        await settled(locks)


# ---------------------------------------------------------------- shared and exclusive


async def test_readers_share_one_lock_of_the_server(pg_dsn, pg_cluster, settled):
    async with open_locks(pg_dsn) as locks:
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                await tasks.start(lambda **kw: hold(locks, 1, shared=True, **kw))
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
            assert locks.statistics().held == 1
            assert locks.statistics().acquired == 10
            async with locks.try_lock(1) as lock:
                assert lock is None
            async with locks.try_lock(1, shared=True) as lock:
                assert lock is not None
            tasks.cancel_scope.cancel()
        await settled(locks)
        assert not pg_cluster.advisory_locks(pg_dsn)


async def test_a_reader_behind_a_writer_comes_after_it(pg_dsn, waiting, settled):
    """The writer stands in the server's queue while readers of its own process hold."""
    order: list[str] = []

    async def take(name, *, shared) -> None:
        async with locks.lock(1, shared=shared):
            order.append(name)

    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as other:
        async with anyio.create_task_group() as tasks:
            async with locks.lock(1, shared=True):
                tasks.start_soon(lambda: take("writer", shared=False))
                (waiter,) = await waiting(1)
                assert not waiter.shared
                tasks.start_soon(lambda: take("reader", shared=True))
                await in_line(locks, 2)
                async with locks.try_lock(1, shared=True) as own:
                    assert own is not None  # this task's own: the writer waits for it
                await refused(other, 1, shared=True)  # the server makes other processes wait too
        assert order == ["writer", "reader"]
        await settled(locks)


async def test_what_a_task_may_not_take_twice(pg_dsn, settled):
    async with open_locks(pg_dsn) as locks:
        async with locks.lock(1):
            for shared in (False, True):
                with pytest.raises(LockAlreadyHeldError):
                    async with locks.lock(1, shared=shared):
                        raise AssertionError("a deadlock")
                with pytest.raises(LockAlreadyHeldError):
                    async with locks.try_lock(1, shared=shared):
                        raise AssertionError("held")
        async with locks.lock(1, shared=True):
            with pytest.raises(LockAlreadyHeldError):
                async with locks.lock(1):
                    raise AssertionError("a deadlock")
            async with locks.lock(1, shared=True) as again:
                assert locks.statistics().held == 1
                await again.release()
            async with locks.lock(1, shared=True):
                pass
        await settled(locks)


async def test_what_a_task_holds_by_another_source(pg_dsn, waiting, settled):
    async def wait() -> None:
        async with locks.lock(1):
            pass

    async with open_locks(pg_dsn) as locks:
        async with anyio.create_task_group() as tasks, pg_lock(pg_dsn, 1):
            with pytest.raises(LockAlreadyHeldError):
                async with locks.lock(1):
                    raise AssertionError("a deadlock")
            tasks.start_soon(wait)
            await waiting(1)
            # In the local line it would wait for somebody who waits for this task.
            with pytest.raises(LockAlreadyHeldError):
                async with locks.lock(1):
                    raise AssertionError("a deadlock")
        await settled(locks)


async def test_readers_do_not_starve_another_process_writer(pg_dsn, waiting, settled):
    """Its readers never all let go; a writer elsewhere gets in all the same."""
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as other:
        written = anyio.Event()

        async def read(delay) -> None:
            await anyio.sleep(delay)
            while not written.is_set():
                async with locks.lock(1, shared=True):
                    await anyio.sleep(0.3)

        async def write() -> None:
            async with other.lock(1):
                written.set()

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for delay in (0, 0.1, 0.2):
                    tasks.start_soon(read, delay)
                await anyio.sleep(0.3)
                tasks.start_soon(write)
        await settled(locks)


async def test_a_reader_gets_no_share_of_what_is_dead(pg_dsn, pg_cluster, settled):
    async def linger(*, task_status) -> None:
        with pytest.raises(LockLost):
            async with locks.lock(1, shared=True) as lock:
                task_status.started(lock)
                with anyio.move_on_after(SOON, shield=True):
                    await over.wait()

    async with open_locks(pg_dsn) as locks:
        over = anyio.Event()
        async with anyio.create_task_group() as tasks:
            lost = await tasks.start(linger)
            pg_cluster.terminate_backend(lost.backend_pid)
            try:
                await lost.wait_lost()
                async with locks.lock(1, shared=True) as lock:
                    assert lock.backend_pid != lost.backend_pid
                    await anyio.sleep(0.02)
            finally:
                over.set()
        await settled(locks)


async def test_a_writer_waits_for_readers_whose_session_has_died(
    pg_dsn, pg_cluster, waiting, settled
):
    """The server has granted it the lock; but they are still at work here."""
    order: list[str] = []

    async def linger(*, task_status) -> None:
        with pytest.raises(LockLost):
            async with locks.lock(1, shared=True) as lock:
                task_status.started(lock)
                with anyio.move_on_after(SOON, shield=True):
                    await over.wait()
                    order.append("old reader left")

    async def write() -> None:
        async with locks.lock(1):
            order.append("writer")
            await anyio.sleep(0.05)
            order.append("writer left")

    async def read() -> None:
        async with locks.lock(1, shared=True):
            order.append("reader")

    async def give_up() -> None:
        with pytest.raises(LockTimeout):
            async with locks.lock(1, acquire_timeout=1.5):
                raise AssertionError("not free")

    async with open_locks(pg_dsn) as locks:
        for wait in (give_up, write):
            over = anyio.Event()
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    lost = await tasks.start(linger)
                    async with anyio.create_task_group() as waiters:
                        waiters.start_soon(wait)
                        await waiting(1)
                        if wait is write:
                            waiters.start_soon(read)
                            await in_line(locks, 2)
                        pg_cluster.terminate_backend(lost.backend_pid)
                        await lost.wait_lost()
                        if wait is write:
                            await in_line(locks, 1)
                            await anyio.sleep(0.05)
                            over.set()
                    over.set()
            await settled(locks)
        last = ["old reader left", "writer", "writer left", "reader"]
        assert order == ["old reader left", *last]


# ---------------------------------------------------------------- beyond max_waiting_sessions


async def test_closed_just_as_one_begins_to_listen(pg_dsn, gone):
    with ExitStack() as listening, anyio.fail_after(SOON):
        async with open_locks(pg_dsn) as locks:
            ring = listening.enter_context(locks._bell.listening(locks.key("k")))
        assert not ring._event.is_set()  # it never heard anything
    await gone()


async def test_who_does_not_stand_in_the_queue_is_told(pg_dsn, waiting, settled):
    """By NOTIFY where another `Locks` lets go."""
    got: list[int] = []

    async def take(key) -> None:
        async with locks.lock(key):
            got.append(key)

    async with open_locks(pg_dsn) as other, open_locks(pg_dsn, max_waiting_sessions=1) as locks:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with other.lock(1), other.lock(2):
                    tasks.start_soon(take, 1)
                    await waiting(1)
                    tasks.start_soon(take, 2)
                    await in_line(locks, 2)
                    await anyio.sleep(0.5)  # its polls are rare by now
                    assert locks.statistics().waiting_sessions == 1
        assert sorted(got) == [1, 2]
        await settled(locks)
        assert locks.statistics().contended == 2


async def test_who_is_not_told_looks_now_and_then(pg_dsn, waiting, settled):
    """A session that knows nothing of this library lets go."""
    async with open_session(pg_dsn) as other, open_locks(pg_dsn, max_waiting_sessions=1) as locks:
        await other.execute("SELECT pg_advisory_lock(1), pg_advisory_lock(2)")

        async def take(key, *, shared=False) -> None:
            async with locks.lock(key, shared=shared):
                pass

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, 1)
                await waiting(1)
                tasks.start_soon(take, 2)
                tasks.start_soon(lambda: take(2, shared=True))
                await in_line(locks, 3)
                with pytest.raises(LockTimeout):
                    async with locks.lock(2, acquire_timeout=0.1):
                        raise AssertionError("not free")
                await other.execute("SELECT pg_advisory_unlock_all()")
        await settled(locks)


async def test_a_writer_that_polls_beside_readers(pg_dsn, waiting, settled):
    async with open_session(pg_dsn) as other, open_locks(pg_dsn, max_waiting_sessions=1) as locks:
        await other.execute("SELECT pg_advisory_lock(1)")
        written = anyio.Event()

        async def take(key) -> None:
            async with locks.lock(key):
                if key == 2:
                    written.set()

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, 1)
                await waiting(1)
                async with locks.lock(2, shared=True):
                    tasks.start_soon(take, 2)
                    await in_line(locks, 2)
                    await anyio.sleep(0.1)
                    assert not written.is_set()
                await written.wait()
                await other.execute("SELECT pg_advisory_unlock_all()")
        await settled(locks)


# ---------------------------------------------------------------- several at once


async def test_several_in_one_order(pg_dsn, pg_cluster, settled):
    async with open_locks(pg_dsn) as locks:
        async with locks.lock_many([3, "a", (1, 2), 3, -1]) as held:
            assert [lock.key for lock in held] == [locks.key(key) for key in (3, "a", (1, 2), -1)]
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 4
            for lock in held:
                lock.assert_held()
            with pytest.raises(LockAlreadyHeldError):
                async with locks.lock_many([7, 3]):
                    raise AssertionError("held")
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 4
        assert not pg_cluster.advisory_locks(pg_dsn)
        async with locks.lock_many(()) as none:
            assert none == ()
        async with locks.lock_many([1, 2], shared=True) as both:
            assert all(lock.shared for lock in both)
        with pytest.raises(LockKeyError):
            locks.lock_many([1, ""])
        with pytest.raises(ValueError, match="acquire_timeout"):
            locks.lock_many([1], acquire_timeout=-1)
        await settled(locks)


async def test_several_or_none(pg_dsn, pg_cluster, settled, events):
    async with open_locks(pg_dsn) as locks, open_session(pg_dsn) as other:
        await other.execute("SELECT pg_advisory_lock(2)")
        for limit in (0, 0.1):
            with pytest.raises(LockTimeout):
                async with locks.lock_many([3, 2, 1], acquire_timeout=limit):
                    raise AssertionError("2 is not free")
            assert [x.objid for x in pg_cluster.advisory_locks(pg_dsn)] == [2]
        with anyio.move_on_after(0.1) as scope:
            async with locks.lock_many([3, 2, 1]):
                raise AssertionError("2 is not free")
        assert scope.cancelled_caught
        assert [x.objid for x in pg_cluster.advisory_locks(pg_dsn)] == [2]
        await settled(locks)
    assert [name for name, _ in events].count("lock.acquire_timed_out") == 2


async def test_the_loss_of_one_of_several(pg_dsn, pg_cluster, settled):
    async with open_locks(pg_dsn, max_locks_per_session=1) as locks:
        with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
            async with locks.lock_many([1, 2, 3]) as held:
                pg_cluster.terminate_backend(held[1].backend_pid)
                await anyio.sleep_forever()
        assert caught.value.reason == "terminated"
        assert not pg_cluster.advisory_locks(pg_dsn)
        await settled(locks)


async def test_several_fenced(pg_dsn, settled):
    async with open_locks(pg_dsn) as locks, open_connection(pg_dsn) as conn:
        await locks.create_fence_table()
        for turn in (1, 2):
            async with locks.lock_many([1, 2], fenced=True) as held:
                assert [lock.fencing_token for lock in held] == [turn, turn]
                async with conn.transaction():
                    for lock in held:
                        await lock.guard(conn)
        await settled(locks)


async def test_several_of_many_tasks_make_no_deadlock(pg_dsn, settled):
    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two:

        async def take(locks, keys) -> None:
            for _ in range(5):
                async with locks.lock_many(keys):
                    await anyio.lowlevel.checkpoint()

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for locks in (one, two):
                    for keys in ([1, 2, 3], [3, 2, 1], [2, 1], [3, 1], [(0, 1), 1, (0, 0)]):
                        tasks.start_soon(take, locks, keys)
        await settled(one)
        await settled(two)


# ---------------------------------------------------------------- the end of it


async def test_closing_it_ends_what_other_tasks_hold_and_want(pg_dsn, waiting, gone):
    ends: dict[str, BaseException] = {}

    async def note(name, block) -> None:
        try:
            async with block:
                await anyio.sleep_forever()
        except (LockLost, anyio.ClosedResourceError) as exc:
            ends[name] = exc

    async with open_session(pg_dsn) as other, anyio.create_task_group() as tasks:
        await other.execute("SELECT pg_advisory_lock(9), pg_advisory_lock(8)")
        with anyio.fail_after(SOON):
            async with open_locks(pg_dsn, max_waiting_sessions=1) as locks:
                tasks.start_soon(note, "holder", locks.lock(1))
                tasks.start_soon(note, "reader", locks.lock(2, shared=True))
                tasks.start_soon(note, "several", locks.lock_many([3, 4]))
                while locks.statistics().held < 4:  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.01)
                tasks.start_soon(note, "in line", locks.lock(1))
                tasks.start_soon(note, "in the queue", locks.lock(9))
                await waiting(1)
                tasks.start_soon(note, "in line behind it", locks.lock(9))
                tasks.start_soon(note, "polls", locks.lock(8))
                await in_line(locks, 4)
        await other.execute("SELECT pg_advisory_unlock_all()")
        await gone(sessions=1)
        with anyio.fail_after(SOON):
            while len(ends) < 7:  # noqa: ASYNC110 - who polls looks again in a second at most
                await anyio.sleep(0.01)
        for name in ("holder", "reader", "several"):
            assert cast("LockLost", ends[name]).reason == "closed"
        for name in ("in line", "in the queue", "in line behind it", "polls"):
            assert isinstance(ends[name], anyio.ClosedResourceError)
        for use in (locks.ping, locks.holders, locks.waiters, locks.create_fence_table):
            with pytest.raises(anyio.ClosedResourceError):
                await use()
        with pytest.raises(anyio.ClosedResourceError):
            async with locks.lock(1):
                raise AssertionError("closed")
        assert locks.statistics().sessions == 0


async def test_a_body_that_outlives_its_locks(pg_dsn, open_quick, gone):
    async def linger(*, task_status) -> None:
        with pytest.raises(LockLost) as caught:
            async with locks.lock(1) as lock:
                task_status.started(lock)
                with anyio.move_on_after(SOON, shield=True):
                    await over.wait()
        assert caught.value.reason == "closed"

    over = anyio.Event()
    async with anyio.create_task_group() as tasks:
        async with open_quick(pg_dsn) as locks:
            lock = await tasks.start(linger)
        assert lock.is_lost
        await gone()
        over.set()


async def test_a_detached_lock_ends_with_it(pg_dsn, gone):
    async with open_locks(pg_dsn) as locks:
        async with locks.lock(1) as lock:
            detached = lock.detach()
        assert not detached.is_lost
    assert (await detached.wait_lost()).reason == "closed"
    with pytest.raises(LockLost):
        await detached.release()
    await gone()


# ---------------------------------------------------------------- detach, early release


async def test_detach(source, pg_cluster, pg_dsn, gone):
    async with pg_lock(source, 1) as lock:
        detached = lock.detach()
        with pytest.raises(LockNotHeldError, match="detached"):
            lock.assert_held()
    async with pg_try_lock(pg_dsn, 1) as other:
        assert other is None
    assert detached.key == lock.key
    assert not detached.is_lost
    assert detached.fencing_token is None
    assert "held" in repr(detached)
    await detached.release()
    with pytest.raises(LockNotHeldError):
        await detached.release()
    with pytest.raises(LockNotHeldError):
        await detached.wait_lost()
    await gone(beside=source)
    async with pg_lock(source, 1):
        pass


async def test_a_detached_lock_that_is_lost(source, pg_cluster, gone):
    async with pg_lock(source, 1) as lock:
        detached = lock.detach()
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                assert (await detached.wait_lost()).reason == "terminated"

            tasks.start_soon(wait)
            await anyio.sleep(0.02)
            pg_cluster.terminate_backend(detached.backend_pid)
    assert detached.is_lost
    with pytest.raises(LockLost):
        await detached.release()


async def test_a_detached_lock_is_nobodys(pg_dsn, settled):
    """Not its task's, whose number another task may have one day."""
    async with open_locks(pg_dsn) as locks:
        async with locks.lock(1) as lock:
            detached = lock.detach()
        with pytest.raises(LockTimeout):
            async with locks.lock(1, acquire_timeout=0.05):
                raise AssertionError("not free")
        await detached.release()
        async with locks.lock(1):
            pass
        await settled(locks)


async def test_released_early_it_is_not_its_tasks(source, pg_dsn):
    async with open_session(pg_dsn) as other:
        async with pg_lock(source, 1) as lock:
            await lock.release()
            await other.execute("SELECT pg_advisory_lock(1)")
            with pytest.raises(LockTimeout):
                async with pg_lock(source, 1, acquire_timeout=0.1):
                    raise AssertionError("not free")
            await other.execute("SELECT pg_advisory_unlock(1)")
            async with pg_lock(source, 1):
                pass


# ---------------------------------------------------------------- names, looking, force


async def test_looking_at_another_process(pg_dsn, another_process, settled):
    async with open_locks(pg_dsn, namespace="ns") as locks:
        process = another_process("nightly")
        with anyio.fail_after(SOON):
            assert await anyio.to_thread.run_sync(process.stdout.readline) == "got it\n"
            while (  # noqa: ASYNC110 - another process tells its name
                found := await locks.holders("nightly")
            )[0].key.name is None:
                await anyio.sleep(0.02)
        (holder,) = found
        assert holder.key == locks.key("nightly") == LockKey.named("nightly", namespace="ns")
        assert holder.application_name == "pgstructured/locks/ns"
        assert (holder.granted, holder.shared) == (True, False)
        assert await locks.is_locked("nightly")
        assert not await locks.is_locked("other")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold, locks, "nightly")
            with anyio.fail_after(SOON):
                while not (  # noqa: ASYNC110 - it is the server's
                    waiters := await locks.waiters("nightly")
                ):
                    await anyio.sleep(0.02)
            assert waiters[0].blocked_by == (holder.backend_pid,)
            assert waiters[0].key.name == "nightly"
            assert await locks.force_release("nightly") == 1
            with anyio.fail_after(SOON):
                found = [holder]
                while found[:1] in ([holder], []):
                    found = await locks.holders()
                    await anyio.sleep(0.02)
            assert found[0].backend_pid != holder.backend_pid
            tasks.cancel_scope.cancel()
        assert await locks.force_release("nightly") == 0
        await settled(locks)


async def test_names_of_what_was_waited_for(pg_dsn, waiting):
    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two:
        async with anyio.create_task_group() as tasks:
            async with one.lock("nightly"):
                tasks.start_soon(hold, two, "nightly")
                await waiting(1)
            with anyio.fail_after(SOON):
                while [  # noqa: ASYNC110 - it is the server's
                    x.key.name for x in await one.holders()
                ] != ["nightly"]:
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()


async def test_ping_and_statistics(pg_dsn, fault_proxy, open_quick):
    async with open_quick(fault_proxy.dsn(pg_dsn)) as locks:
        await locks.ping()
        assert repr(locks) == "<Locks 1 sessions, 0 held>"
        fault_proxy.refuse()
        fault_proxy.reset()
        with pytest.raises(psycopg.OperationalError):
            await locks.ping()
        fault_proxy.accept()
        await locks.ping()
        told = locks.statistics()
        assert told.sessions == 1
        assert told.sessions_opened == 2
        assert told.sessions_lost == 1


# ---------------------------------------------------------------- what it is given


async def test_namespaces_keep_names_apart(pg_dsn):
    async with open_locks(pg_dsn, namespace="a") as a, open_locks(pg_dsn, namespace="b") as b:
        assert a.key("x") == LockKey.named("x", namespace="a") != b.key("x")
        assert a.key(1) == b.key(1) == LockKey.bigint(1)
        assert a.key(LockKey.sqlx("x")) == LockKey.sqlx("x")
        async with a.lock("x"), b.lock("x", acquire_timeout=0):
            pass
    async with open_locks(pg_dsn, namespace=42, key_scheme=LockKey.platform_go) as go:
        assert go.key("my-lock") == LockKey.bigint(-1711937347357524145)
    async with open_locks(pg_dsn, key_scheme=LockKey.sqlx) as sqlx:
        assert sqlx.key("my-lock") == LockKey.bigint(-7577905956304869515)


async def test_bad_options(pg_dsn):
    for options, words in (
        ({"heartbeat": 0}, "heartbeat"),
        ({"lost_after": 5.0}, "heartbeat"),
        ({"lost_after": 30.0}, "server_timeout"),
        ({"server_timeout": math.nan}, "server_timeout"),
        ({"max_locks_per_session": 0}, "max_locks_per_session"),
        ({"max_locks_per_session": 1.5}, "max_locks_per_session"),
        ({"max_waiting_sessions": -1}, "max_waiting_sessions"),
        ({"idle_session_ttl": 0}, "idle_session_ttl"),
        ({"release_timeout": -1}, "release_timeout"),
        ({"connect_timeout": math.inf}, "connect_timeout"),
        ({"pooler": "perhaps"}, "pooler"),
        ({"fence_table": "a.b.c"}, "fence table"),
        ({"fence_table": ""}, "fence table"),
        ({"namespace": "x", "key_scheme": LockKey.sqlx}, "namespace"),
        ({"namespace": 2**31, "key_scheme": LockKey.platform_go}, "namespace"),
    ):
        with pytest.raises(ValueError, match=words):
            async with open_locks(pg_dsn, **options):
                raise AssertionError("never")


async def test_bad_requests(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        for key in ("", 2**63, (1, 2**31), (2**31, 1)):
            with pytest.raises(LockKeyError):
                locks.lock(key)
        for options in ({"ttl": 0}, {"ttl": -1}, {"acquire_timeout": -1}, {"ttl": math.nan}):
            with pytest.raises(ValueError, match=next(iter(options))):
                locks.lock(1, **options)
        with pytest.raises(ValueError, match="fenced"):
            locks.lock(1, shared=True, fenced=True)
        with pytest.raises(TypeError):
            locks.lock(cast("Any", None))


# ---------------------------------------------------------------- ttl


async def test_a_ttl_is_of_its_own_lock(pg_dsn, pg_cluster, settled):
    """Its neighbours on the session go on."""
    async with open_locks(pg_dsn) as locks:
        async with locks.lock(1) as neighbour, locks.lock(2, ttl=60) as long:
            with pytest.raises(LockLost) as caught:
                async with locks.lock(3, ttl=0.05) as short:
                    assert short.backend_pid == neighbour.backend_pid == long.backend_pid
                    await anyio.sleep(SOON)
            assert caught.value.reason == "expired"
            neighbour.assert_held()
            await long.refresh(30)
            assert long.ttl == 30
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 2
        await settled(locks)


# ---------------------------------------------------------------- fencing


async def test_fenced_on_every_source(source, pg_dsn):
    async with open_locks(pg_dsn) as locks:
        await locks.create_fence_table()
    async with open_connection(pg_dsn) as conn:
        for turn in (1, 2, 3):
            async with pg_lock(source, "f", fenced=True) as lock:
                assert lock.fencing_token == turn
                async with conn.transaction():
                    await lock.guard(conn)
                with pytest.raises(LockError):
                    await lock.guard(conn)
        async with pg_lock(source, "f") as lock:
            assert lock.fencing_token is None
            with pytest.raises(LockError, match="fenced=True"):
                await lock.guard(conn)


async def test_a_fenced_try_waits_for_no_guarded_transaction(source, pg_dsn, unlocked):
    async with open_locks(pg_dsn) as locks:
        await locks.create_fence_table()
        async with locks.lock("f", fenced=True):
            pass
    async with open_connection(pg_dsn) as conn:
        async with conn.transaction():
            await FenceTable().guard(conn, LockKey.named("f"), 1)
            with anyio.fail_after(SOON):
                async with pg_try_lock(source, "f", fenced=True) as lock:
                    assert lock is None
                with pytest.raises(LockTimeout, match="not free"):
                    async with pg_lock(source, "f", fenced=True, acquire_timeout=0):
                        raise AssertionError("it has no token")
                await unlocked()
        async with pg_try_lock(source, "f", fenced=True) as lock:
            assert lock is not None
            assert (lock.fencing_token, lock.previous_ended_cleanly) == (2, True)


@pytest.mark.parametrize("kind", ["conninfo", "locks"])
async def test_fenced_after_a_long_wait(kind, pg_dsn, open_quick, quick, waiting):
    """The token's session has its own time for connecting."""
    async with open_quick(pg_dsn, connect_timeout=1.0) as locks, open_session(pg_dsn) as other:
        await locks.create_fence_table()
        await other.execute("SELECT pg_advisory_lock(1)")
        source = pg_dsn if kind == "conninfo" else locks

        async def take() -> None:
            options = LockOptions(connect_timeout=1.0)
            async with quick(source, 1, fenced=True, options=options) as lock:
                assert lock.fencing_token == 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take)
            await waiting(1)
            await anyio.sleep(1.1)
            await other.execute("SELECT pg_advisory_unlock(1)")


async def test_the_fence_table_is_dropped_under_a_lock(pg_dsn, pg_cluster, settled):
    async with open_locks(pg_dsn) as locks, open_connection(pg_dsn) as conn:
        await locks.create_fence_table()
        async with locks.lock(2) as neighbour:
            async with locks.lock(1, fenced=True):
                await conn.execute("DROP TABLE pgstructured_fence")
            await neighbour.refresh()
            assert [x.objid for x in pg_cluster.advisory_locks(pg_dsn)] == [2]
        await settled(locks)


@pytest.mark.parametrize("is_detached", [False, True])
@pytest.mark.parametrize("kind", ["conninfo", "election"])
async def test_the_fence_table_is_dropped_under_a_lock_with_a_session_of_its_own(
    kind, is_detached, pg_dsn, events, gone
):
    """It was held to the end of its body, and then given up: that is no loss."""
    async with open_locks(pg_dsn) as locks, open_connection(pg_dsn) as conn:
        await locks.create_fence_table()
        election = locks.election("e", candidate="a")
        async with AsyncExitStack() as stack:
            if kind == "conninfo":
                lock: HeldLock = await stack.enter_async_context(pg_lock(pg_dsn, 1, fenced=True))
            else:
                lock = await stack.enter_async_context(election.campaign(fenced=True))
            await conn.execute("DROP TABLE pgstructured_fence")
            if is_detached:
                await lock.detach().release()
    assert [name for name, _ in events][-1] == "lock.release_failed"
    await gone()


# ---------------------------------------------------------------- servers


async def test_nasty_settings_of_the_role(pg_cluster, pg_dsn, open_quick, waiting):
    name = pg_dsn.rsplit("/", 1)[1]
    for setting in ("statement_timeout", "lock_timeout", "idle_session_timeout"):
        pg_cluster.execute(f"ALTER DATABASE {name} SET {setting} = '100ms'")
    async with open_quick(pg_dsn) as one, open_quick(pg_dsn) as two:

        async def take() -> None:
            async with two.lock(1):
                await anyio.sleep(0.3)

        async with anyio.create_task_group() as tasks:
            async with one.lock(1):
                tasks.start_soon(take)
                await waiting(1)
                await anyio.sleep(0.3)
        assert one.statistics().sessions_lost == two.statistics().sessions_lost == 0


async def test_lock_table_full():
    settings = {"max_connections": "10", "max_locks_per_transaction": "10"}
    with Cluster(settings=settings) as cluster:
        async with open_locks(cluster.dsn(), max_locks_per_session=100_000) as locks:
            with psycopg.connect(cluster.dsn(), autocommit=True) as full:
                with pytest.raises(psycopg.errors.OutOfMemory):
                    for first in range(0, 10**6, 500):
                        full.execute(
                            "SELECT pg_advisory_lock(n) FROM generate_series(%s::int8, %s) n",
                            [first, first + 499],
                        )
                for block in (locks.lock(-1), locks.try_lock(-1), locks.lock_many([-1, -2])):
                    with pytest.raises(LockCapacityError, match="max_locks_per_transaction"):
                        async with block:
                            raise AssertionError("full")
                assert locks.statistics().held == 0
                full.execute("SELECT pg_advisory_unlock_all()")
            async with locks.lock(-1, acquire_timeout=SOON):
                assert len(cluster.advisory_locks("postgres")) == 1


async def test_standby():
    with Cluster() as primary:
        standby = primary.standby()
        with pytest.raises(NotPrimaryError, match="connect to the primary"):
            async with open_locks(standby.dsn()):
                raise AssertionError("a standby")


async def test_through_poolers(pg_dsn, pgbouncer_transaction, pgbouncer_session):
    with pytest.raises(SessionRequiredError):
        async with open_locks(pgbouncer_transaction.dsn(pg_dsn)):
            raise AssertionError("no session")
    with pytest.raises(SessionRequiredError):
        async with open_locks(pg_dsn, pooler="transaction"):
            raise AssertionError("no session")
    dsn = pgbouncer_session.dsn(pg_dsn)
    async with open_locks(dsn, pooler="session") as locks, open_locks(pg_dsn) as direct:
        async with locks.lock("x") as lock:
            (holder,) = await direct.holders()
            assert holder.backend_pid == lock.backend_pid
            await refused(direct, "x")


async def test_nobody_there(pg_dsn, fault_proxy, open_quick):
    fault_proxy.refuse()
    began = time.monotonic()
    with pytest.raises(psycopg.OperationalError):
        async with open_quick(fault_proxy.dsn(pg_dsn), connect_timeout=0.3):
            raise AssertionError("nobody there")
    assert time.monotonic() - began < SOON
    with pytest.raises(ConninfoError):
        async with open_locks("host=a nonsense=b"):
            raise AssertionError("never")


async def test_too_many_connections():
    settings = {"max_connections": "8", "superuser_reserved_connections": "0"}
    with Cluster(settings=settings) as cluster:
        options: dict[str, Any] = {
            "max_locks_per_session": 1,
            "connect_timeout": 1.0,
            "release_timeout": 1.0,
        }
        async with open_locks(cluster.dsn(), backoff=Backoff(maximum=0.1), **options) as locks:
            async with AsyncExitStack() as stack:
                for _ in range(7):
                    await stack.enter_async_context(open_session(cluster.dsn()))
                async with locks.lock(1) as lock:
                    with pytest.raises(psycopg.OperationalError, match="too many"):
                        async with locks.lock(2):
                            raise AssertionError("no session for it")
                    with pytest.raises(LockTimeout) as caught:
                        async with locks.lock(2, acquire_timeout=0.8):
                            raise AssertionError("no session for it")
                    assert "too many" in str(caught.value.__cause__)
                    lock.assert_held()
            async with locks.lock(1), locks.lock(2):
                pass


async def test_who_waits_survives_an_outage(pg_dsn, fault_proxy, open_quick, waiting, settled):
    """In the server's queue or beside it, and for longer than connect_timeout before."""
    got: list[int] = []

    async def take(key) -> None:
        async with locks.lock(key):
            got.append(key)

    backoff = Backoff(initial=0.05, maximum=0.1)
    options = {"max_waiting_sessions": 1, "connect_timeout": 1.5, "backoff": backoff}
    async with (
        open_session(pg_dsn) as other,
        open_quick(fault_proxy.dsn(pg_dsn), **options) as locks,
    ):
        await other.execute("SELECT pg_advisory_lock(1), pg_advisory_lock(2)")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, 1)
                await waiting(1)
                tasks.start_soon(take, 2)
                await anyio.sleep(1.7)
                fault_proxy.refuse()
                fault_proxy.reset()
                await anyio.sleep(0.1)
                fault_proxy.accept()
                await waiting(1)
                await other.execute("SELECT pg_advisory_unlock_all()")
        assert sorted(got) == [1, 2]
        await settled(locks)


async def test_a_conninfo_callable_that_fails_later(pg_dsn, waiting, open_quick):
    """Its error is for whoever needed a session; nobody else is ended by it."""
    asked = 0

    async def conninfo() -> str:
        nonlocal asked
        asked += 1
        if asked > 2:
            raise KeyError("mine")
        return str(pg_dsn)

    async def take(key) -> None:
        async with locks.lock(key):
            pass

    async with open_session(pg_dsn) as other, open_quick(conninfo, max_waiting_sessions=1) as locks:
        await other.execute("SELECT pg_advisory_lock(1), pg_advisory_lock(2)")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, 1)
                await waiting(1)
                async with locks.lock(3) as held:
                    tasks.start_soon(take, 2)  # hears of it on a session that can't be had
                    while asked < 3:  # noqa: ASYNC110 - nobody tells
                        await anyio.sleep(0.01)
                    await anyio.sleep(0.05)
                    held.assert_held()
                    with pytest.raises(KeyError, match="mine"):
                        await locks.ping()
                    await other.execute("SELECT pg_advisory_unlock_all()")


# ---------------------------------------------------------------- the seeds


async def test_seed_000_sqlx_guard(pg_dsn, pg_cluster):
    """sqlx' PgAdvisoryLockGuard: on your own connection, usable under it, recursive; released
    eagerly (release_now), or kept beyond the block (leak) until unlocked by force."""
    key = LockKey.sqlx("my first Postgres advisory lock!")
    assert key.as_bigint == -5560419505042474287
    async with open_connection(pg_dsn) as conn:
        async with pg_lock(conn, key) as guard:
            assert guard.connection is conn
            cursor = await guard.connection.execute("SELECT 1")
            assert await cursor.fetchone() == (1,)
            async with pg_lock(conn, key):  # as Postgres counts
                pass
            guard.assert_held()
            async with pg_try_lock(pg_dsn, (1, 2)) as other:
                assert other is not None
            await guard.release()  # release_now: on the server, not "on next use"
            assert not pg_cluster.advisory_locks(pg_dsn)
        async with pg_lock(conn, key) as guard:
            leaked = guard.detach()  # leak
        assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
        cursor = await conn.execute("SELECT pg_advisory_unlock(%s)", [key.as_bigint])
        assert await cursor.fetchone() == (True,)  # force_release: sqlx' way, on that session
        with pytest.raises(LockLost):  # and here it is told, where sqlx logs a warning
            await leaked.release()


async def test_seed_001_distributed_lock(pg_dsn, pg_cluster, settled):
    """platform-go's Locker: try, TTL and Refresh, Release, Close, namespaced keys."""
    options: dict[str, Any] = {"namespace": 42, "key_scheme": LockKey.platform_go}
    async with open_locks(pg_dsn, **options) as locker, open_locks(pg_dsn, **options) as other:
        async with locker.try_lock("my-lock", ttl=1.2) as lock:  # Acquire
            assert lock is not None
            (seen,) = pg_cluster.advisory_locks(pg_dsn)
            assert (seen.classid, seen.objid, seen.objsubid) == lock.key.pg_locks_ids
            assert lock.key == LockKey.bigint(-1711937347357524145)
            assert lock.ttl == 1.2
            await refused(other, "my-lock")  # ErrLockNotAcquired
            while anyio.current_time() < lock.acquired_at + 1.3:
                await anyio.sleep(0.2)
                await lock.refresh()  # Refresh: the session is verified, and the TTL starts anew
            await lock.refresh(60)
            await lock.release()  # Release
            with pytest.raises(LockNotHeldError):  # ErrLockNotHeld
                await lock.release()
        with pytest.raises(LockLost) as caught:  # there the TTL is advisory; here it is kept
            async with locker.lock("my-lock", ttl=0.05):
                await anyio.sleep(SOON)
        assert caught.value.reason == "expired"
        with pytest.raises(LockKeyError):  # ErrEmptyKey
            locker.lock("")
        with pytest.raises(ValueError, match="ttl"):  # ErrInvalidTTL
            locker.lock("x", ttl=0)
        await locker.ping()  # Ping
        await settled(locker)
        async with open_locks(pg_dsn, namespace=43, key_scheme=LockKey.platform_go) as apart:
            async with locker.lock("my-lock"), apart.lock("my-lock", acquire_timeout=0):
                pass
    async with open_locks(pg_dsn, **options) as locker, locker.lock("a") as lock:
        lock.detach()
    assert not pg_cluster.advisory_locks(pg_dsn)  # Close releases all


async def test_a_session_that_cannot_be_had_is_told():
    """Also where nobody waits for its error any more, or polls instead."""
    error = RuntimeError("no token today")

    async def conninfo() -> str:
        raise error

    told: list[object] = []
    with instrumented(lambda event: told.append((event.name, dict(event.facts)))):
        with pytest.raises(RuntimeError, match="no token"):
            async with open_locks(conninfo):
                pytest.fail("opened")
    assert told == [("lock.session_failed", {"error": error})]
