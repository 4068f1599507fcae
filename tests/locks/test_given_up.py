"""Acquires and releases that are given up, or lose their session, where it is hardest to clean."""

from __future__ import annotations

import anyio
import pytest

from pgstructured.driver import open_connection, open_session
from pgstructured.errors import LockLost, LockNotHeldError, LockTimeout
from pgstructured.locks._options import LockOptions
from pgstructured.observe import instrumented

from .conftest import SOON, hold, wait_until

# ---------------------------------------------------------------- in line


async def test_a_place_in_the_queue_that_heirs_give_up_too(pg_dsn, open_quick, waiting, settled):
    """Whoever is left it may have been cancelled in the same moment, before or after."""

    async def want(scope) -> None:
        with scope:
            async with locks.lock(1):
                raise AssertionError("not free")

    async with open_quick(pg_dsn) as locks, open_session(pg_dsn) as other:
        await other.execute("SELECT pg_advisory_lock(1)")
        for number in range(12):
            scopes = [anyio.CancelScope() for _ in range(3)]
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    for place, scope in enumerate(scopes, 1):
                        tasks.start_soon(want, scope)
                        await wait_until(lambda n=place: locks.statistics().tasks_waiting == n)
                    await waiting(1)
                    for scope in scopes if number % 2 else reversed(scopes):
                        scope.cancel()
            await waiting(0)
            await settled(locks)
        assert locks.statistics().sessions_lost == 0


async def test_a_try_beside_readers_whose_session_has_died(pg_dsn, pg_cluster, open_quick, settled):
    """It gets no share of what is dead, and asks the server instead."""

    async def linger(*, task_status) -> None:
        with pytest.raises(LockLost):
            async with locks.lock(1, shared=True) as lock:
                task_status.started(lock)
                with anyio.move_on_after(SOON, shield=True):
                    await over.wait()

    async with open_quick(pg_dsn) as locks, open_session(pg_dsn) as other:
        over = anyio.Event()
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                lost = await tasks.start(linger)
                pg_cluster.terminate_backend(lost.backend_pid)
                await lost.wait_lost()
                async with locks.try_lock(1, shared=True) as lock:
                    assert lock is not None
                    assert lock.backend_pid != lost.backend_pid
                    await lock.refresh()
                await other.execute("SELECT pg_advisory_lock(1)")
                async with locks.try_lock(1, shared=True) as lock:
                    assert lock is None
                async with locks.try_lock(1) as lock:
                    assert lock is None
                await other.execute("SELECT pg_advisory_unlock(1)")
                over.set()
        await settled(locks)


async def test_a_try_behind_a_reader_who_has_to_wait(pg_dsn, fault_proxy, open_quick, waiting):
    """It might have got a share of what was asked for; now it is refused."""
    refused = anyio.Event()

    async def try_it() -> None:
        async with locks.try_lock(1, shared=True) as lock:
            assert lock is None
        refused.set()

    async with open_quick(fault_proxy.dsn(pg_dsn)) as locks, open_session(pg_dsn) as other:
        await other.execute("SELECT pg_advisory_lock(1)")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                fault_proxy.freeze("down")
                tasks.start_soon(hold, locks.lock(1, shared=True))
                await wait_until(lambda: locks.statistics().tasks_waiting == 1)
                tasks.start_soon(try_it)
                await wait_until(lambda: locks.statistics().tasks_waiting == 2)
                assert not refused.is_set()
                fault_proxy.thaw()
                await refused.wait()
                await waiting(1)
                tasks.cancel_scope.cancel()


# ---------------------------------------------------------------- a token that can't be had


@pytest.mark.parametrize("how", ["heard", "silent", "silent beside others"])
async def test_cancelled_while_it_waits_for_a_token(
    how, guarded, bumping, pg_dsn, fault_proxy, open_quick, settled, gone
):
    dsn = fault_proxy.dsn(pg_dsn)
    async with open_quick(dsn, heartbeat=15.0) as locks:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as others:
                if how == "silent beside others":
                    beside = await others.start(hold, locks.lock(2))
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(hold, locks.lock(1, fenced=True))
                    await bumping()
                    if how != "heard":
                        fault_proxy.freeze()
                    tasks.cancel_scope.cancel()
                fault_proxy.thaw()
                if how == "silent beside others":
                    await beside.refresh()
                others.cancel_scope.cancel()
        await settled(locks)
        await gone(within=SOON, sessions=1, beside=locks)


async def test_the_tokens_session_is_killed(guarded, bumping, pg_dsn, pg_cluster, open_quick):
    """The lock is kept, and its token asked for again."""
    async with open_quick(pg_dsn) as locks:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:

                async def take() -> None:
                    async with locks.lock(1, fenced=True, acquire_timeout=SOON) as lock:
                        assert lock.fencing_token == 2
                        assert lock.previous_ended_cleanly is True
                        await lock.refresh()

                tasks.start_soon(take)
                killed = await bumping()
                (held,) = pg_cluster.advisory_locks(pg_dsn)
                pg_cluster.terminate_backend(killed)
                while await bumping() == killed:  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.01)
                assert pg_cluster.advisory_locks(pg_dsn) == [held]
                await guarded.execute("ROLLBACK")
        assert locks.statistics().sessions_lost == 1


