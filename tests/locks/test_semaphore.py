"""A limited number of holders, in the order in which they came."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import random
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import anyio
import pytest

from pgstructured.errors import (
    LockAlreadyHeldError,
    LockKeyError,
    LockLost,
    LockNotHeldError,
    LockTimeout,
)
from pgstructured.locks import HeldSlot, LockKey, Semaphore, _slots, open_locks
from pgstructured.locks._slots import slot_key
from pgstructured.testing import assert_cancellable

SOON = 20  # seconds that nothing here takes on any machine
KEY = LockKey.named("s")
TURNSTILE = slot_key(KEY, "turnstile")


@pytest.fixture
def standing(pg_cluster, pg_dsn):
    """Wait until somebody has the turnstile; give the session's process id."""

    async def check(*, not_by=0):
        with anyio.fail_after(SOON):
            while True:
                for lock in pg_cluster.advisory_locks(pg_dsn):
                    ids = (lock.classid, lock.objid, lock.objsubid)
                    if ids == TURNSTILE.pg_locks_ids and lock.granted and lock.pid != not_by:
                        return lock.pid
                await anyio.sleep(0.01)

    return check


@pytest.fixture
def at_the_turnstile(pg_cluster, pg_dsn):
    """Wait until so many have the turnstile or wait for it."""

    async def check(count):
        found = -1
        while found != count:
            await anyio.sleep(0.01)
            locks = pg_cluster.advisory_locks(pg_dsn)
            ids = [(lock.classid, lock.objid, lock.objsubid) for lock in locks]
            found = ids.count(TURNSTILE.pg_locks_ids)

    return check


@asynccontextmanager
async def taken(locks, limit, count=1):
    """Places that other tasks hold."""

    async def take(*, task_status) -> None:
        async with locks.semaphore("s", limit).acquire(0) as held:
            task_status.started(held)
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        yield [await tasks.start(take) for _ in range(count)]
        tasks.cancel_scope.cancel()


async def in_line(locks, count) -> None:
    """Wait until so many tasks wait."""
    with anyio.fail_after(SOON):
        while locks.statistics().tasks_waiting != count:  # noqa: ASYNC110 - it is not ours
            await anyio.sleep(0.005)


# ---------------------------------------------------------------- keys and figures


def hkdf(secret: bytes, info: bytes) -> int:
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    expanded = hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()
    return int.from_bytes(expanded[:8], "little", signed=True)


@pytest.mark.parametrize("part", ["0", "7", "turnstile"])
@pytest.mark.parametrize(
    ("key", "numbers"),
    [
        (LockKey.bigint(-5), b"-5"),
        (LockKey.pair(1, -2), b"1,-2"),
        (KEY, str(KEY.as_bigint).encode()),
    ],
)
def test_derived_keys(key, numbers, part):
    info = b"pgstructured semaphore v1\0" + part.encode()
    assert slot_key(key, part).as_bigint == hkdf(numbers, info)
    assert slot_key(key, part).scheme == "semaphore"


def test_derived_keys_never_change():
    """Two versions that disagree would not exclude each other."""
    assert [slot_key(LockKey.bigint(1), part).as_bigint for part in ("0", "1", "turnstile")] == [
        3348601752545102230,
        -7673528997346293533,
        -1184780704116864776,
    ]
    assert slot_key(LockKey.bigint(1), "0").name == "1 slot 0"
    assert slot_key(LockKey.pair(1, 2), "3").name == "1,2 slot 3"
    assert TURNSTILE.name == "s turnstile"


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3", None])
async def test_bad_limits(pg_dsn, limit):
    async with open_locks(pg_dsn) as locks:
        with pytest.raises(ValueError, match="limit"):
            locks.semaphore("s", limit)


