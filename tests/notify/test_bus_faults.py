"""The bus while everything breaks: it comes back by itself, and says what it can't know."""

from __future__ import annotations

from typing import Any

import anyio
import psycopg
import pytest

from pgstructured.errors import (
    BusUnavailableError,
    ConnectionLostError,
    ConninfoError,
    DeliveryError,
    ListenRejectedError,
    NotPrimaryError,
    SubscriptionOverflowError,
)
from pgstructured.notify import BusState, Gap, open_notify_bus

REFUSED = "host=127.0.0.1 port=1"


def is_reconnect(item, generation) -> bool:
    return isinstance(item, Gap) and (item.reason, item.generation) == ("reconnected", generation)


async def test_a_killed_session(kit) -> None:
    with kit.events() as events:
        async with open_notify_bus(kit.dsn, channels=["s"], backoff=kit.quick) as bus:
            async with (
                bus.subscribe("a") as one,
                bus.subscribe("a", "b") as two,
                bus.subscribe_reconnects() as reconnects,
            ):
                first_pid = bus.backend_pid
                kit.notify("a", "1")
                await kit.eventually(lambda: bus.statistics().received == 1)
                kit.kill(bus)
                assert await bus.wait_generation(1) == 2
                assert bus.backend_pid != first_pid
                assert await kit.listening(bus) == {"s", "a", "b"}
                kit.notify("a", "2")
                for each in (one, two):
                    before, gap, after = await kit.take(each, 3)
                    assert (before, after) == ("1", "2")
                    assert is_reconnect(gap, 2)
                    assert gap.lost is None
                    assert 0 < gap.outage < 10
                kit.kill(bus)
                assert await bus.wait_generation(2) == 3
                assert await bus.wait_live() == 3
                assert await reconnects.receive() == 3  # 2 and 3, coalesced
                figures = bus.statistics()
                assert (figures.reconnects, figures.attempts) == (2, 3)
                assert isinstance(figures.last_error, psycopg.errors.AdminShutdown)
    names = [name for name, _ in events if name.startswith("bus.")]
    assert names == [
        "bus.connected",
        *["bus.lost", "bus.reconnected", "bus.gap", "bus.gap"],
        *["bus.lost", "bus.reconnected"],
        "bus.closed",
    ]


async def test_the_stream_of_reconnects(kit) -> None:
    async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
        async with bus.subscribe_reconnects() as stream:
            async with anyio.create_task_group() as tg:

                async def receive() -> None:
                    assert await stream.receive() == 2
                    with pytest.raises(anyio.ClosedResourceError):
                        await stream.receive()

                tg.start_soon(receive)
                await anyio.wait_all_tasks_blocked()
                with pytest.raises(anyio.BusyResourceError):
                    await stream.receive()
                kit.kill(bus)
                await bus.wait_generation(1)
                await anyio.wait_all_tasks_blocked()
                await stream.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()


async def test_a_silent_network(kit, fault_proxy) -> None:
    """Nothing but the heartbeat can tell."""
    async with open_notify_bus(
        fault_proxy.dsn(kit.dsn),
        heartbeat=0.1,
        heartbeat_timeout=1.0,
        connect_timeout=1,
        backoff=kit.quick,
    ) as bus:
        async with bus.subscribe("a") as subscription:
            await kit.eventually(lambda: bus.statistics().heartbeat_rtt is not None)
            assert bus.generation == 1
            fault_proxy.freeze()
            frozen_at = anyio.current_time()
            await kit.eventually(lambda: bus.state is BusState.DOWN)
            assert bus.backend_pid is None
            with pytest.raises(ConnectionLostError, match="no session at present"):
                await bus.ping()
            kit.notify("a", "lost")
            await kit.eventually(lambda: bus.statistics().attempts > 1)
            frozen_for = anyio.current_time() - frozen_at
            fault_proxy.thaw()
            with anyio.fail_after(20):
                [gap] = await kit.take(subscription, 1)
            assert is_reconnect(gap, 2)
            # From the last sign of life, which was before the freeze or just after.
            assert gap.outage > frozen_for - 0.5
            kit.notify("a", "2")
            assert await kit.take(subscription, 1) == ["2"]


