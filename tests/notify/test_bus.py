"""The bus while nothing breaks: subscribing, routing, LISTEN and UNLISTEN, figures, publishing."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Any

import anyio
import psycopg
import pytest

from pgstructured.driver import connect
from pgstructured.errors import (
    ChannelNameError,
    ConninfoError,
    DecodeError,
    ListenRejectedError,
    PayloadTooLargeError,
)
from pgstructured.notify import (
    BusState,
    Channel,
    Gap,
    Notification,
    notify,
    notify_many,
    open_notify_bus,
    run_notify_bus,
)
from pgstructured.testing import assert_cancellable


async def next_of(subscription) -> Notification[Any]:
    item = await subscription.receive()
    assert isinstance(item, Notification)
    return item


async def test_first_steps(kit) -> None:
    async with open_notify_bus(kit.dsn, channels=["a", Channel.json("b")]) as bus:
        assert bus.state is BusState.LIVE
        assert bus.generation == 1
        assert bus.channels == {"a", "b"}
        assert await kit.listening(bus) == {"a", "b"}
        assert repr(bus) == "<NotifyBus live generation=1>"
        assert await bus.ping() > 0
        assert await bus.wait_live() == 1
        assert await bus.wait_generation(0) == 1
        [(name, pid)] = kit.execute(
            "SELECT application_name, pid FROM pg_stat_activity WHERE pid = %s", (bus.backend_pid,)
        )
        assert (name, pid) == ("pgstructured/notify", bus.backend_pid)
        async with bus.subscribe("a") as subscription:
            assert subscription.channels == {"a"}
            assert repr(subscription) == "<Subscription to a: 0 buffered>"
            kit.notify("a", "1", "2")
            before = anyio.current_time()
            first = await subscription.receive()
            assert not isinstance(first, Gap)
            assert (first.channel, first.payload, first.value) == ("a", "1", "1")
            assert first.pid == kit.conn.info.backend_pid
            assert first.generation == 1
            assert before - 5 < first.received_at <= anyio.current_time()
            assert await kit.take(subscription, 1) == ["2"]
    assert str(bus.state) == "closed"
    assert bus.backend_pid is None


async def test_name_shows_on_the_server(kit) -> None:
    async with open_notify_bus(kit.dsn, name="billing") as bus:
        [(name,)] = kit.execute(
            "SELECT application_name FROM pg_stat_activity WHERE pid = %s", (bus.backend_pid,)
        )
        assert name == "pgstructured/notify/billing"


async def test_several_channels_in_one_stream_and_in_order(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus:
        async with bus.subscribe("a", "b", "a", buffer=10_000) as both, bus.subscribe("b") as one:
            for i in range(50):
                kit.execute(
                    "SELECT pg_notify('a', %s), pg_notify('c', ''), pg_notify('b', %s)",
                    (f"a{i}", f"b{i}"),
                )
            assert await kit.take(both, 100) == [f"{c}{i}" for i in range(50) for c in "ab"]
            assert await kit.take(one, 50) == [f"b{i}" for i in range(50)]


async def test_one_object_for_all_who_decode_alike(kit) -> None:
    calls = []

    def decode(payload):
        calls.append(payload)
        return int(payload)

    channel = Channel("n", decode=decode)
    async with open_notify_bus(kit.dsn) as bus:
        async with (
            bus.subscribe(channel) as one,
            bus.subscribe(channel) as two,
            bus.subscribe("n") as text,
        ):
            kit.notify("n", "7", "x")
            first, second, third = [await next_of(each) for each in (one, two, text)]
            assert first is second
            assert (first.value, second.value, third.value) == (7, 7, "7")
            assert calls == ["7"]
            with pytest.raises(DecodeError):
                _ = (await next_of(one)).value
            assert (await next_of(text)).value == "x"
            kit.notify("n", "8")  # neither the bus nor the subscriber minds
            assert (await next_of(one)).value == 8


async def test_unusual_names_and_payloads(kit) -> None:
    names = ['a"b', "a$$b", "FooBar", "é" * 31, "ON", "*", "x" * 63, "_pgstructured_probe_"]
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe(*names) as subscription:
        for name in names:
            kit.notify(name, "é" * 3999, "")
            assert await kit.take(subscription, 2) == ["é" * 3999, ""]


async def test_impossible_options(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus:
        wrong: list[tuple[list[str], dict[str, Any], str]] = [
            ([], {}, "at least one channel"),
            (["a"], {"buffer": 0}, "buffer must be at least 1"),
            (["a"], {"overflow": "block"}, "overflow must be one of"),
            (["a"], {"gaps": "maybe"}, "gaps must be one of"),
        ]
        for arguments, options, complaint in wrong:
            with pytest.raises(ValueError, match=complaint):
                bus.subscribe(*arguments, **options)
        with pytest.raises(ChannelNameError):
            bus.subscribe("")
        async with bus.subscribe("a") as subscription:
            with pytest.raises(ValueError, match="max_items"):
                await subscription.receive_many(0)
    wrong_too: list[tuple[dict[str, Any], str]] = [
        ({"initial_connect": "never"}, "initial_connect must be one of"),
        ({"connect_timeout": 0}, "connect_timeout must be more than 0"),
        ({"heartbeat": -1}, "heartbeat must be more than 0"),
        ({"max_outage": 0}, "max_outage must be more than 0"),
        ({"unlisten_linger": -1}, "unlisten_linger must be 0 or more"),
    ]
    for options, complaint in wrong_too:
        with pytest.raises(ValueError, match=complaint):
            async with open_notify_bus(kit.dsn, **options):
                pass
    for mode in ("fail", "retry", "background"):
        for conninfo in ("host='secret", "env:PGSTRUCTURED_NO_SUCH_VARIABLE"):
            with pytest.raises(ConninfoError) as caught:
                async with open_notify_bus(conninfo, initial_connect=mode):
                    pass
            assert "secret" not in str(caught.value)


async def test_passwords_are_not_shown(kit) -> None:
    async with open_notify_bus(f"{kit.dsn}?password=s3cret") as bus:
        assert "s3cret" not in repr([bus, vars(bus), vars(bus._link)])


async def test_listen_goes_with_the_last_subscriber_after_a_while(kit) -> None:
    async with open_notify_bus(kit.dsn, channels=["s"], unlisten_linger=1.0) as bus:
        async with bus.subscribe("a", "s"):
            async with bus.subscribe("a"):
                pass
            assert await kit.listening(bus) == {"a", "s"}
        assert await kit.listening(bus) == {"a", "s"}
        async with bus.subscribe("a"):  # back in time
            await anyio.sleep(1.2)
            assert await kit.listening(bus) == {"a", "s"}
        await kit.eventually(lambda: bus.channels == {"s"})
        assert await kit.listening(bus) == {"s"}


async def test_a_thousand_come_and_go_and_are_cancelled(kit) -> None:
    """The server's list is exactly what the wishes are, whatever the order."""
    rng = random.Random(7)
    async with open_notify_bus(kit.dsn, unlisten_linger=0) as bus:
        stayed: set[str] = set()
        done = anyio.Event()

        async def come_and_go(index: int) -> None:
            channel = f"c{rng.randrange(50)}"
            await anyio.sleep(rng.random() * 0.2)
            with anyio.move_on_after(rng.choice([0, 0.0005, 0.002, 0.01, 5])):
                async with bus.subscribe(channel, f"c{rng.randrange(50)}"):
                    # Entered means heard.
                    assert channel in bus.channels
                    await anyio.sleep(rng.random() * 0.01)

        async def stay(index: int, *, task_status) -> None:
            async with bus.subscribe(f"c{index}") as subscription:
                task_status.started()
                stayed.add(f"c{index}")
                assert await kit.take(subscription, 1) == [f"for {index}"]
                await done.wait()

        async with anyio.create_task_group() as tg:
            async with anyio.create_task_group() as churn:
                for index in range(1000):
                    churn.start_soon(come_and_go, index)
                for index in range(0, 50, 7):
                    await tg.start(stay, index)
            await kit.eventually(lambda: bus.channels == stayed)
            await bus.ping()
            assert await kit.listening(bus) == stayed
            assert bus.statistics().subscribers == len(stayed)
            for index in range(50):
                kit.notify(f"c{index}", f"for {index}")
            await anyio.lowlevel.checkpoint()
            done.set()
        assert bus.generation == 1
        await kit.eventually(lambda: not bus.channels)
        assert await kit.listening(bus) == set()


