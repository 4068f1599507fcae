"""A batch of notifications, and the one statement that sends it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, final

from pgstructured.driver import Prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# One row comes back, and the arrays keep the order.
_NOTIFY: Final = (
    "SELECT pg_catalog.count(pg_catalog.pg_notify(channel, payload))"
    " FROM ROWS FROM (pg_catalog.unnest({}::text[]), pg_catalog.unnest({}::text[]))"
    " AS item (channel, payload)"
)
NOTIFY_FOR_SESSION: Final = Prepared(b"pgstructured_notify", _NOTIFY.format("$1", "$2").encode())
"""For a `Session`, with two arrays as parameters."""
NOTIFY_FOR_CURSOR: Final = _NOTIFY.format("%s", "%s")
"""For a cursor of psycopg's, with two arrays as parameters."""
MAKE_ROOM: Final = "SELECT pg_catalog.pg_notification_queue_usage()"
"""Lets the server forget what every listener has read.

Once its queue is full it does so for nobody else: whoever notifies is refused, and only who
has notified would have it done. PostgreSQL 18 stays full so, with no laggard left.
"""

_BEYOND_ASCII: Final = re.compile(r"[^\x00-\x7f]")


@final
class Batch:
    """Notifications in a row, all checked.

    Two lists and not one of pairs: a garbage collector would look at each pair.
    """

    __slots__ = ("names", "payloads")

    def __init__(self, names: list[str] | None = None, payloads: list[str] | None = None) -> None:
        self.names: list[str] = [] if names is None else names
        self.payloads: list[str] = [] if payloads is None else payloads

    def __len__(self) -> int:
        return len(self.names)

    def head(self, count: int) -> Batch:
        """Return the first ``count``; they stay."""
        return Batch(self.names[:count], self.payloads[:count])

    def drop(self, count: int) -> None:
        """Remove the first ``count``."""
        del self.names[:count]
        del self.payloads[:count]

    def arrays(self) -> tuple[str, str]:
        """Return names and payloads, each as the text of an array."""
        return _array_of(self.names), _array_of(self.payloads)

    def statement(self, *, as_bytes: bool = False) -> str:
        """Return a statement that sends them and has no parameters.

        It is the same whatever the session's client encoding and string syntax are.

        Args:
            as_bytes: The database knows no characters (SQL_ASCII): send the bytes of UTF-8.
        """
        escape = _escape_bytes if as_bytes else _escape_character
        names, payloads = (_literal_of(array, escape) for array in self.arrays())
        return _NOTIFY.format(names, payloads)


def _array_of(texts: Iterable[str]) -> str:
    # In one go, for it is done on each batch; no text has a NUL in it.
    joined = "\0".join(texts).replace("\\", "\\\\").replace('"', '\\"')
    return '{"' + joined.replace("\0", '","') + '"}'


def _literal_of(text: str, escape: Callable[[re.Match[str]], str]) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    if not escaped.isascii():
        escaped = _BEYOND_ASCII.sub(escape, escaped)
    return f"E'{escaped}'"


def _escape_character(found: re.Match[str]) -> str:
    return f"\\U{ord(found[0]):08x}"


def _escape_bytes(found: re.Match[str]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in found[0].encode())
