"""The pytest plugin: leak checks that find what they are for, and cost nothing else."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from functools import partial

import psycopg
import pytest

from pgstructured.testing import _leaks
from pgstructured.testing._databases import Databases
from pgstructured.testing._leaks import younger_garbage_only

pytest_plugins = ["pytester"]

_HEAD = """
    import psycopg, pytest, anyio, threading
"""


@pytest.fixture
def inner(pytester, monkeypatch):
    """A pytest run of a user's own, in this process."""
    # What is left there stays.
    monkeypatch.setattr(_leaks, "server_leaks", partial(_leaks.server_leaks, grace=0.2))
    monkeypatch.setattr(_leaks, "_TASK_GRACE", 0.2)
    pytester.makeini("[pytest]\nanyio_mode = auto\n")

    def run(source, **outcomes):
        pytester.makepyfile(_HEAD + source)
        # It brings up a server of its own.
        result = pytester.runpytest_inprocess(
            "-rs", "-p", "no:cacheprovider", "-W", "default::UserWarning"
        )
        result.assert_outcomes(**outcomes)
        return result.stdout.str()

    return run


def test_clean_tests_pass(inner):
    inner(
        """
    def test_sync(pg_dsn):
        with psycopg.connect(pg_dsn) as connection:
            connection.execute("select pg_advisory_lock(1)")

    async def test_async(pg_dsn):
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 0)

    @pytest.mark.anyio
    def test_of_something_else():
        pass

    async def test_without_a_database():
        pass

    def test_private(pg_cluster_private, pg_cluster):
        assert pg_cluster_private.port != pg_cluster.port
        """,
        passed=7,
    )


def test_leaks_are_found(inner):
    said = inner(
        """
    kept = []

    def test_session(pg_dsn):
        kept.append(psycopg.connect(pg_dsn, application_name="forgotten"))

    def test_prepared(pg_dsn):
        connection = psycopg.connect(pg_dsn)
        connection.tpc_begin(connection.xid(1, "forgotten too", ""))
        connection.execute("select pg_advisory_xact_lock(77)")
        connection.tpc_prepare()
        connection.close()

    def test_thread(pg_dsn):
        ended = threading.Event()
        kept.append(ended)
        threading.Thread(target=ended.wait, name="pgstructured-forgotten", daemon=True).start()

    def test_end():
        kept[0].close()
        kept[1].set()

    def test_socket(pg_dsn):
        import socket, warnings

        class Cycle:
            def __del__(self):
                warnings.warn("of another kind", UserWarning)

        cycle = Cycle()
        cycle.itself = cycle
        cycle.socket = socket.socket()
        """,
        passed=5,
        errors=4,
        warnings=1,
    )
    assert "session" in said
    assert "(forgotten): idle" in said
    assert "advisory lock 0, 77" in said
    assert "prepared transaction 1_" in said
    assert "thread pgstructured-forgotten" in said
    assert "unclosed <socket.socket" in said
    assert "of another kind" in said


def test_left_tasks_are_found(inner):
    said = inner(
        """
    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(request):
        return request.param

    async def leave(name):
        if name == "asyncio":
            import asyncio
            return asyncio.ensure_future(asyncio.sleep(10))
        import trio
        return trio.lowlevel.spawn_system_task(trio.sleep, 10)

    async def test_task(pg_dsn, anyio_backend):
        await leave(anyio_backend)

    @pytest.mark.pg_leaks_ok
    async def test_task_that_may_stay(pg_dsn, anyio_backend):
        await leave(anyio_backend)
        """,
        failed=2,
        passed=2,
    )
    assert "tasks left by the test" in said


def test_a_failed_test_has_one_complaint(inner):
    inner(
        """
    kept = []

    def test_failing(pg_dsn):
        kept.append(psycopg.connect(pg_dsn))
        assert False

    @pytest.mark.pg_leaks_ok
    def test_that_may_leak(pg_dsn):
        kept.append(psycopg.connect(pg_dsn))

    def test_end():
        for connection in kept:
            connection.close()
        """,
        failed=1,
        passed=2,
    )


def test_no_pooler_is_a_skip_with_its_reason(inner, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    said = inner(
        """
    def test_pooled(pgbouncer_transaction, pgbouncer_session):
        pass
        """,
        skipped=1,
    )
    assert "no pgbouncer on PATH" in said


def test_the_databases_of_tests_survive_what_ends_their_connection(pg_cluster):
    with Databases(pg_cluster) as databases:
        name = databases.create()
        for _ in range(2):
            pids = databases.execute("select pg_backend_pid()", {})
            assert databases.execute("select pg_backend_pid()", {}) == pids
            pg_cluster.terminate_backend(pids[0][0])
        databases.drop(name)
        databases.drop(name)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(pg_cluster.dsn(name))


def test_nothing_is_imported_before_it_is_used():
    program = (
        "import sys, pytest, pgstructured; before = set(sys.modules);"
        "import pgstructured.testing.pytest_plugin; print(sorted(set(sys.modules) - before))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout == "['pgstructured.testing', 'pgstructured.testing.pytest_plugin']\n"


def test_only_what_is_younger_is_looked_at():
    """Garbage that was there before is not this test's; what it makes is found."""
    found: list[str] = []

    class Garbage:
        def __init__(self, name: str) -> None:
            self.name, self.itself = name, self

        def __del__(self) -> None:
            found.append(self.name)

    gc.collect()
    Garbage("older")
    with younger_garbage_only():
        Garbage("younger")
        gc.collect()
        assert found == ["younger"]
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert found == ["younger", "older"]


def test_objects_that_somebody_else_has_frozen_stay_so():
    gc.freeze()
    try:
        with younger_garbage_only():
            assert gc.get_freeze_count()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