async def test_a_flood_is_life(kit, fault_proxy) -> None:
    """A heartbeat whose answer is queued behind a flood is no death."""
    fault_proxy.throttle(1_500_000, "down")
    async with open_notify_bus(
        fault_proxy.dsn(kit.dsn), heartbeat=0.05, heartbeat_timeout=0.8
    ) as bus:
        async with bus.subscribe("a", buffer=100_000) as subscription:
            kit.notify("a", *(f"{i:0100}" for i in range(20_000)))
            received = 0
            with anyio.fail_after(30):
                while received < 20_000:
                    received += len(await subscription.receive_many())
            assert bus.generation == 1


@pytest.mark.parametrize("fault", ["reset", "fin"])
async def test_a_broken_network(kit, fault_proxy, fault) -> None:
    async with open_notify_bus(fault_proxy.dsn(kit.dsn), backoff=kit.quick) as bus:
        async with bus.subscribe("a") as subscription:
            for generation in (2, 3):
                getattr(fault_proxy, fault)()
                [gap] = await kit.take(subscription, 1)
                assert is_reconnect(gap, generation)
                kit.notify("a", "x")
                assert await kit.take(subscription, 1) == ["x"]


async def test_a_notification_in_one_piece_with_the_reply_to_listen(kit, fault_proxy) -> None:
    # Nothing but LISTEN is to be answered meanwhile: no UNLISTEN.
    async with open_notify_bus(fault_proxy.dsn(kit.dsn), unlisten_linger=60) as bus:
        await bus.ping()  # behind the UNLISTEN of the probe
        for index in range(10):
            async with anyio.create_task_group() as tg:

                async def subscribe(index=index) -> None:
                    async with bus.subscribe(f"c{index}") as subscription:
                        assert await kit.take(subscription, 1) == [f"first {index}"]

                fault_proxy.merge(f"first {index}".encode(), "down")
                tg.start_soon(subscribe)
                await anyio.to_thread.run_sync(fault_proxy.wait_held)
                kit.notify(f"c{index}", f"first {index}")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_server_restart(pg_cluster_private, kit, mode) -> None:
    from pgstructured import Backoff

    cluster = pg_cluster_private
    async with open_notify_bus(
        cluster.dsn(), backoff=Backoff(initial=0.01, maximum=0.1), connect_timeout=5
    ) as bus:
        async with bus.subscribe("a") as subscription:
            await anyio.to_thread.run_sync(cluster.stop, mode)
            await kit.eventually(
                lambda: bus.state is BusState.DOWN and bus.statistics().attempts > 1
            )
            await anyio.to_thread.run_sync(cluster.start)
            with anyio.fail_after(30):
                item = await subscription.receive()
            assert is_reconnect(item, 2)
            cluster.execute("NOTIFY a, 'x'")
            assert (await subscription.receive()).payload == "x"  # type: ignore[union-attr]


@pytest.mark.slow
async def test_a_crash_of_the_server(pg_cluster_private, kit) -> None:
    """One backend killed with SIGKILL takes them all down; the server then recovers by itself."""
    cluster = pg_cluster_private
    async with open_notify_bus(cluster.dsn(), backoff=kit.quick, connect_timeout=5) as bus:
        async with bus.subscribe("a") as subscription:
            with cluster.connect() as victim:
                pid = victim.info.backend_pid
                await anyio.to_thread.run_sync(cluster.kill_backend, pid)
            with anyio.fail_after(30):
                assert is_reconnect(await subscription.receive(), 2)
            cluster.execute("NOTIFY a, 'x'")
            assert await kit.take(subscription, 1) == ["x"]


