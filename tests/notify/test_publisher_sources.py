"""Where a publisher may send: a session of its own, a connection, a pool, behind a pooler."""

from __future__ import annotations

from functools import partial

import anyio
import psycopg
import pytest

from pgstructured import connect, notify
from pgstructured.errors import (
    ConnectionLostError,
    ConninfoError,
    NotPrimaryError,
    PoolClosedError,
    PoolTimeoutError,
    UndeliveredError,
)
from pgstructured.pool import open_pool

open_publisher = partial(notify.open_publisher, flush_timeout=20)  # for a busy machine
REFUSED = "host=127.0.0.1 port=1"

# ---------------------------------------------------------------- conninfo


async def test_from_the_environment(kit, heard, monkeypatch) -> None:
    monkeypatch.setenv("PGSTRUCTURED_TEST", kit.dsn)
    async with open_publisher("env:PGSTRUCTURED_TEST") as publisher:
        await publisher.publish("a", "x")
    assert heard() == [("a", "x")]


async def test_a_callable_is_asked_at_each_attempt(kit, heard) -> None:
    """What it raises is a failed attempt; where it leads may change."""
    answers = [OSError("no token"), ConninfoError("no host"), RuntimeError("its own")]
    asked = 0

    async def conninfo() -> str:
        nonlocal asked
        asked += 1
        await anyio.lowlevel.checkpoint()
        if asked <= len(answers):
            raise answers[asked - 1]
        return REFUSED if asked == len(answers) + 1 else kit.dsn

    async with open_publisher(conninfo) as publisher:
        await publisher.publish("a", "x")
        await publisher.flush()
    assert asked == len(answers) + 2
    assert heard() == [("a", "x")]


async def test_a_callable_that_hangs(kit, heard, monkeypatch) -> None:
    monkeypatch.setattr("pgstructured.notify._publisher_carriers._CONNECT_TIMEOUT", 0.5)
    asked = 0

    async def conninfo() -> str:
        nonlocal asked
        asked += 1
        if asked == 1:
            await anyio.sleep_forever()
        return str(kit.dsn)

    async with open_publisher(conninfo) as publisher:
        await publisher.publish("a", "x")
        await publisher.flush()
        error = publisher.statistics().last_error
    assert isinstance(error, psycopg.errors.ConnectionTimeout)
    assert heard() == [("a", "x")]


async def test_the_primary_of_several_hosts(kit, heard, pg_cluster_private) -> None:
    primary = psycopg.conninfo.conninfo_to_dict(pg_cluster_private.dsn())
    with pg_cluster_private.standby() as standby:
        conninfo = psycopg.conninfo.make_conninfo(
            pg_cluster_private.dsn(),
            host="127.0.0.1,127.0.0.1",
            port=f"{standby.port},{primary['port']}",
        )
        async with open_publisher(conninfo) as publisher:
            await publisher.publish("a", "x")
            await publisher.flush()
        alone = standby.dsn()
        with pytest.raises(UndeliveredError) as caught, anyio.fail_after(10):
            async with open_publisher(alone, flush_timeout=0) as publisher:
                await publisher.publish("a", "x")  # it might be promoted: tried again
                await kit.eventually(lambda: publisher.statistics().retries > 0)
        # Without a choice of hosts the standby itself says so.
        assert isinstance(caught.value.__cause__, psycopg.errors.ReadOnlySqlTransaction)
        with pytest.raises(UndeliveredError) as caught, anyio.fail_after(10):
            async with open_publisher(
                f"{alone}?target_session_attrs=primary", flush_timeout=0
            ) as publisher:
                await publisher.publish("a", "x")
                await kit.eventually(lambda: publisher.statistics().last_error is not None)
        assert isinstance(caught.value.__cause__, NotPrimaryError)


async def test_behind_a_transaction_pooler(kit, heard, pgbouncer_transaction) -> None:
    async with open_publisher(
        pgbouncer_transaction.dsn(kit.dsn), interval=0, max_batch=7
    ) as publisher:
        for index in range(50):
            await publisher.publish("a", str(index))
    assert heard() == [("a", str(index)) for index in range(50)]


async def test_behind_a_transaction_pooler_on_a_connection(
    kit, heard, pgbouncer_transaction
) -> None:
    async with (
        await connect(pgbouncer_transaction.dsn(kit.dsn)) as connection,
        open_publisher(connection, interval=0, max_batch=7) as publisher,
    ):
        for index in range(50):
            await publisher.publish("a", str(index))
    assert heard() == [("a", str(index)) for index in range(50)]


# ---------------------------------------------------------------- a connection


