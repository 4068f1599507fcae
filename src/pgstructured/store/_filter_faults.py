"""How a filter says what is wrong with it: where, and what was expected there."""

from __future__ import annotations

from typing import Final
from unicodedata import combining, east_asian_width

from pgstructured.errors import FilterError

_BEFORE: Final = 60  # characters of a long line that are shown
_AFTER: Final = 20
_CUT: Final = "..."


def fault(source: str, position: int, message: str) -> FilterError:
    """Return the error of `source` at `position`: the message, the line, a caret under the place.

    The line is the filter's own text. Values of bindings are not in it, and must not be in
    `message` either.
    """
    start = source.rfind("\n", 0, position) + 1
    end = source.find("\n", position)
    line = source[start : len(source) if end < 0 else end]
    column = position - start
    before = line[max(0, column - _BEFORE) : column]
    after = line[column : column + _AFTER]
    head = _CUT if len(before) < column else ""
    tail = _CUT if len(after) < len(line) - column else ""
    place = f"line {source.count(chr(10), 0, position) + 1}, column {column + 1}"
    shown = "".join(map(_shown, before + after))
    padding = " " * (len(head) + sum(map(_width, before)))
    return FilterError(
        f"{message} ({place})\n  {head}{shown}{tail}\n  {padding}^", position=position
    )


def _shown(character: str) -> str:
    """Return what can stand in a terminal and in a log, and takes the same place."""
    return character if character.isprintable() else " " if character.isspace() else "?"


def _width(character: str) -> int:
    if combining(character):
        return 0
    return 2 if east_asian_width(character) in {"W", "F"} else 1
