"""What the tests of the store share: tables, ways to the server, who cancels, and who looks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import psycopg
import pytest
from psycopg.rows import dict_row

from pgstructured.observe import instrumented

SOON = 20
"""Seconds that nothing here takes on any machine."""

ITEMS = """
    CREATE TABLE items (
        id int PRIMARY KEY, name text, price numeric, tags text[], doc jsonb,
        made timestamptz DEFAULT '2026-01-31 12:00+00'
    )
"""


@pytest.fixture
def sql(pg_dsn):
    """Runs SQL past everything that is tested, and returns its rows."""

    def run(query, params=None) -> Any:
        with psycopg.connect(pg_dsn, autocommit=True, row_factory=dict_row) as conn:
            cursor = conn.execute(query, params)
            return cursor.fetchall() if cursor.description else None

    return run


@pytest.fixture
def items(sql):
    """A table, ``items``, and what returns its rows in order."""
    sql(ITEMS)
    return lambda: sql("SELECT * FROM items ORDER BY id")


@pytest.fixture(params=["direct", "transaction"])
def dsn(request, pg_dsn):
    """Straight to the server, and through a PgBouncer that pools transactions."""
    if request.param == "direct":
        return pg_dsn
    return request.getfixturevalue("pgbouncer_transaction").dsn(pg_dsn)


@pytest.fixture
def events():
    """The names and facts of the store's events."""
    seen = []

    def note(event):
        if event.name.startswith("store."):
            seen.append((event.name, dict(event.facts)))

    with instrumented(note):
        yield seen


async def fetch(conn, query, params=None):
    """Return the one value that a query gives."""
    cursor = conn.cursor(row_factory=psycopg.rows.tuple_row)
    await cursor.execute(query, params)
    (value,) = await cursor.fetchone()
    return value


async def eventually(condition):
    """Wait until a condition is true."""
    with anyio.fail_after(SOON):
        while not condition():  # noqa: ASYNC110 - it may be the server's
            await anyio.sleep(0.005)


@pytest.fixture
def kit(cancel_at):
    """The functions above, for modules that can't import each other."""
    return SimpleNamespace(soon=SOON, fetch=fetch, eventually=eventually, cancel_at=cancel_at)
