"""Publishing after the commit: order, batches, bounds, and what leaving does."""

from __future__ import annotations

import asyncio
import math
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from pgstructured import Channel, connect, notify
from pgstructured.errors import (
    ChannelNameError,
    ConninfoError,
    PayloadTooLargeError,
    UndeliveredError,
)
from pgstructured.notify import Publisher
from pgstructured.testing import assert_cancellable

open_publisher = partial(notify.open_publisher, flush_timeout=20)  # for a busy machine
REFUSED = "host=127.0.0.1 port=1"


async def test_order_and_batches(kit, heard) -> None:
    with kit.events() as events:
        async with open_publisher(kit.dsn, interval=30) as publisher:
            for index in range(2500):
                publisher.publish_nowait("a", str(index))
            assert publisher.statistics().pending == 2500
            await publisher.flush()
            figures = publisher.statistics()
            assert (figures.delivered, figures.batches, figures.retries) == (2500, 3, 0)
            assert (figures.pending, figures.in_flight, figures.refused) == (0, 0, 0)
            assert figures.last_error is None
            assert "delivered=2500" in repr(publisher)
    assert heard() == [("a", str(index)) for index in range(2500)]
    sent = [facts["count"] for name, facts in events if name == "publisher.sent"]
    assert sent == [1000, 1000, 500]
    assert not [name for name, _ in events if name == "publisher.undelivered"]


async def test_payloads_and_channels_arrive_as_they_are(kit, heard) -> None:
    odd = ["", "'", '"', "\\", "{a,b}", "NULL", "é😀€", " ", "$1 %s", "\x01\n\t", "x" * 7999]
    async with open_publisher(kit.dsn) as publisher:
        for payload in odd:
            await publisher.publish("a", payload)
        await publisher.publish('b"\\', "x")
        await publisher.publish("b")
        await publisher.publish(Channel.json("b"), {"é": [1, None]})
        publisher.publish_nowait(Channel("b", encode=str, decode=int), 7)
    told = heard()
    assert [payload for channel, payload in told if channel == "a"] == odd
    assert told[len(odd) :] == [('b"\\', "x"), ("b", ""), ("b", '{"é":[1,null]}'), ("b", "7")]


async def test_equal_ones_of_a_batch_are_delivered_once(kit, heard) -> None:
    async with open_publisher(kit.dsn, interval=30) as publisher:
        for payload in ("1", "2", "1"):
            await publisher.publish("a", payload)
        await publisher.flush()
        await publisher.publish("a", "1")
        await publisher.flush()
        assert publisher.statistics().delivered == 4
    assert heard() == [("a", "1"), ("a", "2"), ("a", "1")]


async def test_a_batch_waits_for_more(kit, heard) -> None:
    async with open_publisher(kit.dsn, interval=1.0) as publisher:
        for payload in "123":
            await publisher.publish("a", payload)
            await anyio.sleep(0.01)
        await kit.eventually(lambda: publisher.statistics().delivered == 3)
        assert publisher.statistics().batches == 1
    assert heard() == [("a", "1"), ("a", "2"), ("a", "3")]


async def test_a_full_batch_waits_for_nothing(kit) -> None:
    async with open_publisher(kit.dsn, interval=30, max_batch=3) as publisher:
        for index in range(7):
            await publisher.publish("a", str(index))
        await kit.eventually(lambda: publisher.statistics().delivered == 6)
        assert publisher.statistics().pending == 1


async def test_where_nothing_more_has_room_nothing_is_waited_for(kit, heard) -> None:
    async with open_publisher(kit.dsn, interval=30, max_pending=3) as publisher:
        with anyio.fail_after(20):
            for index in range(10):
                await publisher.publish("a", str(index))
    assert heard() == [("a", str(index)) for index in range(10)]


async def test_no_interval(kit, heard) -> None:
    async with open_publisher(kit.dsn, interval=0) as publisher:
        for index in range(10):
            await publisher.publish("a", str(index))
            await publisher.flush()
    assert heard() == [("a", str(index)) for index in range(10)]


async def test_leaving_sends_what_is_in_line(kit, heard) -> None:
    with anyio.fail_after(20):
        async with open_publisher(kit.dsn, interval=30) as publisher:
            publisher.publish_nowait("a", "1")
    assert heard() == [("a", "1")]


