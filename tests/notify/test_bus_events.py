"""What the bus tells those who observe it: each event, with the facts that the table lists."""

from __future__ import annotations

import anyio
import psycopg
import pytest

from pgstructured.errors import BusUnavailableError, DeliveryError, ListenRejectedError
from pgstructured.notify import open_notify_bus
from pgstructured.observe import EVENTS


def of(events, name):
    """Return the facts of all events of one name, and check that they are those promised."""
    found = [facts for each, facts in events if each == name]
    for facts in found:
        assert tuple(sorted(facts)) == tuple(sorted(EVENTS[name].facts))
    return found


async def test_connected_lost_reconnected_closed(kit) -> None:
    with kit.events() as events:
        async with open_notify_bus(kit.dsn, channels=["a"], backoff=kit.quick) as bus:
            pids = [bus.backend_pid]
            kit.kill(bus)
            await bus.wait_generation(1)
            pids.append(bus.backend_pid)
    [connected] = of(events, "bus.connected")
    assert connected == {"generation": 1, "backend_pid": pids[0], "channels": 1}
    [lost] = of(events, "bus.lost")
    assert lost["generation"] == 1
    assert isinstance(lost["error"], psycopg.errors.AdminShutdown)
    [again] = of(events, "bus.reconnected")
    assert again.pop("outage") > 0
    assert again == {"generation": 2, "backend_pid": pids[1], "channels": 1}
    assert of(events, "bus.closed") == [{"generation": 2}]


async def test_attempts_that_fail(kit, fault_proxy) -> None:
    with kit.events() as events:
        async with open_notify_bus(
            fault_proxy.dsn(kit.dsn), name="billing", backoff=kit.quick
        ) as bus:
            fault_proxy.refuse()
            fault_proxy.reset()
            await kit.eventually(lambda: bus.statistics().attempts > 3)
            fault_proxy.accept()
            await bus.wait_generation(1)
    failed = of(events, "supervise.attempt_failed")
    assert {facts["what"] for facts in failed} == {"pgstructured/notify/billing"}
    assert all(isinstance(facts["error"], psycopg.OperationalError) for facts in failed)
    assert len(failed) > 2


async def test_a_loss_without_a_word_has_a_cause(kit, fault_proxy) -> None:
    with kit.events() as events:
        async with open_notify_bus(fault_proxy.dsn(kit.dsn), backoff=kit.quick) as bus:
            fault_proxy.fin()
            await bus.wait_generation(1)
    [lost] = of(events, "bus.lost")
    assert isinstance(lost["error"], psycopg.OperationalError)


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "close"])
async def test_lag(kit, overflow) -> None:
    """At once, when it begins; and when it has doubled, so that nobody's log is flooded."""
    with kit.events() as events:
        async with open_notify_bus(kit.dsn) as bus:
            async with bus.subscribe("b", "a", buffer=5, overflow=overflow) as subscription:
                for count in range(1, 41):
                    kit.notify("a", "x")
                    await kit.eventually(lambda: bus.statistics().received == count)  # noqa: B023
                assert of(events, "bus.gap") == []  # nobody has been told yet
                assert subscription.statistics().lost == (1 if overflow == "close" else 35)
    lagged = of(events, "bus.lagged")
    assert [facts["lost"] for facts in lagged] == (
        [1] if overflow == "close" else [1, 2, 4, 8, 16, 32]
    )
    assert all(facts["channels"] == ["a", "b"] for facts in lagged)
    assert all(facts["overflow"] == overflow for facts in lagged)


async def test_no_lag_where_only_the_latest_is_wanted(kit) -> None:
    with kit.events() as events:
        async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a", overflow="latest") as stream:
            kit.notify("a", "1", "2", "3")
            await kit.eventually(lambda: bus.statistics().received == 3)
            assert await kit.take(stream, 1) == ["3"]
    assert of(events, "bus.lagged") == of(events, "bus.gap") == []


async def test_a_gap_is_told_when_its_subscriber_is(kit) -> None:
    with kit.events() as events:
        async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a", buffer=1) as stream:
            kit.notify("a", "1", "2", "3")
            await kit.eventually(lambda: bus.statistics().received == 3)
            await stream.receive()
    assert of(events, "bus.gap") == [{"reason": "lagged", "generation": 1, "lost": 2}]


async def test_listen_rejected(kit, monkeypatch) -> None:
    from pgstructured.notify import _routes

    monkeypatch.setattr(_routes, "quote_name", lambda name: "no name")
    with kit.events() as events:
        async with open_notify_bus(kit.dsn) as bus:
            with pytest.raises(ListenRejectedError):
                async with bus.subscribe("a"):
                    pytest.fail("entered")
    [rejected] = of(events, "bus.listen_rejected")
    assert rejected["channel"] == "a"
    assert isinstance(rejected["error"], psycopg.errors.SyntaxError)


async def test_probe_failed(kit, pgbouncer_transaction) -> None:
    with kit.events() as events, anyio.fail_after(20):
        with pytest.raises(DeliveryError) as caught:
            async with open_notify_bus(pgbouncer_transaction.dsn(kit.dsn), connect_timeout=2):
                pytest.fail("entered")
    assert of(events, "bus.probe_failed") == [{"error": caught.value}]


async def test_the_end_of_a_bus_that_died(kit, fault_proxy) -> None:
    with kit.events() as events, pytest.raises(BusUnavailableError):
        async with open_notify_bus(
            fault_proxy.dsn(kit.dsn), max_outage=1.5, backoff=kit.quick
        ) as bus:
            fault_proxy.refuse()
            fault_proxy.reset()
            await bus.wait_generation(1)
    names = [name for name, _ in events if name.startswith("bus.")]
    assert names == ["bus.connected", "bus.lost", "bus.closed"]


async def test_an_instrument_that_fails_disturbs_nobody(kit) -> None:
    from pgstructured.observe import instrumented

    def fail(event) -> None:
        raise ZeroDivisionError(event.name)

    with instrumented(fail):
        async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
            async with bus.subscribe("a", buffer=1) as stream:
                kit.notify("a", "1", "2")
                await kit.eventually(lambda: bus.statistics().received == 2)
                kit.kill(bus)
                await bus.wait_generation(1)
                kit.notify("a", "3")
                await kit.eventually(lambda: bus.statistics().received == 3)
                assert (await kit.take(stream, 2))[1] == "3"
