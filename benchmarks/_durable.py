"""A server that waits for a disk at each commit, as those do that hold anybody's data."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import psycopg

if TYPE_CHECKING:
    from collections.abc import Generator


@contextmanager
def durable_server(dsn: str) -> Generator[str]:
    """Yield the server that was given if it waits for its disk, else one of our own that does.

    The private server of a run is in memory, where nothing would be waited for.
    """
    with psycopg.connect(dsn) as connection:
        (fsync,) = connection.execute("SHOW fsync").fetchone() or ("",)
    if fsync == "on":
        yield dsn
        return
    from pgstructured.testing import Cluster, _storage

    folder = Path(tempfile.gettempdir())
    with mock.patch.object(_storage, "storage_folder", return_value=folder):
        cluster = Cluster(settings={"fsync": "on", "shared_buffers": "64MB"})
        cluster.start()
    with cluster:
        yield cluster.dsn()
