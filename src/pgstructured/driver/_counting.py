# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# Fetching in a pipeline is a private name of psycopg's; this room may know it.
"""Statements that are to return no rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from pgstructured.errors import UnexpectedRowsError

if TYPE_CHECKING:
    from psycopg.abc import Params, Query, QueryNoTemplate

    from ._operating import OperatingConnection


async def execute_no_rows(
    conn: OperatingConnection[Any], query: Query, params: Params | None
) -> int:
    """Do what `Connection.execute_no_rows` says."""
    cursor = conn.cursor()
    await cursor.execute(cast("QueryNoTemplate", query), params)
    await cursor._fetch_pipeline()
    count = 0
    for result in cursor._results:
        if result.ntuples:
            raise UnexpectedRowsError(
                f"a statement that was to return no rows returned {result.ntuples}; "
                "what it did stays done"
            )
        count += result.command_tuples or 0
    return count
