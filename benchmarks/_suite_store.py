"""The table store's benchmarks; see `benchmarks._suite`."""

from __future__ import annotations

from ._suite import ALL, Benchmark, Metric, Target, Variant, _on as on


def _variants(**workloads: str) -> tuple[Variant, ...]:
    return tuple(
        variant
        for name, workload in workloads.items()
        for variant in on(ALL, name.replace("_", " "), "store_ours", workload)
    )


def _beside_hand(limit: float | None, *others: str) -> tuple[Target, ...]:
    """Return targets for time and CPU: so many times what it takes by hand."""
    metrics: tuple[Metric, ...] = ("p50", "cpu")
    return (
        *(
            Target(metric, f"store / {loop}", f"by hand / {loop}", at_most=limit)
            for metric in metrics
            for loop in ALL
        ),
        *(
            Target(metric, f"store / {loop}", f"{other} / {loop}")
            for other in others
            for metric in metrics
            for loop in ALL
        ),
    )


STORE: tuple[Benchmark, ...] = (
    Benchmark(
        name="store-retrieve",
        title="one row by its key, as a dictionary, on a connection of the pool",
        count=200,
        warmup=20,
        rounds=60,
        quick_rounds=15,
        variants=_variants(
            store="retrieve",
            store_with_text="retrieve-text",
            by_hand="retrieve-hand",
            by_hand_tuples="retrieve-hand-tuples",
            by_hand_connection_kept="retrieve-bare",
        ),
        targets=(
            *_beside_hand(1.15, "by hand tuples", "by hand connection kept"),
            *(Target("p50", f"store with text / {loop}", f"by hand / {loop}") for loop in ALL),
        ),
    ),
    Benchmark(
        name="store-persist",
        title="one row stored, on a connection of the pool",
        count=200,
        warmup=20,
        rounds=60,
        quick_rounds=15,
        variants=_variants(
            store="persist", by_hand="persist-hand", by_hand_connection_kept="persist-bare"
        ),
        targets=_beside_hand(1.15, "by hand connection kept"),
    ),
    Benchmark(
        name="store-settings",
        title="one row by its key with a setting for the operation; by hand in a transaction",
        count=100,
        warmup=10,
        rounds=60,
        quick_rounds=15,
        variants=_variants(store="retrieve-settings", by_hand="retrieve-settings-hand"),
        targets=_beside_hand(None),
    ),
    Benchmark(
        name="store-many",
        title="10,000 rows of 4 columns stored: at once, and one by one",
        unit="row",
        rounds=7,
        quick_rounds=3,
        scale=10_000,
        quick_scale=10_000,
        variants=_variants(
            at_once="persist-many",
            one_by_one="persist-many-one-by-one",
            one_by_one_by_hand="persist-many-hand",
        ),
        targets=tuple(
            Target(
                metric,
                f"at once / {loop}",
                f"{other} / {loop}",
                at_least=10.0 if metric == "rate" else None,
            )
            for metric in ("rate", "cpu")
            for other in ("one by one", "one by one by hand")
            for loop in ALL
        ),
    ),
)
