"""pgstructured's bus: receiving, fan-out, latency, idling, memory."""

from __future__ import annotations

import gc
import tracemalloc
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from benchmarks._batch import Batch, Options, expect
from benchmarks._notifier import notifier
from pgstructured.driver import connect
from pgstructured.notify import open_notify_bus

from .notify_arrivals import workloads
from .notify_fanout import receive_each, receive_many, receivers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from benchmarks._batch import Workload

SUBSCRIBERS = 1000
CHUNK = 10_000


def _fan_out(
    subscribers: int, burst: int, receive: Callable[[Any, Any], Awaitable[None]]
) -> Workload:
    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(open_notify_bus(options.dsn))
            streams = [
                await stack.enter_async_context(bus.subscribe(options.channel))
                for _ in range(subscribers)
            ]
            send = stack.enter_context(notifier(options.dsn, options.channel))
            deliveries = await stack.enter_async_context(receivers([*streams], receive))

            async def batch(count: int) -> None:
                for _ in range(options.scale * count // (subscribers * burst)):
                    deliveries.expect(subscribers * burst)
                    send(burst)
                    await deliveries.complete.wait()
                    expect("deliveries", deliveries.count, subscribers * burst)

            yield batch

    return workload


@asynccontextmanager
async def _receiving(options: Options, on_payload: Callable[[str], None]) -> AsyncGenerator[None]:
    async def receive() -> None:
        while True:
            for notification in await subscription.receive_many():
                on_payload(notification.payload)

    async with (
        open_notify_bus(options.dsn) as bus,
        bus.subscribe(options.channel, buffer=options.scale, gaps="raise") as subscription,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(receive)
        yield
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def _receive_flood(options: Options) -> AsyncGenerator[Batch]:
    async with (
        open_notify_bus(options.dsn) as bus,
        bus.subscribe(options.channel, buffer=options.scale, gaps="raise") as subscription,
    ):

        async def batch(count: int) -> None:
            received = size = 0
            while received < count:
                for notification in await subscription.receive_many():
                    size += len(notification.payload)
                    received += 1
            expect("payload bytes", size, count * 100)

        yield batch


@asynccontextmanager
async def _idle_subscribers(options: Options) -> AsyncGenerator[Batch]:
    """Weigh a subscriber that waits, less the task that does it."""

    async def wait(*, task_status: Any = anyio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await anyio.sleep_forever()

    async with open_notify_bus(options.dsn) as bus:

        async def subscribe(*, task_status: Any = anyio.TASK_STATUS_IGNORED) -> None:
            async with bus.subscribe(options.channel) as subscription:
                task_status.started()
                await subscription.receive()

        async def weigh(task: Callable[..., Awaitable[None]]) -> float:
            async with anyio.create_task_group() as tasks:
                await tasks.start(task)
                gc.collect()
                tracemalloc.start()
                before, _ = tracemalloc.get_traced_memory()
                for _ in range(SUBSCRIBERS):
                    await tasks.start(task)
                await anyio.wait_all_tasks_blocked()
                gc.collect()
                after, _ = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                tasks.cancel_scope.cancel()
            return (after - before) / SUBSCRIBERS / 1024

        async def batch(_: int) -> dict[str, float]:
            return {"KiB each": await weigh(subscribe) - await weigh(wait)}

        yield batch


@asynccontextmanager
async def _stuck_subscriber(options: Options) -> AsyncGenerator[Batch]:
    """Send to a subscriber that never receives, and to one that does."""
    async with (
        open_notify_bus(options.dsn) as bus,
        bus.subscribe(options.channel) as stuck,
        bus.subscribe(options.channel, buffer=100_000, gaps="raise") as other,
        await connect(options.dsn) as looking,
    ):
        with notifier(options.dsn, options.channel) as send:

            async def batch(_: int) -> dict[str, float]:
                known = bus.statistics().received
                gc.collect()
                tracemalloc.start()
                before, _ = tracemalloc.get_traced_memory()
                usage = 0.0
                for _ in range(options.scale // CHUNK):
                    send(CHUNK)
                    received = 0
                    while received < CHUNK:
                        received += len(await other.receive_many())
                    cursor = await looking.execute("SELECT pg_notification_queue_usage()")
                    usage = max(usage, *(await cursor.fetchone() or ()))
                gc.collect()
                after, _ = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                figures = stuck.statistics()
                total = bus.statistics().received
                expect("accounted for", figures.lost + figures.depth, total)
                expect("received", total - known, options.scale)
                return {"KiB grown": (after - before) / 1024, "queue usage": usage}

            yield batch


WORKLOADS: dict[str, Workload] = {
    **workloads(_receiving),
    "flood": _receive_flood,
    "idle-subscribers": _idle_subscribers,
    "stuck-subscriber": _stuck_subscriber,
    **{
        f"fan-out-{subscribers}-{burst}": _fan_out(subscribers, burst, receive_each)
        for subscribers in (100, 1000)
        for burst in (1, 20)
    },
    **{
        f"fan-out-many-{subscribers}": _fan_out(subscribers, 20, receive_many)
        for subscribers in (100, 1000)
    },
}
