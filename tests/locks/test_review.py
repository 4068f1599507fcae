"""What a review of the whole room has found: each was wrong once."""

from __future__ import annotations

import math
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, cast

import anyio
import pytest

from pgstructured.driver import Connection, ConnectionState, open_connection
from pgstructured.errors import LockNotHeldError
from pgstructured.locks import open_locks, pg_lock
from pgstructured.locks._watch import Watch

from .conftest import PATIENT

SOON = 20  # seconds that nothing here takes on any machine


@pytest.fixture
def cancel_natively(anyio_backend_name):
    """Start a coroutine as a task of asyncio's own, to be cancelled by no scope."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than that of scopes")
    import asyncio

    return asyncio.ensure_future


class _Itself:
    """The task that asks, as something to be cancelled."""

    @staticmethod
    def cancel() -> None:
        import asyncio

        task = asyncio.current_task()
        assert task is not None
        task.cancel()


async def _ended(task: Any) -> BaseException | None:
    """Wait for a task of asyncio's own; return what it has raised."""
    import asyncio

    with anyio.fail_after(SOON):
        await asyncio.wait([task])
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def let_go(how: str, lock: Any, proxy: Any) -> None:
    """Let a lock go at the end of its block, or before; its answer is held back."""
    proxy.hold(b"true", "down")
    if how == "release":
        await lock.release()
    elif how == "detached":
        await lock.detach().release()


async def check_open_and_unlocked(conn: Connection[Any]) -> None:
    assert conn.state is ConnectionState.OPEN
    own = "locktype = 'advisory' AND pid = pg_backend_pid()"
    cursor = await conn.execute(f"SELECT count(*) FROM pg_locks WHERE {own}")
    assert await cursor.fetchone() == (0,)


# ---------------------------------------------------------------- the watch


async def test_a_watch_that_is_over_tells_at_once():
    """Also if somebody asked it to remind them in the meantime, which never comes."""
    watch = Watch(lambda: math.inf, lambda: None)
    await watch.run(anyio.lowlevel.checkpoint)
    told: list[bool] = []
    watch.remind(anyio.current_time() + SOON)
    watch.add(lambda: told.append(True), math.inf)
    assert told


async def test_a_watch_does_not_spin_while_those_it_has_told_are_leaving():
    """An unlock that is under way stays until its time is over, however silent the session."""
    began = anyio.current_time()
    watch = Watch(lambda: began)
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch.run, anyio.sleep_forever)
        watch.add(look, math.inf)
        await anyio.sleep(0.1)
        watch.stop()
    assert looks
    assert looks <= (anyio.current_time() - began) / 0.005 + 3  # a few turns at its ends


# ---------------------------------------------------------------- who asks


async def test_a_shared_try_behind_one_that_took_over_a_wait(pg_dsn, waiting):
    """It would wait as long as the other does, who stands in the server's queue."""

    async def hold(*, task_status) -> None:
        async with open_locks(pg_dsn) as others, others.lock(1):
            task_status.started()
            await anyio.sleep_forever()

    async def want(locks, scope) -> None:
        with scope:
            async with locks.lock(1, shared=True):
                raise AssertionError("it is held elsewhere")

    async with open_locks(pg_dsn) as locks, anyio.create_task_group() as tasks:
        await tasks.start(hold)
        first, second = anyio.CancelScope(), anyio.CancelScope()
        tasks.start_soon(want, locks, first)
        await waiting(1)
        tasks.start_soon(want, locks, second)
        with anyio.fail_after(SOON):
            while locks.statistics().tasks_waiting < 2:  # noqa: ASYNC110 - nothing tells
                await anyio.sleep(0.01)
            first.cancel()
            while locks.statistics().tasks_waiting > 1:  # noqa: ASYNC110 - ditto
                await anyio.sleep(0.01)
            async with locks.try_lock(1, shared=True) as lock:
                assert lock is None
        tasks.cancel_scope.cancel()


# ---------------------------------------------------------------- detached, in its own block


async def test_a_detached_lock_is_released_in_its_block(pg_dsn, gone):
    async with pg_lock(pg_dsn, 1) as lock:
        detached = lock.detach()
        await detached.release()
        await gone()
        with pytest.raises(LockNotHeldError):
            await detached.release()


