"""One run: a server, proxies, workers, a nemesis; then the history, checked."""

from __future__ import annotations

import json
import random
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from pgstructured.locks import open_locks
from pgstructured.testing import Cluster, FaultProxy

from ._history import History, Write, read_records
from ._nemesis import Nemesis
from ._worker import Assignment
from ._workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._history import Figures

LOOPS = ("asyncio", "uvloop", "trio")
KEYS = ("red", "orange", "yellow", "green", "blue", "violet")
START_TIMEOUT = 60.0
QUIESCE = 4.0
"""Seconds in which the server notes that killed clients are gone: twice its check interval."""
TABLES = (
    "CREATE TABLE register (key text PRIMARY KEY, value int NOT NULL)",
    "CREATE TABLE log (key text NOT NULL, token int8 NOT NULL, value int NOT NULL)",
)


def run(
    *,
    seconds: float,
    seed: int,
    processes: int,
    figures: Figures,
    calm: bool,
    lie: str | None,
    keep: Path | None = None,
) -> History:
    """Return the history of a run.

    Args:
        seconds: How long things break.
        seed: What the lots are drawn from.
        processes: How many workers.
        figures: Those of their sessions.
        calm: Break nothing.
        lie: How a worker cheats; for tests of the checker.
        keep: Folder in which to leave what was written down.
    """
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        cluster = stack.enter_context(Cluster(settings={"max_connections": "400"}))
        dsn = cluster.create_database("history")
        _make_tables(cluster)
        proxies = [
            stack.enter_context(FaultProxy(cluster.host, cluster.port)) for _ in range(processes)
        ]
        assignments = [
            Assignment(
                process="",
                worker=number,
                loop=LOOPS[number % len(LOOPS)],
                seed=f"{seed}/{number}",
                conninfo=proxy.dsn(dsn),
                # Whom the network cuts off from its lock may still reach the data, or not.
                register=dsn if number % 2 else proxy.dsn(dsn),
                keys=list(KEYS),
                path="",
                figures={name: getattr(figures, name) for name in figures.__slots__},
                lie=lie,
            )
            for number, proxy in enumerate(proxies)
        ]
        workers = Workers(assignments, folder)
        stack.callback(workers.end)
        lots = random.Random(seed)
        nemesis = Nemesis(cluster, "history", proxies, workers, lots)
        workers.wait_started(START_TIMEOUT)
        until = time.monotonic() + seconds
        if calm:
            time.sleep(seconds)
        else:
            nemesis.run(until)
        history = History(faults=nemesis.faults, healed=time.monotonic())
        workers.drain(3 * figures.liveness + 10)
        (folder / "faults.jsonl").write_text(
            "".join(f"{json.dumps(asdict(fault))}\n" for fault in history.faults)
        )
        history.leaks += _find_leaks(cluster, figures, "advisory locks", _locks)
        workers.close(2 * figures.release_timeout + 10)
        history.leaks += _find_leaks(cluster, figures, "sessions", _sessions)
        for path in workers.histories:
            with path.open() as lines:
                read_records(history, lines)
        history.trouble += workers.trouble
        _read_register(cluster, history)
        return history


def _make_tables(cluster: Cluster) -> None:
    for table in TABLES:
        cluster.execute(table, dbname="history")
    for key in KEYS:
        cluster.execute("INSERT INTO register VALUES (%s, 0)", [key], dbname="history")

    async def create() -> None:
        async with open_locks(cluster.dsn("history")) as locks:
            await locks.create_fence_table()

    anyio.run(create)


def _locks(cluster: Cluster) -> list[str]:
    return [str(lock) for lock in cluster.advisory_locks("history")]


def _sessions(cluster: Cluster) -> list[str]:
    return [str(session) for session in cluster.sessions("history")]


def _find_leaks(
    cluster: Cluster, figures: Figures, what: str, find: Callable[[Cluster], list[str]]
) -> list[str]:
    deadline = time.monotonic() + QUIESCE + figures.patience
    while found := find(cluster):
        if time.monotonic() > deadline:
            return [f"{what} were left on the server: {found}"]
        time.sleep(0.05)
    return []


def _read_register(cluster: Cluster, history: History) -> None:
    for key, value in cluster.execute("SELECT key, value FROM register", dbname="history"):
        history.register[key] = value
    for key, token, value in cluster.execute("SELECT * FROM log", dbname="history"):
        history.log.append(Write(key=key, token=token, value=value))
