"""The behaviour of what the bus grew from: PgNotifyBus, and listen_to_notifications.

What they promise is kept, and what they warn of does not happen here.
"""

from __future__ import annotations

import anyio
import pytest

from pgstructured.notify import BusState, Gap, Notification, open_notify_bus, run_notify_bus

# ---------------------------------------------------------------- PgNotifyBus


async def test_bus_channels_registered_up_front(kit) -> None:
    async with open_notify_bus(kit.dsn, channels=["a", "b"]) as bus:
        assert bus.channels == {"a", "b"}
        assert await kit.listening(bus) == {"a", "b"}
        async with bus.subscribe("c"):  # one that was not is no dead end: LISTEN follows
            assert bus.channels == {"a", "b", "c"}


async def test_bus_subscribers_get_the_raw_payload(kit) -> None:
    async with open_notify_bus(kit.dsn, channels=["a"]) as bus:
        async with bus.subscribe("a") as one, bus.subscribe("a") as two:
            kit.notify("a", '{"raw": true}')
            for each in (one, two):
                assert await kit.take(each, 1) == ['{"raw": true}']


async def test_bus_subscribers_can_lag_by_256(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        kit.notify("a", *map(str, range(256)))
        await kit.eventually(lambda: bus.statistics().received == 256)
        assert subscription.statistics().lost == 0
        kit.notify("a", "256")
        await kit.eventually(lambda: bus.statistics().received == 257)
        assert await kit.take(subscription, 2) == [Gap(reason="lagged", generation=1, lost=1), "1"]


async def test_bus_generation_is_one_at_first_and_grows_with_every_reconnect(kit) -> None:
    """By every kind of loss: theirs stays as it is when the session is killed."""
    async with open_notify_bus(kit.dsn, initial_connect="background", backoff=kit.quick) as bus:
        before = bus.generation
        assert before == 0
        assert await bus.wait_generation(before) == 1
        async with bus.subscribe_reconnects() as reconnects:
            kit.kill(bus)
            assert await reconnects.receive() == 2


async def test_bus_who_subscribes_before_the_first_connect_takes_it_for_no_reconnect(
    kit, fault_proxy
) -> None:
    fault_proxy.refuse()
    async with open_notify_bus(
        fault_proxy.dsn(kit.dsn), initial_connect="background", backoff=kit.quick
    ) as bus:
        async with anyio.create_task_group() as tg:

            async def subscribe() -> None:
                async with bus.subscribe("a") as subscription:
                    kit.notify("a", "x")
                    assert await kit.take(subscription, 1) == ["x"]  # and no gap

            tg.start_soon(subscribe)
            await anyio.wait_all_tasks_blocked()
            fault_proxy.accept()


async def test_bus_reconnects_coalesce(kit) -> None:
    async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
        async with bus.subscribe_reconnects() as reconnects:
            for generation in (1, 2, 3):
                kit.kill(bus)
                await bus.wait_generation(generation)
            assert await reconnects.receive() == 4


async def test_bus_runs_as_a_task_until_it_is_told_to_stop(kit) -> None:
    async with anyio.create_task_group() as tg:
        bus = await tg.start(run_notify_bus, kit.dsn)
        assert bus.state is BusState.LIVE
        tg.cancel_scope.cancel()
    assert bus.state is BusState.CLOSED


# ---------------------------------------------------------------- listen_to_notifications


async def test_listen_tells_the_publishers_pid_and_the_payload(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        kit.notify("a", "x")
        item = await subscription.receive()
        assert isinstance(item, Notification)
        assert (item.pid, item.payload) == (kit.conn.info.backend_pid, "x")


async def test_listen_more_than_once_is_fine(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus:
        async with bus.subscribe("a", "a") as one, bus.subscribe("a") as two:
            kit.notify("a", "x")
            for each in (one, two):
                assert await kit.take(each, 1) == ["x"]
            assert await kit.listening(bus) == {"a"}


async def test_listen_is_not_undone_by_a_rollback(kit) -> None:
    """A LISTEN in a transaction that is rolled back has no effect; ours are in none."""
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        with pytest.raises(ZeroDivisionError), kit.conn.transaction():
            async with bus.subscribe("b"):
                pass
            raise ZeroDivisionError
        kit.notify("a", "x")
        assert await kit.take(subscription, 1) == ["x"]


async def test_listen_is_not_delayed_by_a_query(kit) -> None:
    """Theirs come after the end of the transaction that the connection is in."""
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        async with anyio.create_task_group() as tg:
            tg.start_soon(anyio.to_thread.run_sync, kit.execute, "SELECT pg_sleep(0.3)")

            async def publish() -> None:
                session = bus._link.session
                assert session is not None
                await session.execute("SELECT pg_notify('a', 'x')")

            tg.start_soon(publish)
            assert await kit.take(subscription, 1) == ["x"]


async def test_listen_ends_are_told_where_they_matter(kit) -> None:
    """Nobody has to watch for the server kicking him off: it is in the stream."""
    async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
        async with bus.subscribe("a") as subscription:
            kit.kill(bus)
            gap = await subscription.receive()
            assert isinstance(gap, Gap)
            assert gap.reason == "reconnected"


async def test_listen_has_a_heartbeat_without_being_asked(kit, fault_proxy) -> None:
    async with open_notify_bus(
        fault_proxy.dsn(kit.dsn), heartbeat=0.1, heartbeat_timeout=1.0, backoff=kit.quick
    ) as bus:
        await kit.eventually(lambda: bus.statistics().heartbeat_rtt is not None)
        fault_proxy.freeze()
        await kit.eventually(lambda: bus.state is BusState.DOWN)
        fault_proxy.thaw()
        with anyio.fail_after(20):
            await bus.wait_live()
