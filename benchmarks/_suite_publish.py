"""The benchmarks of publishing; see `benchmarks._suite`."""

from __future__ import annotations

from ._suite import ALL, BOTH, Benchmark, Target, _beside as beside, _on as on

PUBLISH: tuple[Benchmark, ...] = (
    Benchmark(
        name="publish-many",
        title="1,000 notifications, one by one and in one statement",
        unit="notification",
        count=1,
        rounds=30,
        quick_rounds=7,
        scale=1000,
        quick_scale=1000,
        variants=(
            *on(BOTH, "psycopg execute", "publish_psycopg", "execute"),
            *on(ALL, "execute", "publish_ours", "execute"),
            *on(ALL, "notify_many", "publish_ours", "notify-many"),
            *on(ALL, "open_publisher", "publish_ours", "publisher"),
        ),
        targets=(
            *(
                Target("rate", f"notify_many / {loop}", f"{name} / {other}", at_least=20.0)
                for name in ("psycopg execute", "execute")
                for loop in ALL
                for other in (beside(loop) if name == "psycopg execute" else loop,)
            ),
            *(Target("rate", f"open_publisher / {loop}", f"execute / {loop}") for loop in ALL),
        ),
    ),
    Benchmark(
        name="publish-insert",
        title="rows that 32 writers insert and announce, each on its connection, on a disk",
        unit="row",
        count=1,
        rounds=20,
        quick_rounds=7,
        scale=3200,
        quick_scale=3200,
        variants=(
            *on(ALL, "INSERT", "publish_ours", "insert"),
            *on(ALL, "INSERT, publish", "publish_ours", "insert-publish"),
            *on(ALL, "INSERT, NOTIFY", "publish_ours", "insert-notify"),
        ),
        targets=(
            *(
                Target("rate", f"INSERT, publish / {loop}", f"INSERT / {loop}", at_least=0.9)
                for loop in ALL
            ),
            *(Target("rate", f"INSERT, NOTIFY / {loop}", f"INSERT / {loop}") for loop in ALL),
            *(Target("cpu", f"INSERT, publish / {loop}", f"INSERT / {loop}") for loop in ALL),
        ),
    ),
)
