"""Many readers or one writer."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import pytest

from pgstructured.errors import LockAlreadyHeldError, LockLost, LockTimeout
from pgstructured.locks import LockKey, RWLock, open_locks

SOON = 25  # seconds that nothing here takes on any machine


@pytest.fixture
def opened(pg_dsn):
    """Runs a test's body with `Locks`, and with others as another process has them."""

    @asynccontextmanager
    async def open_both():
        async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
            yield locks, others

    return open_both


async def test_it_is_the_lock_of_its_key(opened, pg_cluster, pg_dsn):
    async with opened() as (locks, _):
        rwlock = locks.rwlock("a")
        assert isinstance(rwlock, RWLock)
        assert rwlock.key == LockKey.named("a")
        assert repr(rwlock) == f"<RWLock {rwlock.key}>"
        async with rwlock.read() as held:
            (lock,) = pg_cluster.advisory_locks(pg_dsn)
            assert (lock.pid, lock.shared) == (held.backend_pid, True)
            assert held.shared
        async with rwlock.write() as held:
            (lock,) = pg_cluster.advisory_locks(pg_dsn)
            assert (lock.pid, lock.shared) == (held.backend_pid, False)
            assert not held.shared
        assert pg_cluster.advisory_locks(pg_dsn) == []
        with pytest.raises(TypeError):
            cast("Any", RWLock)()


async def test_readers_share_and_writers_do_not(opened):
    async with opened() as (locks, others):
        async with locks.rwlock("a").read():
            async with others.rwlock("a").read(acquire_timeout=0):
                for source in (locks, others):
                    with pytest.raises(LockAlreadyHeldError):
                        async with source.rwlock("a").write(acquire_timeout=0):
                            pass

        async def refused(kind) -> None:
            with pytest.raises(LockTimeout):
                async with getattr(others.rwlock("a"), kind)(acquire_timeout=0):
                    pass

        async with locks.rwlock("a").read(), anyio.create_task_group() as tasks:
            tasks.start_soon(refused, "write")
        async with locks.rwlock("a").write(), anyio.create_task_group() as tasks:
            tasks.start_soon(refused, "write")
            tasks.start_soon(refused, "read")


async def test_no_upgrade(opened):
    async with opened() as (locks, _):
        rwlock = locks.rwlock("a")
        async with rwlock.read():
            with pytest.raises(LockAlreadyHeldError):
                async with rwlock.write():
                    pass
            async with rwlock.read() as again:  # counts
                assert again.shared
        async with rwlock.write():
            for open_again in (rwlock.read, rwlock.write):
                with pytest.raises(LockAlreadyHeldError):
                    async with open_again():
                        pass


async def test_a_writer_that_waits_goes_before_readers_that_come_later(opened, waiting, pg_dsn):
    order: list[str] = []

    async def enter(source, kind, name) -> None:
        async with getattr(source.rwlock("a"), kind)():
            order.append(name)

    async with opened() as (locks, others), open_locks(pg_dsn) as third:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with locks.rwlock("a").read():
                    tasks.start_soon(enter, others, "write", "writer")
                    await waiting(1)
                    tasks.start_soon(enter, third, "read", "reader elsewhere")
                    await waiting(2)
                    tasks.start_soon(enter, others, "read", "reader beside it")
                    while others.statistics().tasks_waiting < 2:  # noqa: ASYNC110 - nobody tells
                        await anyio.sleep(0.005)
                    assert order == []
        assert order[0] == "writer"
        assert sorted(order[1:]) == ["reader beside it", "reader elsewhere"]


async def test_a_fenced_writer(opened):
    async with opened() as (locks, _):
        await locks.create_fence_table()
        tokens: list[int | None] = []
        for _ in range(2):
            async with locks.rwlock("a").write(fenced=True) as held:
                tokens.append(held.fencing_token)
        async with locks.rwlock("a").read() as held:
            assert held.fencing_token is None
        first, second = tokens
        assert first is not None
        assert second is not None
        assert second > first


@pytest.mark.parametrize("kind", ["read", "write"])
async def test_a_ttl(opened, kind):
    async with opened() as (locks, _):
        with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
            async with getattr(locks.rwlock("a"), kind)(ttl=0.05) as held:
                assert held.ttl == 0.05
                await anyio.sleep_forever()
        assert caught.value.reason == "expired"


@pytest.mark.parametrize("kind", ["read", "write"])
async def test_bad_figures(opened, kind):
    async with opened() as (locks, _):
        open_it = getattr(locks.rwlock("a"), kind)
        with pytest.raises(ValueError, match="acquire_timeout"):
            open_it(acquire_timeout=-1)
        with pytest.raises(ValueError, match="ttl"):
            open_it(ttl=0)


async def test_all_readers_of_a_lost_session_are_told(opened, pg_cluster):
    async with opened() as (locks, _):
        losses: list[str] = []

        async def read(*, task_status) -> None:
            try:
                async with locks.rwlock("a").read() as held:
                    task_status.started(held.backend_pid)
                    await anyio.sleep_forever()
            except LockLost as exc:
                losses.append(exc.reason)

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                pids = {await tasks.start(read) for _ in range(3)}
                (pid,) = pids
                pg_cluster.terminate_backend(pid)
        assert losses == ["terminated"] * 3


async def test_a_cancelled_writer_lets_readers_pass(opened, waiting, gone):
    async with opened() as (locks, others):

        async def write(*, task_status) -> None:
            with anyio.CancelScope() as scope:
                task_status.started(scope)
                async with others.rwlock("a").write():
                    raise AssertionError("nobody has let go of it")

        async def read() -> None:
            async with others.rwlock("a").read():
                pass

        with anyio.fail_after(SOON):
            async with locks.rwlock("a").read():
                async with anyio.create_task_group() as tasks:
                    scope = await tasks.start(write)
                    await waiting(1)
                    scope.cancel()
                    tasks.start_soon(read)
        await gone(sessions=10)