async def test_cancelled_at_every_step_of_subscribe(kit) -> None:
    async with open_notify_bus(kit.dsn, unlisten_linger=0) as bus:
        steps = 0
        entered = False
        while not entered:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tg:

                    async def cancel_later(steps=steps, scope=scope) -> None:
                        for _ in range(steps):
                            await anyio.lowlevel.checkpoint()
                        scope.cancel()

                    tg.start_soon(cancel_later)
                    async with bus.subscribe("a", "b"):
                        entered = True
                        tg.cancel_scope.cancel()
            steps += 1
            assert bus.statistics().subscribers == 0
            await kit.eventually(lambda: not bus.channels)
            assert await kit.listening(bus) == set()
        assert steps > 1
        assert bus.generation == 1


async def test_cancelled_while_listen_is_under_way(kit, fault_proxy) -> None:
    async with open_notify_bus(fault_proxy.dsn(kit.dsn), unlisten_linger=0) as bus:
        await bus.ping()  # behind the UNLISTEN of the probe
        fault_proxy.hold(b"LISTEN", "down")
        async with anyio.create_task_group() as tg:

            async def subscribe() -> None:
                async with bus.subscribe("a"):
                    raise AssertionError

            tg.start_soon(subscribe)
            await anyio.to_thread.run_sync(fault_proxy.wait_held)
            tg.cancel_scope.cancel()
        assert bus.statistics().subscribers == 0
        assert bus.channels == {"a"}  # the server's answer is not in yet
        fault_proxy.release()
        await kit.eventually(lambda: not bus.channels)
        assert await kit.listening(bus) == set()


