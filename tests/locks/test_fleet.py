"""The sessions of one `Locks`: who gets a place on one, who gives up, and what ends with them."""

from __future__ import annotations

from typing import Any, cast

import anyio
import pytest

from pgstructured.locks import open_locks
from pgstructured.locks._lanes import Lane

SOON = 20  # seconds that nothing here takes on any machine


@pytest.mark.parametrize("kind", ["a place", "a whole session"])
async def test_given_up_in_the_moment_it_is_had(kind, pg_dsn, open_quick, settled):
    """Nobody has it then, so it goes to who comes next."""
    async with open_quick(pg_dsn, max_locks_per_session=1) as locks:
        fleet = locks._fleet

        async def want(scope) -> None:
            with scope:
                await (fleet.reserve() if kind == "a place" else fleet.reserve_whole())
                raise AssertionError("it was cancelled")

        for _ in range(5):
            with anyio.fail_after(SOON):
                while fleet._opening:  # noqa: ASYNC110 - for the round before
                    await anyio.sleep(0.01)
            taken = []
            while (lane := fleet.reserve_now()) is not None:
                taken.append(lane)
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(want, scope)
                with anyio.fail_after(SOON):
                    while not fleet._wants:
                        await anyio.lowlevel.checkpoint()
                scope.cancel()
                for lane in taken:
                    fleet.give_back(lane)
            assert scope.cancelled_caught
            await settled(locks)
        async with locks.lock(1, acquire_timeout=SOON):
            pass
        await locks.ping()


async def test_given_up_in_the_moment_it_is_refused(pg_dsn, fault_proxy, open_quick):
    """The cancellation comes out, whatever else there was to say."""
    scope = anyio.CancelScope()

    async def want(locks) -> None:
        with scope:
            await locks.ping()
            raise AssertionError("it was cancelled")

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with open_quick(fault_proxy.dsn(pg_dsn)) as locks:
                async with locks.lock(1) as lock:
                    lock.detach()
                fault_proxy.freeze()
                tasks.start_soon(want, locks)
                while not locks._fleet._wants:
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
    assert scope.cancelled_caught


async def test_a_fault_of_our_own_in_the_background_reaches_the_owner(pg_dsn, monkeypatch, gone):
    def note(self) -> str:
        raise ZeroDivisionError

    with anyio.fail_after(SOON), pytest.raises(ZeroDivisionError):
        async with open_locks(pg_dsn) as locks:
            async with locks.lock("a"):
                pass
            (lane,) = locks._fleet.lanes
            monkeypatch.setattr(Lane, "note", note)
            lane.remind_of_names()
            await anyio.sleep_forever()
    await gone()


async def test_of_many_names_the_last_ones_are_shown(pg_dsn):
    """A session that has held thousands doesn't remember them all."""
    async with (
        open_locks(pg_dsn, max_locks_per_session=200) as locks,
        open_locks(pg_dsn) as other,
        locks.lock("first", acquire_timeout=SOON),
    ):
        for number in range(150):
            async with locks.lock(f"name {number}"):
                pass
        async with locks.lock("last"):
            shown = None
            with anyio.fail_after(SOON):
                while shown is None:
                    await anyio.sleep(0.01)
                    (holder,) = await other.holders("last")
                    shown = holder.key.name
        assert shown == "last"
        (lane,) = (lane for lane in locks._fleet.lanes if lane.slots)
        assert len(lane.noted) == 100


async def test_a_scheme_that_would_have_to_be_awaited(pg_dsn):
    async def scheme(name: str) -> Any:
        raise AssertionError("never called")

    with pytest.raises(ValueError, match="must not be asynchronous"):
        async with open_locks(pg_dsn, key_scheme=cast("Any", scheme)):
            raise AssertionError("never")
