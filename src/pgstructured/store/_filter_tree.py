"""What a filter is, once it is understood: conditions on columns, and how they are joined.

Nodes know nothing of SQL and nothing of bindings' values: a tree can be kept, and used again
with other bindings. Positions are indexes into the filter's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from decimal import Decimal

EqualityOperator = Literal["=", "<>"]
OrderingOperator = Literal["<", "<=", ">", ">="]
PatternOperator = Literal["LIKE", "ILIKE"]


@dataclass(frozen=True, slots=True)
class Reference:
    """``${name}``: a binding, or what is inside of one."""

    path: tuple[str, ...]
    position: int


@dataclass(frozen=True, slots=True)
class Text:
    """A string: what was written, and references to be put between."""

    pieces: tuple[str | Reference, ...]
    position: int


@dataclass(frozen=True, slots=True)
class Number:
    """A number: as it was written, and what it is, to the last digit."""

    text: str
    value: int | Decimal


@dataclass(frozen=True, slots=True)
class Boolean:
    """``TRUE`` or ``FALSE``."""

    value: bool


@dataclass(frozen=True, slots=True)
class Now:
    """``now()``, or some time before or after it."""

    sign: Literal["+", "-"] | None = None
    offset: Text | Reference | None = None


@dataclass(frozen=True, slots=True)
class Null:
    """``NULL``, which goes with ``=`` and ``!=`` only."""


Value = Text | Number | Boolean | Now | Reference


@dataclass(frozen=True, slots=True)
class Equality:
    """``column = value``; with a reference to None, ``IS NULL``."""

    column: str
    operator: EqualityOperator
    value: Value


@dataclass(frozen=True, slots=True)
class Ordering:
    """``column < value``."""

    column: str
    operator: OrderingOperator
    value: Value


@dataclass(frozen=True, slots=True)
class Likeness:
    """``column LIKE pattern``."""

    column: str
    negated: bool
    operator: PatternOperator
    pattern: Text | Reference


@dataclass(frozen=True, slots=True)
class Membership:
    """``column IN (value, ...)``; what is a list among the values stands for its items."""

    column: str
    negated: bool
    values: tuple[Value, ...]
    enclosed: bool
    """Whether in parentheses; without, there is one reference, and to a list."""


@dataclass(frozen=True, slots=True)
class Range:
    """``column BETWEEN low AND high``."""

    column: str
    negated: bool
    low: Value
    high: Value


@dataclass(frozen=True, slots=True)
class Nullness:
    """``column IS NULL``."""

    column: str
    negated: bool


@dataclass(frozen=True, slots=True)
class Negation:
    """``NOT part``."""

    part: Node


@dataclass(frozen=True, slots=True)
class Junction:
    """Two parts or more, all with AND or all with OR between."""

    connector: Literal["AND", "OR"]
    parts: tuple[Node, ...]


Condition = Equality | Ordering | Likeness | Membership | Range | Nullness
Node = Condition | Negation | Junction