@pytest.mark.slow
async def test_killed_again_and_again_nothing_is_missed(kit) -> None:
    """With a re-read at every gap a subscriber sees every row, whatever was lost."""
    kit.execute("CREATE TABLE rows (n int PRIMARY KEY)")
    kit.execute(
        "CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_notify('rows', NEW.n::text); RETURN NULL; END $$"
    )
    kit.execute("CREATE TRIGGER t AFTER INSERT ON rows FOR EACH ROW EXECUTE FUNCTION tell()")
    stopped = anyio.Event()
    written: set[int] = set()
    ended = 0

    def write(first: int) -> None:
        with psycopg.connect(kit.dsn, autocommit=True) as conn:
            for n in range(first, 1_000_000, 3):
                if stopped.is_set():
                    return
                conn.execute("INSERT INTO rows VALUES (%s)", (n,))
                written.add(n)

    def read() -> set[int]:
        with psycopg.connect(kit.dsn) as conn:
            return {n for (n,) in conn.execute("SELECT n FROM rows").fetchall()}

    async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
        async with bus.subscribe("rows", buffer=20, initial_gap=True) as subscription:
            seen: set[int] = set()
            last_generation = 0
            async with anyio.create_task_group() as tg:

                async def writer(first: int) -> None:
                    nonlocal ended
                    await anyio.to_thread.run_sync(write, first)
                    ended += 1
                    kit.notify("rows", "")  # wakes who has seen everything already

                async def killer() -> None:
                    for generation in range(1, 8):
                        await kit.eventually(lambda: len(written) > 20 * generation)  # noqa: B023 - awaited
                        kit.kill(bus)
                        await bus.wait_generation(generation)
                    stopped.set()

                for first in range(3):
                    tg.start_soon(writer, first)
                tg.start_soon(killer)
                try:
                    with anyio.fail_after(50):
                        while ended < 3 or seen < written:
                            item = await subscription.receive()
                            assert item.generation >= last_generation
                            last_generation = item.generation
                            if isinstance(item, Gap):
                                seen |= await anyio.to_thread.run_sync(read)
                            elif item.payload:
                                seen.add(int(item.payload))
                finally:  # its threads would go on for ever
                    stopped.set()
            assert seen == written
            assert len(written) > 100
            assert bus.generation == 8


async def test_no_notification_of_a_generation_before_its_gap(kit) -> None:
    async with open_notify_bus(kit.dsn, channels=["a"], backoff=kit.quick) as bus:
        async with bus.subscribe("a", buffer=100_000) as subscription:
            stopped = anyio.Event()

            def publish() -> None:
                with psycopg.connect(kit.dsn, autocommit=True) as conn:
                    while not stopped.is_set():
                        conn.execute("SELECT pg_notify('a', i::text) FROM generate_series(1, 20) i")

            async with anyio.create_task_group() as tg:
                tg.start_soon(anyio.to_thread.run_sync, publish)
                try:
                    for generation in range(1, 6):
                        seen = bus.statistics().received
                        await kit.eventually(lambda: bus.statistics().received > seen)  # noqa: B023 - awaited
                        kit.kill(bus)
                        await bus.wait_generation(generation)
                finally:  # its thread would go on for ever
                    stopped.set()
            present = 1
            for item in await subscription.receive_many():
                if isinstance(item, Gap):
                    assert item.generation == present + 1
                    present = item.generation
                assert item.generation == present
            assert present == 6


