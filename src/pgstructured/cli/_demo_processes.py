"""The demo's two worker processes, as their conductor sees them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio
from anyio.abc import UNIXSocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from psycopg.conninfo import make_conninfo

from ._demo_worker import receive_line, send_line

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from anyio.abc import ByteStream

    from pgstructured.testing import FaultProxy

BACKENDS: Final = ("asyncio", "trio")
"""Event loop of each worker, and its name."""
STEP_TIMEOUT: Final = 10.0
"""Seconds that anything the demo waits for may take."""
PARTING_TIMEOUT: Final = 2.0
"""Seconds that a worker has to end by itself, once its conductor has hung up."""
WORKER: Final = (sys.executable, "-m", "pgstructured.cli._demo_worker")
"""Starts a worker, followed by its event loop, its mark and the number of its socket."""


class DemoFailed(Exception):  # noqa: N818 - an outcome of the demo, not an error of the library
    """Something that had to happen did not."""


class WorkerProcess:
    """The conductor's side of one worker process."""

    def __init__(self, name: str, proxy: FaultProxy, stream: ByteStream) -> None:
        self.name = name
        self.proxy = proxy
        self.bus_pid = 0
        self._stream = stream
        self._reports = BufferedByteReceiveStream(stream)
        self._backlog: list[dict[str, Any]] = []

    async def tell(self, do: str, **facts: object) -> None:
        """Send a command.

        Raises:
            DemoFailed: if the worker has ended.

        Cancellation:
            A checkpoint; a cancelled call may have sent a part of it.
        """
        try:
            await send_line(self._stream, do=do, **facts)
        except anyio.BrokenResourceError:
            raise DemoFailed(f"the {self.name} worker ended before it was told {do!r}") from None

    async def expect(self, event: str) -> dict[str, Any]:
        """Return the next report of ``event``; others are kept for later.

        Raises:
            DemoFailed: if there is none in time, or the worker has ended.

        Cancellation:
            A checkpoint unless the report is there; loses nothing.
        """
        for report in self._backlog:
            if report["event"] == event:
                self._backlog.remove(report)
                return report
        try:
            with anyio.move_on_after(STEP_TIMEOUT):
                while (report := await receive_line(self._reports))["event"] != event:
                    self._backlog.append(report)
                return report
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            raise DemoFailed(f"the {self.name} worker ended before {event!r}") from None
        seen = [report["event"] for report in self._backlog]
        raise DemoFailed(f"{self.name}: no {event!r} within {STEP_TIMEOUT:g} s; got {seen}")


@asynccontextmanager
async def open_workers(
    base: str, proxies: dict[str, FaultProxy], mark: str
) -> AsyncGenerator[list[WorkerProcess]]:
    """Run one worker process on each event loop for the length of a block.

    Cancellation:
        Entering is a checkpoint. Leaving is shielded, and takes at most twice
        `PARTING_TIMEOUT` for each worker.
    """
    async with AsyncExitStack() as stack:
        workers: list[WorkerProcess] = []
        for name in BACKENDS:
            conninfo = _through(base, proxies[name], mark)
            stream = await stack.enter_async_context(_open_process(name, conninfo, mark))
            workers.append(WorkerProcess(name, proxies[name], stream))
        yield workers


@asynccontextmanager
async def _open_process(name: str, conninfo: str, mark: str) -> AsyncGenerator[ByteStream]:
    """Run one worker, and yield what connects it with its conductor."""
    # A pair, not an address: the temp folder's path may be too long for one.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = await anyio.open_process(
            [*WORKER, name, mark, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=None,
            stderr=None,
            pass_fds=[theirs.fileno()],
            # By way of the environment: a command line is for everybody to read.
            env={**os.environ, "PGSTRUCTURED_DEMO_DSN": conninfo},
            start_new_session=True,  # a terminal's Ctrl-C is its conductor's
        )
        theirs.close()
        try:
            async with await UNIXSocketStream.from_socket(ours) as stream:
                yield stream
        finally:
            # It ends by itself when its conductor hangs up, which has happened by now.
            with anyio.move_on_after(PARTING_TIMEOUT, shield=True):
                await process.wait()
            if process.returncode is None:
                process.kill()
            with anyio.move_on_after(PARTING_TIMEOUT, shield=True):
                await process.aclose()


def _through(base: str, proxy: FaultProxy, mark: str) -> str:
    """Return the conninfo of the server behind ``proxy``; certificates still match the host."""
    address = {"hostaddr": proxy.host, "port": str(proxy.port), "application_name": mark}
    return make_conninfo(base, **address)
