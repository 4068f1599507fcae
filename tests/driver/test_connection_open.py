"""`connect` and `open_connection`: options, poolers, watching, heartbeat."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import anyio
import psycopg
import pytest
from anyio.lowlevel import checkpoint
from psycopg import errors
from psycopg.pq import TransactionStatus

from pgstructured.driver import Connection, ConnectionState, Pooler, connect, open_connection
from pgstructured.errors import ConnectionLostError, ConninfoError
from pgstructured.observe import Event, instrumented

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgstructured.testing import Cluster, FaultProxy, PgBouncer


async def value(conn: Connection[Any], query: str, *params: Any) -> Any:
    row = await (await conn.execute(query, params or None)).fetchone()
    assert row is not None
    return row[0]


# ---------------------------------------------------------------- connect


async def test_defaults(pg_dsn: str) -> None:
    events: list[Event] = []
    with instrumented(events.append):
        conn = await connect(pg_dsn)
    assert conn.autocommit
    assert conn.prepare_threshold == 5
    assert not conn.behind_pooler
    assert await value(conn, "SHOW application_name") == "pgstructured"
    assert [event.name for event in events] == ["driver.connected"]
    assert events[0].facts["backend_pid"] == conn.info.backend_pid
    await conn.aclose()


async def test_options(pg_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conn = await connect(
        pg_dsn + "?application_name=theirs",
        application_name="mine — é" + "x" * 80,
        autocommit=False,
        row_factory=psycopg.rows.dict_row,
        cursor_factory=psycopg.AsyncClientCursor,
        prepare_threshold=None,
        options="-c search_path=elsewhere",
    )
    assert await (await conn.execute("SHOW application_name")).fetchone() == {
        "application_name": "mine ? ?" + "x" * 55
    }
    assert await (await conn.execute("SHOW search_path")).fetchone() == {"search_path": "elsewhere"}
    assert not conn.autocommit
    assert conn.prepare_threshold is None
    assert type(conn.cursor()) is psycopg.AsyncClientCursor
    await conn.aclose()

    monkeypatch.setenv("PGSTRUCTURED_TEST_DSN", pg_dsn + "?application_name=theirs")
    conn2 = await connect("env:PGSTRUCTURED_TEST_DSN", context=conn)
    assert await value(conn2, "SHOW application_name") == "theirs"
    await conn2.aclose()

    async def ask() -> str:
        await checkpoint()
        return pg_dsn

    conn3 = await connect(ask, connect_timeout=None)
    assert await value(conn3, "SELECT 1") == 1
    await conn3.aclose()
    conn4 = await Connection.connect(
        pg_dsn, row_factory=psycopg.rows.dict_row, cursor_factory=psycopg.AsyncClientCursor,
        context=conn3,
    )  # fmt: skip
    assert await (await conn4.execute("SELECT 1 AS one")).fetchone() == {"one": 1}
    await conn4.close()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"pooler": "pgbouncer"}, "pooler must be one of 'auto', 'none', 'session', 'transaction'"),
        ({"connect_timeout": 0}, "connect_timeout must be a finite number of seconds above 0"),
        ({"connect_timeout": float("inf")}, "connect_timeout must be"),
        ({"cancel_timeout": -1}, "cancel_timeout must be"),
        ({"cancel_timeout": None}, "cancel_timeout must be"),
        ({"cancel_timeout": True}, "cancel_timeout must be"),
        ({"heartbeat": 0}, "heartbeat must be"),
        ({"heartbeat_timeout": "5"}, "heartbeat_timeout must be"),
        ({"close_timeout": float("nan")}, "close_timeout must be"),
    ],
)
async def test_bad_options(pg_dsn: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        async with open_connection(pg_dsn, **options):
            raise AssertionError("it was to be refused")


async def test_bad_conninfo(pg_dsn: str) -> None:
    with pytest.raises(ConninfoError):
        await connect("this is no conninfo")
    for no_number in ("soon", "nan"):
        with pytest.raises(ConninfoError, match="connect_timeout must be a number"):
            await connect(pg_dsn + f"?connect_timeout={no_number}")
    with pytest.raises(ConninfoError, match="no connection parameter: heart_beat"):
        await connect(pg_dsn, heart_beat=10)


async def test_the_total_time_for_connecting(pg_dsn: str, fault_proxy: FaultProxy) -> None:
    fault_proxy.freeze()
    dsn = fault_proxy.dsn(pg_dsn)
    host = f"host={fault_proxy.host},{fault_proxy.host} port={fault_proxy.port},{fault_proxy.port}"
    for conninfo, options in (
        (dsn, {"connect_timeout": 0.2}),
        (dsn + "?connect_timeout=0.2", {}),
        (dsn + "?connect_timeout=0.2", {"connect_timeout": None}),
        (host, {"connect_timeout": 0.2}),
    ):
        with anyio.fail_after(8), pytest.raises(errors.ConnectionTimeout):
            await connect(conninfo, **options)
    fault_proxy.thaw()
    conn = await connect(dsn + "?connect_timeout=0")
    await conn.aclose()

    async def ask() -> str:
        await anyio.sleep_forever()
        return ""

    with anyio.fail_after(8), pytest.raises(errors.ConnectionTimeout, match="conninfo"):
        await connect(ask, connect_timeout=0.05)


async def test_the_question_for_a_pooler_is_within_the_total_time(
    pg_dsn: str, fault_proxy: FaultProxy
) -> None:
    fault_proxy.hold(b"pg_backend_pid")
    with anyio.fail_after(8), pytest.raises(errors.ConnectionTimeout, match="pooler"):
        await connect(fault_proxy.dsn(pg_dsn), connect_timeout=1.5)
    fault_proxy.release()


async def test_a_cancelled_connect_leaves_nothing(
    pg_dsn: str, fault_proxy: FaultProxy, pg_cluster: Cluster
) -> None:
    for pattern in (None, b"pg_backend_pid"):
        if pattern is None:
            fault_proxy.freeze("down")
        else:
            fault_proxy.hold(pattern)
        with anyio.fail_after(8), anyio.move_on_after(0.2) as scope:
            await connect(fault_proxy.dsn(pg_dsn))
        assert scope.cancelled_caught
        fault_proxy.thaw()
        fault_proxy.release()
    with anyio.fail_after(5):
        while pg_cluster.sessions(pg_dsn):  # noqa: ASYNC110 - the server can't tell
            await anyio.sleep(0.01)


async def test_an_error_while_connecting(pg_dsn: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        await connect(pg_dsn, dbname="nowhere")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        await Connection.connect(pg_dsn, dbname="nowhere")


async def test_a_refused_question_for_a_pooler(pg_dsn: str) -> None:
    with psycopg.connect(pg_dsn, autocommit=True) as conn:
        conn.execute("CREATE FUNCTION public.pg_backend_pid() RETURNS int LANGUAGE plpgsql AS"
                     " $$ BEGIN RAISE EXCEPTION 'no'; END $$")  # fmt: skip
    with pytest.raises(errors.RaiseException):
        await connect(pg_dsn, options="-c search_path=public,pg_catalog")


async def test_declared_poolers(pg_dsn: str) -> None:
    cases: list[tuple[Pooler, bool, int | None]] = [
        ("none", False, 5),
        ("session", True, 5),
        ("transaction", True, None),
    ]
    for pooler, is_behind, threshold in cases:
        conn = await connect(pg_dsn, pooler=pooler)
        assert conn.behind_pooler is is_behind
        assert conn.prepare_threshold == threshold
        await conn.aclose()


async def test_a_detected_pooler(pg_dsn: str, pgbouncer_transaction: PgBouncer) -> None:
    conn = await connect(pgbouncer_transaction.dsn(pg_dsn))
    assert conn.behind_pooler
    assert conn.prepare_threshold is None
    with anyio.move_on_after(0.1):
        await conn.execute("SELECT pg_sleep(30)")
    assert await value(conn, "SELECT 1") == 1
    await conn.aclose()


async def test_a_password_is_nowhere(pg_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    secret = "s3cr3t-w0rd"
    conn = await connect(pg_dsn, password=secret)
    told = [repr(conn), str(conn)]
    await conn.aclose()
    options: Any
    for options in ({"dbname": "nowhere"}, {"host": "127.0.0.1", "port": "1"}, {"sslmode": "x"}):
        with pytest.raises((psycopg.Error, ConninfoError)) as caught:
            await connect(pg_dsn, password=secret, **options)
        told.append(repr(caught.value))
    assert secret not in "\n".join([*told, caplog.text])


# ---------------------------------------------------------------- open_connection


@pytest.mark.parametrize("pooler", ["auto", "none"])
async def test_watching(pg_dsn: str, pg_cluster: Cluster, pooler: Pooler) -> None:
    async with open_connection(pg_dsn, pooler=pooler) as conn:
        await anyio.sleep(0.05)
        pg_cluster.terminate_backend(conn.info.backend_pid)
        with anyio.fail_after(5):
            await conn.wait_closed()
        assert conn.state is ConnectionState.FAILED
        assert isinstance(conn.failure, errors.AdminShutdown)
        with pytest.raises(ConnectionLostError):
            await conn.execute("SELECT 1")
    assert conn.state is ConnectionState.FAILED
    async with open_connection(pg_dsn) as conn:
        await anyio.sleep(0.02)
        await conn.aclose()
        await anyio.sleep(0.02)
    assert conn.state is ConnectionState.CLOSED


async def test_the_bodys_error_comes_out_bare(pg_dsn: str) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_connection(pg_dsn) as conn:
            raise ZeroDivisionError
    assert conn.state is ConnectionState.CLOSED


async def test_leaving_ends_a_statement_that_runs(pg_dsn: str, pg_cluster: Cluster) -> None:
    async with anyio.create_task_group() as tasks:
        async with open_connection(pg_dsn, close_timeout=20) as conn:

            async def run() -> None:
                with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
                    await conn.execute("SELECT pg_sleep(30)")

            tasks.start_soon(run)
            await anyio.sleep(0.05)
    with anyio.fail_after(5):
        while pg_cluster.sessions(pg_dsn):  # noqa: ASYNC110 - the server can't tell
            await anyio.sleep(0.01)


async def test_leaving_against_a_silent_server(
    pg_dsn: str, fault_proxy: FaultProxy, end_sessions: Callable[[], None]
) -> None:
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            async with open_connection(fault_proxy.dsn(pg_dsn), close_timeout=0.1) as conn:

                async def run() -> None:
                    with pytest.raises(psycopg.OperationalError):
                        await conn.execute("SELECT pg_sleep(30)")

                tasks.start_soon(run)
                await anyio.sleep(0.05)
                fault_proxy.freeze()
    assert conn.state is ConnectionState.CLOSED
    fault_proxy.thaw()
    end_sessions()


async def test_what_comes_unasked(pg_dsn: str) -> None:
    async with open_connection(pg_dsn) as conn, open_connection(pg_dsn) as other:
        await conn.execute("LISTEN here")
        await other.execute("NOTIFY here, 'kept'")
        with anyio.fail_after(5):
            while not conn._notifies_backlog:  # noqa: ASYNC110 - the watcher's
                await anyio.sleep(0.01)
        assert [n.payload async for n in conn.notifies(timeout=0)] == ["kept"]
        heard = anyio.Event()
        conn.add_notify_handler(lambda _: heard.set())
        await other.execute("NOTIFY here, 'handled'")
        with anyio.fail_after(5):
            await heard.wait()


async def test_watching_gives_way_to_operations(pg_dsn: str) -> None:
    async with open_connection(pg_dsn) as conn:
        query = "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 1000)) TO STDOUT"
        async with conn.cursor().copy(query) as copy:
            count = 0
            while await copy.read():
                count += 1
                if count % 100 == 0:
                    await anyio.sleep(0.01)
        assert count == 1000
        async with conn.pipeline():
            cursor = await conn.execute("SELECT 1")
            await anyio.sleep(0.05)
            assert await cursor.fetchone() == (1,)
        async with conn.transaction():
            await anyio.sleep(0.05)
            assert await value(conn, "SELECT 2") == 2


async def test_a_callback_that_raises_while_watching(pg_dsn: str) -> None:
    # psycopg raises it in the operation that reads; here there is none but the block.
    with pytest.raises(ZeroDivisionError):
        async with open_connection(pg_dsn) as conn, open_connection(pg_dsn) as other:
            await conn.execute("LISTEN here")
            conn.add_notify_handler(lambda _: cast("None", 1 / 0))
            await other.execute("NOTIFY here")
            await anyio.sleep(20)


async def test_heartbeat(pg_dsn: str, fault_proxy: FaultProxy) -> None:
    async with open_connection(fault_proxy.dsn(pg_dsn), heartbeat=0.1, heartbeat_timeout=2) as conn:
        await anyio.sleep(0.25)
        assert await value(conn, "SELECT 1") == 1
        async with conn.transaction():
            await anyio.sleep(0.25)
        assert conn.state == "open"
        accepted = fault_proxy.accepted
        fault_proxy.freeze()
        with anyio.fail_after(10):
            await conn.wait_closed()
        assert conn.state is ConnectionState.FAILED
        assert "heartbeat" in str(conn.failure)
        # No cancel request was tried.
        assert fault_proxy.accepted == accepted
    fault_proxy.thaw()


async def test_an_answered_heartbeat_is_an_event(pg_dsn: str) -> None:
    events: list[Event] = []
    with instrumented(events.append):
        async with open_connection(pg_dsn, heartbeat=0.05) as conn:
            pid = conn.info.backend_pid
            with anyio.fail_after(10):
                while len(events) < 3:  # noqa: ASYNC110 - it tells no task
                    await anyio.sleep(0.01)
    _, *beats = events
    assert {beat.name for beat in beats} == {"driver.heartbeat"}
    assert {beat.facts["backend_pid"] for beat in beats} == {pid}
    assert all(isinstance(beat.facts["took"], float) for beat in beats)


async def test_a_heartbeat_of_a_lost_session(pg_dsn: str, fault_proxy: FaultProxy) -> None:
    dsn = fault_proxy.dsn(pg_dsn)
    async with open_connection(dsn, heartbeat=0.1, heartbeat_timeout=60) as conn:
        fault_proxy.freeze()
        await anyio.sleep(0.2)
        fault_proxy.reset()
        with anyio.fail_after(20):
            await conn.wait_closed()
        assert conn.state is ConnectionState.FAILED
    fault_proxy.thaw()


async def test_leaving_in_the_middle_of_a_heartbeat(pg_dsn: str, fault_proxy: FaultProxy) -> None:
    with anyio.fail_after(20):
        async with open_connection(
            fault_proxy.dsn(pg_dsn), heartbeat=0.1, heartbeat_timeout=60, close_timeout=0.1
        ) as conn:
            fault_proxy.freeze()
            await anyio.sleep(0.2)
    assert conn.state is ConnectionState.CLOSED
    fault_proxy.thaw()


async def test_an_operation_waits_for_a_heartbeat(pg_dsn: str, fault_proxy: FaultProxy) -> None:
    async with open_connection(fault_proxy.dsn(pg_dsn), heartbeat=0.1) as conn:
        fault_proxy.freeze("down")
        await anyio.sleep(0.2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(value, conn, "SELECT 1")
            await anyio.sleep(0.05)
            fault_proxy.thaw()


async def test_a_blocked_loop_is_no_silence(pg_dsn) -> None:
    """The heartbeat's answer has come; only nobody was there to read it in time."""
    for _ in range(3):
        async with open_connection(pg_dsn, heartbeat=0.05, heartbeat_timeout=0.4) as conn:
            with anyio.fail_after(20):
                while conn.pgconn.transaction_status != TransactionStatus.ACTIVE:
                    await anyio.lowlevel.checkpoint()
            time.sleep(0.8)
            await conn.execute("SELECT 1")
            assert conn.state is ConnectionState.OPEN
