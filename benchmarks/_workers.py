"""The parent's side: starts the workers, gives each its turn, collects what they measured."""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import make_conninfo

from ._worker import BATCH_TIMEOUT, Assignment

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from ._suite import Benchmark, Variant

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 60.0
STOP_TIMEOUT = 10.0
DROP = "DROP TABLE IF EXISTS bench_rows, bench_lines, bench_fence"
PARK = 0.02
"""Seconds in which a subscriber, told that it is its turn, comes to wait for its socket."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One batch of one variant, per unit: microseconds."""

    cpu: float
    wall: float
    p50: float
    figures: dict[str, float] = field(default_factory=dict)
    """Those of the workload's own, not per unit."""


@dataclass(slots=True)
class Outcome:
    """What a benchmark gave: samples by label, as many as rounds, and what could not run."""

    benchmark: Benchmark
    rounds: int
    scale: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


class WorkerFailedError(Exception):
    """A worker could not start or broke off; ``missing`` if only something isn't installed."""

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.missing = missing


class Worker:
    """The process of one variant."""

    def __init__(self, variant: Variant, assignment: Assignment) -> None:
        self.variant = variant
        self.channel: str = assignment.options["channel"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._worker", json.dumps(asdict(assignment))],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def wait_ready(self) -> None:
        """Wait until the worker has connected and warmed up."""
        self._answer(START_TIMEOUT)

    def begin(self, count: int) -> None:
        """Give the worker its turn."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n".encode())
        self._process.stdin.flush()

    def result(self, units: int) -> Sample:
        """Wait for the end of the turn and return what was measured, per unit."""
        answer = self._answer(BATCH_TIMEOUT + STOP_TIMEOUT)
        figures = answer.pop("figures")
        per_unit = {key: value / units for key, value in answer.items()}
        return Sample(**per_unit, figures=figures)

    def stop(self) -> None:
        """End the process, by force if it does not by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(STOP_TIMEOUT)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not readable:
            raise WorkerFailedError(f"no answer in {timeout:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailedError(f"ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if reason := answer.get("missing"):
            raise WorkerFailedError(str(reason), missing=True)
        if reason := answer.get("error"):
            raise WorkerFailedError(str(reason).rstrip())
        return answer


@contextmanager
def _prepared(dsn: str, benchmark: Benchmark) -> Generator[psycopg.Connection]:
    """Make the tables that the workloads read; yield a connection that can send notifications."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(DROP)
        if benchmark.name == "fetch":
            connection.execute(
                "CREATE UNLOGGED TABLE bench_rows AS SELECT i, i * 1.5::float8 AS half, "
                "'name of number ' || i AS name, timestamptz '2024-02-29' + i * interval '1 min' "
                "AS at FROM generate_series(1, 10000) i"
            )
        elif benchmark.name == "copy-out":
            connection.execute(
                "CREATE UNLOGGED TABLE bench_lines AS "
                "SELECT lpad(i::text, 99, 'x') AS line FROM generate_series(1, 10000) i"
            )
        connection.execute("CHECKPOINT")
        yield connection
        connection.execute(DROP)


@contextmanager
def _database(dsn: str, name: str) -> Generator[str]:
    """Yield the conninfo of a new database, which goes again."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield make_conninfo(dsn, dbname=name)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def _started(benchmark: Benchmark, dsn: str, outcome: Outcome) -> Generator[list[Worker]]:
    with ExitStack() as stack:
        workers: list[Worker] = []
        for number, variant in enumerate(benchmark.variants):
            name = f"bench_{number}"
            own = stack.enter_context(_database(dsn, name)) if benchmark.is_apart else dsn
            assignment = Assignment(
                library=variant.library,
                workload=variant.workload,
                loop=variant.loop,
                warmup=benchmark.warmup,
                options={
                    "dsn": own,
                    "channel": name,
                    "loop": variant.loop,
                    "scale": outcome.scale,
                },
            )
            worker = Worker(variant, assignment)
            stack.callback(worker.stop)
            try:
                worker.wait_ready()  # one after the other: starting side by side would be noise
            except WorkerFailedError as failure:
                _record(outcome, worker, failure)
            else:
                workers.append(worker)
        yield workers


def _record(outcome: Outcome, worker: Worker, failure: WorkerFailedError) -> None:
    label = worker.variant.label
    (outcome.missing if failure.missing else outcome.errors)[label] = str(failure)
    outcome.samples.pop(label, None)


def run(
    benchmark: Benchmark, dsn: str, *, rounds: int, quick: bool, progress: Callable[[str], None]
) -> Outcome:
    """Run a benchmark: in every round each variant has one turn, in an order drawn by lot."""
    scale = benchmark.quick_scale if quick else benchmark.scale
    outcome = Outcome(benchmark, rounds, scale)
    lots = random.Random(20_240_229)
    with _prepared(dsn, benchmark) as sender, _started(benchmark, dsn, outcome) as workers:
        for number in range(rounds):
            progress(f"{benchmark.name}: round {number + 1} of {rounds}")
            for worker in lots.sample(workers, len(workers)):
                try:
                    sample = _turn(worker, benchmark, scale, sender)
                except (WorkerFailedError, BrokenPipeError) as error:
                    workers.remove(worker)
                    _record(outcome, worker, _as_failure(error))
                else:
                    outcome.samples.setdefault(worker.variant.label, []).append(sample)
    return outcome


def _as_failure(error: WorkerFailedError | BrokenPipeError) -> WorkerFailedError:
    return error if isinstance(error, WorkerFailedError) else WorkerFailedError(str(error))


def _turn(worker: Worker, benchmark: Benchmark, scale: int, sender: psycopg.Connection) -> Sample:
    if not benchmark.notifies:
        worker.begin(benchmark.count)
        return worker.result(scale or 1)
    worker.begin(scale)
    time.sleep(PARK)
    sender.execute(
        "SELECT count(pg_notify(%s, lpad(i::text, 100, 'x'))) FROM generate_series(1, %s) i",
        (worker.channel, scale),
    )
    return worker.result(1)


def chosen(suite: tuple[Benchmark, ...], names: list[str]) -> Iterator[Benchmark]:
    """Yield the benchmarks whose names begin with one of ``names``; all without names."""
    for benchmark in suite:
        if not names or any(benchmark.name.startswith(name) for name in names):
            yield benchmark
