"""Plain AnyIO memory object streams, one for each receiver: what a bus would do by hand.

Nothing comes from a server here: it is the fan-out alone, `send_nowait` and `receive`.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from benchmarks._batch import Batch, Options, expect

from .notify_fanout import receive_each, receivers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from benchmarks._batch import Workload


def _fan_out(subscribers: int, burst: int) -> Workload:
    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        pairs = [anyio.create_memory_object_stream[str](2 * burst) for _ in range(subscribers)]
        senders = [sender for sender, _ in pairs]
        streams = [receiver for _, receiver in pairs]
        async with AsyncExitStack() as stack:
            for stream in (*senders, *streams):
                await stack.enter_async_context(stream)
            deliveries = await stack.enter_async_context(receivers([*streams], receive_each))

            async def batch(count: int) -> None:
                for _ in range(options.scale * count // (subscribers * burst)):
                    deliveries.expect(subscribers * burst)
                    for number in range(burst):
                        payload = str(number)
                        for sender in senders:
                            sender.send_nowait(payload)
                    await deliveries.complete.wait()
                    expect("deliveries", deliveries.count, subscribers * burst)

            yield batch

    return workload


WORKLOADS = {
    f"fan-out-{subscribers}-{burst}": _fan_out(subscribers, burst)
    for subscribers in (100, 1000)
    for burst in (1, 20)
}
