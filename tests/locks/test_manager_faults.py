"""Locks on shared sessions under attack: cancelled, killed, frozen, restarted, raced."""

# Bodies that block the event loop are a part of what is tested.

from __future__ import annotations

import math
import random
import time
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest

from pgstructured.driver import open_session
from pgstructured.errors import LockAlreadyHeldError, LockLost, LockNotHeldError, LockTimeout
from pgstructured.locks import open_locks

from .conftest import SOON, hold, wait_until


class Checker:
    """Who is inside, as this process knows it: never more than the kind of lock allows."""

    def __init__(self):
        self.inside: dict[int, list[bool]] = {}
        self.entered = 0

    def enter(self, key, *, shared):
        others = self.inside.setdefault(key, [])
        assert not others or (shared and all(others)), f"two holders of {key}"
        others.append(shared)
        self.entered += 1

    def leave(self, key, *, shared):
        self.inside[key].remove(shared)


# ---------------------------------------------------------------- cancellations


@pytest.mark.parametrize("how", ["free", "contended", "in line", "polling", "fenced", "several"])
async def test_cancelled_at_every_await(cancel_at, how, pg_dsn, pg_cluster, settled):
    """Of taking, holding and releasing: nothing is left, on the server or here."""

    async def take() -> None:
        if how == "several":
            async with locks.lock_many([1, 2, 3]):
                await anyio.lowlevel.checkpoint()
            return
        async with locks.lock(1, fenced=how == "fenced") as lock:
            await anyio.lowlevel.checkpoint()
            await lock.refresh()

    async def let_go() -> None:
        await anyio.sleep(0.01)
        await other.execute("SELECT pg_advisory_unlock(1)")

    async with (
        open_session(pg_dsn) as other,
        open_locks(pg_dsn, max_waiting_sessions=1) as locks,
    ):
        await locks.create_fence_table()
        number = 0
        is_over = False
        while not is_over:
            assert number < 300
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
                    if how in ("contended", "in line", "polling"):
                        await other.execute("SELECT pg_advisory_lock(1)")
                    if how == "polling":
                        await other.execute("SELECT pg_advisory_lock(2)")
                        tasks.start_soon(hold, locks.lock(2))
                        await wait_until(lambda: locks.statistics().waiting_sessions)
                    if how == "in line":
                        tasks.start_soon(hold, locks.lock(1))
                        await wait_until(lambda: locks.statistics().waiting_sessions)
                        stack.callback(tasks.cancel_scope.cancel)
                    elif how in ("contended", "polling"):
                        tasks.start_soon(let_go)
                    waits_for = 0.3 if how == "in line" else math.inf
                    with anyio.CancelScope() as scope, anyio.move_on_after(waits_for):
                        await cancel_at(take(), scope, number)
                    if how == "polling":
                        tasks.cancel_scope.cancel()
            # Where the cancellation has come too late to matter, there is nothing more to try.
            is_over = not scope.cancel_called
            await other.execute("SELECT pg_advisory_unlock_all()")
            await settled(locks)
            with anyio.fail_after(SOON):
                while pg_cluster.advisory_locks(pg_dsn):  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.005)
            number += 1
        assert number > 1
        async with locks.lock(1, acquire_timeout=5):
            pass
        assert locks.statistics().sessions_lost == 0


async def test_opening_and_closing_are_cancelled_at_every_await(cancel_at, pg_dsn, gone):
    async def open_them() -> None:
        async with open_locks(pg_dsn) as locks:
            async with locks.lock(1) as lock:
                await anyio.lowlevel.checkpoint()
                lock.detach()

    number = 0
    is_over = False
    while not is_over:
        assert number < 300
        with anyio.fail_after(SOON), anyio.CancelScope() as scope:
            await cancel_at(open_them(), scope, number)
        is_over = not scope.cancel_called
        await gone()
        number += 1
    assert number > 5


