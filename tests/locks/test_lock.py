"""What a lock does on every source: take, hold, count, refresh, release."""

# Bodies that block the event loop are a part of what is tested.

from __future__ import annotations

import math
import sys
from datetime import timedelta
from typing import Any, cast

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from pgstructured.driver import Connection
from pgstructured.errors import (
    LockAlreadyHeldError,
    LockError,
    LockKeyError,
    LockLost,
    LockNotHeldError,
    LockTimeout,
)
from pgstructured.locks import HeldLock, LockKey, pg_lock, pg_try_lock
from pgstructured.locks._options import LockOptions
from pgstructured.pool import Pool
from pgstructured.testing import assert_cancellable

from .conftest import hold


async def test_a_lock_is_held_for_its_block(source, pg_cluster, pg_dsn, events):
    async with pg_lock(source, "a") as lock:
        (held,) = pg_cluster.advisory_locks(pg_dsn)
        assert (held.classid, held.objid, held.objsubid) == LockKey.named("a").pg_locks_ids
        assert held.pid == lock.backend_pid
        assert not held.shared
        assert lock.key == LockKey.named("a")
        if isinstance(source, Pool):
            assert isinstance(lock.connection, Connection)
        else:
            assert lock.connection is (source if isinstance(source, Connection) else None)
        assert lock.ttl is None
        assert not lock.shared
        assert not lock.is_lost
        now = anyio.current_time()
        assert 0 <= now - lock.acquired_at < 10
        assert 0 <= now - lock.last_confirmed < 10
        assert 0 <= lock.waited < 10  # a loop's clock may tick in milliseconds
        assert repr(lock) == f"<HeldLock {lock.key} exclusive held>"
        lock.assert_held()
        await lock.refresh()
    assert not pg_cluster.advisory_locks(pg_dsn)
    assert not lock.is_lost
    assert [name for name, _ in events] == [
        "lock.acquire_started",
        "lock.acquired",
        "lock.refreshed",
        "lock.released",
    ]
    assert events[1][1] == {
        "key": lock.key,
        "shared": False,
        "backend_pid": lock.backend_pid,
        "waited": lock.waited,
    }


async def test_every_kind_of_key(source, pg_cluster, pg_dsn):
    for key in ("name", -(2**63), (-1, 5), LockKey.pair(1, 2)):
        async with pg_lock(source, key, shared=True) as lock:
            (held,) = pg_cluster.advisory_locks(pg_dsn)
            assert (held.classid, held.objid, held.objsubid) == lock.key.pg_locks_ids
            assert held.shared
            assert lock.shared
            assert "shared" in repr(lock)


async def test_release_before_the_end(source, pg_cluster, pg_dsn, gone):
    async with pg_lock(source, 1) as lock:
        await lock.release()
        await gone(beside=source)
        with pytest.raises(LockNotHeldError, match="released already"):
            await lock.release()
        with pytest.raises(LockNotHeldError):
            lock.assert_held()
        with pytest.raises(LockNotHeldError):
            await lock.refresh()
        with pytest.raises(LockNotHeldError):
            await lock.wait_lost()
        assert not lock.is_lost
        assert "released" in repr(lock)
        await anyio.sleep(0.02)  # its watcher has ended, and not cancelled the body
    async with pg_lock(source, 1):
        pass


async def test_after_the_block_it_is_not_held(source):
    async with pg_lock(source, 1) as lock:
        pass
    with pytest.raises(LockNotHeldError):
        lock.assert_held()


async def test_try(source, pg_dsn, events):
    async with pg_lock(source, 1):
        async with pg_try_lock(source, 2) as other:
            assert other is not None

        async def try_it() -> None:
            async with pg_try_lock(pg_dsn, 1) as lock:
                assert lock is None
            async with pg_try_lock(pg_dsn, 1, shared=True) as lock:
                assert lock is None
            with pytest.raises(LockTimeout, match="not free"):
                async with pg_lock(pg_dsn, 1, acquire_timeout=0):
                    raise AssertionError("not free")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(try_it)
    assert [name for name, _ in events].count("lock.acquire_timed_out") == 1


async def test_shared_and_exclusive(source, pg_dsn):
    async with pg_lock(source, 1, shared=True):
        async with pg_lock(pg_dsn, 1, shared=True, acquire_timeout=0):
            pass

        async def exclusive() -> None:
            async with pg_try_lock(pg_dsn, 1) as lock:
                assert lock is None

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exclusive)


async def test_refused(source, pg_dsn):
    async with anyio.create_task_group() as tasks:
        await tasks.start(hold, pg_lock(pg_dsn, 1))
        async with pg_try_lock(source, 1) as lock:
            assert lock is None
        with pytest.raises(LockTimeout, match="not free"):
            async with pg_lock(source, 1, acquire_timeout=0):
                raise AssertionError("not free")
        tasks.cancel_scope.cancel()