async def test_other_bad_figures(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        with pytest.raises(LockKeyError):
            locks.semaphore("", 1)
        with pytest.raises(ValueError, match="acquire_timeout"):
            locks.semaphore("s", 1).acquire(-1)
        with pytest.raises(TypeError):
            cast("Any", Semaphore)()
        with pytest.raises(TypeError):
            HeldSlot()


# ---------------------------------------------------------------- taking


async def test_a_slot_is_a_lock(pg_dsn, pg_cluster, events):
    async with open_locks(pg_dsn) as locks:
        semaphore = locks.semaphore("s", 3)
        assert (semaphore.key, semaphore.limit) == (KEY, 3)
        assert repr(semaphore) == f"<Semaphore {KEY} limit=3>"
        async with semaphore.acquire() as held:
            (lock,) = pg_cluster.advisory_locks(pg_dsn)
            assert (lock.classid, lock.objid, lock.objsubid) == held.key.pg_locks_ids
            assert lock.pid == held.backend_pid
            assert held.key == slot_key(KEY, str(held.slot))
            assert held.slot in range(3)
            assert not held.shared
            assert 0 <= held.waited < SOON  # a loop's clock may tick in milliseconds
            assert held.fencing_token is None
            held.assert_held()
            (holder,) = await locks.holders()
            assert holder.key.name == f"s slot {held.slot}"
            assert not await locks.is_locked("s")
        assert not pg_cluster.advisory_locks(pg_dsn)
    told = [(name, facts["key"]) for name, facts in events if "session" not in name]
    assert told == [
        ("lock.acquire_started", KEY),
        ("lock.acquired", held.key),
        ("lock.released", held.key),
    ]


async def test_as_many_as_the_limit(pg_dsn, events):
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        async with taken(locks, 3, 2) as here, taken(others, 3) as there:
            held = [*here, *there]
            assert {slot.slot for slot in held} == {0, 1, 2}
            assert len({slot.key for slot in held}) == 3
            for source in (locks, others):
                with pytest.raises(LockTimeout, match="is not free"):
                    async with source.semaphore("s", 3).acquire(0):
                        pass
                with pytest.raises(LockTimeout, match="within"):
                    async with source.semaphore("s", 3).acquire(0.05):
                        pass
            async with others.semaphore("s", 4).acquire(0) as more:  # whoever says more has more
                assert more.slot == 3
            await held[0].release()
            async with others.semaphore("s", 3).acquire(0) as again:
                assert again.slot == held[0].slot
        assert [name for name, _ in events].count("lock.acquire_timed_out") == 4
        assert locks.statistics().tasks_waiting == 0
        assert others.statistics().contended >= 1


async def test_many_slots(pg_dsn):
    """More than one statement tries."""
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        async with taken(locks, 60, 60):
            with pytest.raises(LockTimeout):
                async with others.semaphore("s", 60).acquire(0):
                    pass
            async with others.semaphore("s", 61).acquire(0) as held:
                assert held.slot == 60


async def test_any_limit(pg_dsn, monkeypatch):
    """A limit that means "no limit" costs what a small one costs."""
    made = itertools.count()

    def make(key, part):
        assert next(made) < 1000
        return slot_key(key, part)

    monkeypatch.setattr(_slots, "slot_key", make)
    async with open_locks(pg_dsn) as locks, taken(locks, 2**63, 5):
        async with locks.semaphore("s", 2**63).acquire(0) as held:
            assert 0 <= held.slot < 2**63


async def test_a_task_that_would_wait_for_itself(pg_dsn):
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        async with locks.semaphore("s", 2).acquire(), others.semaphore("s", 2).acquire() as second:
            for source in (locks, others):
                for limit in (0, None):
                    with pytest.raises(LockAlreadyHeldError, match="all 2 of the semaphore"):
                        async with source.semaphore("s", 2).acquire(limit):
                            pass
            await second.release()
            async with locks.semaphore("s", 2).acquire():
                with pytest.raises(LockAlreadyHeldError):
                    async with locks.semaphore("s", 2).acquire():
                        pass

        async def fill(*, task_status) -> None:
            async with locks.semaphore("s", 2).acquire():
                task_status.started()
                await anyio.sleep_forever()

        # Not all are its own: it may wait, and does so in vain.
        async with anyio.create_task_group() as tasks, locks.semaphore("s", 2).acquire():
            await tasks.start(fill)
            with pytest.raises(LockTimeout):
                async with locks.semaphore("s", 2).acquire(0.05):
                    pass
            tasks.cancel_scope.cancel()


async def test_a_task_takes_two_after_waiting_for_the_first(pg_dsn, standing):
    """The turnstile is left behind its back: that must not look like one it holds."""
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:

        async def take_two() -> None:
            async with locks.semaphore("s", 2).acquire(), locks.semaphore("s", 2).acquire():
                pass

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with taken(others, 2, 2):
                    tasks.start_soon(take_two)
                    await standing()


# ---------------------------------------------------------------- waiting


async def test_waiting_for_a_slot_elsewhere(pg_dsn, standing, events, unlocked):
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:

        async def wait() -> None:
            async with others.semaphore("s", 1).acquire() as held:
                let_go_to.append(held.acquired_at)

        let_go_to: list[float] = []
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with locks.semaphore("s", 1).acquire() as held:
                    tasks.start_soon(wait)
                    await standing()
                    await anyio.sleep(0.1)  # so that it hears
                    let_go_at = anyio.current_time()
                    await held.release()
        print(f"handed over in {(let_go_to[0] - let_go_at) * 1000:.1f} ms")  # noqa: T201
        assert "lock.contended" in [name for name, _ in events]
        await unlocked()


async def test_first_come_first_served_across_processes(
    pg_dsn, standing, waiting, at_the_turnstile
):
    order: list[str] = []

    async def enter(source, name) -> None:
        async with source.semaphore("s", 1).acquire():
            order.append(name)
            await at_the_turnstile(min(2, 4 - len(order)))  # the next one of each line

    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two, open_locks(pg_dsn) as three:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with one.semaphore("s", 1).acquire():
                    tasks.start_soon(enter, two, "two's first")
                    await standing()
                    tasks.start_soon(enter, three, "three's first")
                    await waiting(1)
                    tasks.start_soon(enter, two, "two's second")
                    await in_line(two, 2)
                    tasks.start_soon(enter, three, "three's second")
                    await in_line(three, 2)
    assert order == ["two's first", "three's first", "two's second", "three's second"]


async def test_nobody_overtakes(pg_dsn, standing):
    """A slot that has just become free is for those who wait."""
    entered = anyio.Event()

    async def enter(source) -> None:
        async with source.semaphore("s", 1).acquire():
            entered.set()
            await anyio.sleep_forever()

    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with taken(locks, 1) as (held,):
                    tasks.start_soon(enter, others)
                    await standing()
                    await held.release()
                    while not entered.is_set():
                        with pytest.raises(LockTimeout):
                            async with locks.semaphore("s", 1).acquire(0):
                                raise AssertionError("it has overtaken")
                tasks.cancel_scope.cancel()


async def test_a_try_waits_for_an_answer_and_not_for_a_slot(pg_dsn):
    """Of several at once in one process each gets what there is."""
    got: list[int] = []
    refused: list[int] = []

    async def attempt(number: int) -> None:
        try:
            async with locks.semaphore("s", 3).acquire(0) as held:
                got.append(held.slot)
                await done.wait()
        except LockTimeout:
            refused.append(number)
            done.set()

    async with open_locks(pg_dsn) as locks:
        done = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(attempt, number)
    assert sorted(got) == [0, 1, 2]
    assert len(refused) == 1


async def test_a_try_beside_one_that_waits_is_refused(pg_dsn, standing):
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:

        async def wait() -> None:
            async with locks.semaphore("s", 1).acquire():
                pass

        async with anyio.create_task_group() as tasks:
            async with others.semaphore("s", 1).acquire():
                tasks.start_soon(wait)
                await standing()
                with pytest.raises(LockTimeout):
                    async with locks.semaphore("s", 1).acquire(0):
                        pass


@pytest.mark.slow
async def test_many_tasks_in_two_processes(pg_dsn, unlocked):
    """Never more than the limit inside, at some time so many, and nobody is passed by."""
    tasks_each, limit = 25, 3
    came: dict[str, list[int]] = {"one": [], "two": []}
    order: dict[str, list[int]] = {"one": [], "two": []}
    inside = most = 0

    async def work(name, locks, number) -> None:
        nonlocal inside, most
        came[name].append(number)
        async with locks.semaphore("s", limit).acquire() as held:
            order[name].append(number)
            inside += 1
            most = max(most, inside)
            if inside == limit:
                full.set()
            slots.append(held.slot)
            assert len({*slots}) == len(slots)
            await full.wait()  # the first ones; however slowly the others come
            await anyio.sleep(0.002)
            slots.remove(held.slot)
            inside -= 1

    full = anyio.Event()

    slots: list[int] = []
    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two:
        with anyio.fail_after(3 * SOON):
            async with anyio.create_task_group() as tasks:
                for number in range(tasks_each):
                    tasks.start_soon(work, "one", one, number)
                    tasks.start_soon(work, "two", two, number)
        await unlocked()
    assert most == limit
    assert order == came
    assert [len(numbers) for numbers in order.values()] == [tasks_each] * 2


async def test_a_higher_limit_joins_the_line(pg_dsn, standing):
    """Whoever stands at the turnstile hears of as many slots as it has use for."""
    order: list[str] = []

    async def enter(name, limit) -> None:
        async with locks.semaphore("s", limit).acquire():
            order.append(name)

    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with taken(others, 3, 3) as held:
                    first, second, third = sorted(held, key=lambda slot: slot.slot)
                    tasks.start_soon(enter, "first", 1)
                    await standing()
                    tasks.start_soon(enter, "third", 3)
                    await in_line(locks, 2)
                    tasks.start_soon(enter, "second", 2)
                    await in_line(locks, 3)
                    await first.release()
                    await in_line(locks, 0)
                    assert order == ["first", "third", "second"]
                    second.assert_held()
                    third.assert_held()


async def test_a_line_that_hears_of_more_already(pg_dsn, standing):
    order: list[int] = []

    async def enter(limit) -> None:
        async with locks.semaphore("s", limit).acquire():
            order.append(limit)

    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with taken(others, 3, 3) as held:
                    third, second, first = sorted(held, key=lambda slot: slot.slot)
                    for count, limit in enumerate((2, 3, 2), 1):
                        tasks.start_soon(enter, limit)
                        await standing()
                        await in_line(locks, count)
                    await first.release()  # of no use to the first in line
                    await anyio.sleep(0.05)
                    assert order == []
                    await second.release()
                    await in_line(locks, 0)
                    third.assert_held()
    assert order == [2, 3, 2]


async def test_a_task_at_the_slots_own_key(pg_dsn):
    """What a session has been granted twice is held by one of the two."""
    inside: list[str] = []

    async def enter(name, opening) -> None:
        async with opening:
            inside.append(name)
            await anyio.sleep(0.05)
            assert inside.pop() == name

    async with open_locks(pg_dsn) as locks:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(enter, "slot", locks.semaphore("s", 1).acquire())
                    tasks.start_soon(enter, "lock", locks.lock(slot_key(KEY, "0")))


# ---------------------------------------------------------------- death


async def test_a_holder_dies(pg_dsn, pg_cluster, standing, events):
    losses: list[LockLost] = []

    async def hold(*, task_status) -> None:
        with pytest.raises(LockLost) as caught:
            async with locks.semaphore("s", 1).acquire() as held:
                task_status.started(held.backend_pid)
                await anyio.sleep_forever()
        losses.append(caught.value)

    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                pid = await tasks.start(hold)

                async def kill() -> None:
                    await standing()
                    pg_cluster.terminate_backend(pid)

                tasks.start_soon(kill)
                async with others.semaphore("s", 1).acquire() as held:
                    assert held.slot == 0
    (loss,) = losses
    assert loss.reason == "terminated"
    assert "s slot 0" in str(loss)


async def test_who_stands_at_the_turnstile_loses_it(pg_dsn, pg_cluster, standing, unlocked):
    """It joins the line again, behind those who waited."""
    order: list[str] = []

    async def enter(name, locks) -> None:
        async with locks.semaphore("s", 1).acquire():
            order.append(name)

    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two, open_locks(pg_dsn) as three:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with one.semaphore("s", 1).acquire():
                    tasks.start_soon(enter, "two", two)
                    pid = await standing()
                    tasks.start_soon(enter, "three", three)
                    await in_line(three, 1)
                    with anyio.fail_after(SOON):
                        while all(  # noqa: ASYNC110 - it is the server's
                            x.granted for x in pg_cluster.advisory_locks(pg_dsn)
                        ):
                            await anyio.sleep(0.01)
                    pg_cluster.terminate_backend(pid)
                    await standing(not_by=pid)
                    await anyio.sleep(0.1)
        assert order == ["three", "two"]
        await unlocked()


async def test_all_sessions_die_again_and_again(pg_dsn, pg_cluster, unlocked):
    inside: list[object] = []
    turns: list[tuple[int, int]] = []
    now = itertools.count()

    async def work(locks) -> None:
        while True:
            try:
                async with locks.semaphore("s", 2).acquire():
                    began = next(now)
                    inside.append(locks)
                    try:
                        # Here; elsewhere whoever has lost its slot may not know of it yet.
                        assert inside.count(locks) <= 2
                        await anyio.sleep(0.01)
                    finally:
                        inside.remove(locks)
                        ended = next(now)
            except LockLost:
                continue
            turns.append((began, ended))
            return

    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two:
        with anyio.fail_after(2 * SOON):
            async with anyio.create_task_group() as tasks:
                for _ in range(6):
                    tasks.start_soon(work, one)
                    tasks.start_soon(work, two)
                for _ in range(5):
                    await anyio.sleep(0.03)
                    for session in pg_cluster.sessions(pg_dsn):
                        pg_cluster.terminate_backend(session.pid)
        await unlocked()
    assert len(turns) == 12
    for began, _ in turns:  # of those that had a slot from their beginning to their end
        assert sum(other <= began < ended for other, ended in turns) <= 2


async def test_a_network_that_falls_silent(pg_dsn, fault_proxy, open_hasty, standing, unlocked):
    """Who stands at the turnstile there has lost it, in doubt, and waits for its turn anew."""
    async with open_locks(pg_dsn) as others:
        async with open_hasty(fault_proxy.dsn(pg_dsn)) as locks:

            async def wait() -> None:
                with pytest.raises(LockTimeout):
                    async with locks.semaphore("s", 1).acquire(3.0):
                        pass

            with anyio.fail_after(SOON):
                async with others.semaphore("s", 1).acquire():
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(wait)
                        await standing()
                        fault_proxy.freeze()
            fault_proxy.thaw()
            await unlocked()


async def test_a_turnstile_that_can_not_be_left_in_time(
    pg_dsn, fault_proxy, open_quick, standing, unlocked
):
    """Its session is given up, and others pass as soon as the server has noticed."""
    async with (
        open_locks(pg_dsn) as others,
        open_quick(fault_proxy.dsn(pg_dsn), release_timeout=0.1) as locks,
    ):
        async with taken(others, 1):
            with anyio.fail_after(SOON):  # though the network is silent still
                async with anyio.create_task_group() as tasks:

                    async def wait() -> None:
                        async with locks.semaphore("s", 1).acquire():
                            raise AssertionError("nobody has let go of it")

                    tasks.start_soon(wait)
                    await standing()
                    fault_proxy.freeze()
                    tasks.cancel_scope.cancel()
        fault_proxy.thaw()
        await unlocked()
        with anyio.fail_after(SOON):
            async with locks.semaphore("s", 1).acquire():
                pass


async def test_a_lost_network_while_asking(pg_dsn, fault_proxy, open_quick):
    async with open_quick(fault_proxy.dsn(pg_dsn)) as locks:
        await locks.ping()
        fault_proxy.delay(0.2, "down")

        async def break_off() -> None:
            await anyio.sleep(0.1)
            fault_proxy.refuse()
            fault_proxy.delay(0)
            fault_proxy.reset()
            await anyio.sleep(0.1)
            fault_proxy.accept()

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(break_off)
                async with locks.semaphore("s", 1).acquire() as held:
                    assert held.slot == 0


async def test_no_session_to_stand_with(pg_dsn, fault_proxy, standing, unlocked):
    """What it says tells of the semaphore, and why there was no session."""
    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two:
        async with open_locks(fault_proxy.dsn(pg_dsn)) as locks:

            async def stand() -> None:
                async with two.semaphore("s", 1).acquire():
                    pass

            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    async with taken(one, 1), locks.lock("beside"):
                        tasks.start_soon(stand)
                        await standing()
                        fault_proxy.refuse()
                        with pytest.raises(LockTimeout) as caught:
                            async with locks.semaphore("s", 1).acquire(1.0):
                                pass
                        fault_proxy.accept()
            assert str(KEY) in str(caught.value)
        await unlocked()


# ---------------------------------------------------------------- leaving, closing


async def test_release_and_detach(pg_dsn, pg_cluster):
    async with open_locks(pg_dsn) as locks:
        semaphore = locks.semaphore("s", 1)
        async with semaphore.acquire() as held:
            await held.release()
            with pytest.raises(LockNotHeldError):
                held.assert_held()
            async with semaphore.acquire() as again:
                detached = again.detach()
        with pytest.raises(LockTimeout):
            async with open_locks(pg_dsn) as others, others.semaphore("s", 1).acquire(0):
                pass
        await detached.release()
        assert not pg_cluster.advisory_locks(pg_dsn)


async def test_closing_ends_who_holds_and_who_waits(pg_dsn, standing):
    ends: list[BaseException] = []

    async def enter(locks, *, task_status=anyio.TASK_STATUS_IGNORED) -> None:
        try:
            async with locks.semaphore("s", 1).acquire():
                task_status.started()
                await anyio.sleep_forever()
        except (LockLost, anyio.ClosedResourceError) as exc:
            ends.append(exc)

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with open_locks(pg_dsn) as locks:
                await tasks.start(enter, locks)
                tasks.start_soon(enter, locks)
                await standing()
                tasks.start_soon(enter, locks)
                await in_line(locks, 2)
            with pytest.raises(anyio.ClosedResourceError):
                async with locks.semaphore("s", 1).acquire():
                    pass
    kinds = sorted(type(end).__name__ for end in ends)
    assert kinds == ["ClosedResourceError", "ClosedResourceError", "LockLost"]


# ---------------------------------------------------------------- cancellation


async def test_entering_is_cancellable(pg_dsn, unlocked):
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:

        async def enter() -> None:
            async with locks.semaphore("s", 1).acquire():
                pass

        await assert_cancellable(enter)
        async with others.semaphore("s", 1).acquire():
            await assert_cancellable(enter)
        await unlocked()


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a lock"])
@pytest.mark.parametrize("what", ["thaw", "reset"])
async def test_a_cancelled_question(pg_dsn, fault_proxy, open_quick, unlocked, beside, what):
    """What is granted after all is given back, also where the answer takes its time."""
    async with open_quick(fault_proxy.dsn(pg_dsn), release_timeout=0.2) as locks:
        async with AsyncExitStack() as stack:
            if beside and what == "reset":
                stack.enter_context(pytest.raises(LockLost))
            if beside:
                await stack.enter_async_context(locks.lock("beside"))
            await locks.ping()
            fault_proxy.freeze("down")
            with anyio.fail_after(SOON):
                with anyio.move_on_after(0.1) as scope:
                    async with locks.semaphore("s", 1).acquire():
                        raise AssertionError("nobody has heard of it")
            assert scope.cancelled_caught
            if what == "reset":
                fault_proxy.reset()
            fault_proxy.thaw()
        await unlocked()
        with anyio.fail_after(SOON):
            async with locks.semaphore("s", 1).acquire() as held:
                assert held.slot == 0


async def test_questions_that_are_given_up_at_once(pg_dsn, fault_proxy, open_quick, unlocked):
    """Nothing is held on their session then, so it ends: not one waits for the others' ends."""
    async with open_quick(fault_proxy.dsn(pg_dsn), release_timeout=0.2) as locks:

        async def ask(name: str) -> None:
            async with locks.semaphore(name, 1).acquire():
                raise AssertionError("nobody has heard of it")

        await locks.ping()
        fault_proxy.freeze("down")
        with anyio.fail_after(SOON / 2):  # long before the silence is noticed
            with anyio.move_on_after(0.1):
                async with anyio.create_task_group() as tasks:
                    for name in ("s", "t", "u"):
                        tasks.start_soon(ask, name)
            while locks._fleet.lanes:  # noqa: ASYNC110 - it ends by itself
                await anyio.sleep(0.01)
        fault_proxy.thaw()
        await unlocked()


async def test_a_cancelled_question_that_is_refused(pg_dsn, fault_proxy, unlocked):
    async with open_locks(pg_dsn) as others, open_locks(fault_proxy.dsn(pg_dsn)) as locks:
        await locks.ping()
        async with others.semaphore("s", 1).acquire() as held:
            fault_proxy.delay(0.1, "down")
            with anyio.move_on_after(0.05) as scope:
                async with locks.semaphore("s", 1).acquire():
                    pass
            assert scope.cancelled_caught
            held.assert_held()
        fault_proxy.delay(0)
        await unlocked()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_cancelled_at_random_moments(pg_dsn, unlocked, seed):
    """Never more than the limit inside, and nothing is left."""
    rng = random.Random(seed)
    inside = 0
    entered = cancelled = 0
    longest = 0.03

    async def work(locks, rng) -> None:
        nonlocal inside, entered, cancelled, longest
        for _ in range(15):
            limit = rng.choice([0, None, None, 0.01])
            with anyio.move_on_after(rng.random() * longest) as scope:
                try:
                    async with locks.semaphore("s", 2).acquire(limit):
                        inside += 1
                        entered += 1
                        try:
                            assert inside <= 2, f"seed {seed}"
                            await anyio.sleep(rng.random() * 0.01)
                        finally:
                            inside -= 1
                except LockTimeout:
                    pass
            cancelled += scope.cancelled_caught
            # To where some are in time and some are not, on whatever machine.
            longest *= 1.02 if scope.cancelled_caught else 0.98

    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two:
        with anyio.fail_after(2 * SOON):
            async with anyio.create_task_group() as tasks:
                for locks in (one, two):
                    for _ in range(4):
                        tasks.start_soon(work, locks, random.Random(rng.random()))
        await unlocked()
        assert one.statistics().tasks_waiting == two.statistics().tasks_waiting == 0
        async with one.semaphore("s", 2).acquire(0), two.semaphore("s", 2).acquire(0):
            pass
    print(f"seed {seed}: {entered} entered, {cancelled} cancelled")  # noqa: T201
    assert entered
    assert cancelled
