"""Waiting for long, which is virtual here."""

from __future__ import annotations

import anyio
import pytest

from pgstructured import open_notify_bus, open_pool
from pgstructured.testing import virtual_backend


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request):
    # A moment of real time before each jump: the server is real.
    return virtual_backend(request.param, autojump=0.5)


async def test_polling_by_the_clock(pg_dsn, conn, log):
    """Half a minute after the last look, and not before."""
    async with (
        open_notify_bus(pg_dsn, heartbeat=None) as bus,
        open_pool(pg_dsn, max_idle=1e6, max_lifetime=1e6) as pool,
        log.follow(bus, pool, await log.now(conn)) as following,
    ):
        await conn.execute("INSERT INTO events (topic, payload) VALUES ('t', '1')")
        assert (await following.receive()).payload == 1  # at once, for what was there
        began = anyio.current_time()
        await conn.execute("INSERT INTO events (topic, payload) VALUES ('t', '2')")
        assert (await following.receive()).payload == 2
        assert anyio.current_time() - began >= 30


async def test_wake_ups_by_the_clock(pg_dsn, log):
    async with open_notify_bus(pg_dsn, heartbeat=None) as bus, log.wake_ups(bus, poll=7) as wakes:
        await wakes.receive()
        for _ in range(3):
            began = anyio.current_time()
            await wakes.receive()
            assert 7 <= anyio.current_time() - began < 30
