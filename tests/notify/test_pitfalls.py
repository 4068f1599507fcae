"""What goes wrong with LISTEN and NOTIFY elsewhere, one test for each way.

The numbers are those of the survey that the bus was designed by:

==  ==========================================  =========================================
 1  the reply to LISTEN and a notification      test_pitfall_01
    in one piece
 2  state read beside a subscription            test_pitfall_02
 3  a notification before its row               test_pitfall_03
 4  the gap of a reconnect                      test_pitfall_04
 5  half-open TCP                               test_pitfall_05
 6  a heartbeat behind a flood                  test_pitfall_06
 7  one slow subscriber holds up all            test_pitfall_07
 8  what psycopg's ``notifies()`` can't do      test_pitfall_08, test_pitfall_08_idle
 9  a batch lost by a cancellation              test_pitfall_09
10  a connection shared with queries            test_pitfall_10
11  overflow that nobody can count              test_pitfall_11
12  unsubscribing during dispatch               test_pitfall_12
13  UNLISTEN overtakes LISTEN                   test_pitfall_13
14  cancelled during LISTEN                     test_pitfall_14
15  one of many LISTENs fails                   test_pitfall_15
16  names                                       test_pitfall_16
17  payloads                                    test_pitfall_17
18  equal notifications in one transaction      test_pitfall_18
19  order                                       test_pitfall_19
20  other databases, standbys                   test_pitfall_20, test_pitfall_20_standby
21  poolers                                     test_pitfall_21
22  LISTEN fails for a reason of the server's   test_pitfall_22
23  backoff that is no backoff                  test_pitfall_23
24  fork and threads                            does not apply: an event loop survives no fork
                                                either, and everything belongs to its loop
25  encodings                                   test_pitfall_25
==  ==========================================  =========================================
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from typing import Any

import anyio
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from pgstructured import Backoff
from pgstructured.driver import connect
from pgstructured.errors import (
    ChannelNameError,
    DeliveryError,
    ListenRejectedError,
    NotPrimaryError,
    PayloadTooLargeError,
)
from pgstructured.notify import BusState, Gap, Notification, notify, open_notify_bus


def payloads(items) -> list[str]:
    return [item.payload for item in items]


async def all_of(subscription, count) -> list[Any]:
    """Receive so many notifications, all that is there at a time."""
    items: list[Any] = []
    with anyio.fail_after(50):
        while len(items) < count:
            items += await subscription.receive_many()
    return items


async def test_pitfall_01_a_notification_in_one_piece_with_the_reply_to_listen(
    kit, fault_proxy
) -> None:
    # Nothing but LISTEN is to be answered meanwhile: no UNLISTEN.
    async with open_notify_bus(fault_proxy.dsn(kit.dsn), unlisten_linger=60) as bus:
        await bus.ping()  # behind the UNLISTEN of the probe
        async with anyio.create_task_group() as tg:

            async def subscribe() -> None:
                async with bus.subscribe("a") as subscription:
                    assert await kit.take(subscription, 1) == ["the very first"]

            fault_proxy.merge(b"the very first", "down")
            tg.start_soon(subscribe)
            await anyio.to_thread.run_sync(fault_proxy.wait_held)
            kit.notify("a", "the very first")


async def test_pitfall_02_entered_is_listening(kit) -> None:
    """Whatever is committed after the entry is in the stream, so what is read then is whole."""
    async with open_notify_bus(kit.dsn, unlisten_linger=0) as bus:
        for index in range(200):
            async with bus.subscribe(f"c{index % 7}") as subscription:
                kit.notify(f"c{index % 7}", str(index))
                assert await kit.take(subscription, 1) == [str(index)]


async def test_pitfall_03_the_row_is_there_when_its_notification_is(kit) -> None:
    kit.execute("CREATE TABLE rows (n int)")
    kit.execute(
        "CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_notify('rows', NEW.n::text); RETURN NULL; END $$"
    )
    kit.execute("CREATE TRIGGER t AFTER INSERT ON rows FOR EACH ROW EXECUTE FUNCTION tell()")
    async with (
        open_notify_bus(kit.dsn) as bus,
        bus.subscribe("rows") as subscription,
        await connect(kit.dsn) as conn,
        anyio.create_task_group() as tg,
    ):

        def write() -> None:
            for n in range(100):
                kit.execute("INSERT INTO rows VALUES (%s)", (n,))

        tg.start_soon(anyio.to_thread.run_sync, write)
        for n in range(100):
            assert await kit.take(subscription, 1) == [str(n)]
            cursor = await conn.execute("SELECT FROM rows WHERE n = %s", (n,))
            assert cursor.rowcount == 1


@pytest.mark.slow
async def test_pitfall_04_killed_every_150_ms_while_writers_write(kit) -> None:
    """A subscriber that reads anew at every gap misses nothing."""
    kit.execute("CREATE TABLE rows (n int PRIMARY KEY)")
    kit.execute(
        "CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_notify('rows', NEW.n::text); RETURN NULL; END $$"
    )
    kit.execute("CREATE TRIGGER t AFTER INSERT ON rows FOR EACH ROW EXECUTE FUNCTION tell()")
    stopped = anyio.Event()
    written: list[int] = []

    def write(first: int) -> None:
        with psycopg.connect(kit.dsn, autocommit=True) as conn:
            for n in range(first, 1_000_000, 3):
                if stopped.is_set():
                    return
                conn.execute("INSERT INTO rows VALUES (%s)", (n,))
                written.append(n)
                time.sleep(0.004)  # as fast as they can, they would leave the reader no time

    def read() -> set[int]:
        with psycopg.connect(kit.dsn) as conn:
            return {n for (n,) in conn.execute("SELECT n FROM rows").fetchall()}

    async with (
        open_notify_bus(kit.dsn, backoff=kit.quick) as bus,
        bus.subscribe("rows", initial_gap=True) as subscription,
    ):
        seen: set[int] = set()
        gaps = 0
        async with anyio.create_task_group() as tg:

            async def write_and_tell(first: int) -> None:
                await anyio.to_thread.run_sync(write, first)
                kit.notify("rows", "end")

            async def kill() -> None:
                for _ in range(12):
                    await anyio.sleep(0.15)
                    await bus.wait_live()
                    kit.kill(bus)
                await bus.wait_generation(12)
                stopped.set()

            for first in range(3):
                tg.start_soon(write_and_tell, first)
            tg.start_soon(kill)
            try:
                with anyio.fail_after(50):
                    while not (stopped.is_set() and seen.issuperset(written)):
                        item = await subscription.receive()
                        if isinstance(item, Gap):
                            gaps += 1
                            seen |= await anyio.to_thread.run_sync(read)
                        elif item.payload != "end":
                            seen.add(int(item.payload))
            finally:  # the threads would go on for ever
                stopped.set()
        assert bus.generation == 13
        assert gaps > 1
        assert len(written) > 50


async def test_pitfall_05_a_peer_that_is_gone_without_a_word(kit, fault_proxy) -> None:
    """TCP keeps acknowledging: the heartbeat finds out, and nobody waits for a goodbye."""
    with kit.events() as events:
        async with open_notify_bus(
            fault_proxy.dsn(kit.dsn),
            heartbeat=0.1,
            heartbeat_timeout=1.0,
            connect_timeout=0.5,
            backoff=kit.quick,
        ) as bus:
            async with bus.subscribe("a"):
                fault_proxy.freeze()
                await kit.eventually(lambda: bus.state is BusState.DOWN)
            with anyio.fail_after(10):
                await kit.eventually(lambda: bus.statistics().attempts > 1)
        assert bus.state is BusState.CLOSED  # though the server still is silent
    [lost] = [facts for name, facts in events if name == "bus.lost"]
    assert "silent" in str(lost["error"])


async def test_pitfall_06_a_heartbeat_behind_a_flood(kit) -> None:
    kit.execute("SET work_mem = '256MB'")
    async with open_notify_bus(kit.dsn, heartbeat=0.05, heartbeat_timeout=2.0) as bus:
        async with bus.subscribe("a", buffer=100_000) as subscription:
            async with anyio.create_task_group() as tg:
                tg.start_soon(
                    anyio.to_thread.run_sync,
                    kit.execute,
                    "SELECT count(pg_notify('a', i::text)) FROM generate_series(1, 100000) i",
                )
                items = await all_of(subscription, 100_000)
            assert payloads(items) == [str(i) for i in range(1, 100_001)]
            assert bus.generation == 1


@pytest.mark.slow
async def test_pitfall_07_a_subscriber_that_never_receives(kit) -> None:
    async with (
        open_notify_bus(kit.dsn) as bus,
        bus.subscribe("a") as stuck,
        bus.subscribe("a", buffer=30_000, gaps="raise") as other,
    ):
        await bus.ping()
        tracemalloc.start()
        try:
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(5):
                kit.execute(
                    "SELECT count(pg_notify('a', i::text)) FROM generate_series(1, 20000) i"
                )
                assert len(await all_of(other, 20_000)) == 20_000
                assert kit.execute("SELECT pg_notification_queue_usage()") == [(0.0,)]
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 1_000_000  # of 100,000 notifications
        figures = stuck.statistics()
        assert (figures.depth, figures.lost) == (256, 100_000 - 256)
        gap = await stuck.receive()
        assert gap == Gap(reason="lagged", generation=1, lost=100_000 - 256)


async def test_pitfall_08_leaving_the_loop_and_working_beside_it(kit) -> None:
    """A `break` loses nothing, and LISTEN and round trips go on beside a waiting receiver."""
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        kit.notify("a", *map(str, range(100)))
        async for item in subscription:
            assert isinstance(item, Notification)
            break
        assert await kit.take(subscription, 99) == [str(i) for i in range(1, 100)]
        async with anyio.create_task_group() as tg:
            tg.start_soon(kit.take, subscription, 1)
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(20):
                assert await bus.ping() > 0
                async with bus.subscribe("b") as other:
                    kit.notify("b", "meanwhile")
                    assert await kit.take(other, 1) == ["meanwhile"]
            kit.notify("a", "the end")


async def test_pitfall_08_idle_nothing_wakes_but_the_heartbeat(kit, monkeypatch) -> None:
    async with open_notify_bus(kit.dsn, heartbeat=0.2) as bus, bus.subscribe("a") as subscription:
        await bus.ping()
        reads = 0
        session: Any = bus._link.session
        session = session._wire
        dispatch = session._dispatch

        def count() -> None:
            nonlocal reads
            reads += 1
            dispatch()

        monkeypatch.setattr(session, "_dispatch", count)
        async with anyio.create_task_group() as tg:
            tg.start_soon(kit.take, subscription, 1)
            began = anyio.current_time()
            await kit.eventually(lambda: reads >= 4)
            assert reads <= (anyio.current_time() - began) / 0.2 + 1
            kit.notify("a", "x")


async def test_pitfall_09_cancelled_in_the_body_of_the_loop(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        kit.notify("a", *map(str, range(100)))
        with anyio.CancelScope() as scope:
            async for _ in subscription:
                scope.cancel()
                await anyio.sleep_forever()
        assert await kit.take(subscription, 99) == [str(i) for i in range(1, 100)]


async def test_pitfall_10_the_session_is_the_buss_alone(kit) -> None:
    """It never is in a transaction, where nothing would arrive and the queue could not shrink."""
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        async with await connect(kit.dsn) as conn, conn.transaction():
            await conn.execute("SELECT 1")  # a transaction of somebody else is nobody's business
            kit.notify("a", "1")
            assert await kit.take(subscription, 1) == ["1"]
            await bus.ping()
            found = kit.execute(
                "SELECT state, xact_start FROM pg_stat_activity WHERE pid = %s", (bus.backend_pid,)
            )
            assert found == [("idle", None)]


@pytest.mark.slow
async def test_pitfall_10_no_idle_timeout_of_the_server_ends_it(kit) -> None:
    name = kit.execute("SELECT current_database()")[0][0]
    kit.execute(f'ALTER DATABASE "{name}" SET idle_session_timeout = 500')
    async with open_notify_bus(kit.dsn, heartbeat=None) as bus, bus.subscribe("a") as subscription:
        await anyio.sleep(1.0)
        kit.notify("a", "x")
        assert await kit.take(subscription, 1) == ["x"]
        assert bus.generation == 1


plans = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 40), st.booleans()), min_size=1, max_size=12
)


@given(
    plan=plans,
    buffer=st.integers(1, 30),
    overflow=st.sampled_from(["drop_oldest", "drop_newest", "latest"]),
)
@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # each example takes a server's time
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_pitfall_11_received_and_lost_are_what_was_published(
    kit, plan, buffer, overflow
) -> None:
    """At any speeds, through a real server: exactly, and each count where the loss was."""
    async with (
        open_notify_bus(kit.dsn, verify_delivery=False) as bus,
        bus.subscribe("a", buffer=buffer, overflow=overflow) as subscription,
    ):
        published = received = told = 0
        last = -1
        gap = 0

        def look(item) -> None:
            nonlocal received, told, last, gap
            if isinstance(item, Gap):
                assert item.lost is not None
                told += item.lost
                gap += item.lost
            else:
                if overflow != "latest":
                    assert int(item.payload) - last - 1 == gap
                received, last, gap = received + 1, int(item.payload), 0

        for count, takes, many in plan:
            kit.notify("a", *(str(published + i) for i in range(count)))
            published += count
            await kit.eventually(lambda: bus.statistics().received == published, every=0.001)  # noqa: B023 - awaited
            if many and takes:
                if subscription.statistics().depth:
                    for item in await subscription.receive_many(takes):
                        look(item)
            else:
                for _ in range(min(takes, subscription.statistics().depth)):
                    look(await subscription.receive())
        with pytest.raises(anyio.WouldBlock):
            while True:
                look(subscription.receive_nowait())
        figures = subscription.statistics()
        assert figures.depth == 0
        assert received == figures.received
        assert received + figures.lost == published
        assert told == (0 if overflow == "latest" else figures.lost)


async def test_pitfall_12_unsubscribing_another_while_notifications_are_handed_out(kit) -> None:
    async with open_notify_bus(kit.dsn, unlisten_linger=0) as bus:
        scopes: list[anyio.CancelScope] = []
        survived: list[int] = []
        rng = random.Random(5)

        async def subscriber(index: int, *, task_status) -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                async with bus.subscribe("a") as subscription:
                    task_status.started()
                    async for _ in subscription:
                        rng.choice(scopes).cancel()
                        if rng.random() < 0.2:
                            break
            survived.append(index)

        async with anyio.create_task_group() as tg:
            for index in range(50):
                await tg.start(subscriber, index)
            while bus.statistics().subscribers:
                kit.notify("a", "1", "2")
                await anyio.sleep(0.005)
        assert len(survived) == 50
        await kit.eventually(lambda: not bus.channels)
        assert bus.generation == 1


async def test_pitfall_13_unlisten_overtakes_no_listen(kit) -> None:
    """Who has entered hears, however many leave the same channel at that moment."""
    rng = random.Random(9)
    async with open_notify_bus(kit.dsn, unlisten_linger=0) as bus:

        async def come_and_go(index: int) -> None:
            channel = f"c{index % 5}"
            for _ in range(10):
                await anyio.sleep(rng.random() * 0.004)
                async with bus.subscribe(channel) as subscription:
                    kit.notify(channel, f"{index}")
                    with anyio.fail_after(20):
                        while (await subscription.receive()).payload != f"{index}":  # type: ignore[union-attr]
                            pass

        async with anyio.create_task_group() as tg:
            for index in range(20):
                tg.start_soon(come_and_go, index)
        await kit.eventually(lambda: not bus.channels)
        assert await kit.listening(bus) == set()


async def test_pitfall_14_cancelled_during_listen(kit, fault_proxy) -> None:
    """Who waits leaves at once; the session stays, and the answer is reaped."""
    async with open_notify_bus(fault_proxy.dsn(kit.dsn), unlisten_linger=0) as bus:
        pid = bus.backend_pid
        fault_proxy.freeze("down")
        with anyio.move_on_after(0.05) as scope:
            async with bus.subscribe("a"):
                pytest.fail("entered")
        assert scope.cancelled_caught
        assert bus.statistics().subscribers == 0
        fault_proxy.thaw("down")
        await kit.eventually(lambda: not bus.channels)
        assert await kit.listening(bus) == set()
        assert (bus.backend_pid, bus.generation) == (pid, 1)


async def test_pitfall_15_one_channel_of_a_hundred_is_refused(kit, monkeypatch) -> None:
    """All go in one transaction, which fails; the others are none the worse for it."""
    from pgstructured.notify import _routes
    from pgstructured.notify._channels import quote_name as quote

    monkeypatch.setattr(_routes, "quote_name", lambda c: "no name" if c == "c77" else quote(c))
    async with open_notify_bus(kit.dsn) as bus:
        entered: list[int] = []
        refused: list[Any] = []
        done = anyio.Event()

        async def subscribe(index: int) -> None:
            try:
                async with bus.subscribe(f"c{index}"):
                    entered.append(index)
                    await done.wait()
            except ListenRejectedError as exc:
                cause = exc.__cause__
                refused.append((index, type(cause)))

        async with anyio.create_task_group() as tg:
            for index in range(100):
                tg.start_soon(subscribe, index)
            await kit.eventually(lambda: len(entered) + len(refused) == 100)
            assert refused == [(77, psycopg.errors.SyntaxError)]
            assert await kit.listening(bus) == {f"c{index}" for index in entered}
            done.set()
        assert bus.generation == 1


@pytest.mark.parametrize(
    "name",
    ['a"b', "a$$b", "FooBar", "é" * 31, "x" * 63, "ON", "*", "select", "a;b", "a'b", "\\", " "],
)
async def test_pitfall_16_names(kit, name) -> None:
    """Exactly that channel, for `pg_notify` and for a quoted NOTIFY."""
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe(name) as subscription:
        kit.notify(name, "1")
        kit.execute("NOTIFY \"{}\", '2'".format(name.replace('"', '""')).replace("%", "%%"))
        kit.notify(name.swapcase()[:-1] + "?", "of another")
        kit.notify(name, "3")
        assert await kit.take(subscription, 3) == ["1", "2", "3"]


@pytest.mark.parametrize("name", ["", "x" * 64, "é" * 32, "a\0b"])
async def test_pitfall_16_names_that_the_server_would_cut(kit, name) -> None:
    async with open_notify_bus(kit.dsn) as bus:
        with pytest.raises(ChannelNameError):
            bus.subscribe(name)
        assert not bus.channels


async def test_pitfall_17_payloads(kit) -> None:
    async with (
        open_notify_bus(kit.dsn) as bus,
        bus.subscribe("a") as subscription,
        await connect(kit.dsn) as conn,
    ):
        await notify(conn, "a", "x" * 7999)
        await notify(conn, "a", "é" * 3999)
        kit.execute("SELECT pg_notify('a', NULL)")
        for too_large in ("x" * 8000, "é" * 4000):
            with pytest.raises(PayloadTooLargeError) as caught:
                await notify(conn, "a", too_large)
            assert (caught.value.size, caught.value.limit) == (8000, 7999)
        await notify(conn, "a", "last")
        expected = ["x" * 7999, "é" * 3999, "", "last"]
        assert await kit.take(subscription, 4) == expected


async def test_pitfall_18_equal_ones_in_one_transaction(kit) -> None:
    """The server sends one, where the first was; what was rolled back never was."""
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        with kit.conn.transaction():
            kit.notify("a", "1", "2", "1")
            with pytest.raises(ZeroDivisionError), kit.conn.transaction():
                kit.notify("a", "3")
                raise ZeroDivisionError
            with kit.conn.transaction():
                kit.notify("a", "2", "4")
        kit.notify("a", "1")
        assert await kit.take(subscription, 4) == ["1", "2", "4", "1"]
        assert bus.statistics().received == 4


@pytest.mark.slow
async def test_pitfall_19_one_order_for_all(kit) -> None:
    """Transactions one after the other, each whole, in the same order for every subscriber."""
    async with open_notify_bus(kit.dsn) as bus:
        async with (
            bus.subscribe("a", "b", buffer=10_000) as one,
            bus.subscribe("b", "a", buffer=10_000) as two,
        ):

            def write(writer: int) -> None:
                with psycopg.connect(kit.dsn, autocommit=True) as conn:
                    for transaction in range(40):
                        conn.execute(
                            "SELECT pg_notify(CASE i %% 2 WHEN 0 THEN 'a' ELSE 'b' END, %s || i)"
                            " FROM generate_series(0, 9) i",
                            (f"{writer} {transaction} ",),
                        )

            async with anyio.create_task_group() as tg:
                for writer in range(3):
                    tg.start_soon(anyio.to_thread.run_sync, write, writer)
            items = await all_of(one, 1200)
            assert payloads(items) == payloads(await all_of(two, 1200))
            last = [-1] * 3
            for start in range(0, 1200, 10):
                group = [
                    [int(part) for part in item.payload.split()] for item in items[start:][:10]
                ]
                writer, transaction, _ = group[0]
                assert group == [[writer, transaction, i] for i in range(10)]
                assert transaction == last[writer] + 1
                last[writer] = transaction


async def test_pitfall_20_other_databases(kit, pg_cluster) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        pg_cluster.execute("NOTIFY a, 'of another database'")
        kit.notify("a", "ours")
        assert await kit.take(subscription, 1) == ["ours"]


@pytest.mark.slow
async def test_pitfall_20_standby(pg_cluster_private, kit) -> None:
    """No LISTEN there: an error at first, and an attempt that failed, with backoff, later."""
    standby = await anyio.to_thread.run_sync(pg_cluster_private.standby)
    with pytest.raises(NotPrimaryError):
        async with open_notify_bus(standby.dsn()):
            pytest.fail("entered")
    where: list[str] = [standby.dsn()]

    async def conninfo() -> str:
        return where[0]

    async with open_notify_bus(
        conninfo, initial_connect="background", backoff=Backoff(initial=0.02, maximum=0.1)
    ) as bus:
        await kit.eventually(lambda: bus.statistics().attempts > 3)
        assert isinstance(bus.statistics().last_error, NotPrimaryError)
        where[0] = pg_cluster_private.dsn()
        with anyio.fail_after(20):
            assert await bus.wait_live() == 1


async def test_pitfall_21_a_transaction_pooler(kit, pgbouncer_transaction) -> None:
    with anyio.fail_after(20), pytest.raises(DeliveryError, match="directly"):
        async with open_notify_bus(pgbouncer_transaction.dsn(kit.dsn), connect_timeout=2):
            pytest.fail("entered")


async def test_pitfall_22_a_failing_listen_is_no_bad_channel(kit, monkeypatch) -> None:
    """On connecting, another attempt; later the subscriber's error, with the server's own."""
    from pgstructured.notify import _listening

    # Nothing is about one channel here, as with 58P01; an error of the server is hard to come by.
    monkeypatch.setattr(_listening, "_ABOUT_ONE_CHANNEL", ("no such class",))
    with kit.events() as events:
        async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
            async with bus.subscribe("a") as subscription:
                [route] = bus._routes._routes.values()
                with monkeypatch.context() as patch:
                    patch.setattr(route, "quoted", "no name")
                    kit.kill(bus)
                    await kit.eventually(lambda: bus.statistics().attempts > 3)
                    error = bus.statistics().last_error
                    assert isinstance(error, psycopg.Error)
                    assert error.sqlstate == "42601"
                with anyio.fail_after(20):
                    gap = await subscription.receive()
                assert isinstance(gap, Gap)
                assert gap.reason == "reconnected"
    assert "bus.listen_rejected" not in [name for name, _ in events]
    assert [name for name, _ in events].count("supervise.attempt_failed") > 2


async def test_pitfall_23_losses_in_a_row_grow_rarer(kit) -> None:
    """Being live for a moment is no reason to begin anew with the shortest delay."""
    with kit.events() as events:
        async with open_notify_bus(
            kit.dsn, backoff=Backoff(initial=0.004, maximum=0.1, factor=2.0, reset_after=60.0)
        ) as bus:
            for generation in range(1, 8):
                kit.kill(bus)
                await bus.wait_generation(generation)
    failed = [facts for name, facts in events if name == "supervise.attempt_failed"]
    assert [facts["attempt"] for facts in failed] == [*range(1, len(failed) + 1)]
    assert len(failed) >= 7
    for facts in failed:
        assert 0 <= facts["delay"] <= min(0.1, 0.004 * 2.0 ** (facts["attempt"] - 1))
    assert all(facts["error"].sqlstate == "57P01" for facts in failed)


async def test_pitfall_23_a_listen_that_is_answered_by_a_reset(kit, fault_proxy) -> None:
    """Connecting works, LISTEN does not: that is no reason to be in a hurry either."""
    async with open_notify_bus(
        fault_proxy.dsn(kit.dsn), backoff=Backoff(initial=0.05, maximum=0.5, reset_after=60)
    ) as bus:
        async with bus.subscribe("a") as subscription:
            for _ in range(3):
                generation = bus.generation
                fault_proxy.cut(b"LISTEN", "up")
                fault_proxy.reset()
                await bus.wait_generation(generation)
            gap = await subscription.receive()
            assert isinstance(gap, Gap)
            assert bus._link.supervision.failures >= 3  # nothing has reset the count


@pytest.mark.parametrize(
    ("database_in", "channel", "sent", "seen"),
    [
        ("LATIN1", "é", b"\xe9", "é"),
        ("WIN1252", "€", b"\x81", "\udc81"),  # no character there
        ("EUC_JP", "あ", b"\xa4\xa2", "あ"),
        ("EUC_JP", "あ", b"\xa9\xa1", "\udca9\udca1"),  # none either
        ("SQL_ASCII", "é", b"\xff", "\udcff"),
        ("SQL_ASCII", "é", "é".encode(), "é"),
        # What the server knows and Python doesn't: a name is heard, a payload recognisable.
        ("EUC_JP", "№①", b"\xad\xe2", "\udcad\udce2"),
        ("EUC_TW", "中", b"a\xc4\xe3", "a\udcc4\udce3"),
        ("EUC_TW", "中", b"\xfe\xfe", "\udcfe\udcfe"),  # no character there
    ],
    indirect=["database_in"],
)
async def test_pitfall_25_encodings(kit, database_in, channel, sent, seen) -> None:
    """Whatever somebody publishes, the session stays; what is no character stays recognisable."""
    async with (
        open_notify_bus(database_in, backoff=kit.quick) as bus,
        bus.subscribe(channel, "other") as subscription,
    ):
        with psycopg.connect(database_in, autocommit=True, client_encoding="utf8") as conn:
            conn.execute("SELECT pg_notify(%s, 'before')", (channel,))
            conn.execute(
                "SELECT pg_notify(%s, convert_from(%s, getdatabaseencoding()))", (channel, sent)
            )
            conn.execute("SELECT pg_notify('other', 'after')")
        assert await kit.take(subscription, 3) == ["before", seen, "after"]
        assert bus.generation == 1
        assert await kit.listening(bus) == {channel, "other"}


@pytest.mark.parametrize("database_in", ["EUC_TW"], indirect=True)
async def test_pitfall_25_a_name_that_grows_in_the_databases_encoding(kit, database_in) -> None:
    """Four bytes each there, where UTF-8 has three: the server would cut it, and nobody hear."""
    async with open_notify_bus(database_in) as bus:
        async with bus.subscribe("万" * 15):
            assert await kit.listening(bus) == {"万" * 15}
        with pytest.raises(ListenRejectedError, match="64 bytes") as caught:
            async with bus.subscribe("a", "万" * 16):
                pass
        assert (caught.value.channel, caught.value.sqlstate) == ("万" * 16, "42622")
        assert bus.generation == 1
