"""A publisher while everything breaks: at least once, in order, or told."""

from __future__ import annotations

from functools import partial

import anyio
import psycopg
import pytest

from pgstructured import notify
from pgstructured.errors import UndeliveredError

open_publisher = partial(notify.open_publisher, flush_timeout=20)  # for a busy machine
NAME = "pgstructured/publisher"
PIDS = (
    "SELECT pid FROM pg_stat_activity"
    " WHERE application_name = %s AND datname = current_database() AND state IS NOT NULL"
)
KILL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = %s AND datname = current_database()"
)


def first_time(payloads):
    """Return payloads without those that came before."""
    return list(dict.fromkeys(payloads))


def publisher_events(events):
    return [name for name, _ in events if name.startswith("publisher.")]


@pytest.fixture
def refusing(kit):
    """Have the server refuse where a condition of ``$2``, the payload, holds."""

    # A function that is built in can't be replaced, but it can be put aside.
    kit.execute("ALTER FUNCTION pg_catalog.pg_notify(text, text) RENAME TO built_in_notify")

    def refuse(condition, sqlstate):
        kit.conn.execute(
            "CREATE OR REPLACE FUNCTION pg_catalog.pg_notify(text, text) RETURNS void"
            f" LANGUAGE plpgsql AS $$ BEGIN IF {condition} THEN"
            f" RAISE 'refused' USING ERRCODE = '{sqlstate}'; END IF;"
            " PERFORM built_in_notify($1, $2); END $$"
        )

    return refuse


# ---------------------------------------------------------------- sessions that are lost


async def test_killed_all_the_time(kit, heard) -> None:
    """Kill its session all the time: nothing is missing, and what comes again comes in order."""
    count = 400
    async with open_publisher(kit.dsn, interval=0.005, max_batch=20) as publisher:

        async def publish(name: str) -> None:
            for index in range(count):
                await publisher.publish(name, str(index))
                await anyio.sleep(0.002)

        async def kill() -> None:
            while True:
                delivered = publisher.statistics().delivered
                await anyio.sleep(0.15)
                # Or nobody gets on where connecting takes longer.
                await kit.eventually(lambda: publisher.statistics().delivered > delivered)  # noqa: B023 - awaited
                kit.execute(KILL, (NAME,))

        async with anyio.create_task_group() as killing:
            killing.start_soon(kill)
            with anyio.fail_after(40):
                async with anyio.create_task_group() as tasks:
                    for name in "ab":
                        tasks.start_soon(publish, name)
            killing.cancel_scope.cancel()
        with anyio.fail_after(30):
            await publisher.flush()
        assert publisher.statistics().delivered == 2 * count
    told = heard()
    for name in "ab":
        payloads = [payload for channel, payload in told if channel == name]
        assert first_time(payloads) == [str(index) for index in range(count)]


@pytest.mark.parametrize("fault", ["reset", "fin"])
async def test_the_answer_is_lost(kit, heard, fault_proxy, fault) -> None:
    """The server has taken the batch and we can't know: it comes twice, in order."""
    with kit.events() as events:
        async with open_publisher(
            fault_proxy.dsn(kit.dsn), interval=0, flush_timeout=20
        ) as publisher:
            await publisher.publish("a", "0")
            await publisher.flush()
            fault_proxy.freeze("down")
            for payload in "12":
                publisher.publish_nowait("a", payload)
            await kit.eventually(lambda: publisher.statistics().in_flight == 2)
            await kit.eventually(lambda: len(heard.so_far()) == 3)
            publisher.publish_nowait("a", "3")
            getattr(fault_proxy, fault)()
            fault_proxy.thaw()
            await publisher.flush()
            figures = publisher.statistics()
            assert (figures.delivered, figures.retries) == (4, 1)
            assert isinstance(figures.last_error, psycopg.OperationalError)
    assert [payload for _, payload in heard()] == ["0", "1", "2", "1", "2", "3"]
    told = publisher_events(events)
    assert told[:2] == ["publisher.sent", "publisher.retried"]
    assert set(told[2:]) == {"publisher.sent"}
    ((_, facts),) = (event for event in events if event[0] == "publisher.retried")
    assert facts["count"] == 2


async def test_an_idle_session_that_is_killed_is_replaced_at_once(kit, heard) -> None:
    async with open_publisher(kit.dsn) as publisher:
        await publisher.publish("a", "1")
        await publisher.flush()
        ((pid,),) = kit.execute(PIDS, (NAME,))
        kit.execute(KILL, (NAME,))
        await kit.eventually(lambda: kit.execute(PIDS, (NAME,)) not in ([], [(pid,)]))
        await publisher.publish("a", "2")
        await publisher.flush()
        assert publisher.statistics().retries == 0
        assert isinstance(publisher.statistics().last_error, psycopg.errors.AdminShutdown)
    assert heard() == [("a", "1"), ("a", "2")]