async def test_lost_while_it_waits_for_a_token(guarded, bumping, pg_dsn, pg_cluster, open_quick):
    """Its body never begins."""
    async with open_quick(pg_dsn) as locks:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:

                async def take() -> None:
                    with pytest.raises(LockLost) as caught:
                        async with locks.lock(1, fenced=True):
                            raise AssertionError("it was lost before")
                    assert caught.value.reason == "terminated"

                tasks.start_soon(take)
                await bumping()
                (held,) = pg_cluster.advisory_locks(pg_dsn)
                pg_cluster.terminate_backend(held.pid)
                await wait_until(lambda: locks.statistics().sessions_lost)
                await guarded.execute("ROLLBACK")


async def test_cancelled_as_it_is_found_lost(guarded, bumping, pg_dsn, pg_cluster, open_quick):
    """The cancellation from outside wins, as for a body that has begun."""
    outer = anyio.CancelScope()

    async def take() -> None:
        with outer:
            async with locks.lock(1, fenced=True):
                raise AssertionError("it was lost before")
            raise AssertionError("it was cancelled")

    def note(event) -> None:
        if event.name == "lock.acquired":
            outer.cancel()

    async with open_quick(pg_dsn) as locks:
        with anyio.fail_after(SOON), instrumented(note):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take)
                await bumping()
                (held,) = pg_cluster.advisory_locks(pg_dsn)
                pg_cluster.terminate_backend(held.pid)
                await wait_until(lambda: locks.statistics().sessions_lost)
                await guarded.execute("ROLLBACK")
    assert outer.cancelled_caught


async def test_a_guard_with_a_stale_token(pg_dsn, open_quick, quick):
    """The lock was lost, whoever has noticed it."""
    async with open_quick(pg_dsn) as locks, open_connection(pg_dsn) as conn:
        await locks.create_fence_table()
        with pytest.raises(LockLost) as caught:
            async with locks.lock(1, fenced=True) as lock:
                assert lock.previous_ended_cleanly is None
                await conn.execute("UPDATE pgstructured_fence SET token = token + 1")
                with pytest.raises(LockLost, match="newer token"):
                    async with conn.transaction():
                        await lock.guard(conn)
                assert lock.is_lost
                await anyio.sleep_forever()
        assert caught.value.reason == "fenced"
        async with locks.lock(1) as unfenced:
            assert unfenced.previous_ended_cleanly is None


# ---------------------------------------------------------------- answers that don't come


@pytest.mark.parametrize("neighbours", [0, 1])
async def test_a_try_that_is_given_up_without_an_answer(
    neighbours, pg_dsn, pg_cluster, fault_proxy, open_quick, settled, gone
):
    """It is unlocked when the server is heard of again; its neighbours don't suffer."""
    async with open_quick(fault_proxy.dsn(pg_dsn), heartbeat=15.0) as locks:
        async with anyio.create_task_group() as tasks:
            held = [await tasks.start(hold, locks.lock(key)) for key in range(10, 10 + neighbours)]
            async with locks.lock(2):
                pass  # what is prepared is prepared
            fault_proxy.freeze("down")
            with anyio.fail_after(SOON), pytest.raises(LockTimeout):
                async with locks.lock(1, acquire_timeout=0.1):
                    raise AssertionError("no answer")
            fault_proxy.thaw()
            for lock in held:
                await lock.refresh()
            await wait_until(lambda: len(pg_cluster.advisory_locks(pg_dsn)) == neighbours)
            tasks.cancel_scope.cancel()
        await settled(locks)
        assert locks.statistics().sessions_lost == 0
    await gone(within=SOON)


async def test_a_fenced_release_whose_session_ends(pg_dsn, fault_proxy, open_quick, settled, gone):
    async def cut() -> None:
        await anyio.sleep(0.05)
        fault_proxy.reset()
        fault_proxy.thaw()

    async with open_quick(fault_proxy.dsn(pg_dsn), release_timeout=10.0) as locks:
        await locks.create_fence_table()
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                with pytest.raises(LockLost) as caught:
                    async with locks.lock(1, fenced=True):
                        fault_proxy.freeze()
                        tasks.start_soon(cut)
        assert caught.value.reason == "disconnected"
        await settled(locks)
    await gone(within=SOON)


async def test_a_question_that_can_not_be_sent(pg_dsn, open_quick, settled):
    """Sending is what finds the session ended; the lock is had on another one."""
    async with open_quick(pg_dsn) as locks:
        await locks.ping()  # so that nothing is in flight
        (lane,) = locks._fleet.lanes
        # What libpq says to who sends when it has just seen the connection end.
        lane.session._wire.pgconn.exit_pipeline_mode()
        async with locks.lock(1, acquire_timeout=SOON) as lock:
            assert lock.backend_pid != lane.session.backend_pid
            await lock.refresh()
        await settled(locks)
        assert locks.statistics().sessions_lost == 1


