"""Locks that many tasks take and release at once, which go to the server as one command."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import psycopg
import pytest

from pgstructured.driver._wire import Wire
from pgstructured.errors import LockCapacityError
from pgstructured.locks import LockKey
from pgstructured.locks._names import MARKER
from pgstructured.locks._statements import CHANNEL, TRY, UNLOCK, ring_payload
from pgstructured.observe import Event, instrumented
from pgstructured.testing import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable

TASKS = 60
KINDS: dict[str, Callable[[int], LockKey]] = {
    "bigint": lambda number: LockKey.bigint(-(2**63) + number),
    "pair": lambda number: LockKey.pair(-(2**31) + number, 2**31 - 1 - number),
    "named": lambda number: LockKey.named(f"gathered {number}"),
}
TOGETHER = {
    found.together.name: name
    for name, statements in (("try", TRY), ("unlock", UNLOCK))
    for found in statements.values()
}
HELD = (
    "SELECT classid::bigint, objid::bigint, objsubid, mode FROM pg_locks"
    " WHERE locktype = 'advisory' AND granted"
)
SHARE = "SELECT pg_advisory_lock_shared(%s)"


@pytest.fixture
def together(monkeypatch) -> list[str]:
    """What went out as one command for many: ``try`` or ``unlock``."""
    seen: list[str] = []
    send = Wire.send_prepared

    def spy(wire, statement, *args):
        if statement.name in TOGETHER:
            seen.append(TOGETHER[statement.name])
        return send(wire, statement, *args)

    monkeypatch.setattr(Wire, "send_prepared", spy)
    return seen


async def run_many(locks, keys, work, *, times: int) -> None:
    """Take every key so often, each in a task of its own."""

    async def take(number: int, key: LockKey, shared: bool) -> None:
        for _ in range(times):
            async with locks.lock(key, shared=shared) as lock:
                await work(number, lock)

    async with anyio.create_task_group() as tasks:
        for number, key in enumerate(keys):
            tasks.start_soon(take, number, key, number % 3 == 0)


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_gathered_is_held(open_quick, settled, pg_dsn, together, kind) -> None:
    """Some shared, some not; each is on the server while its task has it, and no longer."""
    keys = [KINDS[kind](number) for number in range(TASKS)]
    wrong: list[int] = []

    def is_on_server(lock) -> bool:
        mode = "ShareLock" if lock.shared else "ExclusiveLock"
        return (*lock.key.pg_locks_ids, mode) in observer.execute(HELD).fetchall()

    async def look(number: int, lock) -> None:
        if number % 10 < 2 and not is_on_server(lock):
            wrong.append(number)

    with psycopg.connect(pg_dsn, autocommit=True) as observer:
        async with open_quick(pg_dsn) as locks:
            with anyio.fail_after(60):
                while not {"try", "unlock"} <= set(together):
                    await run_many(locks, keys, look, times=5)
            assert wrong == []
            await settled(locks)
            assert observer.execute(HELD).fetchall() == []


@pytest.mark.parametrize("kind", ["pair", "named"])
async def test_who_waits_elsewhere_is_told_of_each(open_quick, pg_dsn, together, kind) -> None:
    keys = [KINDS[kind](number) for number in range(TASKS)]
    times = 5

    async def do_nothing(number: int, lock) -> None:
        pass

    with psycopg.connect(pg_dsn, autocommit=True) as listener:
        listener.execute(f"LISTEN {CHANNEL}")
        listener.execute("SELECT pg_advisory_lock(%s)", (MARKER.as_bigint,))
        rounds = 0
        async with open_quick(pg_dsn) as locks:
            with anyio.fail_after(60):
                while "unlock" not in together:
                    await run_many(locks, keys, do_nothing, times=times)
                    rounds += 1
        told = [found.payload for found in listener.notifies(timeout=0.5)]
    # Equal payloads of one transaction would be told once; a key is unlocked once in each.
    assert {payload: told.count(payload) for payload in told} == {
        ring_payload(key, "released"): rounds * times for key in keys
    }


def fill(*hogs: psycopg.Connection) -> int:
    """Fill the server's lock table; return how many locks that took."""
    taken = 0
    try:
        while taken < 100_000:
            for hog in hogs:
                hog.execute(SHARE, (10**9 + taken,))
            taken += 1
    except psycopg.errors.OutOfMemory:
        pass
    return taken


async def test_no_room_for_all_of_them(open_quick, settled, together) -> None:
    """The lock table is full: each is told so, and keeps nothing."""
    settings = {"max_locks_per_transaction": "10", "max_connections": "10"}
    outcomes = {"held": 0, "refused": 0}
    with Cluster(settings=settings) as cluster, anyio.fail_after(120):
        dsn = cluster.dsn()
        with psycopg.connect(dsn, autocommit=True) as hog:
            taken = fill(hog)
            hog.execute("SELECT pg_advisory_unlock_all()")
            for number in range(taken - 20):
                hog.execute("SELECT pg_advisory_lock(%s)", (10**9 + number,))

            async def take(locks, number: int) -> None:
                for turn in range(20):
                    try:
                        async with locks.lock(LockKey.bigint(number * 1000 + turn)):
                            outcomes["held"] += 1
                            await anyio.lowlevel.checkpoint()
                    except LockCapacityError:
                        outcomes["refused"] += 1

            async with open_quick(dsn) as locks:
                while not (outcomes["refused"] and "try" in together):
                    async with anyio.create_task_group() as tasks:
                        for number in range(TASKS):
                            tasks.start_soon(take, locks, number)
                await settled(locks)
                hog.execute("SELECT pg_advisory_unlock_all()")
                assert hog.execute(HELD).fetchall() == []
    assert outcomes["held"] > 0