async def test_subscribing_while_down(kit, fault_proxy) -> None:
    """It waits, and enters live without a gap: it has missed nothing that was promised."""
    async with open_notify_bus(fault_proxy.dsn(kit.dsn), backoff=kit.quick) as bus:
        async with bus.subscribe("old") as old:
            fault_proxy.refuse()
            fault_proxy.reset()
            await kit.eventually(lambda: bus.state is BusState.DOWN)
            entered = anyio.Event()
            async with anyio.create_task_group() as tg:

                async def subscribe() -> None:
                    async with bus.subscribe("old", "new") as subscription:
                        entered.set()
                        assert await kit.take(subscription, 1) == ["x"]

                async def give_up() -> None:
                    with anyio.move_on_after(0.05) as scope:
                        async with bus.subscribe("other"):
                            pass
                    assert scope.cancelled_caught

                tg.start_soon(subscribe)
                await give_up()
                assert not entered.is_set()
                assert bus.channels == {"old", "new"}
                fault_proxy.accept()
                with anyio.fail_after(20):
                    await entered.wait()
                assert await kit.listening(bus) == {"old", "new"}
                kit.notify("new", "x")
            assert is_reconnect((await kit.take(old, 1))[0], 2)


async def test_what_came_before_entering_is_forgotten_in_an_outage(kit, fault_proxy) -> None:
    async with open_notify_bus(fault_proxy.dsn(kit.dsn), backoff=kit.quick) as bus:
        async with bus.subscribe("old"), anyio.create_task_group() as tg:
            held = b"LISTEN"  # the command tag in the server's reply
            fault_proxy.hold(held, "down")

            async def subscribe() -> None:
                async with bus.subscribe("old", "new") as subscription:
                    kit.notify("old", "after")
                    assert await kit.take(subscription, 1) == ["after"]

            kit.notify("old", "before")
            tg.start_soon(subscribe)
            await anyio.to_thread.run_sync(fault_proxy.wait_held)
            dispatched = bus.statistics().dispatched
            fault_proxy.reset()
            fault_proxy.release()
            await bus.wait_generation(1)
            assert bus.statistics().dispatched >= dispatched


async def test_leaving_in_an_outage_forgets_the_channel(kit, fault_proxy) -> None:
    async with open_notify_bus(
        fault_proxy.dsn(kit.dsn), channels=["s"], backoff=kit.quick, unlisten_linger=60
    ) as bus:
        async with bus.subscribe("a"):
            pass
        assert await kit.listening(bus) == {"s", "a"}
        fault_proxy.reset()
        await bus.wait_generation(1)
        assert await kit.listening(bus) == {"s"} == set(bus.channels)


# ---------------------------------------------------------------- the first connect


async def test_the_first_connect_fails_bare() -> None:
    with pytest.raises(psycopg.OperationalError, match="refused"):
        async with open_notify_bus(REFUSED):
            pass
    with pytest.raises(psycopg.OperationalError, match="refused") as caught:
        async with open_notify_bus("host=127.0.0.1,127.0.0.1 port=1,2"):
            pass
    assert "port: '2'" in str(caught.value)


async def test_a_conninfo_callable(kit) -> None:
    calls = 0

    async def conninfo() -> Any:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise KeyError("no token today")
        if calls == 3:
            return "host='"
        return kit.dsn

    async with open_notify_bus(conninfo, backoff=kit.quick) as bus:
        kit.kill(bus)
        assert await bus.wait_generation(1) == 2
        assert calls == 5
    with pytest.raises(KeyError, match="no token today"):
        async with open_notify_bus(conninfo):
            pass
    calls = 2
    with pytest.raises(ConninfoError):
        async with open_notify_bus(conninfo):
            pass
    calls = 1
    async with open_notify_bus(conninfo, backoff=kit.quick, initial_connect="retry") as bus:
        assert calls == 5
        assert bus.generation == 1

    async def hang() -> str:
        await anyio.sleep_forever()
        raise AssertionError

    with pytest.raises(psycopg.errors.ConnectionTimeout, match="conninfo"):
        async with open_notify_bus(hang, connect_timeout=0.1):
            pass


