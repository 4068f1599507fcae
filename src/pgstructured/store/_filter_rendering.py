"""From a filter's tree and its bindings to SQL: a condition, and parameters beside it.

What is sent for a literal decides with what it can be compared:

- Text goes without a type, and the server takes it for the column's: a uuid, a date, an enum.
- An integer that is compared for equality goes the same way, so that it also finds text (``zip =
  2134``). One that is compared for order goes as a number: text would be ordered by its letters.
- A number with a point or an exponent, or too long for ``int4``, goes as a number always: an
  integer column has no 5.5, and is less than it all the same.
- A binding outside of quotes goes as psycopg sends its Python type.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, assert_never

from ._filter_drafts import EVERYTHING, Draft
from ._filter_tree import (
    Boolean,
    Equality,
    Junction,
    Likeness,
    Membership,
    Negation,
    Now,
    Nullness,
    Number,
    Ordering,
    Range,
    Reference,
    Text,
)

if TYPE_CHECKING:
    from ._filter_bindings import Bound
    from ._filter_drafts import Where
    from ._filter_tree import Node, Value

    Written = Text | Number | Boolean | Now

_INT4: Final = range(-(2**31), 2**31)
_PART: Final = r"([0-9]{1,10})\s*(second|minute|hour|day|week|month|year)s?"
_LENGTH: Final = re.compile(_PART, re.ASCII | re.IGNORECASE)
_INTERVAL: Final = re.compile(rf"\s*{_PART}(?:\s+{_PART})*\s*", re.ASCII | re.IGNORECASE)
_MAX_COUNT: Final = 2**32 - 1


def render(node: Node | None, bound: Bound) -> Where:
    """Return the condition that a tree says; that of no tree is every row.

    Raises:
        FilterError: A binding is unknown, or can't be put where the filter has it.
    """
    if node is None:
        return EVERYTHING
    draft = Draft()
    _Rendering(bound, draft).node(node)
    return draft.finish()


class _Rendering:
    __slots__ = ("_bound", "_draft")

    def __init__(self, bound: Bound, draft: Draft) -> None:
        self._bound = bound
        self._draft = draft

    def node(self, node: Node) -> None:
        match node:
            case Junction():
                self._junction(node)
            case Negation():
                self._draft.word("(NOT ")
                self.node(node.part)
                self._draft.word(")")
            case Equality():
                self._equality(node)
            case Ordering():
                self._draft.column(node.column)
                self._draft.word(f" {node.operator} ")
                self._ordered(node.value, node.operator)
            case Likeness():
                self._likeness(node)
            case Membership():
                self._membership(node)
            case Range():
                self._draft.column(node.column)
                self._draft.word(" NOT BETWEEN " if node.negated else " BETWEEN ")
                self._ordered(node.low, "BETWEEN")
                self._draft.word(" AND ")
                self._ordered(node.high, "BETWEEN")
            case Nullness():
                self._nullness(node.column, negated=node.negated)
            case _:
                assert_never(node)

    def _junction(self, node: Junction) -> None:
        self._draft.word("(")
        for count, part in enumerate(node.parts):
            if count:
                self._draft.word(f" {node.connector} ")
            self.node(part)
        self._draft.word(")")

    def _nullness(self, column: str, *, negated: bool) -> None:
        self._draft.column(column)
        self._draft.word(" IS NOT NULL" if negated else " IS NULL")

    def _equality(self, node: Equality) -> None:
        value: _Resolved | Written
        if isinstance(node.value, Reference):
            value = _Resolved(self._bound.value(node.value))
            if value.value is None:
                self._nullness(node.column, negated=node.operator == "<>")
                return
        else:
            value = node.value
        self._draft.column(node.column)
        self._draft.word(f" {node.operator} ")
        self._comparable(value)

    def _likeness(self, node: Likeness) -> None:
        self._draft.column(node.column)
        self._draft.word(f"{' NOT' if node.negated else ''} {node.operator} ")
        if isinstance(node.pattern, Reference):
            pattern = self._bound.value(node.pattern)
            if not isinstance(pattern, str):
                expected = f"{node.operator} needs text"
                raise self._bound.wrong_type(node.pattern, pattern, expected)
        else:
            pattern = self._bound.text(node.pattern, pattern=True)
        # The server says so only of a value that gets as far as the pattern's end.
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
            raise self._bound.fault(node.pattern, "a pattern can't end with a single backslash")
        self._draft.parameter(pattern)

    def _membership(self, node: Membership) -> None:
        values: list[_Resolved | Written] = []
        for value in node.values:
            if not isinstance(value, Reference):
                values.append(value)
                continue
            bound = self._bound.value(value)
            items = self._bound.items(value, bound)
            if items is None and (bound is None or not node.enclosed):
                expected = "IN needs values" if node.enclosed else "IN needs a list, tuple or set"
                raise self._bound.wrong_type(value, bound, expected)
            if items is not None and len(node.values) == 1:
                self._draft.any_of(node.column, items, negated=node.negated)
                return
            values.extend(map(_Resolved, (bound,) if items is None else items))
        if not values:
            self._draft.any_of(node.column, (), negated=node.negated)
            return
        self._draft.column(node.column)
        self._draft.word(" NOT IN (" if node.negated else " IN (")
        for count, written in enumerate(values):
            if count:
                self._draft.word(", ")
            self._comparable(written)
        self._draft.word(")")

    def _ordered(self, value: Value, operator: str) -> None:
        """Write a value whose place in an order is what matters."""
        if isinstance(value, Number):
            self._draft.parameter(value.value)
        elif isinstance(value, Reference):
            bound = self._bound.value(value)
            if bound is None:
                raise self._bound.wrong_type(value, bound, f"{operator} needs a value")
            self._draft.parameter(bound)
        else:
            self._comparable(value)

    def _comparable(self, value: _Resolved | Written) -> None:
        """Write a value that a column may be equal to."""
        match value:
            case _Resolved():
                self._draft.parameter(value.value)
            case Text():
                self._draft.parameter(self._bound.text(value))
            case Number():
                short = isinstance(value.value, int) and value.value in _INT4
                self._draft.parameter(value.text if short else value.value)
            case Boolean():
                self._draft.parameter("true" if value.value else "false")
            case Now():
                self._now(value)
            case _:
                assert_never(value)

    def _now(self, now: Now) -> None:
        self._draft.word("now()")
        if now.offset is None:
            return
        self._draft.word(" - " if now.sign == "-" else " + ")
        self._draft.parameter(self._interval(now.offset))
        self._draft.word("::interval")

    def _interval(self, offset: Text | Reference) -> object:
        if isinstance(offset, Reference):
            delta = self._bound.value(offset)
            if not isinstance(delta, timedelta):
                raise self._bound.wrong_type(offset, delta, "now() needs a timedelta beside it")
            return delta
        text = self._bound.text(offset)
        found = _INTERVAL.fullmatch(text) and _LENGTH.findall(text)
        if not found or any(int(count) > _MAX_COUNT for count, _ in found):
            expected = (
                "expected whole numbers of seconds, minutes, hours, days, weeks, months, years"
            )
            raise self._bound.fault(offset, f"{expected}, as in interval '7 days'")
        return " ".join(f"{int(count)} {unit.lower()}" for count, unit in found)


@dataclass(frozen=True, slots=True)
class _Resolved:
    """What a reference stands for."""

    value: object
