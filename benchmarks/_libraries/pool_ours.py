"""pgstructured's pool, on every loop."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from benchmarks._pooling import Peer, workloads

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from benchmarks._batch import Options


async def _select(conn: Any, query: str) -> Any:
    cursor = await conn.execute(query)
    return (await cursor.fetchone())[0]


@asynccontextmanager
async def _open(options: Options, size: int) -> AsyncGenerator[Peer]:
    from pgstructured.pool import open_pool

    opened: list[int] = []

    async def on_connect(conn: Any) -> None:
        opened.append(conn.info.backend_pid)

    async with open_pool(options.dsn, min_size=size, max_size=size, on_connect=on_connect) as pool:
        await pool.wait_ready()
        yield Peer(pool.acquire, _select, opened)


WORKLOADS = workloads(_open)