async def test_a_detached_lock_is_waited_for_from_its_block_on(pg_dsn, pg_cluster):
    """Who waits goes on where the block has ended: then nobody else reads."""
    reasons: list[str] = []

    async def wait(detached) -> None:
        reasons.append((await detached.wait_lost()).reason)

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            for end_before_it_is_left in (True, False):
                async with pg_lock(pg_dsn, 1) as lock:
                    detached = lock.detach()
                    tasks.start_soon(wait, detached)
                    await anyio.sleep(0.01)
                    if end_before_it_is_left:
                        pg_cluster.terminate_backend(detached.backend_pid)
                        while not reasons:  # noqa: ASYNC110 - ditto
                            await anyio.sleep(0.01)
                if not end_before_it_is_left:
                    pg_cluster.terminate_backend(detached.backend_pid)
    assert reasons == ["terminated", "terminated"]


# ---------------------------------------------------------------- asyncio's own cancellation
# It comes once, whatever is shielded: here while something is being given back.


@pytest.mark.parametrize("first", ["time", "cancellation"])
async def test_while_a_wait_is_given_up(
    first, pg_dsn, fault_proxy, open_quick, waiting, settled, gone, cancel_natively
):
    """The session waited on, with the lock in the end, and nobody to release it."""

    async def want(locks, limit) -> None:
        async with locks.lock(1, acquire_timeout=limit):
            raise AssertionError("it is held elsewhere")

    async with open_quick(fault_proxy.dsn(pg_dsn)) as locks:
        async with pg_lock(pg_dsn, 1):
            task = cancel_natively(want(locks, 1.5 if first == "time" else None))
            await waiting(1)
            fault_proxy.freeze()
            if first == "time":
                await anyio.sleep(1.55)
            else:
                task.cancel()
                await anyio.sleep(0.05)
            task.cancel()
            assert await _ended(task) is not None
            fault_proxy.thaw()
            await settled(locks)
        with anyio.fail_after(SOON):
            async with locks.lock(1):
                pass
    await gone()


async def test_while_a_try_is_taken_back(
    pg_dsn, fault_proxy, open_quick, settled, gone, cancel_natively
):
    """Its place in line stayed, so nobody here could have the lock any more."""

    async def want(locks) -> None:
        async with locks.lock(1):
            raise AssertionError("there was no answer")

    async with open_quick(fault_proxy.dsn(pg_dsn)) as locks:
        fault_proxy.freeze("down")
        task = cancel_natively(want(locks))
        for _ in range(2):
            await anyio.sleep(0.05)
            task.cancel()
        assert await _ended(task) is not None
        fault_proxy.thaw("down")
        await settled(locks)
        with anyio.fail_after(SOON):
            async with locks.lock(1):
                pass
    await gone()


async def test_while_the_lock_of_a_failed_body_is_released(
    pg_dsn, fault_proxy, open_quick, settled, gone, cancel_natively, events
):
    """Who waits for its loss was told nothing."""
    refused: list[LockNotHeldError] = []

    async def wait(lock) -> None:
        try:
            await lock.wait_lost()
        except LockNotHeldError as exc:
            refused.append(exc)

    async def fail(locks, tasks) -> None:
        async with locks.lock(1) as lock:
            tasks.start_soon(wait, lock)
            await anyio.sleep(0.01)
            fault_proxy.freeze("down")
            failing.set()
            raise ValueError("the body's")

    failing = anyio.Event()
    async with open_quick(fault_proxy.dsn(pg_dsn)) as locks:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                task = cancel_natively(fail(locks, tasks))
                await failing.wait()
                await anyio.sleep(0.05)
                task.cancel()
                assert await _ended(task) is not None
        assert refused
        assert [name for name, _ in events][-1] == "lock.release_failed"
        fault_proxy.thaw("down")
        await settled(locks)
        with anyio.fail_after(SOON):
            async with locks.lock(1):
                pass
    await gone()


async def test_while_a_detached_lock_is_released(pg_dsn, fault_proxy, gone, cancel_natively):
    """Its session was left, which nobody could have closed."""
    async with pg_lock(fault_proxy.dsn(pg_dsn), 1) as lock:
        detached = cast("Any", lock.detach())
    fault_proxy.freeze("down")
    task = cancel_natively(detached.release())
    await anyio.sleep(0.05)
    task.cancel()
    assert await _ended(task) is not None
    fault_proxy.thaw("down")
    await gone()


