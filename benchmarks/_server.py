"""The server to measure against, and which processes run on which processor."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Generator

Pinning = Literal["same", "split", "none"]


@contextmanager
def pinned_server(dsn: str | None, pinning: Pinning) -> Generator[str]:
    """Yield the conninfo of a server; then let this process and its workers be pinned.

    What we start inherits where it may run, so the server is started from where it belongs,
    and the workers, which come later, from where they do. A server that was given stays
    where it is; only the clients are pinned.
    """
    allowed = sorted(os.sched_getaffinity(0))
    try:
        with _server(dsn, allowed, pinning) as conninfo:
            _pin(allowed, pinning, allowed[-1])
            yield conninfo
    finally:
        os.sched_setaffinity(0, allowed)


@contextmanager
def _server(dsn: str | None, allowed: list[int], pinning: Pinning) -> Generator[str]:
    if dsn is not None:
        yield dsn
        return
    from pgstructured.testing import Cluster

    _pin(allowed, pinning, allowed[-1] if pinning == "same" else allowed[0])
    # One connection for each lock is what some peers need.
    with Cluster(settings={"max_connections": "800"}) as cluster:
        yield cluster.dsn()


def _pin(allowed: list[int], pinning: Pinning, cpu: int) -> None:
    os.sched_setaffinity(0, allowed if pinning == "none" else [cpu])
