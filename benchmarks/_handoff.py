"""How long a lock takes from one process to another that waits for it.

The worker holds the lock, tells its partner to ask for it, gives that some time to be in the
queue, and releases; the partner says when it had it. Both read the same clock.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic_ns
from typing import TYPE_CHECKING, TypeAlias

import anyio

from ._batch import Batch, Options, backend_arguments

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

ROOT = Path(__file__).resolve().parent.parent
QUEUEING = 0.005
"""Seconds in which the partner comes to wait for the lock."""

Take: TypeAlias = "Callable[[], AbstractAsyncContextManager[object]]"
"""Holds the lock for the length of a block."""


@asynccontextmanager
async def measured(module: str, options: Options) -> AsyncGenerator[Batch]:
    """Measure ``handoff_side`` of a module against itself in another process."""
    handoff_side = importlib.import_module(module).handoff_side
    arguments = [module, options.loop, options.dsn, options.channel]
    partner = subprocess.Popen(  # noqa: ASYNC220 - nothing else is to go on
        [sys.executable, "-m", "benchmarks._handoff", json.dumps(arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert partner.stdin is not None
    assert partner.stdout is not None
    asking, answers = partner.stdin.fileno(), partner.stdout.fileno()

    async def batch(count: int) -> list[int]:
        times = []
        for _ in range(count):
            async with take():
                os.write(asking, b"\n")
                await anyio.sleep(QUEUEING)
                released_at = monotonic_ns()
            await anyio.wait_readable(answers)
            times.append(int(os.read(answers, 100)) - released_at)
        return times

    try:
        async with handoff_side(options.dsn, options.channel) as take:
            yield batch
    finally:
        partner.stdin.close()
        partner.wait()
        partner.stdout.close()


async def _serve(module: str, dsn: str, key: str, out: int) -> None:
    async with importlib.import_module(module).handoff_side(dsn, key) as take:
        while True:
            await anyio.wait_readable(0)
            if not os.read(0, 1):
                return
            async with take():
                os.write(out, b"%d\n" % monotonic_ns())


def main() -> None:
    """Be the partner, until standard input ends."""
    module, loop, dsn, key = json.loads(sys.argv[1])
    out = os.dup(1)
    os.dup2(2, 1)
    anyio.run(_serve, module, dsn, key, out, **backend_arguments(loop))


if __name__ == "__main__":
    main()
