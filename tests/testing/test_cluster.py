"""A private server: life, faults, databases."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import closing

import psycopg
import pytest

from pgstructured.testing import Cluster, ServerFailedError, ServerNotFoundError, _server
from pgstructured.testing._account import server_account
from pgstructured.testing._guard import GuardedProcess, child_pids, is_running, wait_gone
from pgstructured.testing._ports import free_port


def connected(dsn):
    return closing(psycopg.connect(dsn, autocommit=True))


def process_of(cluster) -> GuardedProcess:
    process: GuardedProcess = cluster._process
    return process


def pid_of(connection):
    return connection.execute("select pg_backend_pid()").fetchone()[0]


# ---------------------------------------------------------------- life


def test_starts_where_it_says(cluster, binaries):
    assert cluster.is_running
    assert cluster.host == "127.0.0.1"
    assert cluster.execute("show server_version")[0][0].startswith(binaries.version.split()[0])
    by_socket = f"host={cluster.socket_directory} port={cluster.port} user=postgres"
    with psycopg.connect(by_socket, dbname="postgres") as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    assert "database system is ready" in cluster.log_text()
    assert f"port {cluster.port}" in repr(cluster)
    cluster.start()  # runs already


def test_stop_and_start_keep_port_data_and_log(cluster):
    cluster.execute("create table kept (n int)")
    port = cluster.port
    for mode in ("fast", "immediate"):
        cluster.restart(mode)
        assert cluster.port == port
        assert cluster.execute("select count(*) from kept") == [(0,)]
    cluster.stop()
    cluster.stop()
    assert not cluster.is_running
    with pytest.raises(ServerFailedError, match="not running"):
        _ = cluster.pid
    assert "fast shutdown" in cluster.log_text()
    assert "immediate shutdown" in cluster.log_text()
    assert "stopped" in repr(cluster)


def test_close_leaves_nothing():
    with Cluster() as cluster:
        folder = cluster.data_directory.parent
        pids = {cluster.pid, *child_pids(cluster.pid), *process_of(cluster).guard_pids}
    assert not folder.exists()
    assert not wait_gone(frozenset(pids), 5.0)
    cluster.close()
    with pytest.raises(ServerFailedError, match="not been started"):
        _ = cluster.port


def test_before_its_start():
    cluster = Cluster()
    with pytest.raises(ServerFailedError, match="not been started"):
        cluster.dsn()
    cluster.stop()
    cluster.close()


def test_no_log_before_the_first_word(cluster):
    cluster.stop()
    cluster.log_path.unlink()
    assert cluster.log_text() == ""


def test_settings_and_an_initdb_of_its_own():
    with Cluster(settings={"max_connections": "7", "search_path": "it's"}, template=False) as own:
        assert own.execute("show max_connections") == [("7",)]
        assert own.execute("show search_path") == [("it's",)]
        assert own.execute("show max_prepared_transactions") == [("10",)]


def test_a_failing_start_shows_the_log():
    cluster = Cluster(settings={"max_connections": "many"})
    with pytest.raises(ServerFailedError, match='invalid value for parameter "max_connections"'):
        cluster.__enter__()
    assert cluster._folder is None


def test_a_start_that_takes_too_long_is_killed():
    cluster = Cluster(timeout=0.0)
    with pytest.raises(ServerFailedError, match="not ready in"):
        cluster.start()
    assert not cluster.is_running
    cluster.close()


def test_no_server(monkeypatch, tmp_path):
    monkeypatch.setenv("PGSTRUCTURED_PG_BIN", str(tmp_path))
    with pytest.raises(ServerNotFoundError, match=r"pip install 'pgstructured\[embedded\]'"):
        Cluster().start()


def test_a_taken_port_is_left_to_its_owner(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [taken.getsockname()[1]]  # then any: one found before may be taken by then
        monkeypatch.setattr(_server, "free_port", lambda _: ports.pop() if ports else free_port())
        with Cluster() as cluster:
            assert cluster.port != taken.getsockname()[1]


def test_a_restart_waits_for_its_port():
    with Cluster() as cluster:
        cluster.stop()
        cluster._timeout = 1.0
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", cluster.port))
            taken.listen()
            with pytest.raises(ServerFailedError, match="could not bind"):
                cluster.start()
        cluster._timeout = 30.0
        cluster.start()


# ---------------------------------------------------------------- faults


def test_kill_and_start(cluster):
    with connected(cluster.dsn()) as connection:
        children = child_pids(cluster.pid)
        assert children
        cluster.kill()
        assert not cluster.is_running
        assert not wait_gone(children, 0)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    cluster.start()
    assert cluster.execute("select 1") == [(1,)]


def test_kill_also_ends_what_is_stopped(cluster):
    with connected(cluster.dsn()) as frozen, connected(cluster.dsn()) as stopped:
        cluster.freeze(pid_of(frozen))
        os.kill(pid_of(stopped), signal.SIGSTOP)
        cluster.freeze()
        cluster.kill()
        for connection in (frozen, stopped):
            assert not is_running(connection.info.backend_pid)
    cluster.start()


def test_kill_backend_makes_the_server_recover(cluster):
    with connected(cluster.dsn()) as victim, connected(cluster.dsn()) as other:
        cluster.kill_backend(pid_of(victim))
        for connection in (victim, other):
            with pytest.raises(psycopg.OperationalError):
                connection.execute("select pg_sleep(20)")
    deadline = time.monotonic() + 20
    while "all server processes terminated; reinitializing" not in cluster.log_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Refused while it recovers.
    while True:
        try:
            assert cluster.execute("select 1") == [(1,)]
        except psycopg.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            break


def test_only_its_own_processes(cluster):
    for fault in (cluster.kill_backend, cluster.freeze, cluster.thaw):
        with pytest.raises(ValueError, match="no process of this server"):
            fault(os.getpid())


def test_terminate_backend(cluster):
    with connected(cluster.dsn()) as connection:
        assert cluster.terminate_backend(pid_of(connection))
        with pytest.raises(psycopg.errors.AdminShutdown):
            connection.execute("select 1")
    assert not cluster.terminate_backend(2**22 + 1)


def test_freeze_the_postmaster(cluster):
    with connected(cluster.dsn()) as connection:
        cluster.freeze()
        assert connection.execute("select 1").fetchone() == (1,)
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            psycopg.connect(cluster.dsn(), connect_timeout=2)
        cluster.thaw()
        psycopg.connect(cluster.dsn()).close()


def test_freeze_a_session(cluster):
    with connected(cluster.dsn()) as connection:
        pid = pid_of(connection)
        cluster.freeze(pid)
        connection.pgconn.send_query(b"select 1")
        time.sleep(0.05)
        connection.pgconn.consume_input()
        assert connection.pgconn.is_busy()
        cluster.thaw(pid)
        assert connection.pgconn.get_result().get_value(0, 0) == b"1"


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_stop_while_frozen(cluster, mode):
    with connected(cluster.dsn()) as connection:
        cluster.freeze(pid_of(connection))
        cluster.freeze()
        cluster.stop(mode)
    cluster.start()


def test_freeze_has_a_deadline(cluster, monkeypatch):
    monkeypatch.setattr(_server, "_FREEZE_TIMEOUT", 0.01)
    monkeypatch.setattr(_server, "is_stopped", lambda _: False)
    with pytest.raises(ServerFailedError, match="did not stop in"):
        cluster.freeze()


def test_a_stop_that_takes_too_long_kills(cluster):
    with connected(cluster.dsn()) as connection:
        os.kill(pid_of(connection), signal.SIGSTOP)  # behind the cluster's back
        cluster._timeout = 0.3
        with pytest.raises(ServerFailedError, match=r"(?s)did not stop \(fast\).*shutdown"):
            cluster.stop()
        assert not cluster.is_running
        assert not is_running(connection.info.backend_pid)


def test_a_guard_less_is_no_matter(cluster):
    os.kill(process_of(cluster).guard_pids[0], signal.SIGKILL)
    assert not wait_gone(frozenset(process_of(cluster).guard_pids[:1]), 5.0)
    cluster.freeze()
    cluster.stop()
    cluster.start()


def test_a_process_that_does_not_start_leaves_no_guard(tmp_path):
    before = child_pids(os.getpid())
    with pytest.raises(FileNotFoundError):
        GuardedProcess(
            ["true"],
            account=server_account(),
            folder=tmp_path / "missing",
            log=tmp_path / "log",
            ending="TERM",
        )
    assert child_pids(os.getpid()) == before


def test_even_a_kill_has_a_deadline(cluster, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(process_of(cluster), "wait", lambda _: False)
        with pytest.raises(ServerFailedError, match="survived SIGKILL"):
            cluster.kill()


# ---------------------------------------------------------------- standby


def test_standby_and_promote(cluster):
    cluster.execute("create table seen as select 1 as n")
    with cluster.standby() as standby:
        assert standby.execute("select pg_is_in_recovery()") == [(True,)]
        cluster.execute("insert into seen values (2)")
        lsn = cluster.execute("select pg_current_wal_lsn()")[0][0]
        standby._wait_until("select pg_last_wal_replay_lsn() >= %s", [lsn], "no replay")
        assert standby.execute("select count(*) from seen") == [(2,)]
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            standby.execute("insert into seen values (3)")
        cluster.kill()
        standby.promote()
        standby.execute("insert into seen values (3)")
        standby.restart()
        assert standby.execute("select count(*) from seen") == [(3,)]
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            standby.promote()
        cluster.start()  # two primaries
        assert cluster.execute("select count(*) from seen") == [(2,)]


def test_a_standby_ends_with_its_primary():
    with Cluster() as cluster:
        standby = cluster.standby(settings={"application_name": "other"})
        assert standby.execute("show application_name", dbname="template1") != []
    assert not standby.is_running


def test_a_promotion_that_takes_too_long(cluster):
    standby = cluster.standby()
    (startup,) = (
        pid
        for (pid,) in standby.execute("select pid from pg_stat_activity")
        if standby.execute("select backend_type from pg_stat_activity where pid = %s", [pid])
        == [("startup",)]
    )
    standby.freeze(startup)
    standby._timeout = 1.0
    with pytest.raises(ServerFailedError, match="not promoted in"):
        standby.promote()
    standby._timeout = 30.0


# ---------------------------------------------------------------- databases


def test_a_database_per_test(pg_dsn, pg_cluster):
    with connected(pg_dsn) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
        (session,) = pg_cluster.sessions(pg_dsn)
        assert session.pid == connection.info.backend_pid
        assert session.query == "select 1"
        assert session.state == "idle"
        connection.execute("select pg_advisory_lock(7), pg_advisory_lock_shared(1, 2)")
        pair, single = sorted(pg_cluster.advisory_locks(pg_dsn), key=lambda lock: -lock.objsubid)
        assert (single.classid, single.objid, single.shared, single.granted) == (0, 7, False, True)
        assert (pair.classid, pair.objid, pair.shared, pair.objsubid) == (1, 2, True, 2)
        assert pair.pid == session.pid


def test_databases(cluster, capsys):
    times = []
    for _ in range(5):
        started = time.perf_counter()
        dsn = cluster.create_database()
        times.append(time.perf_counter() - started)
    with capsys.disabled():
        print(  # noqa: T201 - for people
            f"\ncreate_database: {sorted(times)[2] * 1000:.1f} ms (median of 5)"
        )
    with connected(dsn) as connection:
        connection.execute("create table t (n int)")
    name = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
    copy = cluster.create_database('a "copy"/of it', template=name)
    assert cluster.execute("select count(*) from t", dbname='a "copy"/of it') == [(0,)]
    connection = psycopg.connect(copy)
    cluster.drop_database(copy)
    with pytest.raises(psycopg.OperationalError):
        connection.execute("select 1")
    connection.close()
    cluster.drop_database(name)
    cluster.drop_database(f"dbname={name}")


def test_dsn_parameters(cluster):
    dsn = cluster.dsn(application_name="a b&c", connect_timeout=5)
    with connected(dsn) as connection:
        assert connection.execute("show application_name").fetchone() == ("a b&c",)