async def test_grant_and_cancellation_race(pg_dsn, pg_cluster, settled):
    """Between two processes' Locks, within a millisecond; whoever wins leaves nothing."""
    rng = random.Random(20261)
    won = lost = 0
    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two:

        async def wait(scope) -> None:
            nonlocal won, lost
            was_granted = False
            with scope:  # which may also end the release, after a grant
                async with two.lock(1):
                    was_granted = True
            won += was_granted
            lost += not was_granted

        number, window = 0, 0.002
        while number < 150 or (not (won and lost) and number < 400):
            scope, won_before = anyio.CancelScope(), won
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    async with one.lock(1) as lock:
                        tasks.start_soon(wait, scope)
                        await wait_until(lambda: two.statistics().waiting_sessions)
                        tasks.start_soon(lock.release)
                        until = time.perf_counter() + rng.uniform(0, window)
                        while time.perf_counter() < until:
                            await anyio.lowlevel.checkpoint()
                        scope.cancel()
                        await anyio.sleep(0.003)
            await settled(two)
            # To where they meet, on whatever machine.
            window *= 0.9 if won > won_before else 1.1
            number += 1
        assert not pg_cluster.advisory_locks(pg_dsn)
        await settled(one)
    assert won + lost == number
    assert won > 0
    assert lost > 0


