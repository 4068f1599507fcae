"""asyncpg's `add_listener`."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg

from .notify_arrivals import workloads

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from benchmarks._batch import Options


@asynccontextmanager
async def receiving(options: Options, on_payload: Callable[[str], None]) -> AsyncGenerator[None]:
    connection = await asyncpg.connect(**options.asyncpg_arguments())

    def on_notification(_connection: object, _pid: int, _channel: str, payload: str) -> None:
        on_payload(payload)

    try:
        await connection.add_listener(options.channel, on_notification)
        yield
    finally:
        await connection.close()


WORKLOADS = workloads(receiving)