async def test_the_first_connect_in_the_background(kit, fault_proxy) -> None:
    fault_proxy.refuse()
    async with open_notify_bus(
        fault_proxy.dsn(kit.dsn), initial_connect="background", backoff=kit.quick
    ) as bus:
        assert (bus.state, bus.generation) == (BusState.CONNECTING, 0)
        await kit.eventually(lambda: bus.statistics().attempts > 2)
        assert (bus.state, bus.backend_pid) == (BusState.CONNECTING, None)
        async with bus.subscribe_reconnects() as reconnects:
            fault_proxy.accept()
            async with bus.subscribe("a") as subscription:
                assert (bus.state, bus.generation) == (BusState.LIVE, 1)
                assert await reconnects.receive() == 1
                kit.notify("a", "x")
                assert await kit.take(subscription, 1) == ["x"]


async def test_the_first_connect_is_retried(kit, fault_proxy) -> None:
    fault_proxy.refuse()
    with kit.events() as events:
        async with anyio.create_task_group() as tg:

            async def accept() -> None:
                await kit.eventually(
                    lambda: "supervise.attempt_failed" in [name for name, _ in events]
                )
                fault_proxy.accept()

            tg.start_soon(accept)
            async with open_notify_bus(
                fault_proxy.dsn(kit.dsn), initial_connect="retry", backoff=kit.quick
            ) as bus:
                assert bus.generation == 1
                assert bus.statistics().attempts > 1


async def test_connecting_to_a_silent_server_is_bounded(kit, fault_proxy) -> None:
    fault_proxy.freeze()
    with anyio.fail_after(10), pytest.raises(psycopg.errors.ConnectionTimeout):
        async with open_notify_bus(fault_proxy.dsn(kit.dsn), connect_timeout=0.3):
            pass


async def test_listening_on_a_silent_server_is_bounded(kit, fault_proxy) -> None:
    fault_proxy.hold(b"LISTEN", "down")
    with anyio.fail_after(10), pytest.raises(psycopg.errors.ConnectionTimeout, match="LISTEN"):
        async with open_notify_bus(fault_proxy.dsn(kit.dsn), channels=["a"], connect_timeout=2):
            pass


# ---------------------------------------------------------------- the end


async def test_an_outage_that_is_too_long(kit, fault_proxy) -> None:
    met: list[str] = []
    with pytest.raises(BusUnavailableError, match=r"not live for 1\.5 s") as caught:
        async with open_notify_bus(
            fault_proxy.dsn(kit.dsn), max_outage=1.5, backoff=kit.quick
        ) as bus:
            async with bus.subscribe("a") as subscription:
                fault_proxy.refuse()
                fault_proxy.reset()
                try:
                    await anyio.sleep_forever()
                except anyio.get_cancelled_exc_class():
                    met.append("cancelled")
                    for operation in (
                        subscription.receive,
                        subscription.receive_many,
                        bus.wait_live,
                        lambda: bus.wait_generation(0),
                        bus.ping,
                    ):
                        with anyio.CancelScope(shield=True):
                            with pytest.raises(BusUnavailableError, match="not live"):
                                await operation()
                    with pytest.raises(BusUnavailableError):
                        subscription.receive_nowait()
                    raise
    assert met == ["cancelled"]
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    assert isinstance(caught.value, anyio.BrokenResourceError)
    assert bus.state is BusState.CLOSED


async def test_who_meets_the_end_in_a_shield_hears_of_it_once(kit, fault_proxy) -> None:
    with pytest.raises(BusUnavailableError) as caught:
        async with open_notify_bus(
            fault_proxy.dsn(kit.dsn), max_outage=1.5, backoff=kit.quick
        ) as bus:
            fault_proxy.refuse()
            fault_proxy.reset()
            with anyio.CancelScope(shield=True):
                await bus.wait_generation(1)
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    with pytest.raises(BusUnavailableError, match="of another bus"):
        async with open_notify_bus(kit.dsn):
            raise BusUnavailableError("of another bus")


