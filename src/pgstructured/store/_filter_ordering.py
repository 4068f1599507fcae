"""``ORDER BY``, and which columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from psycopg import sql

from pgstructured.errors import InvalidIdentifierError

from ._filter_faults import fault
from ._filter_tokens import Kind, Token, tokens_of
from ._identifiers import MAX_BYTES, check_type, identifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgstructured.errors import FilterError

_DIRECTIONS: Final = {"ASC": sql.SQL(" ASC"), "DESC": sql.SQL(" DESC")}
_NULLS: Final = {"FIRST": sql.SQL(" NULLS FIRST"), "LAST": sql.SQL(" NULLS LAST")}


def compile_order_by(order_by: str | Sequence[str] | None) -> sql.Composable | None:
    """Return what stands after ``ORDER BY``; None if nothing is to.

    Args:
        order_by: Columns, each with its ``ASC`` or ``DESC`` and its ``NULLS FIRST`` or ``LAST``
            if it has them: a text with commas between, or a sequence of one each.

    Raises:
        FilterError: It is something else.
    """
    if order_by is None:
        return None
    terms: list[sql.Composable] = []
    if isinstance(order_by, str):
        if order_by.strip():
            terms = _terms(order_by, one=False)
    else:
        for term in order_by:
            terms += _terms(term, one=True)
    return sql.SQL(", ").join(terms) if terms else None


def compile_columns(columns: str | Sequence[str] | None) -> sql.Composable:
    """Return what stands after ``SELECT``: these columns, or ``*`` for None.

    Args:
        columns: Names, as a sequence, or as one text with commas between.

    Raises:
        InvalidIdentifierError: One is no name, or stands there twice, or there are none.
    """
    if columns is None:
        return sql.SQL("*")
    if isinstance(columns, str):
        columns = [name.strip() for name in columns.split(",")]
    names = [identifier(name, kind="column") for name in columns]
    if not names:
        raise InvalidIdentifierError("columns: expected one at least, or None for all")
    seen: set[str] = set()
    for name in columns:
        if name in seen:
            raise InvalidIdentifierError(f"columns: {name} is there twice")
        seen.add(name)
    return sql.SQL(", ").join(names)


def _terms(source: str, *, one: bool) -> list[sql.Composable]:
    """Read terms up to the end; of a sequence's items only one each."""
    check_type("order_by", source, str)
    words = iter(tokens_of(source))
    terms: list[sql.Composable] = []
    after = next(words)
    while True:
        parts: list[sql.Composable] = [_column(source, after)]
        after = next(words)
        if after.word in _DIRECTIONS:
            parts.append(_DIRECTIONS[after.word])
            after = next(words)
        if after.word == "NULLS":
            which = next(words)
            if which.word not in _NULLS:
                raise _unexpected(source, which, "expected FIRST or LAST")
            parts.append(_NULLS[which.word])
            after = next(words)
        terms.append(sql.Composed(parts))
        if after.kind is Kind.END:
            return terms
        if one or after.kind is not Kind.COMMA:
            expected = "the end" if one else "a comma or the end"
            raise _unexpected(
                source, after, f"expected ASC, DESC, NULLS FIRST, NULLS LAST, {expected}"
            )
        after = next(words)


def _column(source: str, token: Token) -> sql.Identifier:
    if token.kind is not Kind.WORD:
        raise _unexpected(source, token, "expected a column")
    if len(token.text) > MAX_BYTES:
        raise _unexpected(source, token, f"a column's name has {MAX_BYTES} bytes at most")
    return identifier(token.text, kind="column")


def _unexpected(source: str, token: Token, message: str) -> FilterError:
    return fault(source, token.position, token.text if token.kind is Kind.BAD else message)
