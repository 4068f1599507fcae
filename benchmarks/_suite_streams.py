"""The benchmarks of streams and COPY; see `benchmarks._suite`."""

from __future__ import annotations

from ._suite import ALL, BOTH, Benchmark, Metric, Target, Variant, _beside as beside, _on as on


def _all(workload: str, *ours: tuple[str, str]) -> tuple[Variant, ...]:
    return (
        *on(ALL, "pgstructured", "streams_ours", workload),
        *(variant for name, other in ours for variant in on(ALL, name, "streams_ours", other)),
        *on(BOTH, "psycopg", "streams_psycopg", workload),
        *on(BOTH, "asyncpg", "streams_asyncpg", workload),
    )


def _at_least(limit: float, *others: str) -> tuple[Target, ...]:
    """Return targets for the rate: so many times psycopg's; asyncpg's is printed."""
    metrics: tuple[Metric, ...] = ("rate", "cpu")
    return (
        *(
            Target("rate", f"pgstructured / {loop}", f"psycopg / {beside(loop)}", at_least=limit)
            for loop in ALL
        ),
        *(
            Target(metric, f"pgstructured / {loop}", f"asyncpg / {beside(loop)}")
            for metric in metrics
            for loop in ALL
        ),
        *(
            Target("rate", f"{other} / {loop}", f"psycopg / {beside(loop)}")
            for other in others
            for loop in ALL
        ),
        *(Target("cpu", f"pgstructured / {loop}", f"psycopg / {loop}") for loop in BOTH),
    )


STREAMS: tuple[Benchmark, ...] = (
    Benchmark(
        name="stream-rows",
        title="a million rows (100,000 if quick) of two integers, streamed in batches of 100",
        unit="row",
        rounds=7,
        quick_rounds=7,
        scale=1_000_000,
        quick_scale=100_000,
        variants=_all("stream", ("receive_many()", "stream-many"), ("receive()", "stream-one")),
        targets=_at_least(0.9, "receive_many()", "receive()"),
    ),
    Benchmark(
        name="stream-paused",
        title="a million rows of 1 kB, of which 1,000 are read; then the reader pauses",
        unit="stream",
        rounds=3,
        quick_rounds=3,
        scale=1_000_000,
        quick_scale=1_000_000,
        figures=("MiB more",),
        variants=_all("paused"),
        targets=tuple(Target("MiB more", f"pgstructured / {loop}", at_most=5) for loop in ALL),
    ),
    Benchmark(
        name="copy-bytes-out",
        title="COPY out of 100 MB (10 MB if quick) in lines of 100 bytes, received as they come",
        unit="line",
        rounds=7,
        quick_rounds=7,
        scale=1_000_000,
        quick_scale=100_000,
        variants=_all("copy-out", ("rows()", "copy-out-rows")),
        targets=_at_least(2.5, "rows()"),
    ),
    Benchmark(
        name="copy-rows-in",
        title="a million rows (100,000 if quick) of an integer and a text, copied into a table",
        unit="row",
        rounds=7,
        quick_rounds=7,
        scale=1_000_000,
        quick_scale=100_000,
        variants=_all("copy-in", ("send_row()", "copy-in-one")),
        targets=_at_least(1.0, "send_row()"),
    ),
)
