"""Fixtures for pytest: servers, databases, proxies, poolers, and leak checks.

Loaded by every pytest run where the package is installed, so it imports nothing
else of the package before a fixture is used.

A test that uses `pg_dsn` fails where it leaves something behind: a session,
advisory lock or prepared transaction in its database, a task (async tests), a
thread of this library, or something that was never closed (`ResourceWarning`).
Mark it with ``pg_leaks_ok`` where that is its purpose.
"""

from __future__ import annotations

from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

    from ._bouncer import PgBouncer, PoolMode
    from ._cluster import Cluster
    from ._databases import Databases
    from ._proxy import FaultProxy

_has_failed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", "pg_leaks_ok: don't check what a test with a pg_dsn leaves behind"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note that a test has failed: what it leaves then is no news."""
    report = yield
    if call.when == "call" and report.failed:
        item.stash[_has_failed] = True
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Check for tasks while the test's event loop is still there."""
    function = pyfuncitem.obj
    if not (iscoroutinefunction(function) and _is_checked(pyfuncitem)):
        return (yield)
    from ._leaks import fail_on_left_tasks  # noqa: PLC0415 - see the module's docstring

    pyfuncitem.obj = fail_on_left_tasks(function)
    try:
        return (yield)
    finally:
        pyfuncitem.obj = function


def _is_checked(node: pytest.Item) -> bool:
    uses_it = "pg_dsn" in getattr(node, "fixturenames", ())
    return uses_it and node.get_closest_marker("pg_leaks_ok") is None


@pytest.fixture(scope="session")
def pg_cluster() -> Generator[Cluster]:
    """A private server for the whole run. Tests that break it use `pg_cluster_private`."""
    from ._cluster import Cluster  # noqa: PLC0415 - see the module's docstring

    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def pg_cluster_private() -> Generator[Cluster]:
    """A private server of this test's own, to be broken."""
    from ._cluster import Cluster  # noqa: PLC0415 - see the module's docstring

    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _pg_databases(pg_cluster: Cluster) -> Generator[Databases]:
    """What makes the databases of `pg_dsn`, and drops them."""
    from ._databases import Databases  # noqa: PLC0415 - see the module's docstring

    with Databases(pg_cluster) as databases:
        yield databases


@pytest.fixture
def pg_dsn(
    pg_cluster: Cluster, _pg_databases: Databases, request: pytest.FixtureRequest
) -> Generator[str]:
    """Connection URL of a database of this test's own, on `pg_cluster`."""
    from ._leaks import (  # noqa: PLC0415 - ditto
        resource_leaks,
        server_leaks,
        thread_leaks,
        younger_garbage_only,
    )

    node: pytest.Item = request.node
    name = _pg_databases.create()
    leaks: list[str] = []
    try:
        with younger_garbage_only():
            yield pg_cluster.dsn(name)
            if _is_checked(node) and not node.stash.get(_has_failed, False):
                # The server first: collecting garbage closes what was forgotten.
                leaks += server_leaks(_pg_databases, name) + thread_leaks() + resource_leaks()
    finally:
        _pg_databases.drop(name)
    if leaks:
        pytest.fail("left behind by the test:\n" + "\n".join(leaks), pytrace=False)


@pytest.fixture
def fault_proxy(pg_cluster: Cluster, pg_dsn: str) -> Generator[FaultProxy]:  # noqa: ARG001 - ends before its leak checks
    """A proxy in front of `pg_cluster`; ``fault_proxy.dsn(pg_dsn)`` leads through it."""
    from ._proxy import FaultProxy  # noqa: PLC0415 - see the module's docstring

    with FaultProxy(pg_cluster.host, pg_cluster.port) as proxy:
        yield proxy


@pytest.fixture
def pgbouncer_transaction(pg_cluster: Cluster, pg_dsn: str) -> Generator[PgBouncer]:  # noqa: ARG001 - ditto
    """A PgBouncer in transaction mode in front of `pg_cluster`; ``.dsn(pg_dsn)`` leads through it.

    Skips the test where there is no PgBouncer on this machine.
    """
    yield from _pgbouncer(pg_cluster, "transaction")


@pytest.fixture
def pgbouncer_session(pg_cluster: Cluster, pg_dsn: str) -> Generator[PgBouncer]:  # noqa: ARG001 - ditto
    """The same in session mode."""
    yield from _pgbouncer(pg_cluster, "session")


def _pgbouncer(cluster: Cluster, pool_mode: PoolMode) -> Generator[PgBouncer]:
    from ._bouncer import PgBouncer, find_pgbouncer  # noqa: PLC0415 - see the module's docstring
    from ._errors import PgBouncerNotFoundError  # noqa: PLC0415 - ditto

    try:
        find_pgbouncer()
    except PgBouncerNotFoundError as error:
        pytest.skip(str(error))
    with PgBouncer(cluster, pool_mode=pool_mode) as bouncer:
        yield bouncer
