"""Fixtures for pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

    from ._cluster import Cluster


@pytest.fixture(scope="session")
def pg_cluster() -> Generator[Cluster]:
    """A private server for the whole run."""
    from ._cluster import Cluster  # noqa: PLC0415 - only runs that use it pay for it

    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def pg_dsn(pg_cluster: Cluster) -> Generator[str]:
    """Connection URL of a database of this test's own."""
    dsn = pg_cluster.create_database()
    yield dsn
    pg_cluster.drop_database(dsn)


@pytest.fixture
def pg_cluster_private() -> Generator[Cluster]:
    """A private server of this test's own, to be broken."""
    from ._cluster import Cluster  # noqa: PLC0415 - only runs that use it pay for it

    with Cluster() as cluster:
        yield cluster
