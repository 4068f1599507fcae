"""Stock psycopg: `psycopg.AsyncConnection`, on asyncio and uvloop."""

from __future__ import annotations

from typing import Any

import psycopg

from ._psycopg import workloads


async def _connect(dsn: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(dsn, autocommit=True)


WORKLOADS = workloads(_connect)