async def test_a_bus_that_never_was_live_gives_up(kit) -> None:
    for mode in ("retry", "background"):
        with pytest.raises(BusUnavailableError):
            async with open_notify_bus(
                REFUSED, initial_connect=mode, max_outage=0.1, backoff=kit.quick
            ):
                await anyio.sleep_forever()
    with pytest.raises(BusUnavailableError):

        async def hang() -> str:
            await anyio.sleep_forever()
            raise AssertionError

        async with open_notify_bus(hang, max_outage=0.1):
            pass


async def test_leaving_while_the_server_is_frozen(kit, fault_proxy) -> None:
    async with open_notify_bus(
        fault_proxy.dsn(kit.dsn), heartbeat=0.05, heartbeat_timeout=30
    ) as bus:
        async with bus.subscribe("a"):
            fault_proxy.freeze()
            session = bus._link.session
            assert session is not None
            await kit.eventually(lambda: session._wire.commands)  # a heartbeat is under way
        left_at = anyio.current_time()
    assert anyio.current_time() - left_at < 15  # and not the 30 of the heartbeat
    fault_proxy.thaw()


async def test_a_bug_ends_the_bus(kit, monkeypatch) -> None:
    """What no retry can heal comes out as itself, also after the first connect."""
    from pgstructured.notify import _link

    with pytest.raises(ZeroDivisionError):
        async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
            monkeypatch.setattr(_link, "find_target", lambda conninfo: 1 / 0)
            kit.kill(bus)
            with anyio.CancelScope(shield=True), pytest.raises(BusUnavailableError, match="ended"):
                await bus.wait_generation(1)
            await anyio.sleep_forever()


# ---------------------------------------------------------------- what kind of server


@pytest.mark.slow
async def test_a_standby(pg_cluster_private, kit) -> None:
    standby = await anyio.to_thread.run_sync(pg_cluster_private.standby)
    with pytest.raises(NotPrimaryError, match="target_session_attrs"):
        async with open_notify_bus(standby.dsn()):
            pass
    both = (
        f"host={standby.host},{pg_cluster_private.host}"
        f" port={standby.port},{pg_cluster_private.port} user=postgres dbname=postgres"
    )
    async with open_notify_bus(both, backoff=kit.quick, connect_timeout=3) as bus:
        async with bus.subscribe("a") as subscription:
            pg_cluster_private.execute("NOTIFY a, 'of the primary'")
            assert await kit.take(subscription, 1) == ["of the primary"]
            await anyio.to_thread.run_sync(pg_cluster_private.stop, "immediate")
            await kit.eventually(lambda: bus.state is BusState.DOWN)
            await anyio.to_thread.run_sync(standby.promote)
            with anyio.fail_after(30):
                assert is_reconnect(await subscription.receive(), 2)
            standby.execute("NOTIFY a, 'of the new one'")
            assert await kit.take(subscription, 1) == ["of the new one"]
    with pytest.raises(BusUnavailableError):
        async with open_notify_bus(
            f"{both} target_session_attrs=standby",
            initial_connect="retry",
            max_outage=0.3,
            backoff=kit.quick,
        ):
            pass


async def test_a_transaction_pooler_is_found_out(kit, pgbouncer_transaction, monkeypatch) -> None:
    from pgstructured.notify import _listening

    monkeypatch.setattr(_listening, "_PATIENCE", 0.5)
    dsn = pgbouncer_transaction.dsn(kit.dsn)
    with kit.events() as events:
        for mode in ("fail", "retry", "background"):
            with pytest.raises(DeliveryError, match="pooler"):
                async with open_notify_bus(dsn, initial_connect=mode):
                    await anyio.sleep_forever()
    assert [name for name, _ in events if name == "bus.probe_failed"] == ["bus.probe_failed"] * 3
    async with open_notify_bus(dsn, verify_delivery=False) as bus:
        assert bus.generation == 1