@pytest.mark.slow
async def test_fuzz(pg_dsn, pg_cluster, settled, request):  # noqa: PLR0915
    """Tasks that take, try, share, wait, give up and get cancelled, over two Locks.

    ``pytest -m slow`` makes it 100,000 rounds over the three event loops.
    """
    is_long = request.config.getoption("-m") == "slow"
    rounds, tasks_count = (33_400, 40) if is_long else (800, 40)
    seed = random.SystemRandom().randrange(10**6) if is_long else 4711
    checker = Checker()
    counts = dict.fromkeys(("had", "refused", "timed out", "cancelled", "again"), 0)

    async def act(locks, rng) -> None:
        key, shared = rng.randrange(6), rng.random() < 0.4
        kind = rng.choice(["wait", "wait", "limit", "try", "many", "release", "detach"])
        limit = {"limit": rng.uniform(0.0005, 0.02)}.get(kind)
        with anyio.CancelScope() as scope:
            if rng.random() < 0.4:
                scope.deadline = anyio.current_time() + rng.expovariate(100)
            try:
                if kind == "try":
                    async with locks.try_lock(key, shared=shared) as lock:
                        await stay(key, lock, rng, shared=shared)
                elif kind == "many":
                    async with locks.lock_many([key, (key + 1) % 6]) as both:
                        checker.enter((key + 1) % 6, shared=False)
                        try:
                            await stay(key, both[0], rng, shared=False)
                        finally:
                            checker.leave((key + 1) % 6, shared=False)
                else:
                    async with locks.lock(key, shared=shared, acquire_timeout=limit) as lock:
                        await stay(key, lock, rng, shared=shared)
                        if kind == "release":
                            await lock.release()
                        elif kind == "detach":
                            detached = lock.detach()
                            await detached.release()
            except LockTimeout:
                counts["timed out"] += 1
        counts["cancelled"] += scope.cancelled_caught

    async def stay(key, lock, rng, *, shared) -> None:
        if lock is None:
            counts["refused"] += 1
            return
        checker.enter(key, shared=shared)
        try:
            counts["had"] += 1
            for _ in range(rng.randrange(3)):
                await anyio.lowlevel.checkpoint()
            if rng.random() < 0.1:
                await lock.refresh()
        finally:
            checker.leave(key, shared=shared)

    async def work(locks, number) -> None:
        rng = random.Random(f"{seed} {number}")
        for _ in range(rounds // tasks_count):
            await act(locks, rng)

    options: dict[str, Any] = {
        "max_waiting_sessions": 3,
        "max_locks_per_session": 3,
        "idle_session_ttl": 0.1,
    }
    async with open_locks(pg_dsn, **options) as one, open_locks(pg_dsn, **options) as two:
        with anyio.fail_after(55 if not is_long else 3000):
            async with anyio.create_task_group() as tasks:
                for number in range(tasks_count):
                    tasks.start_soon(work, (one, two)[number % 2], number)
        await settled(one)
        await settled(two)
        assert not pg_cluster.advisory_locks(pg_dsn), f"seed {seed}"
        assert one.statistics().sessions_lost == two.statistics().sessions_lost == 0
        for key in range(6):
            async with one.lock(key, acquire_timeout=5):
                pass
    counts["again"] = 1
    assert all(counts.values()), counts


# ---------------------------------------------------------------- the deaths of sessions


async def test_the_holders_session_is_killed(pg_dsn, pg_cluster, settled):
    """All its locks are lost, and nobody else's; who waits for one has it next."""
    async with open_locks(pg_dsn, max_locks_per_session=4) as locks:
        losses: list[LockLost] = []
        got: list[int] = []

        async def take(key) -> None:
            async with locks.lock(key):
                got.append(key)

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                held = [await tasks.start(hold, locks.lock(key), losses) for key in range(8)]
                victim = held[0].backend_pid
                for key in (0, 7):
                    tasks.start_soon(take, key)
                await anyio.sleep(0.05)
                pg_cluster.terminate_backend(victim)
                await wait_until(lambda: len(losses) == 4 and got == [0])
                assert {loss.reason for loss in losses} == {"terminated"}
                assert [lock.is_lost for lock in held] == [
                    lock.backend_pid == victim for lock in held
                ]
                tasks.cancel_scope.cancel()
        await settled(locks)


async def test_the_waiters_session_is_killed(pg_dsn, pg_cluster, waiting, settled):
    """It queues anew, on another one, and those behind it in line keep their order."""
    order: list[int] = []

    async def take(number) -> None:
        async with locks.lock(1):
            order.append(number)

    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as other:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with other.lock(1):
                    for number in range(3):
                        tasks.start_soon(take, number)
                        await wait_until(lambda n=number: locks.statistics().tasks_waiting > n)
                    for _ in range(3):
                        (waiter,) = await waiting(1)
                        pg_cluster.terminate_backend(waiter.pid)
                        await waiting(1)
                        await wait_until(lambda: locks.statistics().waiting_sessions)
                        while (  # noqa: ASYNC110 - it is the server's
                            (await waiting(1))[0].pid == waiter.pid
                        ):
                            await anyio.sleep(0.01)
        assert order == [0, 1, 2]
        assert locks.statistics().sessions_lost == 3
        await settled(locks)


@pytest.mark.parametrize("end", ["cancel", "reset", "answer", "time"])
async def test_a_try_whose_answer_is_held_up(end, pg_dsn, pg_cluster, fault_proxy, settled, gone):
    """Granted by the server, and not known of here: cancelled, cut off or slow."""
    limit = 1.5 if end == "time" else 0.5  # so long it can be seen on the server
    async with open_locks(fault_proxy.dsn(pg_dsn), release_timeout=limit) as locks:
        async with locks.lock(1):
            pass  # what is prepared is prepared
        fault_proxy.freeze("down")
        outcomes: list[str] = []

        async def take() -> None:
            try:
                async with locks.lock(1, acquire_timeout=0.2 if end == "time" else None):
                    outcomes.append("had")
            except LockTimeout:
                outcomes.append("timed out")

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take)
                await wait_until(lambda: pg_cluster.advisory_locks(pg_dsn))
                if end == "cancel":
                    tasks.cancel_scope.cancel()
                elif end == "reset":
                    fault_proxy.reset()
                    fault_proxy.thaw()
                elif end == "answer":
                    fault_proxy.thaw()
        fault_proxy.thaw()
        expected = {"cancel": [], "reset": ["had"], "answer": ["had"], "time": ["timed out"]}
        assert outcomes == expected[end]
        await settled(locks)
        await gone(within=SOON, beside=locks)


@pytest.mark.parametrize("how", ["reset", "fin"])
async def test_disconnected(how, pg_dsn, fault_proxy, settled, gone):
    async with open_locks(fault_proxy.dsn(pg_dsn), max_locks_per_session=2) as locks:
        losses: list[LockLost] = []
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for key in range(5):
                    await tasks.start(hold, locks.lock(key), losses)
                getattr(fault_proxy, how)()
        assert [loss.reason for loss in losses] == ["disconnected"] * 5
        assert locks.statistics().sessions_lost == 3
        await settled(locks)
        async with locks.lock(1):
            pass
    await gone()


