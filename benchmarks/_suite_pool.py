"""The pool's benchmarks; see `benchmarks._suite`."""

from __future__ import annotations

from ._suite import ALL, BOTH, Benchmark, Target, Variant, _beside as beside, _on as on


def _all(workload: str) -> tuple[Variant, ...]:
    return (
        *on(ALL, "pgstructured", "pool_ours", workload),
        *on(BOTH, "psycopg_pool", "pool_psycopg", workload),
        *on(BOTH, "asyncpg", "pool_asyncpg", workload),
    )


def _rates(limit: float) -> tuple[Target, ...]:
    """Return targets for the rate: so many times psycopg_pool's; asyncpg's is printed."""
    return (
        *(
            Target(
                "rate",
                f"pgstructured / {loop}",
                f"psycopg_pool / {beside(loop)}",
                at_least=limit,
            )
            for loop in ALL
        ),
        *(Target("rate", f"pgstructured / {loop}", f"asyncpg / {loop}") for loop in BOTH),
        *(Target("cpu", f"pgstructured / {loop}", f"psycopg_pool / {loop}") for loop in BOTH),
    )


POOL: tuple[Benchmark, ...] = (
    Benchmark(
        name="pool-acquire",
        title="a connection borrowed and given back, without a query",
        count=2_000,
        warmup=100,
        rounds=60,
        quick_rounds=15,
        variants=_all("acquire"),
        targets=_rates(2.0),
    ),
    Benchmark(
        name="pool-busy",
        title="50 tasks on 10 connections: borrow, SELECT 1, give back",
        count=1_000,
        warmup=50,
        rounds=60,
        quick_rounds=15,
        variants=_all("busy"),
        targets=_rates(1.2),
    ),
    Benchmark(
        name="pool-cancelled",
        title="24 tasks on 4 connections, cancelled at random for 60 s (10 s if quick)",
        unit="run",
        rounds=1,
        quick_rounds=1,
        scale=60,
        quick_scale=10,
        figures=("cancelled", "swallowed", "lost", "thrown away", "wrong"),
        variants=(
            *on(ALL, "pgstructured", "pool_ours", "cancelled"),
            *on(BOTH, "psycopg_pool", "pool_psycopg", "cancelled"),
            Variant("asyncpg", "pool_asyncpg", "cancelled", "asyncio"),
            Variant("pgstructured, Task.cancel()", "pool_ours", "cancelled-natively", "asyncio"),
            Variant("psycopg_pool, Task.cancel()", "pool_psycopg", "cancelled-natively", "asyncio"),
        ),
        targets=tuple(
            Target(figure, f"{name} / {loop}", at_most=0)
            for name, loops in (
                ("pgstructured", ALL),
                ("pgstructured, Task.cancel()", ("asyncio",)),
            )
            for figure in ("lost", "thrown away", "swallowed", "wrong")
            for loop in loops
        ),
    ),
)
