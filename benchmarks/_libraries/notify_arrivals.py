"""What the receivers' workloads have in common: latencies, wake-ups, a flood."""

from __future__ import annotations

import resource
from contextlib import asynccontextmanager
from statistics import quantiles
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import anyio

from benchmarks._batch import Batch, Options, expect
from benchmarks._notifier import notifier

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from benchmarks._batch import Workload

    Receiving = Callable[[Options, Callable[[str], None]], AbstractAsyncContextManager[object]]

RATE = 1000
IDLE = 3.0
"""Seconds in which nothing happens."""


def latency(receiving: Receiving) -> Workload:
    """Measure from just before `execute` to the receiver's own code, a thousand times a second."""

    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        late: list[int] = []
        complete = anyio.Event()

        def on_payload(payload: str) -> None:
            late.append(monotonic_ns() - int(payload))
            if len(late) == options.scale:
                complete.set()

        async with receiving(options, on_payload):
            with notifier(options.dsn, options.channel) as send:

                async def batch(_: int) -> dict[str, float]:
                    nonlocal complete
                    late.clear()
                    complete = anyio.Event()
                    send(options.scale, 1 / RATE)
                    await complete.wait()
                    return percentiles([each / 1000 for each in late])

                yield batch

    return workload


def percentiles(late: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile."""
    cuts = quantiles(late, n=100)
    return {"p50 us": cuts[49], "p99 us": cuts[98]}


def idle(receiving: Receiving) -> Workload:
    """Count how often the process wakes up while nothing happens."""

    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        async with receiving(options, lambda _: None):
            await anyio.sleep(0.2)

            async def batch(_: int) -> dict[str, float]:
                before = resource.getrusage(resource.RUSAGE_SELF)
                await anyio.sleep(IDLE)
                after = resource.getrusage(resource.RUSAGE_SELF)
                cpu = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
                # One is the end of the nap.
                wakeups = after.ru_nvcsw - before.ru_nvcsw - 1
                return {"wake-ups/s": wakeups / IDLE, "CPU us/s": cpu / IDLE * 1e6}

            yield batch

    return workload


def flood(receiving: Receiving) -> Workload:
    """Receive what the parent sends, to the last byte."""

    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        received = size = wanted = 0
        complete = anyio.Event()

        def on_payload(payload: str) -> None:
            nonlocal received, size
            size += len(payload)
            received += 1
            if received == wanted:
                complete.set()

        async with receiving(options, on_payload):

            async def batch(count: int) -> None:
                nonlocal received, size, wanted, complete
                received, size, wanted, complete = 0, 0, count, anyio.Event()
                await complete.wait()
                expect("payload bytes", size, count * 100)

            yield batch

    return workload


def workloads(receiving: Receiving) -> dict[str, Any]:
    """Return all of them for one library."""
    return {"latency": latency(receiving), "idle": idle(receiving), "flood": flood(receiving)}
