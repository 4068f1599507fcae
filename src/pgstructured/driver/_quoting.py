# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# psycopg's query objects are private names; this room may know them.
"""The query that an error is about, as a note of the exception.

psycopg's errors say where in the query the server stumbled, but not in which. Its
generators know, and an exception has just come through them: so their frames are asked,
which works for every kind of cursor alike, also the user's own. What is shown is what was
sent, never its parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg._cursor_base import BaseCursor
from psycopg._queries import PostgresClientQuery, PostgresQuery

if TYPE_CHECKING:
    from types import TracebackType

LIMIT: Final = 2048
"""Characters that a note has at most."""

_PREFIX: Final = "query: "
_CUT: Final = "..."


def quote_query(exc: BaseException, query: PostgresQuery | None = None) -> None:
    """Add the query that ``exc`` is about to it as a note, if it is psycopg's and known.

    One that has a note already was here before.

    Args:
        exc: The exception, as it comes out of psycopg's generators.
        query: The query, where the caller knows it.
    """
    if not isinstance(exc, psycopg.Error) or hasattr(exc, "__notes__"):
        return
    text, is_as_sent = _text(query or _find_query(exc.__traceback__))
    if text:
        position = exc.diag.statement_position if is_as_sent else None
        exc.add_note(_PREFIX + cut(text, int(position or 1) - 1, LIMIT - len(_PREFIX)))


def cut(text: str, position: int, limit: int) -> str:
    """Return ``limit`` characters of ``text`` around ``position``; dots are for the rest."""
    if len(text) <= limit:
        return text
    start = max(0, min(position - limit // 2, len(text) - limit))
    part = text[start : start + limit]
    if start + limit < len(text):
        part = part[: -len(_CUT)] + _CUT
    if start > 0:
        part = _CUT + part[len(_CUT) :]
    return part


def _find_query(traceback: TracebackType | None) -> PostgresQuery | None:
    while traceback is not None:
        names = traceback.tb_frame.f_locals
        cursor = names.get("self")
        in_cursor: Any = cursor._query if isinstance(cursor, BaseCursor) else None
        # The outermost knows best: parameters of a COPY are merged further in.
        for candidate in (names.get("pgq"), names.get("query"), in_cursor):
            if isinstance(candidate, PostgresQuery):
                return candidate
        traceback = traceback.tb_next
    return None


def _text(query: PostgresQuery | None) -> tuple[str, bool]:
    """Return the text of ``query``, and whether it is the very text that was sent."""
    if query is None:
        return "", False
    encoding = query._tx.encoding
    if isinstance(query, PostgresClientQuery) and query.params is not None:
        return query.template.decode(encoding, "replace"), False  # what was sent has them in it
    return bytes(query.query).decode(encoding, "replace"), True
