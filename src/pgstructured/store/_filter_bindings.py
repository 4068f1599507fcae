"""What a filter's references stand for: found by name, and checked for where they are put.

No error of this module shows a value, only names and types.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from collections.abc import Mapping, Sequence, Set as AbstractSet
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Final, cast
from uuid import UUID

from ._filter_faults import fault
from ._filter_tokens import is_sendable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pgstructured.errors import FilterError

    from ._filter_tree import Reference, Text

# What has one text that Postgres reads as the same value.
_TEXTUAL: Final = (
    *(float, Decimal, UUID),
    *(dt.date, dt.time),
    *(ipaddress.IPv4Address, ipaddress.IPv6Address),
    *(ipaddress.IPv4Network, ipaddress.IPv6Network),
)
_NOTHING: Final = object()
_WILDCARD: Final = re.compile(r"[\\%_]")


class Bound:
    """A filter's text, and the values that its references stand for."""

    __slots__ = ("_bindings", "source")

    def __init__(self, source: str, bindings: Mapping[str, object]) -> None:
        self.source = source
        self._bindings = bindings

    def value(self, reference: Reference) -> object:
        """Return what a reference stands for, None included, with the type it has.

        Raises:
            FilterError: There is no such binding, or it is text that can't be sent.
        """
        value: object = self._bindings
        for count, part in enumerate(reference.path, 1):
            value = _inside(value, part)
            if value is _NOTHING:
                name = ".".join(reference.path[:count])
                raise self.fault(reference, f"unknown binding {name}")
        if isinstance(value, str) and not is_sendable(value):
            what = "has a character in it that Postgres has no text with"
            raise self.fault(reference, f"{_name(reference)} {what}")
        return value

    def items(self, reference: Reference, value: object) -> Sequence[object] | None:
        """Return the items of a value that is a list, tuple or set; None if it is none.

        Raises:
            FilterError: An item is None, or text that can't be sent.
        """
        items = items_of(value)
        problem = None if items is None else problem_of(items)
        if problem is not None:
            raise self.fault(reference, f"{_name(reference)} {problem}")
        return items

    def text(self, text: Text, *, pattern: bool = False) -> str:
        """Return a string with its references replaced by what they stand for.

        In a pattern they stand for themselves: their ``%`` and ``_`` are no wildcards.

        Raises:
            FilterError: There is no such binding, or it has no text.
        """
        parts: list[str] = []
        for piece in text.pieces:
            if isinstance(piece, str):
                parts.append(piece)
                continue
            value = self.value(piece)
            part = _text_of(value)
            if part is None:
                raise self.wrong_type(
                    piece, value, "it has no one text, so it goes outside of quotes"
                )
            parts.append(_WILDCARD.sub(r"\\\g<0>", part) if pattern else part)
        return "".join(parts)

    def wrong_type(self, reference: Reference, value: object, expected: str) -> FilterError:
        """Return the error of a value that can't be put where its reference stands."""
        what = "None" if value is None else f"of type {type(value).__name__}"
        return self.fault(reference, f"{_name(reference)} is {what}: {expected}")

    def fault(self, place: Reference | Text, message: str) -> FilterError:
        """Return the error of a reference or a string."""
        return fault(self.source, place.position, message)


def items_of(value: object) -> Sequence[object] | None:
    """Return the items of a list, tuple or set; None if it is none."""
    if isinstance(value, list | tuple):
        return cast("Sequence[object]", value)
    if isinstance(value, AbstractSet):
        return tuple(cast("Iterable[object]", value))
    return None


def problem_of(items: Sequence[object]) -> str | None:
    """Return why these can't be the values that a column is compared with, if so."""
    if any(item is None for item in items):
        return "has None in it, which is not equal to anything; say IS NULL beside it"
    if not all(is_sendable(item) for item in items if isinstance(item, str)):
        return "has a character in it that Postgres has no text with"
    return None


def _inside(value: object, part: str) -> object:
    if isinstance(value, Mapping):
        mapping = cast("Mapping[str, object]", value)
        return mapping.get(part, _NOTHING)
    if isinstance(value, list | tuple) and part.isdecimal():
        items = cast("Sequence[object]", value)
        # Compared as text first: what is too long is no index, and can't be made a number either.
        if len(part) <= len(str(len(items))) and int(part) < len(items):
            return items[int(part)]
    return _NOTHING


def _text_of(value: object) -> str | None:
    """Return the one text that Postgres reads as this value, if there is one."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(Decimal(value))  # Python refuses to write very long integers
    # psycopg sends an enum's name; a reader of the filter may expect its value.
    return str(value) if isinstance(value, _TEXTUAL) and not isinstance(value, Enum) else None


def _name(reference: Reference) -> str:
    return f"binding {'.'.join(reference.path)}"
