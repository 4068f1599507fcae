"""One of the demo's two processes: it holds a lock when told to, and follows orders.

It talks to the conductor in lines of JSON over the socket it was given, and ends with that.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import anyio
from anyio.abc import UNIXSocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from psycopg import sql

from pgstructured import Backoff
from pgstructured.driver import connect, open_connection
from pgstructured.errors import LockLost
from pgstructured.locks import pg_lock
from pgstructured.notify import Gap, open_notify_bus

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from anyio.abc import ByteSendStream, ByteStream

    from pgstructured.locks import HeldLock
    from pgstructured.notify import NotifyBus

DSN: Final = "env:PGSTRUCTURED_DEMO_DSN"
HEARTBEAT: Final = 0.4
"""Seconds of silence after which a worker asks for a sign of life, and that the answer may take."""
LINE_LIMIT: Final = 65536


async def send_line(stream: ByteSendStream, **facts: object) -> None:
    """Send one message.

    Cancellation:
        A checkpoint; a cancelled call may have sent a part of the line.
    """
    await stream.send(json.dumps(facts).encode() + b"\n")


async def receive_line(stream: BufferedByteReceiveStream) -> dict[str, Any]:
    """Receive one message.

    Raises:
        anyio.EndOfStream: if there are no more.

    Cancellation:
        A checkpoint; loses nothing.
    """
    try:
        message: dict[str, Any] = json.loads(await stream.receive_until(b"\n", LINE_LIMIT))
    except anyio.IncompleteRead:
        raise anyio.EndOfStream from None
    return message


class Worker:
    """What one process does; the demo's mark names the lock, the channel and the table."""

    def __init__(self, name: str, mark: str, conductor: ByteStream) -> None:
        self._name = name
        self._mark = mark
        self._conductor = conductor
        self._sending = anyio.Lock()
        self._release = anyio.Event()
        self._seen: set[int] = set()

    async def run(self) -> None:
        """Follow the conductor's commands until it hangs up."""
        commands = BufferedByteReceiveStream(self._conductor)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow_orders)
            while True:
                try:
                    command = await receive_line(commands)
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    break
                if command["do"] == "hold":
                    self._release = anyio.Event()
                    tasks.start_soon(self._hold, command["watch"])
                elif command["do"] == "release":
                    self._release.set()
                else:
                    await self._report("count", seen=sorted(self._seen))
            tasks.cancel_scope.cancel()

    async def _report(self, event: str, **facts: object) -> None:
        async with self._sending:
            with suppress(anyio.BrokenResourceError):  # it has hung up, as `run` will find
                await send_line(self._conductor, event=event, at=time.monotonic(), **facts)

    async def _hold(self, watch: str) -> None:
        """Hold the lock until told to release it, or until it is lost."""
        try:
            if watch == "session":
                await self._work_under(pg_lock(DSN, self._mark))
            else:
                async with open_connection(
                    DSN, heartbeat=HEARTBEAT, heartbeat_timeout=HEARTBEAT
                ) as conn:
                    await self._work_under(pg_lock(conn, self._mark))
        except LockLost as lost:
            await self._report(
                "lost", reason=lost.reason, sqlstate=lost.sqlstate, certain=lost.certain
            )
        else:
            await self._report("released")

    async def _work_under(self, lock: AbstractAsyncContextManager[HeldLock]) -> None:
        async with lock as held:
            await self._report("acquired", pid=held.backend_pid, waited=held.waited)
            cancelled_at: float | None = None
            try:
                await self._release.wait()  # the work that must not go on without the lock
            except anyio.get_cancelled_exc_class():
                cancelled_at = time.monotonic()
                raise
            finally:
                if cancelled_at is not None:
                    with anyio.move_on_after(1, shield=True):
                        await self._report("body_cancelled", cancelled_at=cancelled_at)

    async def _follow_orders(self) -> None:
        """Take in every order, and after a gap look which ones were missed."""
        async with (
            open_notify_bus(
                DSN,
                heartbeat=HEARTBEAT,
                heartbeat_timeout=HEARTBEAT,
                backoff=Backoff(initial=0.05, maximum=0.5, factor=2.0, reset_after=5.0),
                name=self._name,
            ) as bus,
            bus.subscribe(self._mark, buffer=10_000) as orders,
        ):
            await self._report("listening", pid=bus.backend_pid, generation=bus.generation)
            async for order in orders:
                if isinstance(order, Gap):
                    await self._resync(bus, order)
                else:
                    self._seen.add(int(order.payload))

    async def _resync(self, bus: NotifyBus, gap: Gap) -> None:
        await self._report(
            "gap",
            reason=gap.reason,
            generation=gap.generation,
            outage=gap.outage,
            pid=bus.backend_pid,
        )
        conn = await connect(DSN)
        try:
            query = sql.SQL("SELECT id FROM {}").format(sql.Identifier(self._mark))
            cursor = await conn.execute(query)
            stored = {row[0] for row in await cursor.fetchall()}
        finally:
            with anyio.CancelScope(shield=True):  # bounded by aclose itself
                await conn.aclose()
        missed = len(stored - self._seen)
        self._seen |= stored
        await self._report("resynced", missed=missed)


async def work(name: str, mark: str, descriptor: int) -> None:
    """Work for the conductor at the other end of a socket.

    Cancellation:
        A checkpoint; closes everything that was opened.
    """
    async with await UNIXSocketStream.from_socket(descriptor) as conductor:
        await Worker(name, mark, conductor).run()


if __name__ == "__main__":
    backend, demo_mark, number = sys.argv[1:]
    anyio.run(work, backend, demo_mark, int(number), backend=backend)
