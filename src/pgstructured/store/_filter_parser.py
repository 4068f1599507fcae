"""From a filter's words to its tree: one method for each rule of the grammar.

The grammar, most binding last; ``docs/reference/store-filters.md`` has it for readers::

    filter      = disjunction
    disjunction = conjunction {"OR" conjunction}
    conjunction = negation {"AND" negation}
    negation    = "NOT" negation | "(" disjunction ")" | condition
    condition   = column (comparison | likeness | membership | range | nullness)

Words are not reserved. Where a column is expected any name is one, so ``order = 1`` and even
``not = 1`` are conditions; see `_Parser._is_negation` for where that takes a second look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from ._filter_faults import fault
from ._filter_tokens import Kind, Token, tokens_of
from ._filter_tree import (
    Boolean,
    Condition,
    Equality,
    Junction,
    Likeness,
    Membership,
    Negation,
    Node,
    Now,
    Null,
    Nullness,
    Ordering,
    Range,
    Reference,
    Text,
    Value,
)
from ._identifiers import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgstructured.errors import FilterError

    from ._filter_tree import EqualityOperator, OrderingOperator, PatternOperator

MAX_LENGTH: Final = 131_072  # characters
MAX_CONDITIONS: Final = 256
MAX_DEPTH: Final = 50  # parentheses and NOTs that are open

_EQUALITIES: Final[dict[str, EqualityOperator]] = {"=": "=", "==": "=", "!=": "<>", "<>": "<>"}
_ORDERINGS: Final[dict[str, OrderingOperator]] = {"<": "<", "<=": "<=", ">": ">", ">=": ">="}
_PATTERNS: Final[dict[str, PatternOperator]] = {"LIKE": "LIKE", "ILIKE": "ILIKE"}
_VALUE_KINDS: Final = {Kind.TEXT, Kind.NUMBER, Kind.REFERENCE}
_VALUE_WORDS: Final = {"TRUE", "FALSE", "NULL", "NOW"}


def parse(source: str) -> Node | None:
    """Return the tree of a filter; None if there is nothing in it.

    Raises:
        FilterError: It can't be understood.
    """
    if len(source) > MAX_LENGTH:
        message = f"a filter has {MAX_LENGTH} characters at most; long values are for bindings"
        raise fault(source, MAX_LENGTH, message)
    return _Parser(source).parse()


class _Parser:
    __slots__ = ("_conditions", "_depth", "_index", "_source", "_tokens")

    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = tokens_of(source)
        self._index = 0
        self._depth = 0
        self._conditions = 0

    def parse(self) -> Node | None:
        if self._next().kind is Kind.END:
            return None
        node = self._disjunction()
        if self._next().kind is not Kind.END:
            raise self._wrong("expected AND, OR or the end")
        return node

    # ------------------------------------------------------------ words

    def _next(self) -> Token:
        return self._tokens[self._index]

    def _ahead(self, count: int) -> Token:
        return self._tokens[min(self._index + count, len(self._tokens) - 1)]

    def _take(self) -> Token:
        token = self._next()
        self._index += 1
        return token

    def _takes(self, word: str) -> bool:
        """Take the next word if it is this one."""
        if self._next().word != word:
            return False
        self._index += 1
        return True

    def _expect(self, kind: Kind, message: str) -> None:
        if self._next().kind is not kind:
            raise self._wrong(message)
        self._index += 1

    def _wrong(self, message: str, token: Token | None = None) -> FilterError:
        token = token or self._next()
        # What is no word is what's wrong, whatever was expected in its place.
        bad = token.kind is Kind.BAD
        return fault(self._source, token.position, token.text if bad else message)

    # ------------------------------------------------------------ parts

    def _disjunction(self) -> Node:
        return self._junction("OR", self._conjunction)

    def _conjunction(self) -> Node:
        return self._junction("AND", self._negation)

    def _junction(self, connector: Literal["AND", "OR"], part: Callable[[], Node]) -> Node:
        parts = [part()]
        while self._takes(connector):
            parts.append(part())
        return parts[0] if len(parts) == 1 else Junction(connector, tuple(parts))

    def _negation(self) -> Node:
        if self._next().kind is Kind.OPEN:
            self._enter()
            node = self._disjunction()
            self._expect(Kind.CLOSE, "expected AND, OR or a closing parenthesis")
        elif self._is_negation():
            self._enter()
            node = Negation(self._negation())
        else:
            return self._condition()
        self._depth -= 1
        return node

    def _enter(self) -> None:
        if self._depth == MAX_DEPTH:
            raise self._wrong(f"too deep: {MAX_DEPTH} open parentheses and NOTs at most")
        self._depth += 1
        self._index += 1

    def _is_negation(self) -> bool:
        """Whether the next word is NOT and not a column of that name.

        It is a column if what follows can only be its operator, with the operand that this one
        needs: ``not = 1``, ``not in (1)``. In ``not in = 1`` it is NOT, and the column is ``in``.
        """
        if self._next().word != "NOT":
            return False
        after, operand = self._ahead(1), self._ahead(2)
        match after.word:
            case "LIKE" | "ILIKE" | "BETWEEN":
                return not _starts_value(operand)
            case "IN":
                return operand.kind not in {Kind.OPEN, Kind.REFERENCE}
            case "IS":
                last = self._ahead(3) if operand.word == "NOT" else operand
                return last.word != "NULL"
            case _:
                return after.kind is not Kind.COMPARISON

    # ------------------------------------------------------------ conditions

    def _condition(self) -> Condition:
        if self._conditions == MAX_CONDITIONS:
            raise self._wrong(f"too many conditions: {MAX_CONDITIONS} at most")
        self._conditions += 1
        column = self._column()
        if self._next().kind is Kind.COMPARISON:
            return self._comparison(column)
        if self._takes("IS"):
            negated = self._takes("NOT")
            if not self._takes("NULL"):
                raise self._wrong("expected NULL")
            return Nullness(column, negated)
        negated = self._takes("NOT")
        operator = self._take()
        if operator.word in _PATTERNS:
            return self._likeness(column, _PATTERNS[operator.word], negated=negated)
        if operator.word == "IN":
            return self._membership(column, negated=negated)
        if operator.word == "BETWEEN":
            low = self._value_for("BETWEEN")
            if not self._takes("AND"):
                raise self._wrong("expected AND and the upper bound")
            return Range(column, negated, low, self._value_for("BETWEEN"))
        if negated:
            raise self._wrong("expected LIKE, ILIKE, IN or BETWEEN after NOT", operator)
        raise self._wrong("expected an operator after the column", operator)

    def _column(self) -> str:
        token = self._take()
        if token.kind is not Kind.WORD:
            raise self._wrong("expected a column", token)
        if len(token.text) > MAX_BYTES:
            raise self._wrong(f"a column's name has {MAX_BYTES} bytes at most", token)
        return token.text

    def _comparison(self, column: str) -> Condition:
        operator = self._take().text
        token = self._next()
        value = self._value()
        if operator in _EQUALITIES:
            if isinstance(value, Null):
                return Nullness(column, negated=_EQUALITIES[operator] == "<>")
            return Equality(column, _EQUALITIES[operator], value)
        if isinstance(value, Null):
            raise self._wrong(
                f"NULL is neither more nor less than anything: {operator} needs a value", token
            )
        return Ordering(column, _ORDERINGS[operator], value)

    def _likeness(self, column: str, operator: PatternOperator, *, negated: bool) -> Condition:
        token = self._next()
        value = self._value()
        if not isinstance(value, Text | Reference):
            raise self._wrong(f"{operator} needs a pattern, in quotes or as a binding", token)
        return Likeness(column, negated, operator, value)

    def _membership(self, column: str, *, negated: bool) -> Condition:
        if self._next().kind is Kind.REFERENCE:
            return Membership(column, negated, (self._value_for("IN"),), enclosed=False)
        self._expect(Kind.OPEN, "expected values in parentheses, or a binding that is a list")
        values: list[Value] = []
        if self._next().kind is not Kind.CLOSE:
            values.append(self._value_for("IN"))
            while self._next().kind is Kind.COMMA:
                self._index += 1
                values.append(self._value_for("IN"))
        self._expect(Kind.CLOSE, "expected a comma or a closing parenthesis")
        return Membership(column, negated, tuple(values), enclosed=True)

    # ------------------------------------------------------------ values

    def _value_for(self, operator: str) -> Value:
        token = self._next()
        value = self._value()
        if isinstance(value, Null):
            raise self._wrong(f"NULL does not go with {operator}; say IS NULL beside it", token)
        return value

    def _value(self) -> Value | Null:
        token = self._take()
        if token.value is not None:
            return token.value
        match token.word:
            case "TRUE" | "FALSE":
                return Boolean(token.word == "TRUE")
            case "NULL":
                return Null()
            case "NOW":
                return self._now()
            case "":
                raise self._wrong("expected a value", token)
            case _:
                raise self._wrong("expected a value; text stands in quotes", token)

    def _now(self) -> Now:
        self._expect(Kind.OPEN, "expected (), as in now()")
        self._expect(Kind.CLOSE, "expected ), as in now()")
        if self._next().kind is not Kind.SIGN:
            return Now()
        sign: Literal["+", "-"] = "+" if self._take().text == "+" else "-"
        token = self._take()
        if isinstance(token.value, Reference):
            return Now(sign, token.value)
        if token.word != "INTERVAL":
            raise self._wrong("expected interval '...', or a binding that is a timedelta", token)
        token = self._take()
        if not isinstance(token.value, Text):
            raise self._wrong("expected a length of time in quotes, as in interval '7 days'", token)
        return Now(sign, token.value)


def _starts_value(token: Token) -> bool:
    return token.kind in _VALUE_KINDS or token.word in _VALUE_WORDS