async def test_a_restart(pg_cluster_private, kit) -> None:
    """Published before, during and after: all delivered."""
    dsn = pg_cluster_private.dsn()
    delivered = []
    async with open_publisher(dsn, interval=0) as publisher:
        for turn in range(3):
            for index in range(5):
                await publisher.publish("a", f"{turn}.{index}")
            if turn == 1:
                pg_cluster_private.stop("immediate")
                for index in range(5, 8):
                    await publisher.publish("a", f"{turn}.{index}")
                await kit.eventually(lambda: publisher.statistics().last_error is not None)
                pg_cluster_private.start()
            with anyio.fail_after(30):
                await publisher.flush()
            delivered.append(publisher.statistics().delivered)
    assert delivered == [5, 13, 18]


async def test_a_frozen_server_is_left_in_time(kit, fault_proxy) -> None:
    with kit.events() as events, anyio.fail_after(10):
        with pytest.raises(UndeliveredError) as caught:
            async with open_publisher(
                fault_proxy.dsn(kit.dsn), interval=0, flush_timeout=0.2
            ) as publisher:
                await publisher.publish("a", "1")
                await publisher.flush()
                fault_proxy.freeze()
                await publisher.publish("a", "2")
                await kit.eventually(lambda: publisher.statistics().in_flight == 1)
                await publisher.publish("a", "3")
    assert caught.value.count == 2
    assert publisher_events(events) == ["publisher.sent", "publisher.undelivered"]
    fault_proxy.reset()


async def test_a_frozen_server_while_connecting(kit, fault_proxy) -> None:
    fault_proxy.freeze()
    with anyio.fail_after(10), pytest.raises(UndeliveredError) as caught:
        async with open_publisher(fault_proxy.dsn(kit.dsn), flush_timeout=0.2) as publisher:
            await publisher.publish("a", "1")
    assert caught.value.count == 1
    fault_proxy.reset()


async def test_a_silent_network_is_found(kit, heard, fault_proxy, monkeypatch) -> None:
    monkeypatch.setattr("pgstructured.notify._publisher_carriers._HEARTBEAT", 0.1)
    monkeypatch.setattr("pgstructured.notify._publisher_carriers._HEARTBEAT_TIMEOUT", 1.0)
    async with open_publisher(fault_proxy.dsn(kit.dsn), interval=0) as publisher:
        await publisher.publish("a", "1")
        await publisher.flush()
        fault_proxy.freeze()
        await publisher.publish("a", "2")
        await kit.eventually(lambda: publisher.statistics().retries > 0)
        fault_proxy.thaw()
        await publisher.flush()
    assert first_time(heard()) == [("a", "1"), ("a", "2")]


# ---------------------------------------------------------------- what the server says


async def test_no_such_database(pg_cluster) -> None:
    """It cancels the block and comes out as the server has said it."""
    reached = False
    with anyio.fail_after(20), pytest.raises(psycopg.OperationalError, match="nowhere") as caught:
        async with open_publisher(pg_cluster.dsn("nowhere")):
            await anyio.sleep(15)
            reached = True
    assert caught.value.sqlstate == "3D000"
    assert not reached


async def test_a_refusal_of_everything(kit, heard, refusing) -> None:
    """It is not asked for ever; who uses it later is told why."""
    refusing("$2 = '2'", "42501")
    told: list[BaseException | None] = []
    with kit.events() as events, anyio.fail_after(20):
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
            async with open_publisher(kit.dsn, interval=0) as publisher:
                await publisher.publish("a", "1")
                await publisher.flush()
                publisher.publish_nowait("a", "2")
                publisher.publish_nowait("a", "3")
                try:
                    await anyio.sleep(15)
                finally:
                    for call in (lambda: publisher.publish("a"), publisher.flush):
                        with pytest.raises(anyio.BrokenResourceError) as broken:
                            await call()
                        told.append(broken.value.__cause__)
                    # Met in the block as well, it still comes out once, and as itself.
                    publisher.publish_nowait("a")
    assert told == [caught.value, caught.value]
    assert heard() == [("a", "1")]
    assert publisher_events(events) == ["publisher.sent", "publisher.undelivered"]
    assert events[-1][1] == {"count": 2, "error": caught.value}


