"""The block of one lock: what holds of it whatever the source."""

from __future__ import annotations

import contextlib

import anyio
import pytest

from pgstructured.driver import open_connection
from pgstructured.errors import LockLost, LockTimeout
from pgstructured.locks import open_locks, pg_lock


async def test_a_block_is_entered_once(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        block = locks.lock("once")
        async with block:
            with pytest.raises(RuntimeError, match="only once"):
                await block.__aenter__()
        with pytest.raises(RuntimeError, match="only once"):
            await block.__aenter__()


async def test_the_bodys_error_comes_out_as_it_is(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        error = ValueError("the body's")
        with pytest.raises(ValueError, match="the body's") as caught:
            async with locks.lock("error"):
                raise error
        assert caught.value is error
        assert error.__cause__ is None
        assert error.__context__ is None
        assert not await locks.is_locked("error")


async def test_an_error_group_comes_out_as_it_is(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        group = ExceptionGroup("several", [ValueError("a"), KeyError("b")])
        with pytest.raises(ExceptionGroup) as caught:
            async with locks.lock("group"):
                raise group
        assert caught.value is group
        assert not await locks.is_locked("group")


async def test_no_cancellation_is_swallowed(pg_dsn):
    """An outer scope's cancellation passes through the block's own, which nobody has cancelled."""
    async with open_locks(pg_dsn) as locks:
        after = False
        with anyio.CancelScope() as outer:
            async with locks.lock("outer"):
                outer.cancel()
                await anyio.sleep_forever()
            after = True
        assert outer.cancelled_caught
        assert not after
        assert not await locks.is_locked("outer")


async def test_a_cancelled_body_that_ends_well(pg_dsn):
    """What the body never met is delivered at the next checkpoint."""
    async with open_locks(pg_dsn) as locks:
        after = False
        with anyio.CancelScope() as outer:
            async with locks.lock("met nowhere"):
                outer.cancel()
            after = True
            await anyio.lowlevel.checkpoint()
        assert after
        assert outer.cancelled_caught
        assert not await locks.is_locked("met nowhere")


@pytest.mark.parametrize("ending", ["return", "raise", "wait"])
async def test_a_lock_that_is_lost(pg_dsn, ending):
    async with open_locks(pg_dsn) as locks, open_connection(pg_dsn) as conn:
        with pytest.raises(LockLost) as caught:
            async with locks.lock("lost") as lock:
                with anyio.CancelScope(shield=True):
                    await conn.execute("SELECT pg_terminate_backend(%s)", (lock.backend_pid,))
                    await lock.wait_lost()
                if ending == "raise":
                    raise ValueError("the body's")
                if ending == "wait":
                    await anyio.sleep_forever()
        assert caught.value.reason == "terminated"
        assert isinstance(caught.value.__cause__, ValueError) == (ending == "raise")


async def test_what_is_left_of_a_group_is_the_cause(pg_dsn):
    """The loss' own cancellation is taken out of it."""
    async with open_locks(pg_dsn) as locks, open_connection(pg_dsn) as conn:
        with pytest.raises(LockLost) as caught:
            async with locks.lock("lost") as lock:
                with anyio.CancelScope(shield=True):  # the loss may be known before the answer
                    await conn.execute("SELECT pg_terminate_backend(%s)", (lock.backend_pid,))
                try:
                    await anyio.sleep_forever()
                except anyio.get_cancelled_exc_class() as exc:
                    raise BaseExceptionGroup("both", [exc, ValueError("its own")]) from None
        assert isinstance(caught.value.__cause__, ExceptionGroup)
        assert [type(error) for error in caught.value.__cause__.exceptions] == [ValueError]


async def test_an_acquire_that_fails_leaves_no_scope(pg_dsn):
    """The scope of the body is entered before the grant, and left if there is none."""

    async def hold(*, task_status):
        async with open_locks(pg_dsn) as others, others.lock("taken"):
            task_status.started()
            await anyio.sleep_forever()

    async with open_locks(pg_dsn) as locks, anyio.create_task_group() as tasks:
        await tasks.start(hold)
        async with locks.try_lock("taken") as lock:
            assert lock is None
        with pytest.raises(LockTimeout):
            async with locks.lock("taken", acquire_timeout=0):
                raise AssertionError
        with anyio.move_on_after(0.05) as scope:
            async with locks.lock("taken"):
                raise AssertionError
        assert scope.cancelled_caught
        tasks.cancel_scope.cancel()
        with pytest.raises(anyio.get_cancelled_exc_class()):
            await anyio.lowlevel.checkpoint()  # no scope of a block's stands in between


async def test_blocks_on_an_exit_stack(pg_dsn):
    async with open_locks(pg_dsn) as locks, contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(locks.lock("a"))
        second = await stack.enter_async_context(pg_lock(locks, "b"))
        assert first.backend_pid == second.backend_pid