async def test_timeout(source, pg_dsn, gone, events):
    async with anyio.create_task_group() as tasks:
        await tasks.start(hold, pg_lock(pg_dsn, 1))
        limit = 0.8 if isinstance(source, str) else 0.1  # it connects first
        with pytest.raises(LockTimeout, match=rf"not granted within {limit} s") as caught:
            async with pg_lock(source, 1, acquire_timeout=limit):
                raise AssertionError("not free")
        assert isinstance(caught.value, TimeoutError)
        tasks.cancel_scope.cancel()
    await gone(beside=source)
    assert [name for name, _ in events].count("lock.acquire_timed_out") == 1
    async with pg_lock(source, 1, acquire_timeout=5):
        pass  # and the source is as good as before


async def test_a_timeout_of_the_bodys_own_is_no_acquire_that_timed_out(source, events):
    with pytest.raises(LockTimeout, match="mine"):
        async with pg_lock(source, 1):
            raise LockTimeout("mine")
    assert "lock.acquire_timed_out" not in [name for name, _ in events]
    assert events[-1][0] == "lock.released"


async def test_it_waits_for_its_turn(source, pg_dsn, waiting):
    order: list[str] = []

    async def second() -> None:
        async with pg_lock(source, 1) as lock:
            order.append("second")
            assert lock.waited > 0
            assert anyio.current_time() - lock.last_confirmed < 5

    async with anyio.create_task_group() as tasks:
        async with pg_lock(pg_dsn, 1):
            tasks.start_soon(second)
            await waiting()
            order.append("first")
    assert order == ["first", "second"]


async def test_the_same_task_again_is_refused(pg_dsn):
    async with pg_lock(pg_dsn, 1):
        for shared in (False, True):
            with pytest.raises(LockAlreadyHeldError, match="holds the lock 1 already") as caught:
                async with pg_lock(pg_dsn, 1, shared=shared):
                    raise AssertionError("a deadlock")
            assert isinstance(caught.value, RuntimeError)
        with pytest.raises(LockAlreadyHeldError):
            async with pg_try_lock(pg_dsn, 1):
                raise AssertionError("held")
    async with pg_lock(pg_dsn, 1, shared=True):
        with pytest.raises(LockAlreadyHeldError):
            async with pg_lock(pg_dsn, 1):
                raise AssertionError("a deadlock")
        async with pg_lock(pg_dsn, 1, shared=True), pg_lock(pg_dsn, 1, shared=True):
            pass
    async with pg_lock(pg_dsn, 1):
        pass  # nothing is remembered


async def test_shared_again_behind_a_writer_is_refused(pg_dsn, waiting):
    """The writer waits for this task, so waiting behind the writer would be for ever."""

    async def write() -> None:
        async with pg_lock(pg_dsn, 1):
            pass

    async with anyio.create_task_group() as tasks:
        async with pg_lock(pg_dsn, 1, shared=True):
            tasks.start_soon(write)
            await waiting()
            with pytest.raises(LockAlreadyHeldError):
                async with pg_lock(pg_dsn, 1, shared=True):
                    raise AssertionError("a deadlock")


async def test_ttl(source, pg_cluster, pg_dsn, gone, events):
    with pytest.raises(LockLost, match="its ttl has run out") as caught:
        async with pg_lock(source, 1, ttl=0.1) as lock:
            assert lock.ttl == 0.1
            try:
                await anyio.sleep(10)
            finally:
                # Not unlocked before the body has ended.
                assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
    assert caught.value.reason == "expired"
    assert caught.value.certain
    assert caught.value.sqlstate is None
    assert caught.value.__cause__ is None
    assert caught.value.held_for >= 0.1 - 1e-6  # the difference of two floats
    assert lock.is_lost
    for use in (lock.release, lock.refresh):
        with pytest.raises(LockLost):
            await use()
    with pytest.raises(LockLost):
        lock.assert_held()
    await gone(beside=source)
    assert [name for name, _ in events] == [
        "lock.acquire_started",
        "lock.acquired",
        "lock.lost",
    ]
    assert events[-1][1]["reason"] == "expired"


async def test_refresh_puts_the_ttl_off(source):
    async with pg_lock(source, 1, ttl=0.6) as lock:
        while anyio.current_time() < lock.acquired_at + 0.7:
            await anyio.sleep(0.1)
            await lock.refresh()
        await lock.refresh(20)
        assert lock.ttl == 20
        await anyio.sleep(0.7)
    with pytest.raises(LockLost):
        async with pg_lock(source, 1) as lock:
            await lock.refresh(0.05)
            await anyio.sleep(10)


async def test_a_body_that_does_not_look_up_is_told_at_its_end(source):
    import time

    with pytest.raises(LockLost):
        async with pg_lock(source, 1, ttl=0.05) as lock:
            time.sleep(0.1)
            assert lock.is_lost
            with pytest.raises(LockLost):
                lock.assert_held()
    with pytest.raises(LockLost):
        async with pg_lock(source, 1, ttl=0.05):
            time.sleep(0.1)


