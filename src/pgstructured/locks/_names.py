r"""Names of keys, told to whoever looks at the server.

Postgres knows locks by their numbers. A lock session therefore ends its statements with
a comment that names what it holds or waits for; others read it from
``pg_stat_activity.query``, where it may have been cut (``track_activity_query_size``)::

    SELECT … -- pgstructured {"-123": "nightly", "1,2": "\u6f22"}

It informs and proves nothing: anybody can write such a comment.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from ._keys import LockKey

if TYPE_CHECKING:
    from collections.abc import Iterable

INTRO: Final = " -- pgstructured {"
"""What a note begins with."""
MARKER: Final = LockKey.bigint(-3231381564663532411)
"""A lock of the library's own, not of any user's: the first 8 bytes, little-endian, of
HKDF-SHA256 (RFC 5869) of nothing, without salt, with ``pgstructured marker v1``."""

_NOTE_BYTES: Final = 900  # of the 1,023 that the server shows of a statement by default
_ENTRY: Final = re.compile(
    r'(?:, )?"(-?[0-9]{1,19}|-?[0-9]{1,10},-?[0-9]{1,10})": ("[^"\\]*(?:\\.[^"\\]*)*")'
)


def note(keys: Iterable[LockKey]) -> str:
    """Return a comment for the end of a statement that tells the names of ``keys``.

    Printable ASCII, empty if no key has a name. What comes first is told first: the names
    that don't fit are left out.
    """
    entries: list[str] = []
    room = _NOTE_BYTES - len(INTRO) - 1
    for key in keys:
        if key.name is None:
            continue
        entry = _entry(key.as_bigint, key.as_pair, key.name)
        room -= len(entry) + 2
        if room < 0:
            break
        if entry:
            entries.append(entry)
    return f"{INTRO}{', '.join(entries)}}}" if entries else ""


def read_names(query: str) -> dict[LockKey, str]:
    """Return the names that the note at the end of a statement tells.

    Args:
        query: Any text: cut anywhere, without a note, or meant to harm.
    """
    names: dict[LockKey, str] = {}
    _, found, entries = query.rpartition(INTRO)
    if found:
        position = 0
        while match := _ENTRY.match(entries, position):
            position = match.end()
            with suppress(ValueError):  # a number out of range, or no JSON
                names[LockKey.parse(match[1])] = json.loads(match[2])
    return names


@lru_cache(maxsize=4096)
def _entry(bigint: int | None, pair: tuple[int, int] | None, name: str) -> str:
    """Return what a note says of one key; nothing, if no note could hold it.

    By name too: keys are equal where their numbers are.
    """
    numbers = str(bigint) if pair is None else f"{pair[0]},{pair[1]}"
    # Its ASCII has no line end, so nothing gets out of the comment; and no other INTRO in it.
    told = json.dumps(name).replace("{", "\\u007b").replace("\x7f", "\\u007f")
    entry = f'"{numbers}": {told}'
    return entry if len(entry) + len(INTRO) + 3 <= _NOTE_BYTES else ""
