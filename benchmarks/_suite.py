"""The benchmarks: what runs beside what, and the ratios that are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Loop = Literal["asyncio", "uvloop", "trio"]
Metric = Literal["cpu", "p50", "rate"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One library doing one workload on one event loop."""

    name: str
    """As the table calls it."""

    library: str
    """Module in `benchmarks._libraries`."""

    workload: str
    """Key in that module's ``WORKLOADS``."""

    loop: Loop

    @property
    def label(self) -> str:
        """Name and loop: unique in a benchmark."""
        return f"{self.name} / {self.loop}"


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio between two variants that ran in the same rounds, and its limit if it has one."""

    metric: Metric
    """CPU of the client process, p50 of the wall time, or operations per second."""

    subject: str
    """Label of the variant judged."""

    baseline: str
    """Label of the variant it is measured against."""

    at_most: float | None = None
    at_least: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Variants that take turns, and what is wanted of them."""

    name: str
    title: str
    unit: str = "operation"
    """What one of the counted things is called."""

    count: int = 1
    """Operations in a batch; with ``notifies`` it is the scale."""

    warmup: int = 0
    """Operations at the start of every batch that are not measured."""

    rounds: int
    quick_rounds: int
    scale: int = 0
    """Units in one operation, told to the workload; the figures are per unit."""

    quick_scale: int = 0
    notifies: bool = False
    """Whether the parent sends ``scale`` notifications during each batch, the units of it."""

    variants: tuple[Variant, ...]
    targets: tuple[Target, ...] = field(default=())


def _on(loops: tuple[Loop, ...], name: str, library: str, workload: str) -> tuple[Variant, ...]:
    return tuple(Variant(name, library, workload, loop) for loop in loops)


BOTH: tuple[Loop, ...] = ("asyncio", "uvloop")
ALL: tuple[Loop, ...] = ("asyncio", "uvloop", "trio")


def _select_one(workload: str, how: str) -> Benchmark:
    return Benchmark(
        name=workload,
        title=f"SELECT 1 and its row, one after the other, {how}",
        count=200,
        warmup=10,
        rounds=100,
        quick_rounds=15,
        variants=(
            *_on(BOTH, "psycopg", "stock", workload),
            *_on(ALL, "pgstructured", "ours", workload),
            *_on(BOTH, "asyncpg", "asyncpg_peer", workload),
            *_on(("trio",), "triopg", "triopg_peer", workload),
        ),
        targets=(
            *(
                Target("cpu", f"pgstructured / {loop}", f"psycopg / {loop}", at_most=0.85)
                for loop in BOTH
            ),
            *(
                Target("p50", f"pgstructured / {loop}", f"psycopg / {loop}", at_most=1.0)
                for loop in BOTH
            ),
            Target("cpu", "pgstructured / trio", "pgstructured / asyncio", at_most=1.0),
            Target("cpu", "pgstructured / trio", "psycopg / asyncio", at_most=0.85),
            Target("p50", "pgstructured / trio", "pgstructured / asyncio"),
            Target("rate", "pgstructured / trio", "triopg / trio", at_least=2.0),
            *(Target("cpu", f"pgstructured / {loop}", f"asyncpg / {loop}") for loop in BOTH),
            *(Target("p50", f"pgstructured / {loop}", f"asyncpg / {loop}") for loop in BOTH),
        ),
    )


def _not_slower(*others: str) -> tuple[Target, ...]:
    """Return targets for CPU and time: not more than psycopg's; the others are printed."""
    metrics: tuple[Metric, ...] = ("cpu", "p50")
    return (
        *(
            Target(
                metric,
                f"pgstructured / {loop}",
                f"psycopg / {'asyncio' if loop == 'trio' else loop}",
                at_most=1.0,
            )
            for metric in metrics
            for loop in ALL
        ),
        *(
            Target("cpu", f"pgstructured / {loop}", f"{other} / {loop}")
            for other in others
            for loop in BOTH
        ),
    )


SUITE: tuple[Benchmark, ...] = (
    _select_one("select-one-prepared", "prepared on the server"),
    _select_one("select-one-unprepared", "not prepared"),
    Benchmark(
        name="session",
        title="Session.execute, one after the other",
        count=200,
        warmup=10,
        rounds=100,
        quick_rounds=15,
        variants=(
            *_on(BOTH, "psycopg", "stock", "select-one"),
            *_on(BOTH, "psycopg unprepared", "stock", "select-one-unprepared"),
            *_on(ALL, "pgstructured", "ours", "session-execute"),
        ),
        targets=(
            *(
                Target(
                    "cpu",
                    f"pgstructured / {loop}",
                    f"psycopg / {'asyncio' if loop == 'trio' else loop}",
                    at_most=0.6,
                )
                for loop in ALL
            ),
            *(
                Target("cpu", f"pgstructured / {loop}", f"psycopg unprepared / {loop}")
                for loop in BOTH
            ),
            *(Target("p50", f"pgstructured / {loop}", f"psycopg / {loop}") for loop in BOTH),
        ),
    ),
    Benchmark(
        name="fetch",
        title="10,000 rows of 4 columns, fetched at once",
        unit="row",
        count=2,
        rounds=30,
        quick_rounds=5,
        scale=10_000,
        quick_scale=10_000,
        variants=(
            *_on(BOTH, "psycopg", "stock", "fetch"),
            *_on(ALL, "pgstructured", "ours", "fetch"),
            *_on(BOTH, "asyncpg", "asyncpg_peer", "fetch"),
            *_on(("trio",), "triopg", "triopg_peer", "fetch"),
        ),
        targets=_not_slower("asyncpg"),
    ),
    Benchmark(
        name="copy-out",
        title="psycopg's copy() out of 100 MB (10 MB if quick), in lines of 100 bytes",
        unit="line",
        rounds=7,
        quick_rounds=5,
        scale=1_000_000,
        quick_scale=100_000,
        variants=(
            *_on(BOTH, "psycopg", "stock", "copy-out"),
            *_on(ALL, "pgstructured", "ours", "copy-out"),
        ),
        targets=_not_slower(),
    ),
    Benchmark(
        name="notifications",
        title="200,000 notifications of 100 bytes in one transaction, one subscriber",
        unit="notification",
        rounds=9,
        quick_rounds=5,
        scale=200_000,
        quick_scale=50_000,
        notifies=True,
        variants=(
            *_on(BOTH, "psycopg", "stock", "notifications"),
            *_on(BOTH, "asyncpg", "asyncpg_peer", "notifications"),
            *_on(ALL, "pgstructured", "ours", "bus-notifications"),
            *_on(ALL, "pgstructured notifies()", "ours", "notifications"),
        ),
        targets=(
            *(
                Target(
                    "cpu",
                    f"pgstructured / {loop}",
                    f"{other} / {'asyncio' if loop == 'trio' else loop}",
                    at_most=limit,
                )
                for other, limit in (("asyncpg", 0.7), ("psycopg", 0.6))
                for loop in ALL
            ),
            *(
                Target("cpu", f"pgstructured notifies() / {loop}", f"psycopg / {loop}")
                for loop in BOTH
            ),
        ),
    ),
)
