"""One variant in a process of its own, which does batches when its parent says so.

The parent writes the size of a batch, a line, to our standard input; we answer with a line
of JSON. In between we block in that read, event loop included, so that of all the workers
only the one whose turn it is uses any CPU.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns, process_time_ns
from typing import TYPE_CHECKING, Any

import anyio

from ._batch import Options, backend_arguments

if TYPE_CHECKING:
    from ._batch import Workload

BATCH_TIMEOUT = 120.0
"""Seconds after which a batch that does not end is an error (the parent may be gone)."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What this process is for; the parent passes it as JSON on the command line."""

    library: str
    workload: str
    loop: str
    warmup: int
    options: dict[str, Any]


def _say(out: int, **message: object) -> None:
    os.write(out, json.dumps(message).encode() + b"\n")


async def _serve(workload: Workload, assignment: Assignment, out: int) -> None:
    async with workload(Options(**assignment.options)) as batch:
        if assignment.warmup:
            await batch(10 * assignment.warmup)
        gc.collect()
        gc.freeze()
        _say(out, ready=True)
        while line := sys.stdin.buffer.readline():
            count = int(line)
            with anyio.fail_after(BATCH_TIMEOUT):
                if assignment.warmup:
                    await batch(assignment.warmup)
                cpu, wall = process_time_ns(), perf_counter_ns()
                times = await batch(count)
                wall = perf_counter_ns() - wall
                cpu = process_time_ns() - cpu
            _say(
                out,
                cpu=cpu / count / 1000,
                wall=wall / count / 1000,
                p50=(median(times) if isinstance(times, list) else wall / count) / 1000,
                figures=times if isinstance(times, dict) else {},
            )


def main() -> None:
    """Do what the command line says until standard input ends."""
    assignment = Assignment(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends us
    out = os.dup(1)
    os.dup2(2, 1)  # a stray print must not end up between our answers
    try:
        module = importlib.import_module(f"benchmarks._libraries.{assignment.library}")
        workload = module.WORKLOADS[assignment.workload]
        anyio.run(
            _serve,
            workload,
            assignment,
            out,
            **backend_arguments(assignment.loop),
        )
    except ModuleNotFoundError as error:  # a peer that isn't installed
        _say(out, missing=str(error))
    except Exception:  # noqa: BLE001  whatever it is, the parent reports it
        _say(out, error=traceback.format_exc())


if __name__ == "__main__":
    main()