async def test_nothing_to_send(kit) -> None:
    async with open_publisher(kit.dsn) as publisher:
        await publisher.flush()
    async with open_publisher(REFUSED):  # the server is not needed for it
        pass


async def test_many_tasks_share_it(kit, heard) -> None:
    async with open_publisher(kit.dsn, max_batch=50, max_pending=20) as publisher:

        async def publish(name: str) -> None:
            for index in range(100):
                await publisher.publish(name, str(index))

        async with anyio.create_task_group() as tasks:
            for name in "ab":
                tasks.start_soon(publish, name)
    told = heard()
    for name in "ab":
        assert [payload for channel, payload in told if channel == name] == [
            str(index) for index in range(100)
        ]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "kind", "complaint"),
    [
        (("",), ChannelNameError, "must not be empty"),
        (("a" * 64,), ChannelNameError, "64 bytes"),
        (("a", "x" * 8000), PayloadTooLargeError, "8000 bytes"),
        (("a", "é" * 4000), PayloadTooLargeError, "8000 bytes"),
        (("a", "x\0y"), ValueError, "must not have a NUL"),
        (("a", "\ud800"), ValueError, "surrogates not allowed"),
        (("a", 1), TypeError, "must be text, not int"),
        ((1, "x"), TypeError, "a channel is a str or a Channel, not int"),
    ],
)
async def test_what_is_wrong_is_said_at_the_call(kit, heard, arguments, kind, complaint) -> None:
    async with open_publisher(kit.dsn) as publisher:
        with pytest.raises(kind, match=complaint):
            publisher.publish_nowait(*arguments)
        with pytest.raises(kind, match=complaint):
            await publisher.publish(*arguments)
        assert publisher.statistics().pending == 0
        await publisher.publish("a", "after it")
    assert heard() == [("a", "after it")]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"interval": -1}, "interval must be 0 or more seconds"),
        ({"interval": None}, "interval must be 0 or more seconds"),
        ({"flush_timeout": math.inf}, "flush_timeout must be 0 or more seconds"),
        ({"flush_timeout": math.nan}, "flush_timeout must be 0 or more seconds"),
        ({"max_batch": 0}, "max_batch must be a whole number above 0"),
        ({"max_batch": True}, "max_batch must be a whole number above 0"),
        ({"max_pending": 1.5}, "max_pending must be a whole number above 0"),
    ],
)
async def test_options(options, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        async with open_publisher(REFUSED, **options):
            pytest.fail("entered")


@pytest.mark.parametrize(
    ("source", "kind"),
    [("foo", ConninfoError), ("env:PGSTRUCTURED_MISSING", ConninfoError), (1, TypeError)],
)
async def test_a_source_that_can_never_work(source, kind) -> None:
    with pytest.raises(kind):
        async with open_publisher(source):
            await anyio.sleep(10)


def test_it_is_not_made_by_hand() -> None:
    with pytest.raises(TypeError, match="no public constructor"):
        Publisher()  # type: ignore[call-arg]


# ---------------------------------------------------------------- bounds


async def test_backpressure(kit, heard, fault_proxy) -> None:
    """Pending is bounded, the batch in flight not counted; who waits comes in its turn."""
    async with open_publisher(
        fault_proxy.dsn(kit.dsn), interval=0, max_batch=2, max_pending=3, flush_timeout=20
    ) as publisher:
        await publisher.publish("a", "first")
        await publisher.flush()
        fault_proxy.freeze()
        for index in range(2):
            await publisher.publish("a", str(index))
        await kit.eventually(lambda: publisher.statistics().in_flight > 0)
        room = 3 - publisher.statistics().pending
        for index in range(2, 2 + room):
            publisher.publish_nowait("a", str(index))
        with pytest.raises(anyio.WouldBlock):
            publisher.publish_nowait("a", "too much")
        with anyio.move_on_after(0.05) as scope:
            await publisher.publish("a", "cancelled")
        assert scope.cancelled_caught
        assert publisher.statistics().pending == 3
        done = []

        async def publish(index: int) -> None:
            await publisher.publish("a", str(index))
            done.append(index)

        async with anyio.create_task_group() as tasks:
            for index in range(2 + room, 6 + room):
                tasks.start_soon(publish, index)
                await kit.eventually(
                    lambda index=index: publisher.statistics().tasks_waiting == index - room - 1
                )
            with pytest.raises(anyio.WouldBlock):
                publisher.publish_nowait("a", "out of turn")
            assert done == []
            fault_proxy.thaw()
    assert done == list(range(2 + room, 6 + room))
    assert heard() == [("a", "first"), *(("a", str(index)) for index in range(6 + room))]


# ---------------------------------------------------------------- cancellation


async def test_a_pending_cancellation_is_noticed(kit, heard) -> None:
    async def enter() -> None:
        async with open_publisher(kit.dsn):
            pytest.fail("entered")

    await assert_cancellable(enter)
    async with open_publisher(kit.dsn) as publisher:
        await assert_cancellable(lambda: publisher.publish("a", "cancelled"))
        assert publisher.statistics().pending == 0
        await assert_cancellable(publisher.flush)  # with nothing to wait for
        await publisher.publish("a", "x")
        await assert_cancellable(publisher.flush)
    assert heard() == [("a", "x")]


async def test_cancelled_at_every_moment(kit, heard) -> None:
    """What was published, and only that, arrives in order whenever a call is cancelled."""
    published = []
    async with open_publisher(kit.dsn, interval=0.001, max_batch=3, max_pending=2) as publisher:
        for turns in range(60):
            with anyio.CancelScope() as scope:

                async def work() -> None:
                    for number in range(5):
                        payload = f"{turns}.{number}"  # noqa: B023 - it ends with its turn
                        await publisher.publish("a", payload)
                        published.append(payload)
                    await publisher.flush()

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(work)
                    for _ in range(turns):
                        await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
            assert not scope.cancelled_caught
        await publisher.flush()
        assert publisher.statistics().tasks_waiting == 0
        publisher.publish_nowait("a", "1")
        publisher.publish_nowait("a", "2")
        with pytest.raises(anyio.WouldBlock):  # no room was lost or found on the way
            publisher.publish_nowait("a", "3")
    assert heard() == [("a", payload) for payload in (*published, "1", "2")]


async def test_its_owner_is_cancelled(kit, heard) -> None:
    with anyio.CancelScope() as scope:
        async with open_publisher(kit.dsn, interval=30) as publisher:
            publisher.publish_nowait("a", "before")
            scope.cancel()
            await anyio.sleep(10)
    assert scope.cancelled_caught
    assert heard() == [("a", "before")]


async def test_its_owner_is_cancelled_and_the_server_is_away(kit) -> None:
    with kit.events() as events, anyio.fail_after(10), anyio.CancelScope() as scope:
        async with open_publisher(REFUSED, flush_timeout=0.1) as publisher:
            publisher.publish_nowait("a", "lost")
            scope.cancel()
            await anyio.sleep(10)
    assert scope.cancelled_caught
    assert [facts["count"] for name, facts in events if name == "publisher.undelivered"] == [1]


# ---------------------------------------------------------------- leaving


async def test_its_owner_is_cancelled_by_asyncio_itself(kit, anyio_backend_name) -> None:
    """`Task.cancel` knows no shields: it cuts the flush short, and leaving must not hang."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than that of scopes")
    flushing = asyncio.Event()

    async def own() -> None:
        async with open_publisher(REFUSED, flush_timeout=30) as publisher:
            publisher.publish_nowait("a", "1")
            flushing.set()

    task = asyncio.create_task(own())
    await flushing.wait()
    task.cancel()
    with anyio.fail_after(20), pytest.raises(asyncio.CancelledError):
        await task


async def test_what_was_not_delivered_is_told(kit) -> None:
    with kit.events() as events, anyio.fail_after(10):
        with pytest.raises(UndeliveredError, match="3 notifications") as caught:
            async with open_publisher(REFUSED, flush_timeout=0.1) as publisher:
                for index in range(3):
                    await publisher.publish("a", str(index))
                await kit.eventually(lambda: publisher.statistics().last_error is not None)
    assert caught.value.count == 3
    assert "refused" in str(caught.value.__cause__)
    ((_, facts),) = (event for event in events if event[0] == "publisher.undelivered")
    assert facts == {"count": 3, "error": caught.value.__cause__}


async def test_no_time_to_flush(kit) -> None:
    with pytest.raises(UndeliveredError, match=r"flush_timeout \(0 s\) was over") as caught:
        async with open_publisher(kit.dsn, flush_timeout=0) as publisher:
            publisher.publish_nowait("a", "x")
    assert caught.value.count == 1
    assert caught.value.__cause__ is None


async def test_an_error_of_the_body_comes_out_alone(kit, heard) -> None:
    with kit.events() as events, anyio.fail_after(10):
        for source, flush_timeout in ((kit.dsn, 9), (REFUSED, 0.1)):
            with pytest.raises(ZeroDivisionError):
                async with open_publisher(source, flush_timeout=flush_timeout) as publisher:
                    publisher.publish_nowait("a", "x")
                    raise ZeroDivisionError
    assert heard() == [("a", "x")]
    assert [facts["count"] for name, facts in events if name == "publisher.undelivered"] == [1]


async def test_once_left_nothing_can_be_published(kit, fault_proxy) -> None:
    told: list[str] = []

    async def publish() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await publisher.publish("a", "waits")
        told.append("publish")

    async def flush() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await publisher.flush()
        told.append("flush")

    async with anyio.create_task_group() as tasks:
        with pytest.raises(UndeliveredError) as caught:
            async with open_publisher(
                REFUSED, interval=0, max_batch=1, max_pending=1, flush_timeout=0.1
            ) as publisher:
                publisher.publish_nowait("a", "1")
                # There is no session, so nothing ever gets in flight.
                tasks.start_soon(publish)
                tasks.start_soon(flush)
                await kit.eventually(lambda: publisher.statistics().tasks_waiting == 1)
    assert caught.value.count == 1
    assert sorted(told) == ["flush", "publish"]
    for call in (lambda: publisher.publish("a"), publisher.flush):
        with pytest.raises(anyio.ClosedResourceError):
            await call()
    with pytest.raises(anyio.ClosedResourceError):
        publisher.publish_nowait("a")


# ---------------------------------------------------------------- after a commit


async def test_after_the_commit(kit, heard) -> None:
    kit.execute("CREATE TABLE orders (id int)")
    async with (
        await connect(kit.dsn) as connection,
        open_publisher(kit.dsn, interval=0) as publisher,
    ):

        async def place(number: int) -> None:
            await connection.execute("INSERT INTO orders VALUES (%s)", [number])
            connection.after_commit(lambda: publisher.publish_nowait("a", str(number)))

        async with connection.transaction():
            await place(1)
            await publisher.flush()
            assert publisher.statistics().delivered == 0
        await publisher.flush()
        assert publisher.statistics().delivered == 1
        with pytest.raises(ZeroDivisionError):
            async with connection.transaction():
                await place(2)
                raise ZeroDivisionError
        async with connection.transaction():
            await place(3)
            with pytest.raises(ZeroDivisionError):
                async with connection.transaction():
                    await place(4)
                    raise ZeroDivisionError
            await place(5)
        with anyio.CancelScope() as scope:
            async with connection.transaction():
                await place(6)
                scope.cancel()
                await connection.execute("SELECT 1")
        await place(7)  # no transaction: it is committed
    assert kit.execute("SELECT id FROM orders ORDER BY id") == [(1,), (3,), (5,), (7,)]
    assert heard() == [("a", "1"), ("a", "3"), ("a", "5"), ("a", "7")]


async def test_after_a_commit_there_may_be_no_room(kit) -> None:
    kit.execute("CREATE TABLE orders (id int)")
    with pytest.raises(UndeliveredError):
        async with (
            await connect(kit.dsn) as connection,
            open_publisher(REFUSED, max_pending=1, flush_timeout=0) as publisher,
        ):
            publisher.publish_nowait("a")
            with pytest.raises(anyio.WouldBlock):
                async with connection.transaction():
                    await connection.execute("INSERT INTO orders VALUES (1)")
                    connection.after_commit(lambda: publisher.publish_nowait("a"))
    assert kit.execute("SELECT id FROM orders") == [(1,)]  # the commit stands