async def test_at_every_await_of_the_release_of_a_detached_lock(
    pg_dsn, gone, cancel_natively, cancel_at
):
    """It was lost once the lock had been released, or no longer counted."""

    async def release(number, task) -> None:
        await cancel_at(detached.release(), task, number)

    for number in range(100):
        async with pg_lock(pg_dsn, 1) as lock:
            detached = cast("Any", lock.detach())
        task = cancel_natively(release(number, _Itself()))
        error = await _ended(task)
        assert task.cancelling() == (error is not None)
        await gone()
        if error is None:
            break
        assert task.cancelled()
    assert number >= 2


@pytest.mark.parametrize("how", ["block", "release", "detached"])
async def test_while_a_lock_on_a_connection_is_released(
    how, pg_dsn, fault_proxy, cancel_natively, events
):
    """The user's own connection was closed, though the answer came."""

    async def hold_and_let_go(conn) -> None:
        async with pg_lock(conn, 1) as lock:
            await let_go(how, lock, fault_proxy)

    async with open_connection(fault_proxy.dsn(pg_dsn), autocommit=True) as conn:
        task = cancel_natively(hold_and_let_go(conn))
        with anyio.fail_after(SOON):
            await anyio.to_thread.run_sync(fault_proxy.wait_held)
        task.cancel()
        await anyio.sleep(0.05)
        fault_proxy.release("down")
        await _ended(task)
        assert task.cancelled()
        await check_open_and_unlocked(conn)
    assert "lock.release_failed" not in [name for name, _ in events]


async def test_while_an_unlock_waits_for_its_turn(pg_dsn, quick, cancel_natively, events):
    """The connection was closed, and what another task did there lost."""
    options = replace(PATIENT, release_timeout=8.0)
    async with open_connection(pg_dsn, autocommit=True) as conn:

        async def hold_and_let_go() -> None:
            async with quick(conn, 1, options=options):
                working.append(cancel_natively(conn.execute("SELECT pg_sleep(0.5)")))
                await anyio.wait_all_tasks_blocked()

        working: list[Any] = []
        task = cancel_natively(hold_and_let_go())
        with anyio.fail_after(SOON):
            while not conn._lock._turns:  # noqa: ASYNC110 - nothing tells
                await anyio.sleep(0.01)
        task.cancel()
        await _ended(task)
        assert task.cancelled()
        assert await _ended(working[0]) is None
        await check_open_and_unlocked(conn)
    assert [name for name, _ in events][-1] == "lock.released"


@pytest.mark.parametrize("how", ["dedicated", "managed", "semaphore", "campaign"])
async def test_of_every_task_at_once(how, pg_dsn, gone, cancel_natively):
    """As `asyncio.run` ends what it finds: nobody reads any more that a lock was unlocked."""
    import asyncio

    async def hold() -> None:
        async with AsyncExitStack() as stack:
            if how == "dedicated":
                await stack.enter_async_context(pg_lock(pg_dsn, 1))
            else:
                locks = await stack.enter_async_context(
                    open_locks(pg_dsn, release_timeout=60, lost_after=300, server_timeout=600)
                )
                block: Any = {
                    "managed": lambda: locks.lock(1),
                    "semaphore": lambda: locks.semaphore(1, 1).acquire(),
                    "campaign": lambda: locks.election(1, candidate="a").campaign(),
                }[how]()
                await stack.enter_async_context(block)
            held.set()
            await anyio.sleep_forever()

    held = anyio.Event()
    others = asyncio.all_tasks()
    task = cancel_natively(hold())
    with anyio.fail_after(SOON):
        await held.wait()
    for each in asyncio.all_tasks() - others:
        each.cancel()
    with anyio.fail_after(SOON):
        await asyncio.wait([task])
    assert task.cancelled()
    await gone()


async def test_while_a_locks_is_closed(pg_dsn, open_quick, gone, cancel_natively):
    """Only the end of it ends the session of a leadership that was detached."""
    is_held, may_end = anyio.Event(), anyio.Event()

    async def hold_on(locks) -> None:
        async with locks.lock(1):
            is_held.set()
            with anyio.CancelScope(shield=True):  # so that closing has to wait
                await may_end.wait()

    async def lead(tasks) -> None:
        async with open_quick(pg_dsn) as locks:
            async with locks.election("e", candidate="a").campaign() as leadership:
                leadership.detach()
            tasks.append(cancel_natively(hold_on(locks)))
            await is_held.wait()

    tasks: list[Any] = []
    closing = cancel_natively(lead(tasks))
    with anyio.fail_after(SOON):
        await is_held.wait()
    await anyio.sleep(0.1)
    closing.cancel()
    assert await _ended(closing) is not None
    may_end.set()
    assert await _ended(tasks[0]) is not None
    await gone()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("option", "value"),
    [("namespace", 3), ("max_locks_per_session", True), ("max_waiting_sessions", True)],
)
async def test_options_of_the_wrong_type(option, value, pg_dsn):
    with pytest.raises(ValueError, match=option):
        async with open_locks(pg_dsn, **{option: value}):
            raise AssertionError("it was refused")


