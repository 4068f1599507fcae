"""The demo's two worker processes, as their conductor sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream
from psycopg.conninfo import make_conninfo

from ._demo_worker import receive_line, send_line

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from anyio.abc import Process, SocketStream

    from pgstructured.testing import FaultProxy

BACKENDS: Final = ("asyncio", "trio")
"""Event loop of each worker, and its name."""
STEP_TIMEOUT: Final = 10.0
"""Seconds that anything the demo waits for may take."""


class DemoFailed(Exception):  # noqa: N818 - an outcome of the demo, not an error of the library
    """Something that had to happen did not."""


class WorkerProcess:
    """The conductor's side of one worker process."""

    def __init__(self, name: str, proxy: FaultProxy, stream: SocketStream) -> None:
        self.name = name
        self.proxy = proxy
        self.bus_pid = 0
        self._stream = stream
        self._reports = BufferedByteReceiveStream(stream)
        self._backlog: list[dict[str, Any]] = []

    async def tell(self, do: str, **facts: object) -> None:
        """Send a command."""
        await send_line(self._stream, do=do, **facts)

    async def expect(self, event: str) -> dict[str, Any]:
        """Return the next report of ``event``; others are kept for later."""
        for index, report in enumerate(self._backlog):
            if report["event"] == event:
                return self._backlog.pop(index)
        with anyio.move_on_after(STEP_TIMEOUT):
            while True:
                report = await receive_line(self._reports)
                if report["event"] == event:
                    return report
                self._backlog.append(report)
        seen = [report["event"] for report in self._backlog]
        raise DemoFailed(f"{self.name}: no {event!r} within {STEP_TIMEOUT:g} s; got {seen}")


@asynccontextmanager
async def open_workers(
    base: str, proxies: dict[str, FaultProxy], folder: Path, mark: str
) -> AsyncGenerator[list[WorkerProcess]]:
    """Run one worker process on each event loop for the length of a block."""
    async with AsyncExitStack() as stack:
        workers: list[WorkerProcess] = []
        for name in BACKENDS:
            path = folder / f"{name}.sock"
            listener = await stack.enter_async_context(await anyio.create_unix_listener(path))
            process = await stack.enter_async_context(
                _open_process(name, path, _through(base, proxies[name], mark), mark)
            )
            stream = await _accept(listener, name, process)
            await stack.enter_async_context(stream)
            workers.append(WorkerProcess(name, proxies[name], stream))
        yield workers


async def _accept(listener: Any, name: str, process: Process) -> SocketStream:
    connected: SocketStream | None = None
    with anyio.move_on_after(STEP_TIMEOUT):
        async with anyio.create_task_group() as tasks:

            async def watch_process() -> None:
                await process.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch_process)
            connected = await listener.accept()
            tasks.cancel_scope.cancel()
    if connected is None:
        raise DemoFailed(f"the {name} worker did not start")
    return connected


@asynccontextmanager
async def _open_process(name: str, path: Path, conninfo: str, mark: str) -> AsyncGenerator[Process]:
    command = [sys.executable, "-m", "pgstructured.cli._demo_worker"]
    command += [name, str(path), mark]
    process = await anyio.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=None,
        stderr=None,
        # By way of the environment: a command line is for everybody to read.
        env={**os.environ, "PGSTRUCTURED_DEMO_DSN": conninfo},
    )
    try:
        yield process
    finally:
        # It ends by itself when its conductor hangs up, which has happened by now.
        with anyio.move_on_after(2, shield=True):
            await process.wait()
        if process.returncode is None:
            process.kill()
        with anyio.move_on_after(2, shield=True):
            await process.aclose()


def _through(base: str, proxy: FaultProxy, mark: str) -> str:
    """Return the conninfo of the server behind ``proxy``; certificates still match the host."""
    address = {"hostaddr": proxy.host, "port": str(proxy.port), "application_name": mark}
    return make_conninfo(base, **address)
