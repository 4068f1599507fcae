"""What the history checker has found (``python -m benchmarks.lock_history``), one test each.

And what a storm of cancel requests has, at sessions whose locks come and go.
"""

from __future__ import annotations

import time
from typing import Any

import anyio
import psycopg
import pytest

from pgstructured.driver import open_connection
from pgstructured.errors import LockLost, LockTimeout
from pgstructured.locks import open_locks
from pgstructured.locks._options import LockOptions

# ruff: noqa: ASYNC110 - what is waited for is the server's, or inside


async def test_who_gives_up_does_not_tidy_away_the_next_ones_queue(pg_dsn, fault_proxy):
    """Two tasks of one process then held one key, and leaving raised a KeyError."""
    has_given_up = anyio.Event()
    scope = anyio.CancelScope()
    seen: list[Any] = []

    async def give_up():
        with scope:
            async with locks.lock("key", fenced=True):
                raise AssertionError("a guarded transaction is open")
        has_given_up.set()

    async def try_it():
        async with locks.try_lock("key") as lock:
            seen.append(lock)

    async with open_locks(fault_proxy.dsn(pg_dsn)) as locks, open_connection(pg_dsn) as conn:
        source, key = locks._source, locks.key("key")
        await locks.create_fence_table()
        async with conn.transaction():
            async with locks.lock("key", fenced=True) as lock:
                await lock.guard(conn)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(give_up)
                with anyio.fail_after(10):
                    while not await locks.holders(key):
                        await anyio.sleep(0.01)
                    await anyio.sleep(0.1)  # it waits for its token
                    fault_proxy.delay(0.5, "down")
                    scope.cancel()
                    while source.is_in_use(key):
                        await anyio.sleep(0.001)
                assert not has_given_up.is_set()  # its unlock is on its way
                fault_proxy.delay(0)
                async with locks.lock("key"):
                    await has_given_up.wait()
                    async with anyio.create_task_group() as others:
                        others.start_soon(try_it)
        assert seen == [None]


async def test_a_session_that_is_about_to_be_given_back_is_not_given_out(pg_dsn):
    """It was closed under the lock that had been taken on it meanwhile."""
    async with open_locks(pg_dsn, max_locks_per_session=1, idle_session_ttl=0.2) as locks:
        async with locks.lock("one"), locks.lock("two"), locks.lock("three"):
            lanes = tuple(locks._fleet.lanes)
        assert len(lanes) == 3
        with anyio.fail_after(10):
            while all(lane.is_open for lane in lanes):
                await anyio.lowlevel.checkpoint()
        async with locks.lock("one") as one, locks.lock("two") as two:
            await anyio.sleep(0.3)
            one.assert_held()
            two.assert_held()


async def test_a_silent_session_is_not_handed_on_before_it_is_closed(
    pg_dsn, fault_proxy, open_hasty
):
    """Who waited for a session was given that one, and a `ClosedResourceError`."""
    lost = anyio.Event()
    dsn = fault_proxy.dsn(pg_dsn)

    async def hold():
        with pytest.raises(LockLost) as caught:
            async with locks.lock("one"):
                held.set()
                await anyio.sleep_forever()
        assert caught.value.reason == "unconfirmed"
        lost.set()

    async def thaw():
        await lost.wait()
        fault_proxy.thaw()

    held = anyio.Event()
    async with open_hasty(dsn, max_locks_per_session=1) as locks:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold)
            await held.wait()
            fault_proxy.freeze()
            tasks.start_soon(thaw)
            async with locks.lock("two") as two:
                two.assert_held()


async def test_a_lock_that_is_lost_while_others_are_waited_for_has_no_body(pg_dsn, pg_cluster):
    """The body began, and ran until its first checkpoint."""
    began = False
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        async with anyio.create_task_group() as tasks:
            first, second = sorted((1, 2))

            async def take_both():
                nonlocal began
                with pytest.raises(LockLost) as caught:
                    async with locks.lock_many([first, second]):
                        began = True
                assert caught.value.reason == "terminated"

            async with others.lock(second) as blocking:
                tasks.start_soon(take_both)
                with anyio.fail_after(10):
                    while not await others.waiters(second):
                        await anyio.sleep(0.01)
                    (holder,) = await others.holders(first)
                    assert holder.backend_pid != blocking.backend_pid
                    pg_cluster.terminate_backend(holder.backend_pid)
                    while not locks.statistics().sessions_lost:
                        await anyio.sleep(0.01)
    assert not began


