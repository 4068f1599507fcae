"""A process that appends to an event log when it is told to: what that costs is not the reader's.

The worker writes a line, ``COUNT RATE THINK``: so many events by eight writers, each in a
transaction of its own with the present time (CLOCK_MONOTONIC, nanoseconds) as payload, so many a
second if that is not 0; a writer thinks up to THINK seconds between its append and its commit. When
all are committed the ids come back, a line.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

ROOT = Path(__file__).resolve().parent.parent
WRITERS = 8


class Appender:
    """The process, as its owner sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._pipe = process.stdin
        self._answers = process.stdout

    def begin(self, count: int, *, rate: float = 0.0, think: float = 0.0) -> None:
        """Let it append; returns at once."""
        self._pipe.write(b"%d %f %f\n" % (count, rate, think))
        self._pipe.flush()

    def ids(self) -> set[int]:
        """Return the ids of what it has appended, once all is committed."""
        return set(json.loads(self._answers.readline()))


@contextmanager
def appender(dsn: str, table: str) -> Generator[Appender]:
    """Start the process; it appends to the log of that table."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks._appender", dsn, table],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()  # it is connected
    try:
        yield Appender(process)
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


async def _serve(dsn: str, table: str) -> None:
    from pgstructured import EventLog, connect, open_publisher

    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(open_publisher(dsn))
        log = EventLog(table, publisher=publisher)
        connections = [await stack.enter_async_context(await connect(dsn)) for _ in range(WRITERS)]
        print(flush=True)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            count, rate, think = line.split()
            ids: list[int] = []
            write = _writer(log, ids, WRITERS / float(rate) if float(rate) else 0.0, float(think))
            async with anyio.create_task_group() as tasks:
                for number, connection in enumerate(connections):
                    tasks.start_soon(write, connection, len(range(number, int(count), WRITERS)))
            print(json.dumps(ids), flush=True)


def _writer(log: Any, ids: list[int], interval: float, think: float) -> Callable[..., Any]:
    async def write(connection: Any, count: int) -> None:
        due = time.monotonic() + random.uniform(0, interval)
        for _ in range(count):
            if interval:
                due += interval
                await anyio.sleep(max(0.0, due - time.monotonic()))
            if not think:
                ids.append(await log.append(connection, "bench", time.monotonic_ns()))
                continue
            async with connection.transaction():
                ids.append(await log.append(connection, "bench", time.monotonic_ns()))
                await anyio.sleep(random.uniform(0, think))

    return write


if __name__ == "__main__":
    anyio.run(_serve, *sys.argv[1:])
