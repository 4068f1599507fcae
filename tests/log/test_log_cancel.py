"""Cancellation at every await of what runs on the caller's connection."""

from __future__ import annotations

import anyio
import psycopg
import pytest

from pgstructured import connect
from pgstructured.log import Cursor, EventLog
from pgstructured.testing import assert_cancellable

BEGINNING = Cursor.beginning()


async def test_a_pending_cancellation_is_noticed(conn, log):
    store = log.cursors
    for use in (
        lambda: log.create(conn),
        lambda: log.append(conn, "t", 1),
        lambda: log.append_many(conn, [("t", 1)]),
        lambda: log.read(conn, BEGINNING),
        lambda: log.now(conn),
        lambda: log.trim(conn, 0),
        lambda: store.load(conn, "a", for_update=False),
        lambda: store.save(conn, "a", BEGINNING),
        lambda: store.delete(conn, "a"),
        lambda: store.list(conn),
    ):
        await assert_cancellable(use)
        assert conn.info.transaction_status.name == "IDLE"
    assert (await log.read(conn, BEGINNING)).events == []


@pytest.mark.parametrize("use", ["append", "append_many", "read", "trim", "load", "save", "create"])
async def test_cancelled_at_every_await(pg_dsn, conn, other, log, kit, use):
    """The connection is as usable as before; what was to be done is done, or is not."""
    new = EventLog("new")

    async def do():
        if use == "append":
            await log.append(conn, "t", 1)
        elif use == "append_many":
            await log.append_many(conn, [("t", 1), ("t", 2)])
        elif use == "read":
            page = await log.read(conn, BEGINNING, limit=2)
            assert len(page.events) == 2
            await log.read(conn, page.cursor, limit=2)
        elif use == "trim":
            await log.trim(conn, 0, batch_size=2)
        elif use == "load":
            async with conn.transaction():
                await log.cursors.load(conn, "a")
        elif use == "save":
            await log.cursors.save(conn, "a", BEGINNING)
        else:
            await new.create(conn)

    number, is_over = 0, False
    while not is_over:
        assert number < 200
        await other.execute("TRUNCATE events, events_cursor")
        await other.execute("DROP TABLE IF EXISTS new, new_state, new_trimmed, new_cursor")
        if use in {"read", "trim"}:
            await log.append_many(other, [("t", n) for n in range(3)])
        with anyio.fail_after(kit.soon), anyio.CancelScope() as scope:
            await kit.cancel_at(do(), scope, number)
        is_over = not scope.cancel_called
        assert conn.info.transaction_status.name == "IDLE"
        payloads, _ = await kit.read_all(log, conn)
        if use == "append":
            assert payloads in ([], [1])
        elif use == "append_many":
            assert payloads in ([], [1, 2])
        elif use == "trim":
            assert payloads in ([0, 1, 2], [2], [])
        elif use == "create":
            exists = await kit.fetch(other, "SELECT to_regclass('new') IS NOT NULL")
            assert exists == await kit.fetch(other, "SELECT to_regclass('new_cursor') IS NOT NULL")
            await new.create(conn)
        number += 1
    assert number  # where the answer is quick it suspends nowhere


async def test_cancelled_in_a_transaction(conn, log, kit):
    """It is rolled back with the block."""
    with anyio.CancelScope() as scope:
        async with conn.transaction():
            await log.append(conn, "t", 1)
            scope.cancel()
            await log.append(conn, "t", 2)
    assert scope.cancelled_caught
    assert (await kit.read_all(log, conn))[0] == []


async def test_a_session_that_dies(pg_dsn, log, kit):
    async with await connect(pg_dsn) as conn:
        await log.create(conn)
        await log.append(conn, "t", 1)
        doomed = await connect(pg_dsn)
        with pytest.raises(psycopg.OperationalError):
            async with doomed.transaction():
                await log.append(doomed, "t", "gone")
                kit.kill(pg_dsn, doomed.info.backend_pid)
                await log.append(doomed, "t", "gone too")
        await doomed.close()
        assert (await kit.read_all(log, conn))[0] == [1]
