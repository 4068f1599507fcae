"""What is to be stored: mappings of columns to values, made into rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, cast

from psycopg import ProgrammingError
from psycopg.adapt import PyFormat
from psycopg.types.json import Jsonb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pgstructured.driver import Connection

Row = Mapping[str, object]

_DICT: Final[type[Any]] = dict


def rows_of(data: object) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Return the columns of one row or many, and the rows' values in their order.

    Raises:
        TypeError: It is no mapping, and not made of mappings.
        ValueError: A row has no columns, or others than the first.
    """
    if isinstance(data, Mapping):
        if not data:
            raise ValueError("there are no columns in the data; give one or more, with values")
        row = cast("Row", data)
        return tuple(row), [tuple(row.values())]
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be a mapping of columns to values, or many of them, not"
            f" {type(data).__name__}"
        )
    items = list(cast("Iterable[object]", data))
    if not items:
        return (), []
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            raise TypeError(
                f"row {number} must be a mapping of columns to values, not {type(item).__name__}"
            )
    mappings = cast("list[Row]", items)
    columns = tuple(mappings[0])
    if not columns:
        raise ValueError("row 1 has no columns; give one or more, with values")
    width = len(columns)
    pick = _picker(columns)
    rows: list[tuple[object, ...]] = []
    for number, row in enumerate(mappings, 1):
        try:
            values = pick(row)
        except KeyError:
            values = ()
        if len(row) != width or not values:
            raise ValueError(_difference(number, columns, row))
        rows.append(values)
    return columns, rows


def _picker(columns: tuple[str, ...]) -> Callable[[Row], tuple[object, ...]]:
    if len(columns) == 1:
        (name,) = columns
        return lambda row: (row[name],)
    return cast("Callable[[Row], tuple[object, ...]]", itemgetter(*columns))


def _difference(number: int, columns: tuple[str, ...], row: Row) -> str:
    missing = [name for name in columns if name not in row]
    surplus = [name for name in row if name not in columns]
    told = [
        *([f"lacks {', '.join(map(repr, missing))}"] if missing else []),
        *([f"has {', '.join(map(repr, surplus))} besides"] if surplus else []),
    ]
    return (
        f"row {number} {' and '.join(told)}: all rows must have the columns of the first;"
        " nothing was stored"
    )


def adapted(conn: Connection[Any], parameters: Sequence[object]) -> Sequence[object]:
    """Return parameters as psycopg can send them: a bare `dict` as ``jsonb``.

    psycopg has no rule for them, and there is only one type that they can mean, unless the
    connection was told of another one (as ``hstore`` is registered).
    """
    kinds = [kind for kind in set[type[Any]](map(type, parameters)) if _is_json(conn, kind)]
    if not kinds:
        return parameters
    return [Jsonb(value) if type(value) in kinds else value for value in parameters]


def _is_json(conn: Connection[Any], kind: type[Any]) -> bool:
    if not issubclass(kind, _DICT):
        return False
    try:
        conn.adapters.get_dumper(kind, PyFormat.AUTO)
    except ProgrammingError:
        return True
    return False
