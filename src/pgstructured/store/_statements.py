"""The text of a store's statements.

Rendering SQL from its parts costs as much as the round trip that it is for, and there are few
different texts. So what is made of names only is made once. A statement is in two pieces, with
the table between them, which may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

from psycopg import sql

from pgstructured.errors import FilterError

from ._filter import compile_columns, compile_order_by, compile_where
from ._identifiers import identifier
from ._rows import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")

_REMEMBERED: Final = 512
_CHUNK: Final = 4000
"""Values that one INSERT of many rows carries: a larger one is no faster, and takes memory."""


class Statement(NamedTuple):
    """One statement, with its table left out."""

    head: str
    """What stands before the table."""
    tail: str
    """What stands after it."""
    parameters: Sequence[object]
    """The values."""
    is_raw: bool = False
    """Whether its placeholders are ``$1`` …, not ``%s``."""


def select(
    where: str | Mapping[str, object] | None,
    bindings: Mapping[str, object] | None,
    columns: Sequence[str] | None,
    order_by: str | Sequence[str] | None,
    limit: object,
) -> Statement:
    """Return the SELECT of ``retrieve`` and ``stream``.

    Raises:
        FilterError: What to select, or how, can't be understood.
        InvalidIdentifierError: A name is none.
        ValueError: The limit is none.
    """
    found = compile_where(where, bindings)
    parameters = found.parameters
    if limit is not None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise ValueError(f"limit must be a whole number of rows, 0 or more, not {limit!r}")
        parameters = (*parameters, limit)
    head = _remembered(_select_head, columns)
    order = None if order_by is None else _remembered(_order, order_by)
    return Statement(
        head, _tail(found.text, order, "" if limit is None else " LIMIT %s"), parameters
    )


def update(
    data: object,
    where: str | Mapping[str, object] | None,
    bindings: Mapping[str, object] | None,
    *,
    all_rows: bool,
) -> Statement:
    """Return the UPDATE of ``mutate``.

    Raises:
        FilterError: The condition can't be understood, or is empty without ``all_rows``.
        InvalidIdentifierError: A name is none.
        ValueError: There is nothing to set.
    """
    found = compile_where(where, bindings)
    _check_condition(found.text, "mutate", all_rows=all_rows)
    if not isinstance(data, Mapping):
        raise TypeError(f"data must be a mapping of columns to values, not {type(data).__name__}")
    columns, (values,) = rows_of(cast("Mapping[str, object]", data))
    tail = _remembered(_assignments, columns) + _tail(found.text)
    return Statement("UPDATE ", tail, (*values, *found.parameters))


def delete(
    where: str | Mapping[str, object] | None,
    bindings: Mapping[str, object] | None,
    *,
    all_rows: bool,
) -> Statement:
    """Return the DELETE of ``purge``.

    Raises:
        FilterError: The condition can't be understood, or is empty without ``all_rows``.
        InvalidIdentifierError: A name is none.
    """
    found = compile_where(where, bindings)
    _check_condition(found.text, "purge", all_rows=all_rows)
    return Statement("DELETE FROM ", _tail(found.text), found.parameters)


def insert(
    data: object,
    returning: str | Sequence[str] | None,
    on_conflict: str,
) -> list[Statement]:
    """Return the INSERTs of ``persist``, none for no rows.

    Raises:
        InvalidIdentifierError: A name is none.
        ValueError: The rows don't have the same columns, or none at all.
    """
    if on_conflict not in {"error", "ignore"}:
        raise ValueError(f'on_conflict must be "error" or "ignore", not {on_conflict!r}')
    ends = " ON CONFLICT DO NOTHING" if on_conflict == "ignore" else ""
    if returning is not None:
        ends += _remembered(_returning, None if returning == "*" else returning)
    columns, rows = rows_of(data)
    if not rows:
        return []
    names = _remembered(_names, columns)
    width = len(columns)
    if len(rows) == 1:
        tail = f"{names} VALUES ({', '.join(['%s'] * width)}){ends}"
        return [Statement("INSERT INTO ", tail, rows[0])]
    size = max(_CHUNK // width, 1)
    statements: list[Statement] = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        tail = f"{names} VALUES {_values(width, len(chunk))}{ends}"
        parameters = [value for row in chunk for value in row]
        statements.append(Statement("INSERT INTO ", tail, parameters, is_raw=True))
    return statements


def _check_condition(condition: str | None, operation: str, *, all_rows: bool) -> None:
    if condition is None and not all_rows:
        raise FilterError(
            f"{operation} without a condition is for all rows of the table; if that is meant,"
            " say all_rows=True"
        )


# ---------------------------------------------------------------- pieces


def _remembered(make: Callable[[Any], T], what: str | Iterable[str] | None) -> T:
    """Return what is made of names, and was made before."""
    key = what if what is None or isinstance(what, str) else tuple(what)
    try:
        hash(key)
    except TypeError:  # no names; let it say so
        return make.__wrapped__(key)  # type: ignore[attr-defined,no-any-return]
    return make(key)


@lru_cache(_REMEMBERED)
def _select_head(columns: str | tuple[str, ...] | None) -> str:
    return f"SELECT {compile_columns(columns).as_string()} FROM "  # noqa: S608 - quoted names


@lru_cache(_REMEMBERED)
def _order(order_by: str | tuple[str, ...]) -> str | None:
    compiled = compile_order_by(order_by)
    return None if compiled is None else compiled.as_string()


@lru_cache(_REMEMBERED)
def _returning(columns: str | tuple[str, ...] | None) -> str:
    return f" RETURNING {compile_columns(columns).as_string()}"


@lru_cache(_REMEMBERED)
def _assignments(columns: tuple[str, ...]) -> str:
    names = [identifier(name, kind="column") for name in columns]
    pairs = [sql.SQL("{} = {}").format(name, sql.Placeholder()) for name in names]
    return f" SET {sql.SQL(', ').join(pairs).as_string()}"


@lru_cache(_REMEMBERED)
def _names(columns: tuple[str, ...]) -> str:
    names = [identifier(name, kind="column") for name in columns]
    return f" ({sql.SQL(', ').join(names).as_string()})"


@lru_cache(16)
def _values(width: int, count: int) -> str:
    rows = (
        ",".join(f"${number}" for number in range(first, first + width))
        for first in range(1, width * count + 1, width)
    )
    return f"({'),('.join(rows)})"


@lru_cache(_REMEMBERED)
def _tail(condition: str | None, order: str | None = None, limit: str = "") -> str:
    pieces = [
        "" if condition is None else f" WHERE {condition}",
        "" if order is None else f" ORDER BY {order}",
        limit,
    ]
    return "".join(pieces)
