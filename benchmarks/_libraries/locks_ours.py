"""pgstructured's locks, on every loop."""

from __future__ import annotations

import gc
import tracemalloc
from contextlib import asynccontextmanager
from functools import partial
from statistics import median, quantiles
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

# ruff: noqa: ASYNC110 - what is waited for is looked at
from benchmarks._batch import Batch, Options, expect, one_by_one
from benchmarks._handoff import Take, measured

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine

    from pgstructured.locks import Locks

FENCE_TABLE = "bench_fence"
WAITERS = 1000
HELD = 1000


@asynccontextmanager
async def open_warm(options: Options) -> AsyncGenerator[Locks]:
    """Yield a `Locks` with a fence table."""
    from pgstructured.locks import open_locks

    async with open_locks(options.dsn, fence_table=FENCE_TABLE) as locks:
        await locks.create_fence_table()
        yield locks


@asynccontextmanager
async def _two_selects(options: Options) -> AsyncGenerator[Batch]:
    from pgstructured.driver import open_session

    async with open_session(options.dsn) as session:

        async def operation() -> None:
            await session.execute("SELECT 1")
            await session.execute("SELECT 1")

        yield one_by_one(operation)


@asynccontextmanager
async def _uncontended(options: Options, *, fenced: bool) -> AsyncGenerator[Batch]:
    async with open_warm(options) as locks:

        async def operation() -> None:
            async with locks.lock(options.channel, fenced=fenced):
                pass

        async with locks.lock(options.channel, fenced=fenced) as held:
            expect("a fencing token", held.fencing_token is not None, fenced)
        yield one_by_one(operation)


@asynccontextmanager
async def _many_keys(options: Options) -> AsyncGenerator[Batch]:
    """Each of 100 tasks takes a key of its own, again and again."""
    async with open_warm(options) as locks:

        async def take(key: str, times: int) -> None:
            for _ in range(times):
                async with locks.lock(key):
                    pass

        yield in_tasks(options, take)


def in_tasks(options: Options, take: Callable[[str, int], Coroutine[Any, Any, None]]) -> Batch:
    """Return a batch in which each of 100 tasks takes its key so often as to make ``scale``."""
    keys = [f"{options.channel} {number}" for number in range(100)]

    async def batch(count: int) -> None:
        for _ in range(count):
            async with anyio.create_task_group() as tasks:
                for key in keys:
                    tasks.start_soon(take, key, options.scale // len(keys))

    return batch


@asynccontextmanager
async def handoff_side(dsn: str, key: str) -> AsyncGenerator[Take]:
    """Yield how one of two processes takes the key."""
    from pgstructured.locks import open_locks

    async with open_locks(dsn) as locks:
        yield partial(locks.lock, key)


@asynccontextmanager
async def _local_handoff(options: Options) -> AsyncGenerator[Batch]:
    """1,000 tasks wait for one key; it goes from one to the next."""
    async with open_warm(options) as locks:

        async def wait() -> None:
            async with locks.lock(options.channel):
                pass

        async def batch(count: int) -> list[int]:
            times = []
            for _ in range(count):
                async with anyio.create_task_group() as tasks:
                    async with locks.lock(options.channel):
                        for _ in range(WAITERS):
                            tasks.start_soon(wait)
                        while locks.statistics().tasks_waiting < WAITERS:
                            await anyio.lowlevel.checkpoint()
                        started = perf_counter_ns()
                times.append(perf_counter_ns() - started)
            return times

        yield batch


# ---------------------------------------------------------------- a thousand held locks


@asynccontextmanager
async def _held(options: Options) -> AsyncGenerator[Batch]:
    from pgstructured.driver import open_connection

    async with open_connection(options.dsn) as admin:

        async def batch(count: int) -> dict[str, float]:
            expect("batches of one", count, 1)
            async with open_warm(options) as locks:
                size = await _measure_memory(locks)
            async with open_warm(options) as locks:
                sessions, delays = await _measure_losses(locks, admin.execute)
            percentiles = quantiles(delays, n=100)
            return {
                "sessions": sessions,
                "KiB each": size / 1024,
                "p50 ms": median(delays) / 1e6,
                "p99 ms": percentiles[98] / 1e6,
                "max ms": max(delays) / 1e6,
            }

        yield batch


async def _measure_memory(locks: Locks) -> float:
    """Return how many bytes a held lock takes, beyond a task that holds none."""
    tracemalloc.start()
    try:
        alone = await _measure_tasks(anyio.sleep_forever)
        async with locks.lock("first of all"):
            pass  # what is made once is not a lock's

        async def hold(number: int) -> None:
            async with locks.lock(f"held {number}"):
                await anyio.sleep_forever()

        numbers = iter(range(HELD))
        holding = await _measure_tasks(
            lambda: hold(next(numbers)), lambda: locks.statistics().held == HELD
        )
    finally:
        tracemalloc.stop()
    return (holding - alone) / HELD


async def _measure_tasks(
    run: Callable[[], Coroutine[Any, Any, None]], is_ready: Callable[[], bool] = lambda: True
) -> int:
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    async with anyio.create_task_group() as tasks:
        for _ in range(HELD):
            tasks.start_soon(run)
        await anyio.sleep(0.05)
        while not is_ready():
            await anyio.sleep(0.05)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tasks.cancel_scope.cancel()
    return after - before


async def _measure_losses(
    locks: Locks, execute: Callable[..., Awaitable[object]]
) -> tuple[int, list[int]]:
    """Hold 1,000 locks, end their sessions one by one; return the delays until bodies stop."""
    from pgstructured.errors import LockLost

    delays: list[int] = []
    pids: dict[int, int] = {}
    ended_at = 0

    async def hold(number: int) -> None:
        try:
            async with locks.lock(f"held {number}") as held:
                pids[number] = held.backend_pid
                try:
                    await anyio.sleep_forever()
                finally:
                    delays.append(perf_counter_ns() - ended_at)
        except LockLost:
            del pids[number]

    async with anyio.create_task_group() as tasks:
        for number in range(HELD):
            tasks.start_soon(hold, number)
        while len(pids) < HELD:
            await anyio.sleep(0.01)
        sessions = locks.statistics().sessions
        for pid in sorted(set(pids.values())):
            ended_at = perf_counter_ns()
            await execute("SELECT pg_terminate_backend(%s)", [pid])
            while pid in pids.values():
                await anyio.sleep(0.01)
    expect("bodies that were cancelled", len(delays), HELD)
    return sessions, delays


WORKLOADS = {
    "two-selects": _two_selects,
    "uncontended": partial(_uncontended, fenced=False),
    "uncontended-fenced": partial(_uncontended, fenced=True),
    "many-keys": _many_keys,
    "handoff": partial(measured, __name__),
    "local-handoff": _local_handoff,
    "held": _held,
}
