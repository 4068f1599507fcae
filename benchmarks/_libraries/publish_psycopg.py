"""Publishing with psycopg as it comes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import psycopg

from .publish_ours import one_by_one_on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from benchmarks._batch import Batch, Options


@asynccontextmanager
async def _execute(options: Options) -> AsyncGenerator[Batch]:
    connecting = psycopg.AsyncConnection.connect(options.dsn, autocommit=True)
    async with await connecting as connection:
        yield one_by_one_on(connection, options)


WORKLOADS = {"execute": _execute}
