"""A private server: life, faults, databases."""

from __future__ import annotations

import psycopg


def test_a_database_per_test(pg_dsn):
    with psycopg.connect(pg_dsn) as connection:
        assert connection.execute("select 1").fetchone() == (1,)


async def test_on_every_backend(pg_dsn, anyio_backend_name):
    assert anyio_backend_name in {"asyncio", "trio"}