async def test_bad_times(source):
    for bad in cast("Any", (0, -1, math.nan, "1", timedelta(1))):
        with pytest.raises(ValueError, match="ttl must be"):
            async with pg_lock(source, 1, ttl=bad):
                raise AssertionError("never")
        with pytest.raises(ValueError, match="ttl must be"):
            async with pg_try_lock(source, 1, ttl=bad):
                raise AssertionError("never")
        async with pg_lock(source, 1) as lock:
            with pytest.raises(ValueError, match="ttl must be"):
                await lock.refresh(bad)


async def test_bad_timeouts(pg_dsn):
    for bad in cast("Any", (-1, -0.001, math.nan, math.inf, "1", timedelta(1))):
        with pytest.raises(ValueError, match="acquire_timeout must be"):
            async with pg_lock(pg_dsn, 1, acquire_timeout=bad):
                raise AssertionError("never")


async def test_bad_keys_and_sources(pg_dsn):
    with pytest.raises(LockKeyError):
        async with pg_lock(pg_dsn, ""):
            raise AssertionError("never")
    with pytest.raises(TypeError, match="source must be"):
        async with pg_lock(cast("Any", None), 1):
            raise AssertionError("never")
    with pytest.raises(TypeError, match="no public constructor"):
        cast("Any", HeldLock)()


async def test_the_bodys_error_comes_out_bare(source, gone):
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        async with pg_lock(source, 1):
            raise error
    assert caught.value is error
    assert caught.value.__cause__ is None
    await gone(beside=source)


async def test_entering_and_release_notice_a_pending_cancellation(source, gone):
    async def enter() -> None:
        async with pg_lock(source, 1):
            raise AssertionError("was not noticed")

    await assert_cancellable(enter)
    await gone(beside=source)
    async with pg_lock(source, 1) as lock:
        await assert_cancellable(lock.refresh)
        lock.assert_held()
        await assert_cancellable(lock.wait_lost)
        await assert_cancellable(lock.release)
        with pytest.raises(LockNotHeldError):
            lock.assert_held()
    await gone(beside=source)


async def test_two_processes_hand_over(source, pg_dsn, waiting, anyio_backend_name):
    """We wait in the server's queue, and have the lock once the other process lets it go."""
    program = (
        "import anyio, sys\n"
        "from pgstructured.locks import pg_lock\n"
        "async def main():\n"
        "    async with pg_lock(sys.argv[1], 'job') as lock:\n"
        "        print('got it', flush=True)\n"
        "        sys.stdin.readline()\n"
        "    print('let it go', flush=True)\n"
        "anyio.run(main, backend=sys.argv[2])\n"
    )
    backend = "trio" if anyio_backend_name == "asyncio" else "asyncio"
    async with await anyio.open_process(
        [sys.executable, "-c", program, pg_dsn, backend]
    ) as process:
        stdin, stdout = cast("Any", process.stdin), cast("Any", process.stdout)
        lines = BufferedByteReceiveStream(stdout)
        with anyio.fail_after(20):
            assert await lines.receive_until(b"\n", 100) == b"got it"
            async with anyio.create_task_group() as tasks:

                async def take() -> None:
                    async with pg_lock(source, "job") as lock:
                        assert lock.waited > 0

                tasks.start_soon(take)
                await waiting()
                await stdin.send(b"\n")
            assert await lines.receive_until(b"\n", 100) == b"let it go"
            await process.wait()
    assert process.returncode == 0


def test_options_are_checked():
    for bad, words in (
        ({"heartbeat": 15.0}, r"heartbeat \(15.0\) must be below lost_after \(15.0\)"),
        ({"lost_after": 30.0}, r"lost_after \(30.0\) must be below server_timeout"),
        ({"release_timeout": 0}, "release_timeout must be"),
        ({"connect_timeout": -1}, "connect_timeout must be"),
        ({"server_timeout": math.inf}, "server_timeout must be"),
        ({"heartbeat": math.nan}, "heartbeat must be"),
    ):
        with pytest.raises(ValueError, match=words):
            LockOptions(**bad)


def test_server_settings_are_those_that_the_server_knows():
    options = LockOptions()
    eleven = options.server_settings(110022)
    assert eleven["statement_timeout"] == eleven["lock_timeout"] == "0"
    assert "tcp_user_timeout" not in eleven
    thirteen = options.server_settings(130000)
    assert int(thirteen["tcp_user_timeout"]) >= options.server_timeout * 1000
    assert "idle_session_timeout" not in thirteen
    assert options.server_settings(140000)["idle_session_timeout"] == "0"
    assert "transaction_timeout" not in options.server_settings(160000)
    assert options.server_settings(170000)["transaction_timeout"] == "0"
    lasting = int(eleven["tcp_keepalives_idle"]) + int(eleven["tcp_keepalives_interval"]) * int(
        eleven["tcp_keepalives_count"]
    )
    assert lasting >= options.server_timeout


def test_errors_of_locks_share_a_base():
    assert issubclass(LockTimeout, LockError)
    assert issubclass(LockLost, LockError)
