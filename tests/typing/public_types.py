"""What type checkers make of the public interface; checked by mypy and pyright, never run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

from psycopg.rows import DictRow, TupleRow, dict_row

from pgstructured import (
    Channel,
    Connection,
    EventLog,
    Gap,
    HeldLock,
    LockLost,
    Notification,
    NotifyBus,
    Pool,
    Publisher,
    Subscription,
    connect,
    open_connection,
    open_notify_bus,
    open_pool,
    open_publisher,
    pg_lock,
    pg_try_lock,
)
from pgstructured.log import (
    Cursor,
    CursorStore,
    Event,
    EventId,
    Following,
    Page,
    StoredCursor,
    WakeUps,
)
from pgstructured.notify import notify

if TYPE_CHECKING:
    from pgstructured.errors import LossReason


async def connections() -> None:
    plain = await connect("")
    assert_type(plain, Connection[TupleRow])
    assert_type(await (await plain.execute("select 1")).fetchone(), TupleRow | None)
    as_dict = await connect("", row_factory=dict_row)
    assert_type(as_dict, Connection[DictRow])
    assert_type(plain.failure, BaseException | None)
    async with open_connection("", heartbeat=1) as connection:
        assert_type(connection, Connection[Any])
    async with await Connection.connect("") as stock:
        assert_type(stock, Connection[TupleRow])


async def pools() -> None:
    async with open_pool("", row_factory=dict_row) as pool:
        assert_type(pool, Pool)
        async with pool.acquire() as connection:
            assert_type(connection, Connection[Any])
        async with pool.pin(transaction=True) as connection, pool.transaction() as other:
            assert_type(other, Connection[Any])
        async with pg_lock(pool, "key") as lock:
            assert_type(lock.connection, Connection[Any] | None)


async def event_log(connection: Connection[TupleRow], bus: NotifyBus, pool: Pool) -> None:
    log = EventLog("event", schema="app")
    assert_type(await log.append(connection, "topic", {"any": "JSON"}), EventId)
    assert_type(await log.append_many(connection, [("topic", b"bytes")]), list[EventId])
    page = await log.read(connection, str(Cursor.beginning()), topics={"topic"})
    assert_type(page, Page)
    assert_type(page.events, list[Event])
    assert_type(page.cursor, Cursor)
    assert_type(await log.now(connection), Cursor)
    async with log.follow(bus, pool, page.cursor) as following, log.wake_ups(bus) as wake_ups:
        assert_type(following, Following)
        assert_type(wake_ups, WakeUps)
        async for event in following:
            assert_type(event, Event)
            assert_type(event.payload, Any)
    assert_type(await log.trim(connection, 3600), int)
    assert_type(log.cursors, CursorStore)
    assert_type(await log.cursors.load(connection, "name"), Cursor)
    assert_type(await log.cursors.list(connection), list[StoredCursor])


async def locks(connection: Connection[TupleRow]) -> None:
    async with pg_lock("", "key", shared=True) as lock:
        assert_type(lock, HeldLock)
        assert_type(await lock.wait_lost(), LockLost)
    async with pg_try_lock(connection, (1, 2)) as maybe:
        assert_type(maybe, HeldLock | None)


def reason(error: LockLost) -> LossReason:
    return error.reason


async def notifications(connection: Connection[TupleRow]) -> None:
    numbers = Channel("numbers", decode=int, encode=str)
    assert_type(numbers, Channel[int])
    async with open_notify_bus("") as bus:
        assert_type(bus, NotifyBus)
        async with bus.subscribe("a", "b") as texts:
            assert_type(texts, Subscription[str])
            assert_type(await texts.receive(), Notification[str] | Gap)
        async with bus.subscribe(numbers) as stream:
            async for item in stream:
                if not isinstance(item, Gap):
                    assert_type(item.value, int)
    await notify(connection, numbers, 42)
    async with open_publisher(connection) as publisher:
        assert_type(publisher, Publisher)
        assert_type(await publisher.publish("texts", "1"), None)
        assert_type(publisher.publish_nowait(numbers, 1), None)
