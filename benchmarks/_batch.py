"""A batch: so many operations one after the other, and how long each took."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

Batch = Callable[[int], Awaitable[list[int] | dict[str, float] | None]]
"""Does as many operations as it is told; returns the nanoseconds of each, if it can tell.

Or else figures of its own, by name.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What a workload is told."""

    dsn: str
    """The server to work on, as libpq takes it."""

    channel: str
    """A channel that is this worker's own."""

    loop: str
    """The event loop that it runs on."""

    scale: int
    """Rows to fetch or to copy, notifications to receive; the workload knows which."""

    def asyncpg_arguments(self) -> dict[str, Any]:
        """Return the same server as keyword arguments of `asyncpg.connect`."""
        from psycopg.conninfo import conninfo_to_dict  # not before a library has chosen when

        given = conninfo_to_dict(self.dsn)
        names = {"host": "host", "port": "port", "user": "user", "password": "password"}
        arguments = {theirs: given[ours] for ours, theirs in names.items() if ours in given}
        return {**arguments, "database": given.get("dbname")}


Workload = Callable[[Options], AbstractAsyncContextManager[Batch]]


def one_by_one(operation: Callable[[], Awaitable[object]]) -> Batch:
    """Return a batch function that awaits ``operation`` again and again and times each."""

    async def batch(count: int) -> list[int]:
        times = [0] * count
        for index in range(count):
            started = perf_counter_ns()
            await operation()
            times[index] = perf_counter_ns() - started
        return times

    return batch


def backend_arguments(loop: str) -> dict[str, Any]:
    """Return what `anyio.run` takes for an event loop."""
    return {
        "backend": "trio" if loop == "trio" else "asyncio",
        "backend_options": {"use_uvloop": True} if loop == "uvloop" else {},
    }


def expect(what: str, got: object, wanted: object) -> None:
    """Refuse a measurement of something that did not do its work."""
    if got != wanted:
        raise RuntimeError(f"{what}: got {got!r}, wanted {wanted!r}")
