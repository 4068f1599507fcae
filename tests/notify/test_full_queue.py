"""The server's queue of notifications is full: for a while, and not for ever."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import cast

import anyio
import psycopg
import pytest

from pgstructured import open_pool
from pgstructured.driver import open_connection
from pgstructured.notify import BusState, Gap, Notification, open_notify_bus, open_publisher
from pgstructured.testing import Cluster, find_server_binaries

from .conftest import Kit

pytestmark = pytest.mark.skipif(
    find_server_binaries().major < 17, reason="a queue of 8 GB takes long to fill"
)


@pytest.fixture(scope="module")
def small_queue():
    with Cluster(settings={"max_notify_queue_pages": "64"}) as cluster:
        yield cluster


@pytest.fixture
def dsn(small_queue):
    dsn = small_queue.create_database()
    yield dsn
    small_queue.drop_database(dsn)


@contextmanager
def full_queue(dsn):
    """Fill it behind somebody who listens, and is in a transaction."""
    with psycopg.connect(dsn) as laggard, psycopg.connect(dsn, autocommit=True) as publisher:
        laggard.execute("LISTEN a")
        laggard.commit()
        laggard.execute("SELECT 1")
        with pytest.raises(psycopg.errors.ProgramLimitExceeded):
            for _ in range(1000):
                publisher.execute("SELECT pg_notify('filling', repeat('x', 7900))")
        yield


@pytest.mark.parametrize("source", [nullcontext, open_connection, open_pool])
async def test_a_publisher_goes_on_once_there_is_room(dsn, source) -> None:
    async with (
        open_notify_bus(dsn) as bus,
        bus.subscribe("a") as heard,
        source(dsn) as target,
        open_publisher(target, interval=0) as publisher,
    ):
        with full_queue(dsn):
            publisher.publish_nowait("a", "1")
            await Kit.eventually(lambda: publisher.statistics().retries > 1)
        with anyio.fail_after(20):
            await publisher.flush()
            assert cast("Notification[str]", await heard.receive()).payload == "1"


async def test_a_bus_comes_back_once_there_is_room(dsn) -> None:
    async with open_notify_bus(dsn, backoff=Kit.quick) as bus, bus.subscribe("a") as heard:
        with full_queue(dsn):
            with psycopg.connect(dsn, autocommit=True) as conn:
                conn.execute("SELECT pg_terminate_backend(%s)", (bus.backend_pid,))
            await Kit.eventually(lambda: bus.statistics().attempts > 3)
            assert bus.state is BusState.DOWN
            assert isinstance(bus.statistics().last_error, psycopg.errors.ProgramLimitExceeded)
        with anyio.fail_after(20):
            assert await bus.wait_generation(1) == 2
            assert isinstance(await heard.receive(), Gap)
            with psycopg.connect(dsn, autocommit=True) as conn:
                conn.execute("NOTIFY a, '1'")
            assert cast("Notification[str]", await heard.receive()).payload == "1"
