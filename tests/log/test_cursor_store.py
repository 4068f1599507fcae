"""Stored cursors: everything exactly once."""

from __future__ import annotations

from datetime import timedelta

import anyio
import psycopg
import pytest
from psycopg import IsolationLevel

from pgstructured import connect
from pgstructured.errors import CursorExpiredError
from pgstructured.log import Cursor, CursorStore, StoredCursor

BEGINNING = Cursor.beginning()


async def test_a_cursor_is_kept(conn, other, log, kit):
    store = log.cursors
    assert isinstance(store, CursorStore)
    await log.append_many(conn, [("t", n) for n in range(4)])
    async with conn.transaction():
        cursor = await store.load(conn, "mailer")
        page = await log.read(conn, cursor, limit=3)
        await store.save(conn, "mailer", str(page.cursor))
    assert await store.load(other, "mailer", for_update=False) == page.cursor
    assert (await kit.read_all(log, other, page.cursor))[0] == [3]
    await store.save(conn, "auditor", await log.now(conn))
    before = await kit.fetch(conn, "SELECT clock_timestamp()")
    stored = await store.list(conn)
    assert [each.name for each in stored] == ["auditor", "mailer"]
    assert all(isinstance(each, StoredCursor) for each in stored)
    assert stored[1].cursor == page.cursor
    assert timedelta(0) <= before - stored[1].saved_at < timedelta(seconds=kit.soon)
    assert await store.delete(conn, "mailer")
    assert not await store.delete(conn, "mailer")


async def test_a_new_name_begins_at_the_beginning_and_keeps_from_then_on(conn, log, kit):
    await log.append(conn, "t", "before")
    await log.trim(conn, 0)
    async with conn.transaction():
        await log.cursors.load(conn, "a")
    await log.append(conn, "t", 1)
    assert await log.trim(conn, 0) == 0  # it has not seen it
    cursor = await log.cursors.load(conn, "a", for_update=False)
    assert cursor != BEGINNING
    assert (await kit.read_all(log, conn, cursor))[0] == [1]


async def test_a_new_name_begins_elsewhere(conn, log, kit):
    await log.append(conn, "t", "before")
    now = await log.now(conn)
    async with conn.transaction():
        assert await log.cursors.load(conn, "a", initial=str(now)) == now
        assert await log.cursors.load(conn, "a", initial=BEGINNING) == now
    assert await log.trim(conn, 0) == 1
    with pytest.raises(ValueError, match="not the text of"):
        await log.cursors.load(conn, "b", for_update=False, initial="nonsense")
    with pytest.raises(ValueError, match="not the text of"):
        await log.cursors.save(conn, "b", "nonsense")


async def test_a_rollback_takes_it_back(conn, log):
    async with conn.transaction():
        first = await log.cursors.load(conn, "a")
    await log.append(conn, "t", 1)
    async with conn.transaction(force_rollback=True):
        await log.cursors.save(conn, "a", await log.now(conn))
    assert await log.cursors.load(conn, "a", for_update=False) == first


async def test_locking_needs_a_transaction(pg_dsn, conn, log):
    with pytest.raises(psycopg.ProgrammingError, match="for_update=False"):
        await log.cursors.load(conn, "a")
    async with await connect(pg_dsn, autocommit=False) as implicit:
        await log.cursors.load(implicit, "a")
        await implicit.rollback()


async def test_consumers_of_one_name_take_turns(pg_dsn, conn, log, kit):
    """New ones too: there is no row yet that could be locked."""
    await log.append_many(conn, [("t", n) for n in range(30)])
    await conn.execute("CREATE TABLE done (n int, who int)")

    async def consume(who):
        async with await connect(pg_dsn) as consumer:
            while True:
                async with consumer.transaction():
                    cursor = await log.cursors.load(consumer, "a")
                    page = await log.read(consumer, cursor, limit=1)
                    for event in page.events:
                        await consumer.execute(
                            "INSERT INTO done VALUES (%s, %s)", (event.payload, who)
                        )
                    await log.cursors.save(consumer, "a", page.cursor)
                if not page.events:
                    return

    async with anyio.create_task_group() as tasks:
        for who in range(4):
            tasks.start_soon(consume, who)
    found = await (await conn.execute("SELECT n FROM done")).fetchall()
    assert sorted(n for (n,) in found) == list(range(30))


async def test_a_frozen_consumer_is_told_that_it_is_late(conn, other, log):
    async with conn.transaction():
        await log.cursors.load(conn, "a")
    await other.set_isolation_level(IsolationLevel.REPEATABLE_READ)
    with pytest.raises(psycopg.errors.SerializationFailure):
        async with other.transaction():
            await other.execute("SELECT 1")
            await log.append(conn, "t", 1)
            await log.cursors.save(conn, "a", await log.now(conn))
            await log.cursors.load(other, "a")


async def test_what_a_stored_cursor_has_not_seen_is_kept(conn, log, kit):
    await log.append_many(conn, [("t", n) for n in range(3)])
    page = await log.read(conn, BEGINNING, limit=2)
    await log.cursors.save(conn, "slow", page.cursor)
    await log.append(conn, "t", 3)
    await log.cursors.save(conn, "quick", await log.now(conn))
    assert await log.trim(conn, 0) == 2
    slow = await log.cursors.load(conn, "slow", for_update=False)
    assert (await kit.read_all(log, conn, slow))[0] == [2, 3]
    with kit.noted("log.cursors_expired") as events:
        assert await log.trim(conn, 0, expire_cursors=True, batch_size=1) == 2
        assert await log.trim(conn, 0, expire_cursors=True) == 0
    assert events == [("log.cursors_expired", {"log": "events", "names": ["slow"]})]
    with pytest.raises(CursorExpiredError):
        await log.read(conn, await log.cursors.load(conn, "slow", for_update=False))
    quick = await log.cursors.load(conn, "quick", for_update=False)
    assert (await kit.read_all(log, conn, quick))[0] == []
    # What has expired keeps something nevertheless, until its owner has been told.
    await log.append(conn, "t", 4)
    assert await log.trim(conn, 0) == 0
    assert await log.cursors.delete(conn, "slow")
    await log.cursors.save(conn, "quick", await log.now(conn))
    assert await log.trim(conn, 0) == 1


async def test_one_that_never_began_is_told_too(conn, log, kit):
    """`Cursor.beginning` never expires; stored, it is a place, and does."""
    await log.cursors.save(conn, "a", BEGINNING)
    await log.append(conn, "t", 1)
    assert await log.trim(conn, 0) == 0
    with kit.noted("log.cursors_expired") as events:
        assert await log.trim(conn, 0, expire_cursors=True) == 1
    assert events[0][1]["names"] == ["a"]
    with pytest.raises(CursorExpiredError):
        await log.read(conn, await log.cursors.load(conn, "a", for_update=False))
    await log.cursors.save(conn, "a", BEGINNING)
    cursor = await log.cursors.load(conn, "a", for_update=False)
    assert (await kit.read_all(log, conn, cursor))[0] == []