async def test_room_for_some_of_them(open_quick, settled, together) -> None:
    """What there is room for is granted, and only the others are refused."""
    settings = {"max_locks_per_transaction": "10", "max_connections": "10"}
    undecided, refused = 0, 0
    all_decided, may_leave = anyio.Event(), anyio.Event()

    def decide() -> None:
        nonlocal undecided
        undecided -= 1
        if not undecided:
            all_decided.set()

    async def take(locks, number: int) -> None:
        """What is gathered is what follows an answer."""
        nonlocal refused
        async with locks.lock(LockKey.bigint(0), shared=True) as of_all:
            await of_all.refresh()
            try:
                async with locks.lock(LockKey.bigint(number)):
                    decide()
                    await may_leave.wait()
            except LockCapacityError:
                refused += 1
                decide()

    with Cluster(settings=settings) as cluster, anyio.fail_after(120):
        dsn = cluster.dsn()
        with psycopg.connect(dsn, autocommit=True) as hog:
            async with open_quick(dsn) as locks:
                while not (refused and "try" in together):
                    undecided, refused = TASKS, 0
                    all_decided, may_leave = anyio.Event(), anyio.Event()
                    together.clear()
                    taken = fill(hog)
                    hog.execute("SELECT pg_advisory_unlock_all()")
                    for number in range(taken - TASKS // 2):
                        hog.execute(SHARE, (10**9 + number,))
                    async with anyio.create_task_group() as tasks:
                        for number in range(1, TASKS + 1):
                            tasks.start_soon(take, locks, number)
                        await all_decided.wait()
                        with pytest.raises(psycopg.errors.OutOfMemory):
                            hog.execute(SHARE, (2 * 10**9,))
                        may_leave.set()
                    hog.execute("SELECT pg_advisory_unlock_all()")
                await settled(locks)
                assert hog.execute(HELD).fetchall() == []


async def test_no_room_for_a_fenced_one(open_quick, settled) -> None:
    """It shares no statement with others, so there is nothing to be tried again."""
    settings = {"max_locks_per_transaction": "10", "max_connections": "10"}
    with Cluster(settings=settings) as cluster, anyio.fail_after(60):
        dsn = cluster.dsn()
        with psycopg.connect(dsn, autocommit=True) as hog:
            async with open_quick(dsn) as locks:
                await locks.create_fence_table()
                async with locks.lock("warm", fenced=True):
                    pass
                fill(hog)
                with pytest.raises(LockCapacityError):
                    async with locks.lock("k", fenced=True):
                        raise AssertionError("there was room")
                hog.execute("SELECT pg_advisory_unlock_all()")
                async with locks.lock("k", fenced=True):
                    pass
                await settled(locks)
            assert hog.execute(HELD).fetchall() == []


async def test_unlocked_although_nobody_can_be_told(open_quick, settled, together) -> None:
    """The lock table is full, so to look who waits fails; what was let go is let go."""
    settings = {"max_locks_per_transaction": "10", "max_connections": "10"}
    keys = [LockKey.bigint(number) for number in range(1, TASKS + 1)]
    failed: list[object] = []
    holding, is_full = 0, anyio.Event()

    def note(event: Event) -> None:
        if event.name == "lock.release_failed":
            failed.append(event.facts["error"])

    async def take(locks, key: LockKey) -> None:
        nonlocal holding
        async with locks.lock(key, shared=True) as lock:
            holding += 1
            await is_full.wait()
            await lock.refresh()

    with Cluster(settings=settings) as cluster, instrumented(note):
        dsn = cluster.dsn()
        with psycopg.connect(dsn, autocommit=True) as hog:
            with psycopg.connect(dsn, autocommit=True) as another:
                fill(hog, another)  # most memory is for holders then, for ever, and not for keys
                hog.execute("SELECT pg_advisory_unlock_all()")
            async with open_quick(dsn) as locks:
                async with locks.lock(LockKey.bigint(0)) as other:
                    with anyio.fail_after(40):
                        while not (failed and "unlock" in together):
                            holding, is_full = 0, anyio.Event()
                            for key in keys:  # so that there is no new room when it is let go
                                hog.execute(SHARE, (key.as_bigint,))
                            async with anyio.create_task_group() as tasks:
                                for key in keys:
                                    tasks.start_soon(take, locks, key)
                                while holding < len(keys):  # noqa: ASYNC110 - room is made meanwhile
                                    await anyio.sleep(0.01)
                                fill(hog)
                                together.clear()
                                is_full.set()
                                await anyio.lowlevel.checkpoint()
                                await anyio.lowlevel.checkpoint()
                                time.sleep(0.02)  # the answers come, and nobody reads
                            hog.execute("SELECT pg_advisory_unlock_all()")
                            held = hog.execute(f"{HELD} AND pid = %s", (other.backend_pid,))
                            assert len(held.fetchall()) == 1, "what is still held, and no more"
                await settled(locks)
            assert hog.execute(HELD).fetchall() == []
