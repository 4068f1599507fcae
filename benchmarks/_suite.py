"""The benchmarks: what runs beside what, and the ratios that are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Loop = Literal["asyncio", "uvloop", "trio", "none"]
"""Event loop; none for a library that is synchronous (asyncio runs there and does nothing)."""

Metric = str
"""CPU of the client process, p50 of the wall time, rate (operations per second), or what a
workload calls a figure of its own."""


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
    """What is compared."""

    subject: str
    """Label of the variant judged."""

    baseline: str | None = None
    """Label of the variant it is measured against; the figure itself is judged where None."""

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
    figures: tuple[str, ...] = ()
    """What the workload gives instead of times."""

    notifies: bool = False
    """Whether the parent sends ``scale`` notifications during each batch, the units of it."""
    is_apart: bool = False
    """Whether each variant has a database of its own: at a notification the server wakes every
    session of the database that listens, to whatever, and so all the other variants."""

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


def _beside(loop: Loop) -> Loop:
    """Return where a peer that does not run on trio is measured."""
    return "asyncio" if loop == "trio" else loop


_ON_TRIO = "psycopg, trio-asyncio"
"""The only way to have it on trio."""

_LOCKS: tuple[Benchmark, ...] = (
    Benchmark(
        name="locks-uncontended",
        title="a lock taken and released, nobody else wants it",
        count=100,
        warmup=10,
        rounds=60,
        quick_rounds=15,
        variants=(
            *_on(ALL, "two SELECT 1", "locks_ours", "two-selects"),
            *_on(ALL, "lock", "locks_ours", "uncontended"),
            *_on(ALL, "fenced lock", "locks_ours", "uncontended-fenced"),
            *_on(BOTH, "psycopg by hand", "locks_by_hand", "uncontended"),
            *_on(("trio",), _ON_TRIO, "locks_trio_asyncio", "uncontended"),
            *_on(BOTH, "sqlalchemy-dlock", "dlock_peer", "uncontended"),
            *_on(("none",), "pals", "pals_peer", "uncontended"),
        ),
        targets=(
            *(
                Target(metric, f"{ours} / {loop}", f"two SELECT 1 / {loop}", at_most=limit)
                for ours, limit in (("lock", 1.3), ("fenced lock", 1.9))
                for metric in ("p50", "cpu")
                for loop in ALL
            ),
            *(
                Target(metric, f"lock / {loop}", f"{peer} / {_beside(loop)}")
                for peer in ("psycopg by hand", "sqlalchemy-dlock")
                for metric in ("p50", "cpu")
                for loop in ALL
            ),
            Target("p50", "lock / trio", f"{_ON_TRIO} / trio"),
            Target("cpu", "lock / trio", f"{_ON_TRIO} / trio"),
            *(
                Target(metric, f"lock / {loop}", "pals / none")
                for metric in ("p50", "cpu")
                for loop in ALL
            ),
        ),
    ),
    Benchmark(
        name="locks-100-keys",
        title="100 tasks that take and release 100 different keys again and again",
        unit="lock",
        rounds=15,
        quick_rounds=5,
        scale=10_000,
        quick_scale=5_000,
        variants=(
            *_on(ALL, "lock", "locks_ours", "many-keys"),
            *_on(BOTH, "psycopg, 100 connections", "locks_by_hand", "many-keys"),
            *_on(("trio",), _ON_TRIO, "locks_trio_asyncio", "many-keys"),
            *_on(BOTH, "sqlalchemy-dlock", "dlock_peer", "many-keys"),
        ),
        targets=(
            *(
                Target("rate", f"lock / {loop}", f"{peer} / {_beside(loop)}", at_least=4.0)
                for peer in ("psycopg, 100 connections", "sqlalchemy-dlock")
                for loop in ALL
            ),
            Target("rate", "lock / trio", f"{_ON_TRIO} / trio", at_least=4.0),
        ),
    ),
    Benchmark(
        name="locks-hand-off",
        title="from the release in one process to the grant in another, which waits for it",
        unit="hand-off",
        count=20,
        warmup=2,
        rounds=40,
        quick_rounds=15,
        variants=(
            *_on(ALL, "lock", "locks_ours", "handoff"),
            *_on(BOTH, "psycopg, the server's queue", "locks_by_hand", "handoff"),
        ),
        targets=tuple(
            Target(
                "p50",
                f"lock / {loop}",
                f"psycopg, the server's queue / {_beside(loop)}",
                at_most=1.5,
            )
            for loop in ALL
        ),
    ),
    Benchmark(
        name="locks-local-hand-off",
        title="1,000 tasks of one process wait for one key, which goes from one to the next",
        unit="hand-off",
        rounds=15,
        quick_rounds=5,
        scale=1_000,
        quick_scale=1_000,
        variants=_on(ALL, "lock", "locks_ours", "local-handoff"),
        targets=tuple(Target("rate", f"lock / {loop}", at_least=3_000) for loop in ALL),
    ),
    Benchmark(
        name="locks-election",
        title="from asking the leader to resign to the next one's block",
        unit="election",
        count=20,
        warmup=2,
        rounds=15,
        quick_rounds=5,
        is_apart=True,
        variants=(
            *_on(ALL, "election", "elections", "ours"),
            *_on(BOTH, "psycopg by hand", "elections", "by-hand"),
        ),
        targets=tuple(
            Target("p50", f"election / {loop}", f"psycopg by hand / {_beside(loop)}")
            for loop in ALL
        ),
    ),
    Benchmark(
        name="locks-held",
        title="1,000 locks held at once; their sessions are ended one by one",
        unit="1,000 locks: sessions, memory of each, delay until its body stops",
        rounds=5,
        quick_rounds=3,
        figures=("sessions", "KiB each", "p50 ms", "p99 ms", "max ms"),
        variants=_on(ALL, "lock", "locks_ours", "held"),
        targets=tuple(
            Target(figure, f"lock / {loop}", at_most=limit)
            for figure, limit in (("sessions", 16), ("KiB each", 3), ("p99 ms", 50))
            for loop in ALL
        ),
    ),
)

from ._suite_log import LOG  # noqa: E402 - it takes its words from here
from ._suite_notify import NOTIFY  # noqa: E402 - ditto
from ._suite_pool import POOL  # noqa: E402 - ditto
from ._suite_publish import PUBLISH  # noqa: E402 - ditto
from ._suite_store import STORE  # noqa: E402 - ditto
from ._suite_streams import STREAMS  # noqa: E402 - ditto

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
    *_LOCKS,
    *LOG,
    *NOTIFY,
    *POOL,
    *PUBLISH,
    *STORE,
    *STREAMS,
)
