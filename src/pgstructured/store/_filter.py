"""Filters: text or a mapping, made into a condition and its parameters.

What is in the language is in the modules ``_filter_*``, and imports go down this list only:

====================  =================================================================
``_filter``           the door
``_filter_rendering`` tree and bindings to SQL
``_filter_bindings``  what references stand for
``_filter_drafts``    SQL while it is written
``_filter_parser``    words to a tree
``_filter_tokens``    text to words
``_filter_tree``      what a filter is
``_filter_faults``    errors that show the place
====================  =================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import NoneType
from typing import TYPE_CHECKING, Final

from pgstructured.errors import FilterError

from ._filter_bindings import Bound, items_of, problem_of
from ._filter_drafts import EVERYTHING, Draft, Where as Where
from ._filter_ordering import (
    compile_columns as compile_columns,
    compile_order_by as compile_order_by,
)
from ._filter_parser import parse
from ._filter_rendering import render
from ._identifiers import check_type, identifier

if TYPE_CHECKING:
    from ._filter_tree import Node

_SHORT: Final = 4096
_NO_BINDINGS: Final[Mapping[str, object]] = {}


def compile_where(
    where: str | Mapping[str, object] | None, bindings: Mapping[str, object] | None = None
) -> Where:
    """Return the condition that `where` says; None, blank text and no keys are every row.

    A mapping's columns are equal to its values: to one of them if the value is a list, a tuple or
    a set, and NULL if it is None.

    Args:
        where: Text in the filter language, or a mapping from columns to values.
        bindings: What the text's references stand for.

    Raises:
        FilterError: The text can't be understood, or a binding is unknown or can't be put where it
            is; a list has None in it.
        InvalidIdentifierError: A key of the mapping is no name.
        TypeError: One of them is of another type.
    """
    check_type("where", where, str, Mapping, NoneType)
    check_type("bindings", bindings, Mapping, NoneType)
    if where is None:
        return EVERYTHING
    if isinstance(where, str):
        tree = _kept_tree(where) if len(where) <= _SHORT else parse(where)
        return render(tree, Bound(where, _NO_BINDINGS if bindings is None else bindings))
    if bindings:
        raise FilterError("bindings go with a filter's text; a mapping has its values in it")
    return _from_mapping(where)


@lru_cache(maxsize=256)
def _kept_tree(source: str) -> Node | None:
    return parse(source)


def _from_mapping(where: Mapping[str, object]) -> Where:
    draft = Draft()
    for count, (name, value) in enumerate(where.items()):
        identifier(name, kind="column")
        draft.word(" AND " if count else "(")
        items = items_of(value)
        problem = problem_of((value,) if items is None else items)
        if value is None:
            draft.column(name)
            draft.word(" IS NULL")
        elif problem is not None:
            raise FilterError(f"the value of column {name} {problem}")
        elif items is not None:
            draft.any_of(name, items)
        else:
            draft.column(name)
            draft.word(" = ")
            draft.parameter(value)
    if not where:
        return EVERYTHING
    draft.word(")")
    return draft.finish()
