"""Errors say which query they are about, around the place where it is wrong, without parameters."""

from __future__ import annotations

from contextlib import asynccontextmanager
from itertools import product
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import given, settings, strategies as st
from psycopg import errors

from pgstructured.driver import Connection, connect
from pgstructured.driver._quoting import LIMIT, cut

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@asynccontextmanager
async def connected(dsn: str, **options: Any) -> AsyncGenerator[Connection[Any]]:
    conn = await connect(dsn, **options)
    try:
        yield conn
    finally:
        await conn.aclose()


@settings(deadline=None)
@given(st.text(max_size=60), st.integers(0, 60), st.integers(6, 60))
def test_cutting(text: str, position: int, limit: int) -> None:
    part = cut(text, position, limit)
    assert len(part) == min(len(text), limit)
    if len(text) <= limit:
        assert part == text
    else:
        assert part.strip(".") in text or "." in text


async def test_the_place_of_the_error_is_in_the_note(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        for before, behind in product((0, 100, 3000), repeat=2):
            query = "SELECT " + "1," * before + " missing" + ", 2" * behind
            with pytest.raises(errors.UndefinedColumn) as caught:
                await conn.execute(query)
            (note,) = caught.value.__notes__
            assert len(note) <= LIMIT
            assert note.startswith("query: ")
            assert "missing" in note
            if before + behind <= 200:
                assert note == f"query: {query}"


async def test_every_way_to_run_a_query(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        query, sent = "SELECT 1 / %s::int -- ünïcode", ["query: SELECT 1 / $1::int -- ünïcode"]
        for prepare in (False, True):
            with pytest.raises(errors.DivisionByZero) as caught:
                await conn.execute(query, [0], prepare=prepare)
            assert caught.value.__notes__ == sent
        with pytest.raises(errors.DivisionByZero) as caught:
            await conn.cursor().executemany(query, [(1,), (0,)])
        assert caught.value.__notes__ == sent
        with pytest.raises(errors.DivisionByZero) as caught:
            async with conn.pipeline():
                await conn.execute(query, [0], prepare=False)
        assert caught.value.__notes__ == sent
        with pytest.raises(errors.DivisionByZero) as caught:
            async for _ in conn.cursor().stream(query, [0]):
                pass
        assert caught.value.__notes__ == sent
        with pytest.raises(errors.UndefinedTable) as missed:
            async with conn.transaction(), conn.cursor("named") as cursor:
                await cursor.execute("SELECT * FROM missing WHERE i = %s", [1])
        assert "SELECT * FROM missing WHERE i = $1" in missed.value.__notes__[0]


async def test_parameters_that_psycopg_merges_are_not_shown(pg_dsn: str) -> None:
    async with connected(pg_dsn, cursor_factory=psycopg.AsyncClientCursor) as conn:
        with pytest.raises(errors.InvalidTextRepresentation) as caught:
            await conn.execute("SELECT %s::int", ["secret"])
        assert caught.value.__notes__ == ["query: SELECT %s::int"]
        with pytest.raises(errors.UndefinedColumn) as missed:
            await conn.execute("SELECT missing")
        assert missed.value.__notes__ == ["query: SELECT missing"]
    async with connected(pg_dsn) as conn:
        with pytest.raises(errors.InvalidTextRepresentation) as caught:
            async with conn.cursor().copy("COPY (SELECT %s::int) TO STDOUT", ["secret"]) as copy:
                await copy.read()
        assert "secret" not in caught.value.__notes__[0]


async def test_errors_that_are_about_no_query(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        conn.add_notify_handler(fail)
        await conn.execute("LISTEN here")
        with pytest.raises(ZeroDivisionError) as caught:
            await conn.execute("NOTIFY here")
        assert not hasattr(caught.value, "__notes__")
        with pytest.raises(psycopg.ProgrammingError) as refused:
            async with conn.transaction():
                await conn.set_autocommit(False)
        assert not hasattr(refused.value, "__notes__")


def fail(_: object) -> None:
    raise ZeroDivisionError
