"""The bus's benchmarks; see `benchmarks._suite`."""

from __future__ import annotations

from ._suite import ALL, BOTH, Benchmark, Target, Variant, _beside as beside, _on as on


def _fan_out(subscribers: int) -> tuple[Benchmark, ...]:
    return (
        Benchmark(
            name=f"notify-fan-out-{subscribers}",
            title=f"one notification at a time to {subscribers} subscribers that wait for it",
            unit="delivery",
            rounds=25,
            quick_rounds=7,
            scale=10_000,
            quick_scale=5_000,
            variants=(
                *on(ALL, "memory streams", "notify_streams", f"fan-out-{subscribers}-1"),
                *on(ALL, "bus", "notify_ours", f"fan-out-{subscribers}-1"),
            ),
            targets=tuple(
                Target("cpu", f"bus / {loop}", f"memory streams / {loop}", at_most=0.45)
                for loop in ALL
            ),
        ),
        Benchmark(
            name=f"notify-burst-{subscribers}",
            title=f"bursts of 20 notifications to {subscribers} subscribers that wait for them",
            unit="delivery",
            rounds=25,
            quick_rounds=7,
            scale=40_000,
            quick_scale=20_000,
            variants=(
                *on(ALL, "memory streams", "notify_streams", f"fan-out-{subscribers}-20"),
                *on(ALL, "bus", "notify_ours", f"fan-out-{subscribers}-20"),
                *on(ALL, "bus receive_many", "notify_ours", f"fan-out-many-{subscribers}"),
            ),
            targets=tuple(
                Target("cpu", f"{name} / {loop}", f"memory streams / {loop}", at_most=limit)
                for name, limit in (("bus", 0.2), ("bus receive_many", 0.1))
                for loop in ALL
            ),
        ),
    )


_PEERS = (
    ("asyncpg", "notify_asyncpg"),
    ("asyncpg-listen", "notify_asyncpg_listen"),
    ("psycopg notifies()", "notify_psycopg"),
)


def _with_peers(workload: str) -> tuple[Variant, ...]:
    return (
        *(variant for name, library in _PEERS for variant in on(BOTH, name, library, workload)),
        *on(ALL, "bus", "notify_ours", workload),
    )


NOTIFY: tuple[Benchmark, ...] = (
    Benchmark(
        name="notify-receive",
        title="200,000 notifications of 100 bytes in one transaction, one subscriber",
        unit="notification",
        rounds=15,
        quick_rounds=5,
        scale=200_000,
        quick_scale=50_000,
        notifies=True,
        variants=_with_peers("flood"),
        targets=tuple(
            Target("cpu", f"bus / {loop}", f"{peer} / {beside(loop)}", at_most=limit)
            for peer, limit in (
                ("asyncpg", 0.6),
                ("psycopg notifies()", 0.5),
                ("asyncpg-listen", None),
            )
            for loop in ALL
        ),
    ),
    *_fan_out(100),
    *_fan_out(1000),
    Benchmark(
        name="notify-latency",
        title="1,000 notifications a second, each from before its execute() to the receiver",
        unit="notification",
        rounds=15,
        quick_rounds=5,
        scale=1_000,
        quick_scale=500,
        figures=("p50 us", "p99 us"),
        is_apart=True,
        variants=(
            *_with_peers("latency"),
            *on(BOTH, "asyncpg, in a task", "notify_asyncpg_task", "latency"),
        ),
        targets=tuple(
            Target(
                "p50 us",
                f"bus / {loop}",
                f"{peer} / {beside(loop)}",
                at_most=1.0 if peer == "asyncpg" else None,
            )
            for peer in (*dict(_PEERS), "asyncpg, in a task")
            for loop in ALL
        ),
    ),
    Benchmark(
        name="notify-idle",
        title="nothing happens for three seconds, with every library's own settings",
        unit="process",
        rounds=3,
        quick_rounds=3,
        scale=1,
        quick_scale=1,
        figures=("wake-ups/s", "CPU us/s"),
        is_apart=True,
        variants=_with_peers("idle"),
        targets=tuple(Target("wake-ups/s", f"bus / {loop}", at_most=0.5) for loop in ALL),
    ),
    Benchmark(
        name="notify-memory",
        title="1,000 subscribers that wait: Python memory of each, less that of its task",
        unit="subscriber",
        rounds=3,
        quick_rounds=3,
        scale=1,
        quick_scale=1,
        figures=("KiB each",),
        variants=on(ALL, "bus", "notify_ours", "idle-subscribers"),
        targets=tuple(Target("KiB each", f"bus / {loop}", at_most=4) for loop in ALL),
    ),
    Benchmark(
        name="notify-stuck",
        title="a million notifications: one subscriber receives them all, one never receives",
        unit="million notifications",
        rounds=3,
        quick_rounds=3,
        scale=1_000_000,
        quick_scale=200_000,
        figures=("KiB grown", "queue usage"),
        variants=on(ALL, "bus", "notify_ours", "stuck-subscriber"),
        targets=tuple(
            Target(figure, f"bus / {loop}", at_most=limit)
            for figure, limit in (("KiB grown", 100), ("queue usage", 0))
            for loop in ALL
        ),
    ),
)