@pytest.mark.parametrize("direction", ["up", "down", "both"])
async def test_frozen(direction, pg_dsn, pg_cluster, fault_proxy, open_hasty, settled, gone):
    """Who holds is told in time, while the server still has the lock; who waits goes on."""
    async with open_hasty(fault_proxy.dsn(pg_dsn)) as locks, open_session(pg_dsn) as other:
        losses: list[LockLost] = []
        got: list[int] = []
        await other.execute("SELECT pg_advisory_lock(9)")

        async def take() -> None:
            async with locks.lock(9):
                got.append(9)

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for key in range(3):
                    await tasks.start(hold, locks.lock(key), losses)
                tasks.start_soon(take)
                await wait_until(lambda: locks.statistics().waiting_sessions)
                await anyio.sleep(0.05)
                fault_proxy.freeze(direction)
                await wait_until(lambda: len(losses) == 3)
                assert {loss.reason for loss in losses} == {"unconfirmed"}
                assert not any(loss.certain for loss in losses)
                fault_proxy.thaw()
                await other.execute("SELECT pg_advisory_unlock(9)")
        assert got == [9]
        await settled(locks)
        for key in range(3):
            async with locks.lock(key, acquire_timeout=SOON):
                pass
    await gone(within=SOON)


async def test_heard_of_again_before_the_bodies_end(pg_dsn, pg_cluster, fault_proxy, open_hasty):
    """The session lives on, with what was lost on it: that is unlocked, not left behind."""
    async with open_hasty(
        fault_proxy.dsn(pg_dsn), heartbeat=0.3, lost_after=2.0, server_timeout=10.0
    ) as locks:
        thawed = [anyio.Event() for _ in range(3)]

        async def linger(key, *, task_status) -> None:
            with pytest.raises(LockLost) as caught:
                async with locks.lock(key) as lock:
                    task_status.started(lock)
                    with anyio.move_on_after(SOON, shield=True):
                        await thawed[key].wait()
            assert caught.value.reason == "unconfirmed"

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                held = [await tasks.start(linger, key) for key in range(3)]
                fault_proxy.freeze()
                for lock in held:
                    await lock.wait_lost()
                fault_proxy.thaw()
                await wait_until(lambda: held[0].last_confirmed > anyio.current_time() - 0.4)
                async with locks.lock(7) as later:
                    # On the same session if it is still good for new locks.
                    for key in range(2):
                        thawed[key].set()
                    await wait_until(lambda: len(pg_cluster.advisory_locks(pg_dsn)) <= 2)
                    assert len(pg_cluster.advisory_locks(pg_dsn)) == 2
                    later.assert_held()
                    thawed[2].set()
        with anyio.fail_after(SOON):
            while pg_cluster.advisory_locks(pg_dsn):  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.01)


@pytest.mark.parametrize("neighbours", [0, 2])
async def test_a_release_without_an_answer(
    neighbours, pg_dsn, pg_cluster, fault_proxy, open_quick, settled, events, gone
):
    """Bounded; a session with others' locks is not closed for it."""
    async with open_quick(fault_proxy.dsn(pg_dsn), heartbeat=15.0) as locks:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                held = [
                    await tasks.start(hold, locks.lock(key)) for key in range(10, 10 + neighbours)
                ]
                async with locks.lock(1) as lock:
                    fault_proxy.freeze("down")
                    began = anyio.current_time()
                    await lock.release()
                    assert anyio.current_time() - began < 10  # and not until it is lost
                    with pytest.raises(LockNotHeldError):
                        lock.assert_held()
                assert [name for name, _ in events][-1] == "lock.release_failed"
                fault_proxy.thaw()
                for other in held:
                    await other.refresh()
                await wait_until(lambda: len(pg_cluster.advisory_locks(pg_dsn)) <= neighbours)
                tasks.cancel_scope.cancel()
        await settled(locks)
    await gone(within=SOON)


async def test_a_stopped_backend(pg_cluster_private, open_hasty, settled):
    async with open_hasty(
        pg_cluster_private.dsn(), max_locks_per_session=1, lost_after=1.5
    ) as locks:
        losses: list[LockLost] = []
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                lock = await tasks.start(hold, locks.lock(1), losses)
                beside = await tasks.start(hold, locks.lock(2))
                pg_cluster_private.freeze(lock.backend_pid)
                await wait_until(lambda: losses)
                assert losses[0].reason == "unconfirmed"
                beside.assert_held()
                with pytest.raises(LockTimeout):  # the server holds it still
                    async with locks.lock(1, acquire_timeout=0.2):
                        raise AssertionError("not free")
                pg_cluster_private.thaw(lock.backend_pid)
                async with locks.lock(1, acquire_timeout=SOON):
                    pass
                tasks.cancel_scope.cancel()
        await settled(locks)


