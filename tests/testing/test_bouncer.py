"""A real pooler."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import closing

import psycopg
import pytest

from pgstructured.testing import (
    PgBouncer,
    PgBouncerNotFoundError,
    ServerFailedError,
    _bouncer,
    find_pgbouncer,
)
from pgstructured.testing._guard import is_running
from pgstructured.testing._ports import free_port


@pytest.fixture
def installed():
    try:
        return find_pgbouncer()
    except PgBouncerNotFoundError as error:
        pytest.skip(str(error))


def server_pid(connection):
    return connection.execute("select pg_backend_pid()", prepare=False).fetchone()[0]


def test_transaction_mode_shares_a_session(pg_dsn, pgbouncer_transaction):
    dsn = pgbouncer_transaction.dsn(pg_dsn, application_name="x")
    assert pgbouncer_transaction.admin("SHOW POOLS")
    with (
        closing(psycopg.connect(dsn, autocommit=True)) as one,
        closing(psycopg.connect(dsn, autocommit=True)) as two,
    ):
        assert server_pid(one) == server_pid(two)
        assert one.info.backend_pid != server_pid(one)


def test_session_mode_does_not(pg_dsn, pgbouncer_session):
    dsn = pgbouncer_session.dsn(pg_dsn)
    with (
        closing(psycopg.connect(dsn, autocommit=True)) as one,
        closing(psycopg.connect(dsn, autocommit=True)) as two,
    ):
        assert server_pid(one) != server_pid(two)


def test_it_ends_with_its_block(installed, pg_cluster):
    with PgBouncer(pg_cluster, settings={"max_client_conn": "3"}, default_pool_size=2) as bouncer:
        pid = bouncer.pid
        assert bouncer.host == "127.0.0.1"
        found = {row["key"]: row["value"] for row in bouncer.admin("SHOW CONFIG")}
        assert found["max_client_conn"] == "3"
        assert found["default_pool_size"] == "2"
        assert bouncer.admin("RELOAD") == []
        assert "process up" in bouncer.log_text()
    assert not is_running(pid)
    assert bouncer.log_text() == ""
    with pytest.raises(ServerFailedError, match="not running"):
        _ = bouncer.pid


def test_a_failing_start_shows_the_log(installed, pg_cluster):
    with pytest.raises(ServerFailedError, match=r"(?s)did not start.*no_such"):
        PgBouncer(pg_cluster, settings={"pool_mode": "no_such"}).__enter__()


def test_a_start_that_takes_too_long(installed, pg_cluster):
    bouncer = PgBouncer(pg_cluster, timeout=0.0)
    with pytest.raises(ServerFailedError):
        bouncer.__enter__()
    assert bouncer._folder is None


def test_an_end_that_takes_too_long(installed, pg_cluster):
    with PgBouncer(pg_cluster) as bouncer:
        bouncer._timeout = 0.1
        os.kill(bouncer.pid, signal.SIGSTOP)
        pid = bouncer.pid
        with pytest.raises(ServerFailedError, match="did not stop in"):
            bouncer.close()
        assert not is_running(pid)


def test_a_command_that_takes_too_long(installed, pg_cluster, pg_dsn):
    """PAUSE waited for a transaction of whoever did, without end."""
    with PgBouncer(pg_cluster) as bouncer:
        with closing(psycopg.connect(bouncer.dsn(pg_dsn))) as connection:
            pid = server_pid(connection)  # its transaction stays open
            with pytest.raises(ServerFailedError, match=r"not done 'PAUSE' within 0\.1 s"):
                bouncer.admin("PAUSE", timeout=0.1)
            assert server_pid(connection) == pid
            connection.rollback()
            # It went on with it, and is paused.
            with pytest.raises(psycopg.Error, match="already"):
                bouncer.admin("PAUSE")
            bouncer.admin("RESUME")
            assert bouncer.admin("PAUSE") == []
            bouncer.admin("RESUME")
            assert server_pid(connection) != pid


def test_a_pooler_that_does_not_answer(installed, pg_cluster):
    with PgBouncer(pg_cluster) as bouncer:
        os.kill(bouncer.pid, signal.SIGSTOP)
        try:
            with pytest.raises(ServerFailedError, match="not done 'SHOW VERSION'"):
                bouncer.admin("SHOW VERSION", timeout=0.1)
        finally:
            os.kill(bouncer.pid, signal.SIGCONT)
        assert bouncer.admin("SHOW VERSION")


def test_a_taken_port_is_left_to_its_owner(installed, pg_cluster, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [taken.getsockname()[1]]  # then any: one found before may be taken by then
        monkeypatch.setattr(_bouncer, "free_port", lambda _: ports.pop() if ports else free_port())
        with PgBouncer(pg_cluster) as bouncer:
            assert bouncer.port != taken.getsockname()[1]


def test_none_installed(monkeypatch, tmp_path, pg_cluster):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_bouncer, "_FOLDERS", ())
    with pytest.raises(PgBouncerNotFoundError, match="install your system's package"):
        PgBouncer(pg_cluster).__enter__()
