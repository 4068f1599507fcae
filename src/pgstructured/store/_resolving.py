"""Which table a name means.

An unqualified name means what it would mean in SQL, by ``search_path``; where that knows
none, the only table of that name that there is. Temporary tables are left out: each session
has its own, and a pool has many sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from psycopg import sql
from psycopg.rows import tuple_row

from pgstructured.errors import AmbiguousTableError, TableNotFoundError
from pgstructured.observe import emit

from ._cursors import cursor_of

if TYPE_CHECKING:
    import psycopg

    from pgstructured.driver import Connection

_FIND: Final = """
SELECT n.nspname, pg_catalog.array_position(pg_catalog.current_schemas(true), n.nspname)
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relname = %s AND c.relkind IN ('r', 'v', 'm', 'p', 'f') AND c.relpersistence <> 't'
"""
_QUALIFIED: Final = """
SELECT 1 FROM pg_catalog.pg_class
 WHERE oid = pg_catalog.to_regclass(%s) AND relkind IN ('r', 'v', 'm', 'p', 'f')
"""


class Relation(NamedTuple):
    """A table, as it stands in statements."""

    text: str
    """With its schema, quoted, for statements with ``%s``."""
    raw: str
    """The same for statements with ``$1``, where a ``%`` is nothing special."""


def relation(schema: str, table: str) -> Relation:
    """Return what stands in statements for a table of a schema."""
    raw = sql.Identifier(schema, table).as_string()
    return Relation(raw.replace("%", "%%"), raw)


async def resolve(conn: Connection[Any], table: str) -> Relation:
    """Find the table that an unqualified name means.

    Raises:
        TableNotFoundError: There is none.
        AmbiguousTableError: None is on the search path, and several elsewhere.

    Cancellation:
        A checkpoint; nothing changes.
    """
    cursor = cursor_of(conn, tuple_row)
    await cursor.execute(_FIND, (table,))
    found = await cursor.fetchall()
    visible = [(position, schema) for schema, position in found if position is not None]
    if visible:
        schema = min(visible)[1]
    else:
        schema = _only(table, [name for name, _ in found if not _is_system(name)])
    emit("store.resolved", table=table, schema=schema)
    return relation(schema, table)


async def check_there(conn: Connection[Any], qualified: Relation) -> None:
    """Find out whether a table is there.

    Raises:
        TableNotFoundError: It isn't.

    Cancellation:
        A checkpoint; nothing changes.
    """
    cursor = cursor_of(conn, tuple_row)
    await cursor.execute(_QUALIFIED, (qualified.raw,))
    if await cursor.fetchone() is None:
        raise TableNotFoundError(f"there is no table {qualified.raw}; create it, or grant its use")


def _only(table: str, schemas: list[str]) -> str:
    if not schemas:
        raise TableNotFoundError(
            f'there is no table "{table}" in this database; create it, or see to the spelling:'
            " case matters"
        )
    if len(schemas) > 1:
        schemas.sort()
        raise AmbiguousTableError(
            f'"{table}" is in the schemas {", ".join(schemas)}, none of them on the search path;'
            " say schema=",
            schemas=schemas,
        )
    return schemas[0]


def _is_system(schema: str) -> bool:
    return schema.startswith("pg_") or schema == "information_schema"


# ---------------------------------------------------------------- what DDL does to statements


def is_moved(exc: psycopg.Error) -> bool:
    """Tell whether the statement itself named what isn't there.

    Then nothing has run: its analysis comes before that, and failed. An error that a trigger or a
    function raised carries the same SQLSTATE, but has a context, and no position in
    the statement.
    """
    return (
        exc.sqlstate in _MOVED
        and exc.diag.statement_position is not None
        and exc.diag.internal_query is None
        and exc.diag.context is None
    )


def is_plan_outdated(exc: psycopg.Error) -> bool:
    """Tell whether a prepared statement can't be used any more, so that nothing has run.

    Known by the place in the server that says so: the SQLSTATEs are used for other things too.
    """
    return (
        exc.sqlstate in _OUTDATED
        and exc.diag.source_function in _BINDING
        and exc.diag.context is None
    )


_MOVED: Final = ("42P01", "42703")
_OUTDATED: Final = ("0A000", "26000")
_BINDING: Final = ("RevalidateCachedQuery", "FetchPreparedStatement", "exec_bind_message")
