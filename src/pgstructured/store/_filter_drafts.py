"""A condition while it is written: words of SQL, names of columns, and values beside it.

The words are the ones of `_WORDS` and no others, and a value is only ever a parameter.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Final, cast
from uuid import UUID

from psycopg import sql

from pgstructured.errors import FilterError

from ._identifiers import identifier

if TYPE_CHECKING:
    from collections.abc import Sequence

# The protocol's limit is 65535, and an UPDATE has parameters of its own.
MAX_PARAMETERS: Final = 60_000

_WORDS: Final = {
    word.as_string(): word
    for word in (
        *(sql.SQL("("), sql.SQL(")"), sql.SQL(", "), sql.SQL(" AND "), sql.SQL(" OR ")),
        *(sql.SQL("(NOT "), sql.SQL(" IS NULL"), sql.SQL(" IS NOT NULL")),
        *(sql.SQL(" = "), sql.SQL(" <> "), sql.SQL(" IN ("), sql.SQL(" NOT IN (")),
        *(sql.SQL(" < "), sql.SQL(" <= "), sql.SQL(" > "), sql.SQL(" >= ")),
        *(sql.SQL(" LIKE "), sql.SQL(" NOT LIKE "), sql.SQL(" ILIKE "), sql.SQL(" NOT ILIKE ")),
        *(sql.SQL(" BETWEEN "), sql.SQL(" NOT BETWEEN ")),
        *(sql.SQL(" = ANY("), sql.SQL(" <> ALL(")),
        *(sql.SQL(" IS NULL AND FALSE)"), sql.SQL(" IS NULL OR TRUE)")),
        *(sql.SQL("now()"), sql.SQL(" + "), sql.SQL(" - "), sql.SQL("::interval")),
    )
}
_COLUMN: Final = "column "
_PLACEHOLDER: Final = "placeholder"
_LONG: Final = 500
_MAX_DIMENSIONS: Final = 6  # of the server's arrays
# psycopg makes an array of these, if all are of one of them.
_ARRAY_ITEMS: Final = frozenset({bool, int, float, str, Decimal, UUID, dt.date, dt.datetime})


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """A condition for ``WHERE``, and what goes with it."""

    condition: sql.Composable | None
    """The condition, with a `psycopg.sql.Placeholder` for each value; None is every row.

    Parenthesised as it has to be to stand next to ``AND``.
    """
    parameters: tuple[object, ...] = field(repr=False)
    """The values, in the order of their placeholders."""
    text: str | None
    """The same condition as text: equal where conditions are, so what is made of them can be
    kept under it. There is no value in it."""


EVERYTHING: Final = Where(condition=None, parameters=(), text=None)


class Draft:
    """What has been written of a condition."""

    __slots__ = ("_parameters", "_parts")

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._parameters: list[object] = []

    def word(self, word: str) -> None:
        """Write one of the words that there are."""
        self._parts.append(word)

    def column(self, name: str) -> None:
        """Write the name of a column."""
        self._parts.append(_COLUMN + name)

    def parameter(self, value: object) -> None:
        """Write a placeholder, and put a value beside."""
        # Which type of integers an array has they don't say; psycopg would have it the shortest,
        # and to a smallint[] no int[] is equal.
        self._put(_as_text(value) if _is_of_integers(value, _MAX_DIMENSIONS) else value)

    def _put(self, value: object) -> None:
        if len(self._parameters) == MAX_PARAMETERS:
            raise FilterError(f"too many values: {MAX_PARAMETERS} at most")
        self._parts.append(_PLACEHOLDER)
        self._parameters.append(value)

    def any_of(self, column: str, items: Sequence[object], *, negated: bool = False) -> None:
        """Write that a column is one of these values, or that it is none of them.

        One parameter where they make an array, so that the statement is the same for any number.
        Of none of them at all no column is one, not even one that is NULL.
        """
        if not items:
            self.word("(")
            self.column(column)
            self.word(" IS NULL OR TRUE)" if negated else " IS NULL AND FALSE)")
            return
        if _make_an_array(items):
            self.column(column)
            self.word(" <> ALL(" if negated else " = ANY(")
            self._put(list(items))
        else:
            self.column(column)
            self.word(" NOT IN (" if negated else " IN (")
            for count, item in enumerate(items):
                if count:
                    self.word(", ")
                self.parameter(item)
        self.word(")")

    def finish(self) -> Where:
        """Return what has been written."""
        parts = tuple(self._parts)
        make = _composed if len(parts) <= _LONG else _composed.__wrapped__
        condition, text = make(parts)
        return Where(condition=condition, parameters=tuple(self._parameters), text=text)


def _make_an_array(items: Sequence[object]) -> bool:
    kind = type(items[0])
    if kind not in _ARRAY_ITEMS or any(type(item) is not kind for item in items):
        return False
    # With a time zone and without are two types to the server.
    zones = {item.tzinfo is None for item in items if isinstance(item, dt.datetime)}
    return len(zones) <= 1


def _is_of_integers(value: object, depth: int) -> bool:
    """Tell whether a value is an array of integers, of so many dimensions at most."""
    if type(value) is not list:
        return False
    items = cast("list[object]", value)
    return depth > 0 and all(
        item is None or type(item) is int or _is_of_integers(item, depth - 1) for item in items
    )


def _as_text(value: object) -> object:
    if isinstance(value, list):
        return [_as_text(item) for item in cast("list[object]", value)]
    return str(Decimal(value)) if isinstance(value, int) else value  # of any length


@lru_cache(maxsize=256)
def _composed(parts: tuple[str, ...]) -> tuple[sql.Composed, str]:
    condition = sql.Composed([_composable(part) for part in parts])
    return condition, condition.as_string()


def _composable(part: str) -> sql.Composable:
    if part == _PLACEHOLDER:
        return sql.Placeholder()
    if part.startswith(_COLUMN):
        return identifier(part.removeprefix(_COLUMN), kind="column")
    return _WORDS[part]