async def test_a_wait_that_can_not_be_sent(pg_dsn, open_quick, waiting, settled):
    """As a question that can't."""
    async with open_quick(pg_dsn) as locks, open_session(pg_dsn) as other:
        await other.execute("SELECT pg_advisory_lock(1)")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                await tasks.start(hold, locks.lock(2))
                await locks.ping()  # on another session, for this one holds something
                (idle,) = (lane for lane in locks._fleet.lanes if lane.is_unused)
                idle.session._wire.pgconn.exit_pipeline_mode()
                tasks.start_soon(hold, locks.lock(1))
                await waiting(1)
                await wait_until(lambda: idle not in locks._fleet.lanes)
                tasks.cancel_scope.cancel()
        await settled(locks)
        assert locks.statistics().sessions_lost == 1


async def test_a_look_that_is_given_up(pg_dsn, fault_proxy, open_quick, settled):
    """Its session is in nobody's way afterwards."""
    async with open_quick(fault_proxy.dsn(pg_dsn)) as locks:
        fault_proxy.freeze()
        with anyio.fail_after(SOON), anyio.move_on_after(0.1) as scope:
            await locks.ping()
        assert scope.cancelled_caught
        fault_proxy.thaw()
        await settled(locks)
        await locks.ping()


# ---------------------------------------------------------------- several at once


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_several_of_which_one_can_not_be_had(
    how, pg_dsn, pg_cluster, fault_proxy, open_quick, waiting, settled, events, gone
):
    """Those that were had before are unlocked; or their session ends."""

    async def take() -> None:
        async with locks.lock_many([1, 2]):
            raise AssertionError("2 is not free")

    dsn = fault_proxy.dsn(pg_dsn)
    async with open_quick(dsn) as locks, open_session(pg_dsn) as other:
        await other.execute("SELECT pg_advisory_lock(2)")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take)
                await waiting(1)
                if how == "frozen":
                    fault_proxy.freeze()
                else:
                    (first,) = (x for x in pg_cluster.advisory_locks(pg_dsn) if x.objid == 1)
                    pg_cluster.terminate_backend(first.pid)
                    await wait_until(lambda: locks.statistics().sessions_lost)
                tasks.cancel_scope.cancel()
        fault_proxy.thaw()
        await settled(locks)
        await other.execute("SELECT pg_advisory_unlock(2)")
        await gone(within=SOON, sessions=1, beside=locks)
        failed = "lock.release_failed" in [name for name, _ in events]
        assert failed == (how == "frozen")


async def test_several_whose_body_fails(pg_dsn, pg_cluster, open_quick, settled):
    async with open_quick(pg_dsn) as locks:
        with pytest.raises(KeyError, match="mine"):
            async with locks.lock_many([1, 2]):
                raise KeyError("mine")
        assert not pg_cluster.advisory_locks(pg_dsn)
        await settled(locks)


# ---------------------------------------------------------------- detached


@pytest.mark.parametrize("kind", ["locks", "conninfo"])
async def test_a_detached_lock_is_released_without_an_answer(
    kind, pg_dsn, fault_proxy, open_quick, quick, events, gone
):
    async with open_quick(fault_proxy.dsn(pg_dsn)) as locks:
        source = locks if kind == "locks" else fault_proxy.dsn(pg_dsn)
        async with quick(source, 1, shared=True) as lock:
            detached = lock.detach()
        assert detached.shared
        fault_proxy.freeze("down")
        with anyio.fail_after(SOON):
            await detached.release()
        assert [name for name, _ in events][-1] == "lock.release_failed"
        with pytest.raises(LockNotHeldError):
            await detached.release()
        fault_proxy.thaw()
    await gone(within=SOON)


@pytest.mark.parametrize("kind", ["locks", "conninfo"])
async def test_a_detached_lock_whose_session_ends_in_its_release(
    kind, pg_dsn, fault_proxy, open_quick, quick, gone
):
    options = LockOptions(release_timeout=10.0)
    async with open_quick(fault_proxy.dsn(pg_dsn), release_timeout=10.0) as locks:
        source = locks if kind == "locks" else fault_proxy.dsn(pg_dsn)
        async with quick(source, 1, options=options) as lock:
            detached = lock.detach()

        async def cut() -> None:
            await anyio.sleep(0.05)
            fault_proxy.reset()
            fault_proxy.thaw()

        fault_proxy.freeze()
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cut)
                with pytest.raises(LockLost) as caught:
                    await detached.release()
        assert caught.value.reason == "disconnected"
        assert detached.is_lost
        assert "lost" in repr(detached)
    await gone(within=SOON)


async def test_a_detached_lock_on_a_silent_session(pg_dsn, fault_proxy, open_hasty, gone):
    async with open_hasty(fault_proxy.dsn(pg_dsn)) as locks:
        async with locks.lock(1) as lock:
            detached = lock.detach()
        fault_proxy.freeze()
        with anyio.fail_after(SOON):
            error = await detached.wait_lost()
        assert error.reason == "unconfirmed"
        assert not error.certain
        with pytest.raises(LockLost):
            await detached.release()
        fault_proxy.thaw()
    await gone(within=SOON)
