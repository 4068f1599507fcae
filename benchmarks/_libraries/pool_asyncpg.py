"""asyncpg's pool, on asyncio and uvloop."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg

from benchmarks._pooling import Peer, workloads

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from benchmarks._batch import Options


async def _select(conn: Any, query: str) -> Any:
    return await conn.fetchval(query)


@asynccontextmanager
async def _open(options: Options, size: int) -> AsyncGenerator[Peer]:
    opened: list[int] = []

    async def init(conn: Any) -> None:
        opened.append(conn.get_server_pid())

    async with asyncpg.create_pool(
        **options.asyncpg_arguments(), min_size=size, max_size=size, init=init
    ) as pool:
        yield Peer(pool.acquire, _select, opened)


WORKLOADS = workloads(_open)