async def test_an_unlock_that_was_answered_is_no_loss_though_it_was_seen_late(
    pg_dsn, fault_proxy, quick, events
):
    """A process that was stopped there said that its lock was lost (``closed``)."""

    async def oversleep():
        await anyio.sleep(0.1)
        fault_proxy.thaw()
        time.sleep(2.0)  # more than release_timeout and lost_after

    options = LockOptions(heartbeat=0.15, lost_after=1.8, server_timeout=6.0, release_timeout=1.8)
    async with anyio.create_task_group() as tasks:
        async with quick(fault_proxy.dsn(pg_dsn), "key", options=options):
            fault_proxy.freeze()
            tasks.start_soon(oversleep)
    assert "lock.lost" not in [name for name, _ in events]


async def test_a_heartbeat_that_finds_its_session_ended_ends_nothing_else(pg_dsn, open_quick):
    """Its error ended the block of `open_locks`, with everything in it."""
    async with open_quick(pg_dsn) as locks:
        (lane,) = locks._fleet.lanes
        await locks.ping()  # so that nothing is in flight
        # What libpq says to who sends when it has just seen the connection end.
        lane.session._wire.pgconn.exit_pipeline_mode()
        with anyio.fail_after(10):
            while not locks.statistics().sessions_lost:
                await anyio.sleep(0.01)
        async with locks.lock("key") as lock:
            lock.assert_held()


async def test_a_session_whose_first_question_was_cancelled_is_not_used(
    pg_dsn, monkeypatch, settled, unlocked
):
    """A request to cancel had hit it. The locks taken there were leaked, all that ever were."""
    async with open_locks(pg_dsn, max_locks_per_session=1) as locks:
        async with locks.lock("key"):
            with monkeypatch.context() as patch:
                patch.setattr("pgstructured.locks._lanes.IDENTITY_STATEMENT", "SELECT 1 / 0")
                for block in (locks.lock("other"), locks.semaphore("s", 1).acquire()):
                    with pytest.raises(psycopg.errors.DivisionByZero):
                        async with block:
                            raise AssertionError("there is no session for it")
            async with locks.lock("other") as lock:
                lock.assert_held()
        await settled(locks)
        await unlocked()


@pytest.mark.parametrize("is_given_up", [False, True])
async def test_a_slot_that_was_granted_and_refused(pg_dsn, monkeypatch, unlocked, is_given_up):
    """A request to cancel comes after the grant. The slot stayed taken as long as the session."""
    monkeypatch.setattr(
        "pgstructured.locks._slots.first_free_statement",
        lambda *_args, **_options: (
            f"SELECT CASE WHEN pg_try_advisory_lock(1) AND pg_sleep({int(is_given_up)}) IS NOT NULL"
            " THEN 1 / floor(random())::int END"
        ),
    )
    async with open_locks(pg_dsn) as locks:
        with pytest.raises(LockTimeout if is_given_up else psycopg.errors.DivisionByZero):
            async with locks.semaphore("s", 1).acquire(
                acquire_timeout=0.1 if is_given_up else None
            ):
                raise AssertionError("it was refused")
        await unlocked()


async def test_an_undoing_that_is_refused(pg_dsn, fault_proxy, monkeypatch, unlocked):
    """A request to cancel hits that, twice. The lock stayed as long as the session."""
    async with open_locks(fault_proxy.dsn(pg_dsn), release_timeout=10.0) as locks:
        async with locks.lock("key"):
            pass  # what is prepared is prepared
        with monkeypatch.context() as patch:
            patch.setattr(
                "pgstructured.locks._asking.unlock_statement", lambda *_, **__: "SELECT 1 / 0"
            )
            fault_proxy.delay(0.7, "down")
            with anyio.move_on_after(0.05):
                async with locks.lock("key"):
                    raise AssertionError("it was cancelled")
            fault_proxy.delay(0)
        await unlocked()
        async with locks.lock("key") as lock:
            lock.assert_held()


async def test_a_fenced_release_that_was_done_and_refused(pg_dsn, monkeypatch, settled, unlocked):
    """A request to cancel comes after the unlock. What had been held to the end was called lost."""
    done = "SELECT CASE WHEN pg_advisory_unlock(1) THEN 1 / floor(random())::int END"
    monkeypatch.setattr(
        "pgstructured.locks._fencing.FenceTable.send_unlock",
        lambda _, session, *__: session.send([(done, ())]),
    )
    async with open_locks(pg_dsn) as locks:
        await locks.create_fence_table()
        async with locks.lock(1, fenced=True):
            pass
        await settled(locks)
        await unlocked()


async def test_names_that_find_their_session_ended_end_nothing_else(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        (lane,) = locks._fleet.lanes
        await locks.ping()  # so that nothing is in flight
        lane.session._wire.pgconn.exit_pipeline_mode()
        lane._send_note()
        assert not lane.is_open
        async with locks.lock("key") as lock:
            lock.assert_held()
