"""pals: synchronous, on SQLAlchemy and psycopg. Nothing else runs in its process."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pals

from benchmarks._batch import Batch, Options, one_by_one

from .dlock_peer import make_url

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@asynccontextmanager
async def _uncontended(options: Options) -> AsyncGenerator[Batch]:
    locker = pals.Locker("bench", make_url(options.dsn))

    async def operation() -> None:
        with locker.lock(options.channel):  # blocks, and there is nothing to be blocked
            pass

    try:
        yield one_by_one(operation)
    finally:
        locker.engine.dispose()


WORKLOADS = {"uncontended": _uncontended}