async def test_a_refusal_of_everything_while_leaving(kit, refusing) -> None:
    refusing("true", "42501")
    with anyio.fail_after(20), pytest.raises(UndeliveredError, match="refused") as caught:
        async with open_publisher(kit.dsn, interval=30) as publisher:
            publisher.publish_nowait("a", "1")
            publisher.publish_nowait("a", "2")
    assert caught.value.count == 2
    assert isinstance(caught.value.__cause__, psycopg.errors.InsufficientPrivilege)


async def test_a_flush_in_another_task_is_told_of_the_end(kit, refusing) -> None:
    refusing("true", "42501")

    async def flush() -> None:
        with pytest.raises(anyio.BrokenResourceError):
            await publisher.flush()

    async with anyio.create_task_group() as tasks:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            async with open_publisher(kit.dsn, interval=30) as publisher:
                publisher.publish_nowait("a", "1")
                tasks.start_soon(flush)
                await anyio.sleep(15)


async def test_a_broken_stream_of_the_bodys_own_is_its_own(kit) -> None:
    with pytest.raises(anyio.BrokenResourceError, match="another"):
        async with open_publisher(kit.dsn):
            raise anyio.BrokenResourceError("another")


async def test_a_notification_that_the_server_will_never_take(kit, heard, refusing) -> None:
    """As one whose characters its encoding lacks: told, left out, and the others arrive."""
    refusing("$2 LIKE 'bad%'", "22P05")
    payloads = [f"bad {index}" if index in {0, 7, 8, 29} else str(index) for index in range(30)]
    with kit.events() as events, anyio.fail_after(20):
        with pytest.raises(UndeliveredError, match="refused") as caught:
            async with open_publisher(kit.dsn, interval=30) as publisher:
                for payload in payloads:
                    publisher.publish_nowait("a", payload)
                with pytest.raises(UndeliveredError, match="refused") as flushed:
                    await publisher.flush()
                publisher.publish_nowait("a", "after it")
                await publisher.flush()
                figures = publisher.statistics()
                assert (figures.refused, figures.delivered, figures.retries) == (4, 27, 0)
    assert flushed.value.count == caught.value.count == 4
    assert isinstance(caught.value.__cause__, psycopg.errors.UntranslatableCharacter)
    good = [payload for payload in payloads if not payload.startswith("bad")]
    assert heard() == [("a", payload) for payload in (*good, "after it")]
    refused = [facts for name, facts in events if name == "publisher.refused"]
    assert [facts["channel"] for facts in refused] == ["a"] * 4


async def test_a_database_that_lacks_characters(kit) -> None:
    database = f"latin_{kit.conn.info.backend_pid}"
    kit.execute(
        f"CREATE DATABASE {database} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
        " TEMPLATE template0"
    )
    dsn = psycopg.conninfo.make_conninfo(kit.dsn, dbname=database)
    try:
        with pytest.raises(UndeliveredError) as caught, anyio.fail_after(20):
            async with open_publisher(dsn) as publisher:
                for payload in ("é", "€", "x"):
                    publisher.publish_nowait("a", payload)
        assert caught.value.count == 1
        assert publisher.statistics().delivered == 2
    finally:
        kit.execute(f"DROP DATABASE {database} WITH (FORCE)")


@pytest.mark.parametrize("when", ["at once", "at the commit"])
async def test_a_refusal_for_the_moment(when, kit, heard, refusing) -> None:
    """As a full queue of the server, which is found at the commit: the same batch again, later."""
    refusing("$2 = '2'" if when == "at once" else "false", "54000")
    if when == "at the commit":
        kit.execute(
            "CREATE TABLE refused (payload text);"
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE 'refused' USING ERRCODE = '54000'; END $$;"
            "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON refused"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse();"
            "CREATE OR REPLACE FUNCTION pg_catalog.pg_notify(text, text) RETURNS void"
            " LANGUAGE plpgsql AS $$ BEGIN PERFORM built_in_notify($1, $2);"
            " INSERT INTO refused SELECT $2 WHERE $2 = '2'; END $$"
        )
    with anyio.fail_after(20):
        async with open_publisher(kit.dsn, interval=0) as publisher:
            await publisher.publish("a", "1")
            await publisher.flush()
            publisher.publish_nowait("a", "2")
            await kit.eventually(lambda: publisher.statistics().retries > 1)
            assert publisher.statistics().delivered == 1
            publisher.publish_nowait("a", "3")
            refusing("false", "54000")
    assert heard() == [("a", "1"), ("a", "2"), ("a", "3")]
