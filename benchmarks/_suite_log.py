"""The event log's benchmarks; see `benchmarks._suite`."""

from __future__ import annotations

from ._suite import ALL, Benchmark, Target, _on as on

LOG: tuple[Benchmark, ...] = (
    Benchmark(
        name="log-append",
        title="events that 32 writers append, each on its connection in a transaction, on a disk",
        unit="event",
        rounds=20,
        quick_rounds=7,
        scale=3200,
        quick_scale=3200,
        variants=(
            *on(ALL, "INSERT", "log_ours", "insert"),
            *on(ALL, "append", "log_ours", "append"),
            *on(ALL, "append, NOTIFY", "log_ours", "append-notify"),
        ),
        targets=(
            *(Target("rate", f"append / {loop}", f"INSERT / {loop}", at_least=0.9) for loop in ALL),
            *(Target("rate", f"append, NOTIFY / {loop}", f"INSERT / {loop}") for loop in ALL),
            *(Target("cpu", f"append / {loop}", f"INSERT / {loop}") for loop in ALL),
        ),
    ),
    Benchmark(
        name="log-read",
        title="100,000 events, in pages of 1,000",
        unit="event",
        rounds=15,
        quick_rounds=5,
        scale=100_000,
        quick_scale=100_000,
        variants=(
            *on(ALL, "SELECT", "log_ours", "select"),
            *on(ALL, "SELECT in pages", "log_ours", "select-pages"),
            *on(ALL, "read", "log_ours", "read"),
            *on(ALL, "follow", "log_ours", "follow-all"),
        ),
        targets=(
            *(Target("rate", f"read / {loop}", f"SELECT / {loop}", at_least=0.8) for loop in ALL),
            *(Target("rate", f"read / {loop}", f"SELECT in pages / {loop}") for loop in ALL),
            *(Target("rate", f"follow / {loop}", f"SELECT / {loop}") for loop in ALL),
        ),
    ),
    Benchmark(
        name="log-latency",
        title="1,000 events a second, each from before its append to the consumer",
        unit="event",
        rounds=9,
        quick_rounds=3,
        scale=2_000,
        quick_scale=1_000,
        figures=("p50 ms", "p99 ms", "lost %"),
        variants=(
            *on(ALL, "follow", "log_ours", "latency"),
            *on(ALL, "follow beside a long transaction", "log_ours", "latency-beside"),
            *on(ALL, "id > cursor", "log_ours", "latency-naive"),
        ),
        targets=tuple(
            Target(figure, f"{name} / {loop}", at_most=limit)
            for name in ("follow", "follow beside a long transaction")
            for figure, limit in (("p50 ms", 15), ("lost %", 0))
            for loop in ALL
        ),
    ),
    Benchmark(
        name="log-loss",
        title="8 writers that think up to 30 ms between an append and its commit",
        unit="event",
        rounds=5,
        quick_rounds=3,
        scale=2_000,
        quick_scale=1_000,
        figures=("lost %", "twice"),
        variants=(
            *on(ALL, "follow", "log_ours", "loss"),
            *on(ALL, "id > cursor", "log_ours", "loss-naive"),
        ),
        targets=tuple(
            Target(figure, f"follow / {loop}", at_most=0)
            for figure in ("lost %", "twice")
            for loop in ALL
        ),
    ),
    Benchmark(
        name="log-trim",
        title="a million events (100,000 if quick) trimmed, which all are old",
        unit="log",
        rounds=3,
        quick_rounds=3,
        scale=1_000_000,
        quick_scale=100_000,
        figures=("trim ms", "MiB left"),
        variants=(
            *on(("asyncio",), "by rows", "log_ours", "trim"),
            *on(("asyncio",), "by partitions", "log_ours", "trim-partitions"),
        ),
        targets=tuple(
            Target(figure, "by partitions / asyncio", "by rows / asyncio")
            for figure in ("trim ms", "MiB left")
        ),
    ),
)
