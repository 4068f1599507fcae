"""`TableStore`, and the same statements by hand on pgstructured's pool and connection."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from psycopg.rows import dict_row

from benchmarks._batch import Batch, Options, expect, one_by_one

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from benchmarks._batch import Workload
    from pgstructured import Pool, TableStore

    Ask = Callable[[Any, int], Awaitable[Any]]

_ROWS = 1000
_NAME = "a name that is some 30 bytes long"
_SELECT = "SELECT * FROM store_rows WHERE id = %s"
_INSERT = "INSERT INTO store_rows (id, name, n, done) VALUES (%s, %s, %s, %s)"
_TENANT = {"app.tenant": "t42"}


@asynccontextmanager
async def _opened(options: Options) -> AsyncGenerator[Pool]:
    """Open a pool whose table is this worker's own, with rows in it."""
    from pgstructured import open_pool

    async def on_connect(conn: Any) -> None:
        await conn.execute(f"CREATE SCHEMA IF NOT EXISTS {options.channel}")
        await conn.execute(f"SET search_path = {options.channel}")

    async with open_pool(options.dsn, max_size=1, on_connect=on_connect) as pool:
        async with pool.acquire() as conn:
            await conn.execute(
                "CREATE TABLE store_rows (id int PRIMARY KEY, name text, n float8, done bool)"
            )
            await conn.execute(
                "INSERT INTO store_rows SELECT i, %s, i, true FROM generate_series(1, %s) AS t(i)",
                (_NAME, _ROWS),
            )
        try:
            yield pool
        finally:
            async with pool.acquire() as conn:
                drop: Any = f"DROP SCHEMA {options.channel} CASCADE"
                await conn.execute(drop)


def _store(pool: Pool, options: Options, **more: Any) -> TableStore:
    from pgstructured import TableStore

    return TableStore(pool, "store_rows", schema=options.channel, **more)


def _row(number: int) -> dict[str, Any]:
    return {"id": number, "name": _NAME, "n": number / 2, "done": True}


# ---------------------------------------------------------------- one row


@asynccontextmanager
async def _retrieve(
    options: Options, *, text: bool = False, settings: bool = False
) -> AsyncGenerator[Batch]:
    async with _opened(options) as pool:
        store = _store(pool, options, settings=_TENANT if settings else None)
        numbers = count(1)

        async def by_mapping() -> None:
            number = next(numbers) % _ROWS + 1
            (row,) = await store.retrieve({"id": number})
            expect("id", row["id"], number)

        async def by_text() -> None:
            number = next(numbers) % _ROWS + 1
            (row,) = await store.retrieve("id = ${id}", bindings={"id": number})
            expect("id", row["id"], number)

        yield one_by_one(by_text if text else by_mapping)


async def _select_dicts(conn: Any, number: int) -> Any:
    cursor = conn.cursor(row_factory=dict_row)
    await cursor.execute(_SELECT, (number,))
    (row,) = await cursor.fetchall()
    return row["id"]


async def _select_tuples(conn: Any, number: int) -> Any:
    cursor = await conn.execute(_SELECT, (number,))
    (row,) = await cursor.fetchall()
    return row[0]


async def _select_for_tenant(conn: Any, number: int) -> Any:
    async with conn.transaction():
        await conn.execute("SELECT set_config(%s, %s, true)", ("app.tenant", "t42"))
        return await _select_dicts(conn, number)


async def _insert(conn: Any, number: int) -> Any:
    cursor = await conn.execute(_INSERT, (number, _NAME, number / 2, True))
    expect("rows", cursor.rowcount, 1)
    return number


@asynccontextmanager
async def _by_hand(ask: Ask, options: Options, *, first: int = 1) -> AsyncGenerator[Batch]:
    async with _opened(options) as pool:
        numbers = count(first)

        async def operation() -> None:
            number = next(numbers)
            if first == 1:
                number = number % _ROWS + 1
            async with pool.acquire() as conn:
                expect("id", await ask(conn, number), number)

        yield one_by_one(operation)


@asynccontextmanager
async def _bare(ask: Ask, options: Options, *, first: int = 1) -> AsyncGenerator[Batch]:
    """The connection is kept."""
    async with _opened(options) as pool, pool.acquire() as conn:
        numbers = count(first)

        async def operation() -> None:
            number = next(numbers)
            if first == 1:
                number = number % _ROWS + 1
            expect("id", await ask(conn, number), number)

        yield one_by_one(operation)


@asynccontextmanager
async def _persist(options: Options) -> AsyncGenerator[Batch]:
    async with _opened(options) as pool:
        store = _store(pool, options)
        numbers = count(_ROWS + 1)

        async def operation() -> None:
            expect("rows", await store.persist(_row(next(numbers))), 1)

        yield one_by_one(operation)


# ---------------------------------------------------------------- many rows


@asynccontextmanager
async def _persist_many(options: Options, *, how: str) -> AsyncGenerator[Batch]:
    async with _opened(options) as pool:
        store = _store(pool, options)
        rows = [_row(number) for number in range(options.scale)]

        async def operation() -> None:
            if how == "at once":
                expect("rows", await store.persist(rows), options.scale)
            elif how == "one by one":
                for row in rows:
                    expect("rows", await store.persist(row), 1)
            else:
                for number in range(options.scale):
                    async with pool.acquire() as conn:
                        await _insert(conn, number)

        timed = one_by_one(operation)

        async def batch(operations: int) -> Any:
            async with pool.acquire() as conn:
                await conn.execute("TRUNCATE store_rows")
            return await timed(operations)

        yield batch


WORKLOADS: dict[str, Workload] = {
    "retrieve": _retrieve,
    "retrieve-text": partial(_retrieve, text=True),
    "retrieve-hand": partial(_by_hand, _select_dicts),
    "retrieve-hand-tuples": partial(_by_hand, _select_tuples),
    "retrieve-bare": partial(_bare, _select_dicts),
    "retrieve-settings": partial(_retrieve, settings=True),
    "retrieve-settings-hand": partial(_by_hand, _select_for_tenant),
    "persist": _persist,
    "persist-hand": partial(_by_hand, _insert, first=_ROWS + 1),
    "persist-bare": partial(_bare, _insert, first=_ROWS + 1),
    "persist-many": partial(_persist_many, how="at once"),
    "persist-many-one-by-one": partial(_persist_many, how="one by one"),
    "persist-many-hand": partial(_persist_many, how="by hand"),
}
