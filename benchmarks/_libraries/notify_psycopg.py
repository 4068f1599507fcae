"""psycopg's `notifies()`."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import psycopg
from psycopg import sql

from .notify_arrivals import workloads

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from benchmarks._batch import Options


@asynccontextmanager
async def _receiving(options: Options, on_payload: Callable[[str], None]) -> AsyncGenerator[None]:
    async def listen() -> None:
        async for notification in connection.notifies():
            on_payload(notification.payload)

    connection = await psycopg.AsyncConnection.connect(options.dsn, autocommit=True)
    async with connection, anyio.create_task_group() as tasks:
        await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(options.channel)))
        tasks.start_soon(listen)
        yield
        tasks.cancel_scope.cancel()


WORKLOADS = workloads(_receiving)
