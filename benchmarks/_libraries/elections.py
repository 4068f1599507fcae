"""From asking a leader to resign to the next leader's block: ours, and by hand on psycopg.

By hand it is what somebody would write who has three connections open: the candidates listen,
the leader unlocks when its process id is told, the next one stands in the server's queue.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import anyio
import psycopg

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from benchmarks._batch import Batch, Options

PAUSE = 0.06
"""Seconds before each request: whoever has resigned stands in line again by then."""
NUMBER = 1234
ASK = (
    "SELECT pg_notify('resign', pid::text) FROM pg_locks"
    f" WHERE locktype = 'advisory' AND granted AND classid = 0 AND objid = {NUMBER}"
)


class _Elections:
    """Times every election from the request on."""

    def __init__(self, ask: Callable[[], Awaitable[object]]) -> None:
        self._ask = ask
        self._is_elected = anyio.Event()
        self._elected_at = 0

    def note(self) -> None:
        """Somebody leads from now on."""
        self._elected_at = perf_counter_ns()
        self._is_elected.set()

    async def batch(self, count: int) -> list[int]:
        times = []
        for _ in range(count):
            await anyio.sleep(PAUSE)
            self._is_elected = anyio.Event()
            asked_at = perf_counter_ns()
            await self._ask()
            with anyio.fail_after(10):
                await self._is_elected.wait()
            times.append(self._elected_at - asked_at)
        return times


@asynccontextmanager
async def _ours(options: Options) -> AsyncGenerator[Batch]:
    from pgstructured.locks import Locks, open_locks

    async def stand(locks: Locks, candidate: str) -> None:
        while True:
            async with locks.election("e", candidate=candidate).campaign() as leadership:
                elections.note()
                await leadership.wait_resign_requested()
            await anyio.sleep(PAUSE / 4)

    async with AsyncExitStack() as stack:
        asking, *standing = [
            await stack.enter_async_context(open_locks(options.dsn)) for _ in range(3)
        ]
        elections = _Elections(asking.election("e", candidate="asks").request_resign)
        async with anyio.create_task_group() as tasks:
            for number, locks in enumerate(standing):
                tasks.start_soon(stand, locks, f"candidate {number}")
            yield elections.batch
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def _by_hand(options: Options) -> AsyncGenerator[Batch]:
    async def stand(connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute("LISTEN resign")
        while True:
            await connection.execute("SELECT pg_advisory_lock(%s)", [NUMBER])
            elections.note()
            async for notification in connection.notifies():
                if notification.payload == str(connection.info.backend_pid):
                    break
            await connection.execute("SELECT pg_advisory_unlock(%s)", [NUMBER])

    async with AsyncExitStack() as stack:
        asking, *standing = [
            await stack.enter_async_context(
                await psycopg.AsyncConnection.connect(options.dsn, autocommit=True)
            )
            for _ in range(3)
        ]
        elections = _Elections(lambda: asking.execute(ASK))
        async with anyio.create_task_group() as tasks:
            for connection in standing:
                tasks.start_soon(stand, connection)
            yield elections.batch
            tasks.cancel_scope.cancel()


WORKLOADS = {"ours": _ours, "by-hand": _by_hand}
