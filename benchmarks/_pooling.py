"""What any pool can be asked: used for ours and for the peers'."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from ._batch import Batch, Options, expect

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from ._batch import Workload

TASKS = 50
SIZE = 10
CANCELLED_TASKS = 24
CANCELLED_SIZE = 4
PATIENCE = 5.0
"""Seconds in which a pool that has lost nothing gives out all its connections."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One pool that is open."""

    acquire: Callable[[], AbstractAsyncContextManager[Any]]
    """Borrows a connection."""

    select: Callable[[Any, str], Awaitable[Any]]
    """Runs a query on a connection and returns its one value."""

    opened: list[int]
    """One item for each connection that was ever made."""


@asynccontextmanager
async def _acquire(open_peer: Any, options: Options) -> AsyncGenerator[Batch]:
    async with open_peer(options, SIZE) as peer:
        acquire = peer.acquire

        async def batch(count: int) -> None:
            for _ in range(count):
                async with acquire():
                    pass

        yield batch


@asynccontextmanager
async def _busy(open_peer: Any, options: Options) -> AsyncGenerator[Batch]:
    async with open_peer(options, SIZE) as peer:
        acquire, select = peer.acquire, peer.select

        async def work(count: int) -> None:
            for _ in range(count):
                async with acquire() as conn:
                    expect("SELECT 1", await select(conn, "SELECT 1"), 1)

        async def batch(count: int) -> None:
            async with anyio.create_task_group() as tasks:
                for _ in range(TASKS):
                    tasks.start_soon(work, count // TASKS)

        yield batch


@asynccontextmanager
async def _cancelled(open_peer: Any, options: Options, *, native: bool) -> AsyncGenerator[Batch]:
    """Cancel tasks at random for ``scale`` seconds, and see what is left of the pool."""

    async def batch(_: int) -> dict[str, float]:
        chance = random.Random(1)
        cancelled = swallowed = wrong = 0
        async with open_peer(options, CANCELLED_SIZE) as peer:
            opened_before = len(peer.opened)

            async def use(number: int) -> None:
                nonlocal wrong
                seconds = chance.uniform(0, 0.01)
                async with peer.acquire() as conn:
                    query = f"SELECT {number} FROM pg_sleep({seconds:.4f})"
                    wrong += await peer.select(conn, query) != number

            async def use_in_scope(number: int) -> None:
                nonlocal cancelled
                with anyio.move_on_after(chance.uniform(0, 0.02)) as scope:
                    await use(number)
                cancelled += scope.cancelled_caught

            async def use_in_task(number: int) -> None:
                nonlocal cancelled, swallowed
                task = asyncio.ensure_future(use(number))
                await asyncio.sleep(chance.uniform(0, 0.02))
                was_cancelled = task.cancel()
                await asyncio.wait([task])
                cancelled += task.cancelled()
                swallowed += was_cancelled and not task.cancelled()

            async def work(until: float) -> None:
                number = 0
                while anyio.current_time() < until:
                    number += 1
                    await (use_in_task if native else use_in_scope)(number)

            async with anyio.create_task_group() as tasks:
                for _ in range(CANCELLED_TASKS):
                    tasks.start_soon(work, anyio.current_time() + options.scale)
            await anyio.sleep(1.0)
            usable = await _count_usable(peer)
            opened = len(peer.opened) - opened_before
        return {
            "cancelled": cancelled,
            "swallowed": swallowed,
            "lost": CANCELLED_SIZE - usable,
            "thrown away": opened,
            "wrong": wrong,
        }

    yield batch


async def _count_usable(peer: Peer) -> int:
    """Return how many connections the pool can still give out at once."""
    usable = 0

    async def hold() -> None:
        nonlocal usable
        async with peer.acquire() as conn:
            await peer.select(conn, "SELECT 1")
            usable += 1
            await anyio.sleep(PATIENCE)

    with anyio.move_on_after(PATIENCE - 1):
        async with anyio.create_task_group() as tasks:
            for _ in range(CANCELLED_SIZE):
                tasks.start_soon(hold)
    return usable


def workloads(open_peer: Any) -> dict[str, Workload]:
    """Return the workloads on the pools that ``open_peer(options, size)`` opens."""
    return {
        "acquire": partial(_acquire, open_peer),
        "busy": partial(_busy, open_peer),
        "cancelled": partial(_cancelled, open_peer, native=False),
        "cancelled-natively": partial(_cancelled, open_peer, native=True),
    }
