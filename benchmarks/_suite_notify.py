"""The bus's benchmarks; see `benchmarks._suite`."""

from __future__ import annotations

from ._suite import ALL, Benchmark, Target, _on as on


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


NOTIFY: tuple[Benchmark, ...] = (
    *_fan_out(100),
    *_fan_out(1000),
)