async def test_a_slow_probe_is_none_that_failed(kit, monkeypatch) -> None:
    """Patience runs out, but the session answers, and the notification came before that."""
    from pgstructured.notify import _listening

    monkeypatch.setattr(_listening, "_PATIENCE", 0)
    async with open_notify_bus(kit.dsn) as bus:
        assert bus.generation == 1


async def test_what_nobody_asked_for_is_passed_over(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        await bus._link.session.execute("LISTEN stray")  # type: ignore[union-attr]
        kit.execute("SELECT pg_notify('stray', ''), pg_notify('a', 'x')")
        assert await kit.take(subscription, 1) == ["x"]
        assert bus.statistics().received == 2


async def test_a_session_pooler_will_do(kit, pgbouncer_session) -> None:
    dsn = pgbouncer_session.dsn(kit.dsn)
    async with open_notify_bus(dsn) as bus, bus.subscribe("a") as subscription:
        kit.notify("a", "x")
        assert await kit.take(subscription, 1) == ["x"]


async def test_a_probe_that_fails_later_is_a_failed_attempt(kit, monkeypatch) -> None:
    from pgstructured.notify import _listening

    async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
        async with bus.subscribe("a") as subscription:
            looks = _listening.Probe.look
            monkeypatch.setattr(_listening, "_PATIENCE", 0.05)
            monkeypatch.setattr(_listening.Probe, "look", lambda self, batch: None)
            kit.kill(bus)
            await kit.eventually(lambda: bus.statistics().attempts > 3)
            assert isinstance(bus.statistics().last_error, DeliveryError)
            assert bus.state is BusState.DOWN
            monkeypatch.setattr(_listening.Probe, "look", looks)
            assert is_reconnect((await kit.take(subscription, 1))[0], 2)
            kit.notify("a", "x")
            assert await kit.take(subscription, 1) == ["x"]
            assert await kit.listening(bus) == {"a"}


async def test_a_server_that_fails_every_listen_is_a_failed_attempt(kit, monkeypatch) -> None:
    """Not the channel's fault: nobody is refused, the bus tries again."""
    from pgstructured.notify import _listening

    async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
        async with bus.subscribe("a") as subscription:
            [route] = bus._routes._routes.values()
            # Else a syntax error would be about the channel.
            monkeypatch.setattr(_listening, "_ABOUT_ONE_CHANNEL", ("58",))
            with monkeypatch.context() as patch:
                patch.setattr(route, "quoted", "no name")
                kit.kill(bus)
                await kit.eventually(lambda: bus.statistics().attempts > 3)
                assert isinstance(bus.statistics().last_error, psycopg.errors.SyntaxError)
                assert bus.state is BusState.DOWN
            assert is_reconnect((await kit.take(subscription, 1))[0], 2)
            kit.notify("a", "x")
            assert await kit.take(subscription, 1) == ["x"]


async def test_a_listen_refused_on_a_reconnect(kit) -> None:
    """The subscriber of that channel is told; the others go on."""
    async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
        async with (
            bus.subscribe("a") as one,
            bus.subscribe("b") as two,
            bus.subscribe("a", buffer=1, overflow="close") as overflown,
        ):
            kit.notify("a", "1", "2")
            assert await kit.take(one, 2) == ["1", "2"]
            [route] = [each for each in bus._routes._routes.values() if each.name == "a"]
            route.quoted = "no name"  # a syntax error: class 42
            kit.kill(bus)
            assert is_reconnect((await kit.take(two, 1))[0], 2)
            with pytest.raises(ListenRejectedError):
                await one.receive()
            with pytest.raises(anyio.ClosedResourceError):
                await one.receive()
            assert bus.channels == {"b"}
            assert await kit.take(overflown, 1) == ["1"]
            with pytest.raises(SubscriptionOverflowError):
                await overflown.receive()
            with pytest.raises(anyio.ClosedResourceError):
                await overflown.receive()
        async with bus.subscribe("a") as again:  # who comes later tries anew
            kit.notify("a", "x")
            assert await kit.take(again, 1) == ["x"]
