"""What the tests of the event log share: a log, two sessions, and somebody to look and to break."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import anyio
import psycopg
import pytest

from pgstructured import Backoff, connect
from pgstructured.log import Cursor, EventLog
from pgstructured.observe import instrumented

SOON = 30
"""Seconds that nothing here takes on any machine."""


@pytest.fixture
def log():
    return EventLog("events")


@pytest.fixture
async def conn(pg_dsn, log):
    """A session; the log is created."""
    async with await connect(pg_dsn) as conn:
        await log.create(conn)
        yield conn


@pytest.fixture
async def other(pg_dsn, conn):
    """Another session."""
    async with await connect(pg_dsn) as other:
        yield other


async def eventually(condition, *, within=SOON):
    """Wait until a condition is true."""
    with anyio.fail_after(within):
        while not condition():  # noqa: ASYNC110 - it may be the server's
            await anyio.sleep(0.005)


async def fetch(conn, query, params=()):
    """Return the one value that a query gives."""
    cursor = await conn.execute(query, params)
    (value,) = await cursor.fetchone()
    return value


async def read_all(log, conn, cursor=None, **options):
    """Return the payloads of all that comes after a cursor, and the cursor after that."""
    payloads: list[object] = []
    cursor = cursor or Cursor.beginning()
    while True:
        page = await log.read(conn, cursor, **options)
        cursor = page.cursor
        if not page.events:
            return payloads, cursor
        payloads += [event.payload for event in page.events]


async def take(following, count):
    """Receive so many events; their payloads."""
    with anyio.fail_after(SOON):
        return [(await following.receive()).payload for _ in range(count)]


@contextmanager
def noted(prefix="log."):
    """Note names and facts of events."""
    seen = []

    def note(event):
        if event.name.startswith(prefix):
            seen.append((event.name, dict(event.facts)))

    with instrumented(note):
        yield seen


def kill(dsn, *pids):
    """End sessions."""
    with psycopg.connect(dsn, autocommit=True) as killer:
        for pid in pids:
            killer.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))


def looked_at(explained, table):
    """Return how many rows of a table a statement has looked at, by its plan as JSON."""
    rows = 0
    nodes = [explained[0][0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", ())
        if node.get("Relation Name") == table:
            rows += (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node[
                "Actual Loops"
            ]
    return rows


@pytest.fixture
def kit(cancel_at):
    """The functions above, for modules that can't import each other."""
    return SimpleNamespace(
        soon=SOON,
        quick=Backoff(initial=0.01, maximum=0.05, reset_after=0.05),
        eventually=eventually,
        fetch=fetch,
        read_all=read_all,
        take=take,
        noted=noted,
        kill=kill,
        looked_at=looked_at,
        cancel_at=cancel_at,
    )
