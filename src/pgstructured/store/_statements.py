"""The text of a store's statements.

Rendering SQL from its parts costs as much as the round trip that it is for, and there are few
different texts. So what is made of names only is made once. A statement is in two pieces, with
the table between them, which may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast
from uuid import UUID

from psycopg import sql

from pgstructured.errors import FilterError

from ._filter import compile_columns, compile_order_by, compile_where
from ._identifiers import identifier
from ._rows import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ._filter import Where

T = TypeVar("T")

_REMEMBERED: Final = 512
_SHORT: Final = 1024
_SELECT_ALL: Final = "SELECT * FROM "
_WHERE: Final = " WHERE "
_INSERT: Final = "INSERT INTO "
_CHUNK: Final = 16_000
"""Values that one INSERT of many rows carries: with 4,000 rows take an eighth longer, more than
this are no faster, and take memory."""


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
        TypeError: One of them is of another type.
        ValueError: The limit is none.
    """
    condition, parameters = _condition(where, bindings)
    if limit is not None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise ValueError(f"limit must be a whole number of rows, 0 or more, not {limit!r}")
        parameters = (*parameters, limit)
    if columns is None and order_by is None and limit is None:
        return Statement(_SELECT_ALL, _WHERE + condition if condition else "", parameters)
    if isinstance(order_by, Mapping):  # whose values would be lost
        raise TypeError(
            f"order_by: expected str or a sequence of them, not {type(order_by).__name__}"
        )
    head = _remembered(_select_head, columns)
    order = None if order_by is None else _remembered(_order, order_by)
    return Statement(
        head, _tail(condition, order, "" if limit is None else " LIMIT %s"), parameters
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
    condition, parameters = _condition(where, bindings)
    _check_condition(condition, "mutate", all_rows=all_rows)
    if not isinstance(data, Mapping):
        raise TypeError(f"data must be a mapping of columns to values, not {type(data).__name__}")
    columns, (values,) = rows_of(cast("Mapping[str, object]", data))
    tail = _remembered(_assignments, columns) + _tail(condition)
    return Statement("UPDATE ", tail, (*values, *parameters))


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
    condition, parameters = _condition(where, bindings)
    _check_condition(condition, "purge", all_rows=all_rows)
    return Statement("DELETE FROM ", _tail(condition), parameters)


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
    kind: object = type(data)
    if kind is dict and data and returning is None:  # made to be quick
        row = cast("dict[str, object]", data)
        tail = _insert_tail(tuple(row), on_conflict)
        return [Statement(_INSERT, tail, tuple(row.values()))]
    columns, rows = rows_of(data)
    ends = _ends(on_conflict)
    if returning is not None:
        ends += _remembered(_returning, None if returning == "*" else returning)
    if len(rows) == 1:
        tail = f"{_remembered(_names, columns)}{_one(len(columns))}{ends}"
        return [Statement(_INSERT, tail, rows[0])]
    statements: list[Statement] = []
    width = len(columns)
    size = max(_CHUNK // width, 1) if rows else 1
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        tail = f"{_remembered(_names, columns)} VALUES {_many(width, len(chunk))}{ends}"
        parameters = [value for row in chunk for value in row]
        statements.append(Statement(_INSERT, tail, parameters, is_raw=True))
    return statements


def _check_condition(condition: str | None, operation: str, *, all_rows: bool) -> None:
    if condition is None and not all_rows:
        raise FilterError(
            f"{operation} without a condition is for all rows of the table; if that is meant,"
            " say all_rows=True"
        )


# ---------------------------------------------------------------- conditions

_PLAIN: Final = frozenset({bool, int, float, str, Decimal, UUID, date, datetime})
_known: Final[dict[tuple[object, ...], str]] = {}


def _condition(
    where: str | Mapping[str, object] | None, bindings: Mapping[str, object] | None
) -> tuple[str | None, tuple[object, ...]]:
    """Return a condition's text, and its values.

    Text without bindings is the same each time. With values of plain types a mapping's text
    depends on nothing but its names.
    """
    kind: object = type(where)
    if bindings is not None or kind is not dict:
        keep = kind is str and bindings is None and len(cast("str", where)) <= _SHORT
        found = _without_bindings(cast("str", where)) if keep else compile_where(where, bindings)
        return found.text, found.parameters
    plain = cast("dict[str, object]", where)
    values = tuple(plain.values())
    shape = (*plain, *map(type, values))
    text = _known.get(shape)
    # Where text has other characters than these, it may be none that can be sent.
    if text is not None and (str not in shape or all(map(_is_simple, values))):
        return text, values
    found = compile_where(plain)
    text = found.text
    if text is not None and _PLAIN.issuperset(map(type, values)):
        if len(_known) >= _REMEMBERED:
            _known.clear()
        _known[shape] = text
    return text, found.parameters


@lru_cache(_REMEMBERED)
def _without_bindings(where: str) -> Where:
    return compile_where(where)


def _is_simple(value: object) -> bool:
    return not isinstance(value, str) or (value.isascii() and "\0" not in value)


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


@lru_cache(_REMEMBERED)
def _insert_tail(columns: tuple[str, ...], on_conflict: str) -> str:
    return f"{_names(columns)}{_one(len(columns))}{_ends(on_conflict)}"


def _ends(on_conflict: str) -> str:
    if on_conflict == "error":
        return ""
    if on_conflict == "ignore":
        return " ON CONFLICT DO NOTHING"
    raise ValueError(f'on_conflict must be "error" or "ignore", not {on_conflict!r}')


def _one(width: int) -> str:
    return f" VALUES ({', '.join(['%s'] * width)})"


@lru_cache(16)
def _many(width: int, count: int) -> str:
    rows = (
        ",".join(f"${number}" for number in range(first, first + width))
        for first in range(1, width * count + 1, width)
    )
    return f"({'),('.join(rows)})"


def _tail(condition: str | None, order: str | None = None, limit: str = "") -> str:
    is_short = condition is None or len(condition) <= _SHORT
    make = _kept_tail if is_short else _kept_tail.__wrapped__
    return make(condition, order, limit)


@lru_cache(_REMEMBERED)
def _kept_tail(condition: str | None, order: str | None, limit: str) -> str:
    pieces = [
        "" if condition is None else _WHERE + condition,
        "" if order is None else f" ORDER BY {order}",
        limit,
    ]
    return "".join(pieces)
