"""What the tests of the pool share: ways to the server, somebody to break things, and to look."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from pgstructured.observe import instrumented

SOON = 30
"""Seconds that nothing here takes on any machine."""


@dataclass
class Way:
    """How a pool gets to the server."""

    mode: str
    dsn: str
    options: dict[str, Any]


@pytest.fixture(params=["direct", "transaction", "session"])
def way(request, pg_dsn):
    """Straight, through a PgBouncer that pools transactions, and one that pools sessions."""
    if request.param == "direct":
        return Way("direct", pg_dsn, {})
    bouncer = request.getfixturevalue(f"pgbouncer_{request.param}")
    options = {"pooler": "session"} if request.param == "session" else {}
    return Way(request.param, bouncer.dsn(pg_dsn), options)


@pytest.fixture
def events():
    """The names and facts of the pool's events."""
    seen = []

    def note(event):
        if event.name.startswith("pool."):
            seen.append((event.name, dict(event.facts)))

    with instrumented(note):
        yield seen


async def eventually(condition, *, within=SOON):
    """Wait until a condition is true."""
    with anyio.fail_after(within):
        while not condition():  # noqa: ASYNC110 - it may be the server's
            await anyio.sleep(0.005)


async def fetch(conn, query="SELECT pg_backend_pid()", params=None):
    """Return the one value that a query gives."""
    cursor = await conn.execute(query, params)
    (value,) = await cursor.fetchone()
    return value


def held(pool):
    """Return what must be zero when nobody has anything: slots beyond what is idle."""
    told = pool.statistics()
    return told.size - told.idle, told.in_use, told.tasks_waiting


async def borrow_at_once(pool, count):
    """Have so many tasks hold a connection at the same time, and give it back."""
    ready = anyio.Event()
    holding = []

    async def borrow():
        async with pool.acquire() as conn:
            holding.append(conn)
            if len(holding) == count:
                ready.set()
            await ready.wait()

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(borrow)


async def fail_to_connect(pool):
    """Acquire until an attempt has failed, and give up."""
    before = pool.statistics().connect_errors

    async def acquire():
        async with pool.acquire():
            raise AssertionError("entered")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(acquire)
        await eventually(lambda: pool.statistics().connect_errors > before)
        tasks.cancel_scope.cancel()


@pytest.fixture
def kit(cancel_at):
    """The functions above, for modules that can't import each other."""

    return SimpleNamespace(
        soon=SOON,
        eventually=eventually,
        fetch=fetch,
        held=held,
        borrow_at_once=borrow_at_once,
        fail_to_connect=fail_to_connect,
        cancel_at=cancel_at,
    )
