"""The one statement that sends a batch of notifications."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Item: TypeAlias = tuple[str, str]
"""A channel's name and a payload, both checked."""

# One row comes back, and the arrays keep the order.
_NOTIFY: Final = (
    "SELECT pg_catalog.count(pg_catalog.pg_notify(channel, payload))"
    " FROM ROWS FROM (pg_catalog.unnest({}::text[]), pg_catalog.unnest({}::text[]))"
    " AS item (channel, payload)"
)
NOTIFY_FOR_SESSION: Final = _NOTIFY.format("$1", "$2")
"""For a `Session`, with two arrays as parameters."""
NOTIFY_FOR_CURSOR: Final = _NOTIFY.format("%s", "%s")
"""For a cursor of psycopg's, with two arrays as parameters."""

_BEYOND_ASCII: Final = re.compile(r"[^\x00-\x7f]")


def arrays_of(items: Sequence[Item]) -> tuple[str, str]:
    """Return the channels and the payloads of a batch, each as the text of an array."""
    names, payloads = zip(*items, strict=True)
    return _array_of(names), _array_of(payloads)


def statement_for(items: Sequence[Item]) -> str:
    """Return a statement that sends a batch and has no parameters.

    It is the same whatever the session's client encoding and string syntax are.
    """
    names, payloads = arrays_of(items)
    return _NOTIFY.format(_literal_of(names), _literal_of(payloads))


def _array_of(texts: Iterable[str]) -> str:
    # In one go, for it is done on each batch; no text has a NUL in it.
    joined = "\0".join(texts).replace("\\", "\\\\").replace('"', '\\"')
    return '{"' + joined.replace("\0", '","') + '"}'


def _literal_of(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    if not escaped.isascii():
        escaped = _BEYOND_ASCII.sub(lambda found: f"\\U{ord(found[0]):08x}", escaped)
    return f"E'{escaped}'"