@pytest.mark.parametrize("autocommit", [True, False])
async def test_a_connection(kit, heard, autocommit) -> None:
    async with (
        await connect(kit.dsn, autocommit=autocommit) as connection,
        open_publisher(connection, interval=0) as publisher,
    ):
        for payload in ("1", "'\\é😀\"", ""):
            await publisher.publish("a", payload)
            await publisher.flush()
            assert connection.info.transaction_status.name == "IDLE"
    assert heard() == [("a", "1"), ("a", "'\\é😀\""), ("a", "")]


async def test_a_connection_with_settings_of_its_own(kit, heard) -> None:
    async with await connect(kit.dsn) as connection:
        await connection.execute("SET client_encoding = 'LATIN1'")
        await connection.execute("SET standard_conforming_strings = off")
        async with open_publisher(connection) as publisher:
            await publisher.publish("a", "'\\é€😀\"")
            await publisher.flush()
    assert heard() == [("a", "'\\é€😀\"")]


@pytest.mark.parametrize("database_in", ["SQL_ASCII", "EUC_JP"], indirect=True)
async def test_a_connection_to_a_database_of_another_encoding(kit, database_in) -> None:
    """SQL_ASCII knows no characters, so there the bytes are escaped."""
    async with (
        await connect(database_in) as connection,
        notify.open_notify_bus(database_in) as bus,
        bus.subscribe("あ") as subscription,
        open_publisher(connection) as publisher,
    ):
        await publisher.publish("あ", "'\\あ\"")
        await publisher.flush()
        assert await kit.take(subscription, 1) == ["'\\あ\""]


async def test_a_connection_in_a_transaction(kit, heard) -> None:
    """The batch waits for its end: a rollback would take it along."""
    async with (
        await connect(kit.dsn) as connection,
        open_publisher(connection, interval=0) as publisher,
    ):
        with pytest.raises(ZeroDivisionError):
            async with connection.transaction():
                await connection.execute("SELECT 1")
                await publisher.publish("a", "1")
                await anyio.sleep(0.1)
                assert publisher.statistics().delivered == 0
                raise ZeroDivisionError
        await publisher.flush()
        async with connection.pipeline():
            await publisher.publish("a", "2")
            await anyio.sleep(0.1)
            assert publisher.statistics().delivered == 1
        await publisher.flush()
        async with connection.transaction():
            connection.after_commit(lambda: publisher.publish_nowait("a", "3"))
    assert heard() == [("a", "1"), ("a", "2"), ("a", "3")]


async def test_a_connection_that_copies(kit, heard) -> None:
    async with (
        await connect(kit.dsn) as connection,
        open_publisher(connection, interval=0) as publisher,
    ):
        async with (
            connection.cursor() as cursor,
            cursor.copy("COPY (SELECT generate_series(1, 5)) TO STDOUT") as copy,
        ):
            await publisher.publish("a", "1")
            await anyio.sleep(0.1)
            assert publisher.statistics().delivered == 0
            assert [bytes(data) async for data in copy]
        await publisher.flush()
    assert heard() == [("a", "1")]


async def test_a_connection_with_a_stream(kit, heard) -> None:
    async with (
        await connect(kit.dsn) as connection,
        open_publisher(connection, interval=0) as publisher,
    ):
        async with connection.stream("SELECT generate_series(1, 5)") as rows:
            await publisher.publish("a", "1")
            await anyio.sleep(0.1)
            assert publisher.statistics().delivered == 0
            assert [number async for (number,) in rows] == [1, 2, 3, 4, 5]
        await publisher.flush()
    assert heard() == [("a", "1")]


async def test_others_use_the_connection_at_the_same_time(kit, heard) -> None:
    async with (
        await connect(kit.dsn) as connection,
        open_publisher(connection, interval=0) as publisher,
    ):
        for index in range(100):
            await publisher.publish("a", str(index))
            cursor = await connection.execute("SELECT %s::int", [index])
            assert await cursor.fetchone() == (index,)
    assert heard() == [("a", str(index)) for index in range(100)]


async def test_leaving_in_a_transaction_that_goes_on(kit, heard) -> None:
    async with await connect(kit.dsn) as connection, connection.transaction():
        await connection.execute("SELECT 1")
        with pytest.raises(UndeliveredError) as caught:
            async with open_publisher(connection, flush_timeout=0.1) as publisher:
                await publisher.publish("a", "x")
    assert caught.value.count == 1
    assert heard() == []


async def test_a_connection_that_is_killed(kit) -> None:
    """There is no other one: the publisher ends, and says why."""
    with anyio.fail_after(10):
        async with await connect(kit.dsn) as connection:
            with pytest.raises(psycopg.OperationalError) as caught:
                async with open_publisher(connection, interval=0) as publisher:
                    kit.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])
                    await publisher.publish("a", "x")
                    await anyio.sleep(5)
            assert connection.failure is not None
            assert caught.value.sqlstate in {"57P01", ConnectionLostError.sqlstate}


