"""pgstructured's bus: fan-out, latency, idling, memory."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from benchmarks._batch import Batch, Options, expect
from benchmarks._notifier import notifier
from pgstructured.notify import open_notify_bus

from .notify_fanout import receive_each, receive_many, receivers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from benchmarks._batch import Workload


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
async def _receive(options: Options) -> AsyncGenerator[Batch]:
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


WORKLOADS: dict[str, Workload] = {
    "receive": _receive,
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
