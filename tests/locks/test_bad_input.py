"""What can't be meant is refused where it is said, by the name of the argument."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import anyio
import psycopg
import pytest

from pgstructured.driver import open_connection
from pgstructured.errors import ConnectionLostError, LockLost
from pgstructured.locks import open_locks, pg_lock, pg_try_lock, pg_try_xact_lock, pg_xact_lock
from pgstructured.notify import open_notify_bus, open_publisher
from pgstructured.pool import open_pool


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("backoff", 5),
        ("key_scheme", "named"),
        ("fence_table", ""),
        ("fence_table", None),
        ("fence_table", "a.b.c"),
    ],
)
async def test_options(pg_dsn, option, value):
    with pytest.raises(ValueError, match=option):
        async with open_locks(pg_dsn, **{option: value}):
            raise AssertionError("it was refused")


async def test_lock_many(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        with pytest.raises(TypeError, match="keys"):
            locks.lock_many("report")
        for options in ({"acquire_timeout": -1}, {"shared": True, "fenced": True}):
            with pytest.raises(ValueError, match=next(iter(options))):
                locks.lock_many([], **cast("Any", options))


@pytest.mark.parametrize("candidate", [None, 5, b"a"])
async def test_candidates_of_the_wrong_type(pg_dsn, candidate):
    async with open_locks(pg_dsn) as locks:
        with pytest.raises(ValueError, match="candidate"):
            locks.election("e", candidate=candidate)


async def test_no_connection_where_one_is_to_be(pg_dsn):
    async with open_pool(pg_dsn) as pool, open_locks(pg_dsn) as locks:
        await locks.create_fence_table()
        not_one = cast("Any", pool)
        for take in (pg_xact_lock, pg_try_xact_lock):
            with pytest.raises(TypeError, match=r"conn must be a connection .* not Pool"):
                await take(not_one, 1)
        async with locks.lock(1, fenced=True) as lock:
            with pytest.raises(TypeError, match=r"conn must be a connection .* not Pool"):
                await lock.guard(not_one)
            lock.assert_held()


async def test_sources_of_the_wrong_kind(pg_dsn):
    with psycopg.connect(pg_dsn) as other:
        sources = ((psycopg, "module"), (other, "psycopg.Connection"), (None, "None"))
    for source, name in sources:
        for take in (pg_lock, pg_try_lock):
            with pytest.raises(TypeError, match=f"source must be a Locks, .* not .*{name}"):
                take(cast("Any", source), 1)
    for take in (pg_lock, pg_try_lock):
        with pytest.raises(TypeError, match="was not entered"):
            async with take(cast("Any", open_locks(pg_dsn)), 1):
                raise AssertionError("it was refused")


async def test_what_is_closed_says_so(pg_dsn):
    async with (
        open_locks(pg_dsn) as locks,
        open_notify_bus(pg_dsn) as bus,
        open_publisher(pg_dsn) as publisher,
    ):
        election = locks.election(1, candidate="a")
    blocks: list[Any] = [
        locks.lock(1),
        locks.try_lock(1),
        locks.lock_many([1]),
        locks.semaphore(1, 1).acquire(),
        election.campaign(),
        election.observe(),
        bus.subscribe("a"),
    ]
    for block in blocks:
        with pytest.raises(anyio.ClosedResourceError, match=r"of open_\w+ was left"):
            async with block:
                raise AssertionError("it was refused")
    for call in (locks.holders, bus.ping, partial(publisher.publish, "a", "1"), publisher.flush):
        with pytest.raises(anyio.ClosedResourceError, match=r"of open_\w+ was left"):
            await call()


async def test_a_connection_that_has_failed(pg_cluster, pg_dsn):
    """It says why, as for every other operation."""
    async with open_connection(pg_dsn) as conn:
        with pytest.raises(LockLost):
            async with pg_lock(conn, 1) as lock:
                pg_cluster.terminate_backend(lock.backend_pid)
                await conn.wait_closed()
        for take in (pg_lock, pg_try_lock):
            with pytest.raises(ConnectionLostError) as caught:
                async with take(conn, 1):
                    raise AssertionError("there is nothing to hold it on")
            assert caught.value.sqlstate == "08003"
            assert caught.value.__cause__ is conn.failure