@pytest.mark.parametrize("lost", [True, False])
async def test_a_connection_that_has_ended_before(kit, lost) -> None:
    async with await connect(kit.dsn) as connection:
        if lost:
            kit.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])
            with pytest.raises(psycopg.OperationalError):
                await connection.execute("SELECT 1")
        else:
            await connection.aclose()
        async with open_publisher(connection):
            pass
        with anyio.fail_after(10), pytest.raises(psycopg.OperationalError, match="is closed"):
            async with open_publisher(connection, interval=0) as publisher:
                await publisher.publish("a", "x")
                await anyio.sleep(5)


async def test_a_connection_whose_server_is_frozen(kit, fault_proxy) -> None:
    async with await connect(fault_proxy.dsn(kit.dsn), cancel_timeout=0.2) as connection:
        with anyio.fail_after(10), pytest.raises(UndeliveredError) as caught:
            async with open_publisher(connection, interval=0, flush_timeout=0.2) as publisher:
                fault_proxy.freeze()
                await publisher.publish("a", "x")
        assert caught.value.count == 1
        assert connection.failure is not None  # its outcome can't be known
    fault_proxy.reset()


async def test_a_statement_that_the_server_refuses_for_the_moment(kit, heard) -> None:
    """On a connection that is still there the batch is sent again."""
    async with await connect(kit.dsn) as connection:
        await connection.execute("SET statement_timeout = 300")
        async with open_publisher(connection, interval=0) as publisher:
            kit.conn.execute("ALTER FUNCTION pg_notify(text, text) RENAME TO built_in_notify")
            kit.conn.execute(
                "CREATE FUNCTION pg_catalog.pg_notify(text, text) RETURNS void LANGUAGE plpgsql"
                " AS 'BEGIN PERFORM pg_sleep(1); PERFORM built_in_notify($1, $2); END'"
            )
            await publisher.publish("a", "x")
            await kit.eventually(lambda: publisher.statistics().retries > 0)
            assert isinstance(publisher.statistics().last_error, psycopg.errors.QueryCanceled)
            await connection.execute("SET statement_timeout = 0")
            await publisher.flush()
    assert heard() == [("a", "x")]


# ---------------------------------------------------------------- a pool


async def test_a_pool(kit, heard) -> None:
    async with open_pool(kit.dsn, max_size=2) as pool:
        async with open_publisher(pool, interval=30, max_batch=4) as publisher:
            for index in range(10):
                await publisher.publish("a", str(index))
        figures = pool.statistics()
        assert (figures.acquired, figures.in_use) == (3, 0)
    assert heard() == [("a", str(index)) for index in range(10)]


async def test_a_pool_that_its_owner_uses_too(kit, heard) -> None:
    """What the owner has borrowed or pinned, and what it does there, is its own affair."""
    async with (
        open_pool(kit.dsn, max_size=2) as pool,
        pool.pin() as connection,
        connection.transaction(force_rollback=True),
        open_publisher(pool, interval=0) as publisher,
    ):
        await publisher.publish("a", "x")
        await publisher.flush()
    assert heard() == [("a", "x")]


async def test_a_pool_that_has_none_for_the_moment(kit, heard) -> None:
    async with (
        open_pool(kit.dsn, max_size=1, acquire_timeout=1) as pool,
        open_publisher(pool, interval=0) as publisher,
    ):
        async with pool.acquire():
            await publisher.publish("a", "x")
            await kit.eventually(lambda: publisher.statistics().retries > 0)
            assert isinstance(publisher.statistics().last_error, PoolTimeoutError)
        await publisher.flush()
    assert heard() == [("a", "x")]


async def test_a_pool_whose_connections_are_killed(kit, heard) -> None:
    async with (
        open_pool(kit.dsn, application_name="pooled") as pool,
        open_publisher(pool, interval=0) as publisher,
    ):
        for index in range(20):
            await publisher.publish("a", str(index))
            if index % 5 == 0:
                await publisher.flush()
                kit.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'pooled' AND datname = current_database()"
                )
    told = [payload for _, payload in heard()]
    assert list(dict.fromkeys(told)) == [str(index) for index in range(20)]


async def test_a_pool_behind_a_transaction_pooler(kit, heard, pgbouncer_transaction) -> None:
    async with (
        open_pool(pgbouncer_transaction.dsn(kit.dsn)) as pool,
        open_publisher(pool, interval=0) as publisher,
    ):
        for index in range(20):
            await publisher.publish("a", str(index))
    assert heard() == [("a", str(index)) for index in range(20)]


async def test_a_pool_that_is_closed(kit) -> None:
    async with open_pool(kit.dsn) as pool:
        pass
    with anyio.fail_after(10), pytest.raises(PoolClosedError):
        async with open_publisher(pool, interval=0) as publisher:
            await publisher.publish("a", "x")
            await anyio.sleep(5)