# ---------------------------------------------------------------- leases and readers


async def test_what_comes_in_by_itself_confirms_no_lease(pg_dsn, open_hasty):
    """However often the leader's session is told something, it is asked for signs of life."""
    async with (
        open_hasty(pg_dsn, lost_after=1.7) as locks,
        open_locks(pg_dsn) as others,
        anyio.create_task_group() as tasks,
    ):
        election = locks.election("flood", candidate="a")

        async def ask() -> None:
            while True:
                await others.election("flood", candidate="b").request_resign()
                await anyio.sleep(0.05)

        async with election.campaign() as leadership:
            tasks.start_soon(ask)
            began = leadership.last_confirmed
            with anyio.fail_after(SOON):
                while leadership.last_confirmed < began + 2.0:  # noqa: ASYNC110 - longer than a lease
                    await anyio.sleep(0.1)
            leadership.assert_held()
        tasks.cancel_scope.cancel()


async def test_late_readers_share_one_session(pg_dsn, monkeypatch, settled):
    """Each asks whether somebody waits for the key exclusively, and joins if nobody does."""
    monkeypatch.setattr("pgstructured.locks._queues.SHARE_FOR", 0.0)
    async with open_locks(pg_dsn) as locks:
        pids: set[int] = set()
        leave = anyio.Event()

        async def read(*, task_status: Any) -> None:
            async with locks.lock("book", shared=True) as lock:
                pids.add(lock.backend_pid)
                task_status.started()
                await leave.wait()

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                await tasks.start(read)
                await anyio.sleep(0.001)  # so that the grant before is an old one
            assert len(pids) == 1
            assert locks.statistics().sessions <= 3
            assert locks.statistics().contended == 0
            leave.set()
        await settled(locks)


async def test_a_late_reader_waits_for_another_process_writer(pg_dsn, monkeypatch, waiting):
    monkeypatch.setattr("pgstructured.locks._queues.SHARE_FOR", 0.0)
    order: list[str] = []
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:

        async def write() -> None:
            async with others.lock("book"):
                order.append("writer")

        async def read() -> None:
            async with locks.lock("book", shared=True):
                order.append("late reader")

        async with anyio.create_task_group() as tasks:
            async with locks.lock("book", shared=True):
                tasks.start_soon(write)
                await waiting()
                async with locks.try_lock("other"):
                    pass
                tasks.start_soon(read)
                await waiting(2)
                order.append("first reader")
    assert order == ["first reader", "writer", "late reader"]


async def test_giving_up_a_fenced_acquire_takes_its_time_once(pg_dsn, fault_proxy, waiting):
    """The lock is given back while the bump, on another session, is being ended."""
    took = 0.0

    async def want() -> None:
        nonlocal took
        try:
            async with locks.lock("k", fenced=True):
                raise AssertionError
        finally:
            took = anyio.current_time() - cancelled_at

    async with (
        open_locks(pg_dsn) as others,
        open_connection(pg_dsn) as conn,
        open_locks(fault_proxy.dsn(pg_dsn), release_timeout=3.0) as locks,
    ):
        await others.create_fence_table()
        async with conn.transaction():
            async with others.lock("k", fenced=True) as held:
                await held.guard(conn)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(want)
                await _waits_for_a_row(conn)
                fault_proxy.freeze()
                cancelled_at = anyio.current_time()
                tasks.cancel_scope.cancel()
        fault_proxy.thaw()
    assert took < 5.8  # and not twice


async def _waits_for_a_row(conn: Connection[Any]) -> None:
    with anyio.fail_after(SOON):
        found = 0
        while not found:
            cursor = await conn.execute(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype <> 'advisory'"
            )
            (found,) = cast("tuple[int]", await cursor.fetchone())
