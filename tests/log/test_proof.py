"""What the log is for: nothing lost and nothing done twice, while everything breaks.

Eight writers think between taking their ids and committing, so that they commit in any order.
Sessions are killed every 150 ms: writers', consumers', the pool's and the bus's. A consumer
that keeps its cursor in the database begins anew all the time, as another process would. One
follows, and keeps its cursor in memory.
"""

from __future__ import annotations

import os
import random

import anyio
import psycopg
import pytest

from pgstructured import connect, open_notify_bus, open_pool, open_publisher
from pgstructured.log import Cursor, EventLog

WRITERS = 8
KILL_EVERY = 0.15
UNKNOWN = (psycopg.OperationalError, psycopg.InterfaceError)


class Proof:
    """One run of it."""

    def __init__(self, dsn, kit, seed):
        self.dsn = dsn
        self.kit = kit
        self.lots = random.Random(seed)
        self.log = EventLog()
        self.is_writing = True
        self.kills = 0
        self.restarts = 0
        self.followed: dict[int, int] = {}

    async def write(self, number):
        """Append, a few in a transaction, until it is over; whatever happens, the table knows."""
        count = 0
        while self.is_writing:
            try:
                async with await connect(self.dsn) as conn:
                    while self.is_writing:
                        async with conn.transaction():
                            for _ in range(self.lots.randrange(1, 4)):
                                count += 1
                                await self.log.append(conn, "t", [number, count])
                            await anyio.sleep(self.lots.uniform(0, 0.03))
                        if self.lots.random() < 0.1:
                            async with conn.transaction(force_rollback=True):
                                await self.log.append(conn, "t", "never")
            except UNKNOWN:
                continue

    async def consume(self, conn):
        """Do the next events' work and note how far that is, in one transaction."""
        async with conn.transaction():
            cursor = await self.log.cursors.load(conn, "consumer")
            page = await self.log.read(conn, cursor, limit=self.lots.choice((1, 7, 1000)))
            for event in page.events:
                await conn.execute("INSERT INTO effect VALUES (%s)", (event.id,))
            await self.log.cursors.save(conn, "consumer", page.cursor)
        return len(page.events)

    async def consume_for_ever(self, *, task_status):
        """As processes do that start, work for a while, and are gone."""
        task_status.started()
        while True:
            try:
                with anyio.move_on_after(self.lots.uniform(0.05, 0.3)):
                    async with await connect(self.dsn) as conn:
                        while True:
                            if not await self.consume(conn):
                                await anyio.sleep(0.005)
            except UNKNOWN:
                pass
            self.restarts += 1

    async def follow(self, bus, pool, *, task_status):
        """Receive what comes; now and then from a cursor that was kept, as text."""
        cursor = str(Cursor.beginning())
        task_status.started()
        while True:
            async with self.log.follow(bus, pool, cursor, limit=50) as following:
                for _ in range(self.lots.randrange(1, 300)):
                    event = await following.receive()
                    self.followed[event.id] = self.followed.get(event.id, 0) + 1
                    cursor = str(self.lots.choice((event, following)).cursor)

    async def kill(self, bus):
        """End sessions, all kinds of them."""
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend' ORDER BY random() LIMIT 2"
        )
        async with await connect(self.dsn, application_name="killer") as conn:
            while True:
                await anyio.sleep(KILL_EVERY)
                await conn.execute(query)
                if self.lots.random() < 0.3 and bus.backend_pid is not None:
                    await conn.execute("SELECT pg_terminate_backend(%s)", (bus.backend_pid,))
                self.kills += 1

    async def run(self, seconds):
        async with await connect(self.dsn) as conn:
            await self.log.create(conn)
            await conn.execute("CREATE TABLE effect (id int8)")
            async with (
                open_publisher(self.dsn) as publisher,
                open_notify_bus(self.dsn, backoff=self.kit.quick) as bus,
                open_pool(self.dsn, max_size=2) as pool,
                anyio.create_task_group() as tasks,
            ):
                self.log = EventLog(publisher=publisher)
                await tasks.start(self.consume_for_ever)
                await tasks.start(self.follow, bus, pool)
                async with anyio.create_task_group() as writing:
                    for number in range(WRITERS):
                        writing.start_soon(self.write, number)
                    with anyio.move_on_after(seconds):
                        await self.kill(bus)
                    self.is_writing = False
                async with await connect(self.dsn) as looking:
                    found = await looking.execute("SELECT id FROM pgstructured_event")
                    committed = {event_id for (event_id,) in await found.fetchall()}
                with anyio.fail_after(self.kit.soon):
                    while self.followed.keys() != committed:  # noqa: ASYNC110 - bounded
                        await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()
        async with await connect(self.dsn) as conn:
            while await self.consume(conn):
                pass
            found = await conn.execute("SELECT id FROM effect")
            done = [event_id for (event_id,) in await found.fetchall()]
        return committed, done


async def prove(dsn, kit, seconds, seed):
    proof = Proof(dsn, kit, seed)
    committed, done = await proof.run(seconds)
    # Hundreds and dozens; on a machine that is very busy, fewer.
    assert len(committed) > 20
    assert proof.kills > 2
    assert proof.restarts > 2
    # Each event's work was done, and done once.
    assert sorted(done) == sorted(committed)
    # Each was received, and none twice: kept cursors are those of the last one received.
    assert set(proof.followed) == committed
    assert set(proof.followed.values()) == {1}


SECONDS = float(os.environ.get("PGSTRUCTURED_PROOF_SECONDS", "6"))
"""How long it goes on; set it for a longer proof."""


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
async def test_nothing_is_lost_and_nothing_done_twice(pg_cluster_private, kit):
    await prove(pg_cluster_private.dsn(), kit, SECONDS, random.randrange(1000))
