"""A process that notifies when it is told to: what publishing costs is not the receiver's.

The worker writes a line, ``COUNT INTERVAL``: so many notifications, each in a transaction of
its own and so many seconds apart with the present time (CLOCK_MONOTONIC, nanoseconds) as payload;
or all in one transaction where the interval is 0, with their numbers.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

ROOT = Path(__file__).resolve().parent.parent
BURST = "SELECT count(pg_notify(%s, i::text)) FROM generate_series(1, %s) i"
SQL = "SELECT pg_notify(%s, %s)"


@contextmanager
def notifier(dsn: str, channel: str) -> Generator[Callable[..., None]]:
    """Yield ``send(count, interval=0.0)``, which returns at once."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks._notifier", dsn, channel],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    pipe = process.stdin
    process.stdout.readline()  # it is connected

    def send(count: int, interval: float = 0.0) -> None:
        pipe.write(b"%d %f\n" % (count, interval))
        pipe.flush()

    try:
        yield send
    finally:
        pipe.close()
        process.wait(10)
        process.stdout.close()


def main() -> None:
    """Notify as standard input says, until it ends."""
    dsn, channel = sys.argv[1:]
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=0) as connection:
        print(flush=True)
        for line in sys.stdin:
            count, interval = int(line.split()[0]), float(line.split()[1])
            if not interval:
                connection.execute(BURST, (channel, count))
                continue
            due = time.monotonic()
            for _ in range(count):
                due += interval
                time.sleep(max(0.0, due - time.monotonic()))
                connection.execute(SQL, (channel, str(time.monotonic_ns())))


if __name__ == "__main__":
    main()