async def test_subscribing_while_unlisten_is_under_way(kit, fault_proxy) -> None:
    async with open_notify_bus(fault_proxy.dsn(kit.dsn), unlisten_linger=0) as bus:
        await bus.ping()  # behind the UNLISTEN of the probe
        async with bus.subscribe("a"):
            fault_proxy.hold(b"UNLISTEN", "down")
        await anyio.to_thread.run_sync(fault_proxy.wait_held)
        async with anyio.create_task_group() as tg:

            async def subscribe() -> None:
                async with bus.subscribe("a") as subscription:
                    kit.notify("a", "x")
                    assert await kit.take(subscription, 1) == ["x"]

            tg.start_soon(subscribe)
            await anyio.wait_all_tasks_blocked()
            fault_proxy.release()


async def test_everything_that_waits_notices_a_cancellation(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:

        async def subscribe() -> None:
            async with bus.subscribe("a"):
                pass

        async def receive_until_noticed(receive=subscription.receive) -> None:
            for _ in range(33):  # what is there needs no waiting: at most 32 of these
                await receive()

        async def receive_some_until_noticed() -> None:
            await receive_until_noticed(lambda: subscription.receive_many(1))

        kit.notify("a", *map(str, range(200)))
        await kit.eventually(lambda: subscription.statistics().depth == 200)
        for operation in (
            subscribe,
            bus.wait_live,
            lambda: bus.wait_generation(0),
            bus.ping,
            receive_until_noticed,
            receive_some_until_noticed,
        ):
            await assert_cancellable(operation)
        received = subscription.statistics().received
        assert await kit.take(subscription, 1) == [str(received)]  # none is lost by it
        while subscription.statistics().depth:
            subscription.receive_nowait()
        await assert_cancellable(subscription.receive)
        await assert_cancellable(subscription.receive_many)


async def test_figures(kit) -> None:
    async with open_notify_bus(kit.dsn, channels=["s"], heartbeat=0.05) as bus:
        async with bus.subscribe("a", buffer=2) as one, bus.subscribe("a") as two:
            kit.notify("a", "1", "2", "3")
            kit.notify("s", "")
            await kit.eventually(lambda: bus.statistics().received == 4)
            assert await kit.take(two, 1) == ["1"]
            figures = bus.statistics()
            assert figures.dispatched == 6
            assert figures.dropped == 1
            assert (figures.subscribers, figures.channels) == (2, 2)
            assert (figures.reconnects, figures.attempts) == (0, 1)
            assert figures.last_error is None
            assert figures.last_received_at is not None
            assert (one.statistics().depth, one.statistics().lost) == (2, 1)
            assert (two.statistics().depth, two.statistics().received) == (2, 1)
        figures = bus.statistics()
        assert (figures.dispatched, figures.dropped, figures.subscribers) == (6, 1, 0)
        await kit.eventually(lambda: bus.statistics().heartbeat_rtt is not None)
        assert 0 < (bus.statistics().heartbeat_rtt or 0) < 5


async def test_figures_never_go_back(kit) -> None:
    """What nobody will receive any more was for somebody all the same."""
    async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
        async with bus.subscribe("a", buffer=2) as subscription:
            kit.notify("a", "1", "2", "3")
            await kit.eventually(lambda: bus.statistics().received == 3)
            await subscription.aclose()
            figures = bus.statistics()
            assert (figures.dispatched, figures.dropped) == (3, 1)
            told = subscription.statistics()
            assert (told.received, told.lost, told.depth) == (0, 1, 0)
        figures = bus.statistics()
        assert (figures.dispatched, figures.dropped) == (3, 1)


async def test_as_a_task(kit) -> None:
    async with anyio.create_task_group() as tg:
        bus = await tg.start(run_notify_bus, kit.dsn)
        async with bus.subscribe("a") as subscription:
            kit.notify("a", "x")
            assert await kit.take(subscription, 1) == ["x"]
        tg.cancel_scope.cancel()
    assert bus.state is BusState.CLOSED


async def test_closed_by_its_owner(kit) -> None:
    """Who still holds something of a closed bus: what is buffered, then the end."""
    async with anyio.create_task_group() as tg:
        opened: dict[str, Any] = {}

        async def hold() -> None:
            bus = opened["bus"]
            async with bus.subscribe("a") as subscription, bus.subscribe("z") as ended:
                await ended.aclose()
                opened["entered"].set()
                await opened["closed"].wait()
                assert await kit.take(subscription, 2) == ["1", "2"]
                for _ in range(2):
                    with pytest.raises(anyio.EndOfStream):
                        await subscription.receive()
                with pytest.raises(anyio.EndOfStream):
                    subscription.receive_nowait()

        async def wait_in(name: str, ending: type[Exception]) -> None:
            bus = opened["bus"]
            with pytest.raises(ending):
                if name == "stream":
                    async with bus.subscribe("b") as subscription:
                        await subscription.receive()
                elif name == "reconnects":
                    async with bus.subscribe_reconnects() as stream:
                        await stream.receive()
                else:
                    await bus.wait_generation(1)

        async with open_notify_bus(kit.dsn) as bus:
            opened.update(bus=bus, entered=anyio.Event(), closed=anyio.Event())
            tg.start_soon(hold)
            tg.start_soon(wait_in, "stream", anyio.EndOfStream)
            tg.start_soon(wait_in, "reconnects", anyio.EndOfStream)
            tg.start_soon(wait_in, "generation", anyio.ClosedResourceError)
            await opened["entered"].wait()
            kit.notify("a", "1", "2")
            await kit.eventually(lambda: bus.statistics().received == 2)
        opened["closed"].set()
    for operation in (bus.wait_live, lambda: bus.wait_generation(0), bus.ping):
        with pytest.raises(anyio.ClosedResourceError):
            await operation()
    with pytest.raises(anyio.ClosedResourceError):
        async with bus.subscribe("a"):
            pass


async def test_an_error_of_the_block_comes_out_bare(kit) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a"):
            raise ZeroDivisionError


async def test_the_owners_cancellation_leaves_nothing(kit) -> None:
    with anyio.CancelScope() as scope:
        async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
            scope.cancel()
            await subscription.receive()
    assert scope.cancelled_caught
    assert bus.state is BusState.CLOSED  # the session: see the fixture's leak check


async def test_a_cancelled_owners_clean_up_waits_for_nothing(kit) -> None:
    """The bus is closed at once: nothing more can come, and nobody is to wait for it."""
    with kit.events() as events, anyio.CancelScope() as scope:
        async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
            kit.notify("a", "1")
            await kit.eventually(lambda: bus.statistics().received == 1)
            scope.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.fail_after(20, shield=True):
                    assert await kit.take(subscription, 1) == ["1"]
                    with pytest.raises(anyio.EndOfStream):
                        await subscription.receive()
                    for operation in (bus.wait_live, bus.ping):
                        with pytest.raises(anyio.ClosedResourceError):
                            await operation()
    assert scope.cancelled_caught
    assert [name for name, _ in events if name.startswith("bus.")] == [
        "bus.connected",
        "bus.closed",
    ]


async def test_entering_the_stream_of_reconnects_is_a_checkpoint(kit) -> None:
    entered = False
    async with open_notify_bus(kit.dsn) as bus:
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with bus.subscribe_reconnects():
                entered = True
    assert not entered


async def test_a_refused_channel_is_its_subscribers_alone(kit, pg_cluster) -> None:
    dsn = kit.dsn
    name = f"{psycopg.conninfo.conninfo_to_dict(dsn)['dbname']}_latin1"
    pg_cluster.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    latin1 = pg_cluster.dsn(name)
    try:
        with kit.events() as events:
            async with open_notify_bus(latin1, channels=["s"]) as bus:
                async with anyio.create_task_group() as tg:

                    async def refused() -> None:
                        with pytest.raises(ListenRejectedError, match="日本") as caught:
                            async with bus.subscribe("a", "日本"):
                                pass
                        assert isinstance(caught.value.__cause__, psycopg.Error)
                        assert caught.value.channel == "日本"
                        assert caught.value.sqlstate == caught.value.__cause__.sqlstate == "22P05"

                    async def fine(channel: str) -> None:
                        async with bus.subscribe(channel):
                            pass

                    tg.start_soon(refused)
                    for channel in "abcdé":
                        tg.start_soon(fine, channel)
                assert bus.generation == 1
                assert bus.statistics().subscribers == 0
                assert await kit.listening(bus) == {"s", "a", "b", "c", "d", "é"}
            assert [
                facts["channel"] for name, facts in events if name == "bus.listen_rejected"
            ] == ["日本"]
        for mode in ("fail", "retry", "background"):
            with pytest.raises(ListenRejectedError, match="日本"):
                async with open_notify_bus(latin1, channels=["日本"], initial_connect=mode):
                    await anyio.sleep_forever()
    finally:
        pg_cluster.drop_database(latin1)


# ---------------------------------------------------------------- publishing


async def test_publishing_belongs_to_the_transaction(kit) -> None:
    numbers = Channel("n", decode=int, encode=str)
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a", numbers) as subscription:
        async with await connect(kit.dsn) as conn:
            await notify(conn, "a")
            await notify(conn, "a", "1")
            await notify(conn, numbers, 7)
            assert await kit.take(subscription, 3) == ["", "1", "7"]
            with pytest.raises(ZeroDivisionError):
                async with conn.transaction():
                    await notify(conn, "a", "rolled back")
                    raise ZeroDivisionError
            async with conn.transaction():
                items: list[tuple[Any, Any]] = [("a", f"{i}") for i in range(1000)]
                assert await notify_many(conn, [*items, (numbers, 5), ("a", "0")]) == 1002
                await anyio.sleep(0.05)
                with pytest.raises(anyio.WouldBlock):
                    subscription.receive_nowait()
            await kit.eventually(lambda: bus.statistics().received == 3 + 1001)
            assert await kit.take(subscription, 257) == [
                Gap(reason="lagged", generation=1, lost=1001 - 256),
                *(f"{i}" for i in range(745, 1000)),
                "5",
            ]
            assert await notify_many(conn, []) == 0


async def test_publishing_checks_before_it_sends(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        async with await connect(kit.dsn) as conn:
            with pytest.raises(PayloadTooLargeError):
                await notify(conn, "a", "x" * 8000)
            with pytest.raises(ChannelNameError):
                await notify(conn, "", "x")
            with pytest.raises(PayloadTooLargeError):
                await notify_many(conn, [("a", "fine"), ("a", "x" * 8000)])
            with pytest.raises(TypeError):
                await notify_many(conn, [("a", 1)])
            with pytest.raises(ValueError, match="NUL"):
                await notify(conn, "a", "\0")
            await notify(conn, "a", "last")
        assert await kit.take(subscription, 1) == ["last"]


@pytest.mark.parametrize("initial_connect", ["fail", "retry"])
async def test_a_scope_cancelled_at_every_await(kit, cancel_at, initial_connect) -> None:
    """Also where the bus meets the cancellation first: who waited was told that it is closed."""
    has_left = False

    async def use() -> None:
        nonlocal has_left
        async with anyio.create_task_group() as tasks:
            bus = await tasks.start(
                partial(run_notify_bus, kit.dsn, initial_connect=initial_connect)
            )
            async with bus.subscribe("a"):
                await bus.ping()
            tasks.cancel_scope.cancel()
        has_left = True

    for number in range(100):
        with anyio.fail_after(20), anyio.CancelScope() as scope:
            await cancel_at(use(), scope, number)
        if has_left:
            break
        assert scope.cancelled_caught
    assert number >= 3


async def test_asyncios_own_cancellation_at_every_await(kit, cancel_at, anyio_backend_name) -> None:
    """Also while the bus is left: it was lost there, or no longer counted."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than that of scopes")

    async def use() -> None:
        async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a"):
            await bus.ping()
        left.append(number)

    left: list[int] = []
    for number in range(100):

        async def run(number=number) -> None:
            await cancel_at(use(), asyncio.current_task(), number)

        task = asyncio.ensure_future(run())
        with anyio.fail_after(20):
            await asyncio.wait([task])
        if not task.cancelled():
            break
        assert task.cancelling() == 1
    assert left == [number]  # for the last one there was nothing to cancel
    assert number >= 4
    assert task.cancelling() == 0
