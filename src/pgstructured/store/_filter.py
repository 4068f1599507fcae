"""Filters: text or a mapping, made into a condition and its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from psycopg import sql

from pgstructured.errors import FilterError, InvalidIdentifierError

from ._identifiers import identifier

_CONDITION: Final = re.compile(
    r"\s*(?P<column>[A-Za-z_]\w*)\s*(?P<operator>==|=|!=|<>|>=|>|<=|<|\blike\b)\s*"
    r"(?P<value>'[^'\\$]*'|-?[0-9]+|\$\{?\w+\}?)\s*(?P<connector>\band\b|\bor\b|$)",
    re.ASCII | re.IGNORECASE,
)
_ORDER: Final = re.compile(
    r"\s*(?P<column>\S+)(?P<direction>\s+(?:asc|desc))?(?P<nulls>\s+nulls\s+(?:first|last))?\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """A condition for ``WHERE``, and what goes with it."""

    condition: sql.Composable | None
    """The condition, with a `psycopg.sql.Placeholder` for each value; None is every row."""
    parameters: tuple[object, ...]
    """The values, in the order of their placeholders."""


def compile_where(
    where: str | Mapping[str, object] | None, bindings: Mapping[str, object] | None = None
) -> Where:
    """Return the condition that `where` says; None, no text and no keys are every row.

    Raises:
        FilterError: The text can't be understood, or names an unknown binding.
        InvalidIdentifierError: A key of the mapping is no name.
    """
    parts: list[sql.Composable] = []
    parameters: list[object] = []
    if where is None:
        return Where(condition=None, parameters=())
    if isinstance(where, Mapping):
        for name, value in where.items():
            column = identifier(name, kind="column")
            parts.append(sql.SQL(" AND "))
            if value is None:
                parts.append(sql.SQL("{} IS NULL").format(column))
            elif isinstance(value, (list, tuple, set, frozenset)):
                parts.append(sql.SQL("{} = ANY({})").format(column, sql.Placeholder()))
                parameters.append(list(cast("Iterable[object]", value)))
            else:
                parts.append(sql.SQL("{} = {}").format(column, sql.Placeholder()))
                parameters.append(value)
        return Where(condition=_joined(parts[1:]), parameters=tuple(parameters))
    position = 0
    dangling = False
    while position < len(where.rstrip()):
        found = _CONDITION.match(where, position)
        if found is None:
            raise FilterError("expected a condition", position=position)
        value = _value(found["value"], bindings or {}, found.start("value"))
        operator = {"==": "=", "!=": "<>"}.get(found["operator"], found["operator"]).upper()
        column = identifier(found["column"], kind="column")
        parts.append(sql.SQL("{} {} {}").format(column, _sql(operator), sql.Placeholder()))
        parameters.append(value)
        parts.append(sql.SQL(" {} ").format(_sql(found["connector"].upper())))
        position = found.end()
        dangling = bool(found["connector"])
    if dangling:
        raise FilterError("expected a condition", position=position)
    return Where(condition=_joined(parts[:-1]), parameters=tuple(parameters))


def compile_order_by(order_by: str | Sequence[str] | None) -> sql.Composable | None:
    """Return what stands after ``ORDER BY``, or None.

    Raises:
        FilterError: It is not a list of columns with directions.
        InvalidIdentifierError: A column is no name.
    """
    if order_by is None:
        return None
    terms: list[sql.Composable] = []
    for term in order_by.split(",") if isinstance(order_by, str) else order_by:
        found = _ORDER.fullmatch(term)
        if found is None:
            raise FilterError("expected a column, ASC or DESC, NULLS FIRST or NULLS LAST")
        after = f"{found['direction'] or ''}{found['nulls'] or ''}".upper().split()
        words = [identifier(found["column"], kind="column"), *map(_sql, after)]
        terms.append(sql.SQL(" ").join(words))
    return sql.SQL(", ").join(terms) if terms else None


def compile_columns(columns: Sequence[str] | None) -> sql.Composable:
    """Return what stands after ``SELECT``: these columns, or ``*``.

    Raises:
        InvalidIdentifierError: A column is no name, or stands there twice, or there are none.
    """
    if columns is None:
        return sql.SQL("*")
    names = [columns] if isinstance(columns, str) else list(columns)
    if not names or len(set(names)) < len(names):
        raise InvalidIdentifierError("columns: expected one or more, each of them once")
    return sql.SQL(", ").join([identifier(name, kind="column") for name in names])


def _joined(parts: list[sql.Composable]) -> sql.Composable | None:
    return sql.Composed([sql.SQL("("), *parts, sql.SQL(")")]) if parts else None


_WORDS: Final = (
    *(sql.SQL("="), sql.SQL("<>"), sql.SQL(">"), sql.SQL(">="), sql.SQL("<"), sql.SQL("<=")),
    *(sql.SQL("LIKE"), sql.SQL("AND"), sql.SQL("OR"), sql.SQL("")),
    *(sql.SQL("ASC"), sql.SQL("DESC"), sql.SQL("NULLS"), sql.SQL("FIRST"), sql.SQL("LAST")),
)


def _sql(word: str) -> sql.Composable:
    return next(known for known in _WORDS if known.as_string() == word)


def _value(token: str, bindings: Mapping[str, object], position: int) -> object:
    if token.startswith("'"):
        return token[1:-1]
    if not token.startswith("$"):
        return int(token)
    try:
        return bindings[token.strip("${}")]
    except KeyError:
        raise FilterError("unknown binding", position=position) from None
