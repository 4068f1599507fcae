"""The stream: receiving, gaps as wished, every policy on overflow, every way to end."""

from __future__ import annotations

import random
from typing import Any

import anyio
import pytest

from pgstructured.errors import GapError, SubscriptionOverflowError
from pgstructured.notify import Gap, Notification, open_notify_bus


async def test_many_at_once(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a", buffer=1000) as subscription:
        kit.notify("a", *map(str, range(500)))
        await kit.eventually(lambda: subscription.statistics().depth == 500)
        assert len(await subscription.receive_many(7)) == 7
        rest = await subscription.receive_many()
        assert [each.payload for each in rest] == [str(i) for i in range(7, 500)]  # type: ignore[union-attr]
        with anyio.move_on_after(0.05) as scope:
            await subscription.receive_many()
        assert scope.cancelled_caught
        async with anyio.create_task_group() as tg:
            tg.start_soon(kit.take, subscription, 1)
            await anyio.wait_all_tasks_blocked()
            kit.notify("a", "woken")


async def test_nowait(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        with pytest.raises(anyio.WouldBlock):
            subscription.receive_nowait()
        kit.notify("a", "1")
        await kit.eventually(lambda: subscription.statistics().depth == 1)
        item = subscription.receive_nowait()
        assert isinstance(item, Notification)


async def test_a_cancelled_receiver_loses_nothing(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a", buffer=9999) as subscription:
        rng = random.Random(3)
        seen: list[str] = []
        async with anyio.create_task_group() as tg:

            async def publish() -> None:
                for i in range(300):
                    kit.notify("a", str(i))
                    if i % 7 == 0:
                        await anyio.sleep(0.001)

            tg.start_soon(publish)
            with anyio.fail_after(20):
                while len(seen) < 300:
                    with anyio.move_on_after(rng.choice([0, 0, 0.0001, 0.001])):
                        if rng.random() < 0.5:
                            seen.append((await subscription.receive()).payload)  # type: ignore[union-attr]
                        else:
                            seen += [each.payload for each in await subscription.receive_many(5)]  # type: ignore[union-attr]
        assert seen == [str(i) for i in range(300)]


async def test_receiving_lets_others_run(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a", buffer=999) as subscription:
        kit.notify("a", *map(str, range(320)))
        await kit.eventually(lambda: subscription.statistics().depth == 320)
        turns = 0
        stopped = False

        async def count() -> None:
            nonlocal turns
            while not stopped:
                turns += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tg:
            tg.start_soon(count)
            for _ in range(320):
                await subscription.receive()
            stopped = True
        assert 5 <= turns <= 40


async def test_one_receiver_at_a_time(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a", buffer=999) as subscription:
        async with anyio.create_task_group() as tg:
            tg.start_soon(kit.take, subscription, 1)
            await anyio.wait_all_tasks_blocked()
            for operation in (subscription.receive, subscription.receive_many):
                with pytest.raises(anyio.BusyResourceError):
                    await operation()
            with pytest.raises(anyio.BusyResourceError):
                subscription.receive_nowait()
            kit.notify("a", "1")
        kit.notify("a", *map(str, range(100)))
        await kit.eventually(lambda: subscription.statistics().depth == 100)
        busy = 0

        async def take_many() -> None:
            nonlocal busy
            for _ in range(40):
                try:
                    await subscription.receive()
                except anyio.BusyResourceError:  # met the other one at its checkpoint
                    busy += 1
                    await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tg:
            tg.start_soon(take_many)
            tg.start_soon(take_many)
        assert subscription.statistics().received == 81 - busy


async def test_closing_wakes_the_receiver(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        kit.notify("a", "dropped by closing")
        await kit.eventually(lambda: subscription.statistics().depth == 1)
        await subscription.aclose()
        await subscription.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await subscription.receive()
        kit.notify("a", "not for a closed one")
        assert subscription.statistics().received == 0
        async with bus.subscribe("b") as other:
            async with anyio.create_task_group() as tg:

                async def receive() -> None:
                    with pytest.raises(anyio.ClosedResourceError):
                        await other.receive_many()

                tg.start_soon(receive)
                await anyio.wait_all_tasks_blocked()
                await other.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            other.receive_nowait()


@pytest.mark.parametrize("name", ["receive", "receive_many"])
async def test_closed_while_others_have_their_turn(kit, name, monkeypatch) -> None:
    async with open_notify_bus(kit.dsn) as bus, bus.subscribe("a") as subscription:
        kit.notify("a", *map(str, range(50)))
        await kit.eventually(lambda: subscription.statistics().depth == 50)
        await kit.take(subscription, 32)

        async def turn_of_others() -> None:
            monkeypatch.undo()
            await subscription.aclose()

        monkeypatch.setattr(anyio.lowlevel, "checkpoint", turn_of_others)
        with pytest.raises(anyio.ClosedResourceError):
            await getattr(subscription, name)()


async def test_initial_gap(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus:
        async with bus.subscribe("a", initial_gap=True) as subscription:
            kit.notify("a", "1")
            first = Gap(reason="subscribed", generation=1)
            assert await kit.take(subscription, 2) == [first, "1"]


@pytest.mark.parametrize("wish", ["yield", "raise", "ignore"])
async def test_gaps_as_wished(kit, wish) -> None:
    async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
        async with bus.subscribe("a", buffer=2, gaps=wish) as subscription:
            kit.notify("a", "1", "2", "3")
            await kit.eventually(lambda: bus.statistics().received == 3)
            kit.kill(bus)
            await bus.wait_generation(1)
            kit.notify("a", "4")
            await kit.eventually(lambda: subscription.statistics().lost == 2)
            if wish == "raise":
                with pytest.raises(GapError, match="lagged, 2 notifications lost") as caught:
                    await subscription.receive()
                assert caught.value.gap == Gap(reason="lagged", generation=1, lost=2)
                assert [each.payload for each in await subscription.receive_many()] == ["3"]  # type: ignore[union-attr]
                with pytest.raises(GapError, match=r"a gap in the stream: reconnected$"):
                    await subscription.receive_many()
                assert await kit.take(subscription, 1) == ["4"]
            elif wish == "yield":
                lagged, third, again, fourth = await kit.take(subscription, 4)
                assert lagged == Gap(reason="lagged", generation=1, lost=2)
                assert (third, fourth) == ("3", "4")
                assert (again.reason, again.generation, again.lost) == ("reconnected", 2, None)
                assert again.outage > 0
            else:
                assert await kit.take(subscription, 2) == ["3", "4"]
            with pytest.raises(anyio.WouldBlock):
                subscription.receive_nowait()


async def test_an_ignored_gap_wakes_nobody(kit) -> None:
    async with open_notify_bus(kit.dsn, backoff=kit.quick) as bus:
        async with bus.subscribe("a", gaps="ignore") as subscription:
            async with anyio.create_task_group() as tg:
                tg.start_soon(kit.take, subscription, 1)
                await anyio.wait_all_tasks_blocked()
                kit.kill(bus)
                await bus.wait_generation(1)
                kit.notify("a", "1")


async def test_overflow_that_closes(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus:
        async with bus.subscribe("a", buffer=2, overflow="close") as subscription:
            kit.notify("a", "1", "2", "3")
            await kit.eventually(lambda: bus.statistics().received == 3)
            kit.notify("a", "4")
            assert await kit.take(subscription, 2) == ["1", "2"]
            with pytest.raises(SubscriptionOverflowError, match="larger buffer"):
                await subscription.receive()
            for _ in range(2):
                with pytest.raises(anyio.ClosedResourceError):
                    await subscription.receive()
            assert subscription.statistics().lost == 1


async def test_slow_subscribers_count_exactly_and_disturb_nobody(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus:
        async with (
            bus.subscribe("a", buffer=10) as oldest,
            bus.subscribe("a", buffer=10, overflow="drop_newest") as newest,
            bus.subscribe("a", overflow="latest") as latest,
            bus.subscribe("a", buffer=100_000) as fast,
        ):
            published = 0
            told: dict[Any, list[int]] = {oldest: [0, 0], newest: [0, 0], latest: [0, 0]}
            rng = random.Random(11)

            async def consume(stream) -> None:
                while True:
                    item = await stream.receive()
                    if isinstance(item, Gap):
                        assert item.reason == "lagged"
                        assert item.lost is not None
                        told[stream][1] += item.lost
                    else:
                        told[stream][0] += 1
                    if rng.random() < 0.05:
                        await anyio.sleep(0.002)

            async with anyio.create_task_group() as tg:
                for stream in told:
                    tg.start_soon(consume, stream)
                for _ in range(60):
                    count = rng.randrange(1, 200)
                    kit.notify("a", *(str(published + i) for i in range(count)))
                    published += count
                    await anyio.sleep(0.002)
                await kit.eventually(
                    lambda: (
                        bus.statistics().received == published
                        # A gap may be the last item, and takes no place.
                        and all(sum(told[stream]) == published for stream in (oldest, newest))
                        and told[latest][0] + latest.statistics().lost == published
                    )
                )
                tg.cancel_scope.cancel()
            for stream in (oldest, newest):
                received, lost = told[stream]
                assert received + lost == published
                assert (received, lost) == (
                    stream.statistics().received,
                    stream.statistics().lost,
                )
                assert lost > 0
            assert told[latest][1] == 0  # it makes no lag gaps
            assert told[latest][0] + latest.statistics().lost == published
            assert [each.payload for each in await fast.receive_many()] == [  # type: ignore[union-attr]
                str(i) for i in range(published)
            ]
            assert kit.execute("SELECT pg_notification_queue_usage()") == [(0.0,)]


async def test_where(kit) -> None:
    async with open_notify_bus(kit.dsn) as bus:
        async with bus.subscribe("a", where=lambda each: int(each.payload) % 2 == 0) as even:
            kit.notify("a", *map(str, range(6)))
            await kit.eventually(lambda: bus.statistics().received == 6)
            kit.notify("a", "7")
            await kit.eventually(lambda: bus.statistics().received == 7)
            kit.notify("a", "8")
            assert await kit.take(even, 4) == ["0", "2", "4", "8"]
            assert even.statistics().lost == 0
            kit.notify("a", "10", "x", "12")
            assert await kit.take(even, 1) == ["10"]
            with pytest.raises(ValueError, match="invalid literal"):
                await even.receive()
            with pytest.raises(anyio.ClosedResourceError):
                await even.receive()
        async with bus.subscribe("a") as other:  # the bus did not mind
            kit.notify("a", "x")
            assert await kit.take(other, 1) == ["x"]