async def test_a_blocked_loop(pg_dsn, pg_cluster, open_hasty, settled):
    """Judged by the clock where it was too long, and not at all where it was not."""
    async with open_hasty(pg_dsn, lost_after=2.0) as locks:
        async with locks.lock(1) as lock:
            time.sleep(0.5)
            await anyio.sleep(0.2)
            lock.assert_held()
        with pytest.raises(LockLost) as caught:
            async with locks.lock(1):
                time.sleep(2.05)
        assert caught.value.reason == "unconfirmed"
        with pytest.raises(LockLost) as caught:
            async with locks.lock(2) as lock:
                pg_cluster.terminate_backend(lock.backend_pid)
                time.sleep(0.1)
        assert caught.value.reason == "terminated"
        await settled(locks)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_restart(mode, pg_cluster_private, open_quick, settled):
    """A hundred hold and a hundred wait: those lose theirs, these get theirs later."""
    cluster = pg_cluster_private
    losses: list[LockLost] = []
    got: list[int] = []

    async def take(locks, key) -> None:
        while True:
            try:
                async with locks.lock(key):
                    got.append(key)
                    return
            except (LockLost, psycopg.OperationalError):  # the server is not there for a while
                await anyio.sleep(0.05)

    dsn = cluster.dsn()
    patient = {"heartbeat": 3.0, "lost_after": 10.0, "server_timeout": 20.0}
    async with (
        open_quick(dsn, connect_timeout=10.0, **patient) as one,
        open_quick(dsn, **patient) as two,
    ):
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for key in range(100):
                    await tasks.start(hold, one.lock(key), losses)
                for key in range(100):
                    tasks.start_soon(take, (one, two)[key % 2], key % 20)
                await wait_until(
                    lambda: one.statistics().tasks_waiting + two.statistics().tasks_waiting == 100
                )
                await anyio.to_thread.run_sync(cluster.restart, mode)
        assert len(losses) == 100
        assert {loss.reason for loss in losses} <= {"terminated", "disconnected"}
        assert len(got) == 100
        await settled(one)
        await settled(two)
        assert not cluster.advisory_locks("postgres")


@pytest.mark.slow
async def test_sessions_are_killed_all_the_time(pg_dsn, pg_cluster, settled, gone):
    """Nobody is inside with another, nothing is left, and everybody gets on."""
    rng = random.Random(7)
    checker = Checker()
    lost = 0
    is_over = False

    async def work(locks, number) -> None:
        nonlocal lost
        own = random.Random(number)
        while not is_over:
            key, shared = own.randrange(4), own.random() < 0.3
            try:
                async with locks.lock(key, shared=shared, acquire_timeout=2):
                    checker.enter(key, shared=shared)
                    try:
                        await anyio.sleep(own.uniform(0, 0.003))
                    finally:
                        checker.leave(key, shared=shared)
            except LockLost:
                lost += 1
            except (LockTimeout, LockAlreadyHeldError, psycopg.OperationalError):
                await anyio.sleep(0.001)

    async def kill() -> None:
        nonlocal is_over
        number, until = 0, time.monotonic() + 10
        while not (lost and checker.entered > 50 and (number >= 40 or time.monotonic() > until)):
            number += 1
            await anyio.sleep(0.03)
            pids = [x.pid for x in await anyio.to_thread.run_sync(pg_cluster.sessions, pg_dsn)]
            if pids:
                # The body's end is told to the checker before the server lets others in: a
                # terminated session says so first.
                await anyio.to_thread.run_sync(pg_cluster.terminate_backend, rng.choice(pids))
        is_over = True

    async with open_locks(pg_dsn, max_locks_per_session=2) as locks:
        with anyio.fail_after(2 * SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kill)
                for number in range(20):
                    tasks.start_soon(work, locks, number)
        await settled(locks)
        assert not pg_cluster.advisory_locks(pg_dsn)
    await gone()
