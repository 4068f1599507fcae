# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# What psycopg's connections and cursors run goes through private names of theirs.
"""What statements may leave in their session, by their text.

What a session keeps on the server can't be looked at without asking it, so the text of each
statement is: one that sets, listens, locks, or makes a temporary table is a *trace*, and only
a connection with traces is reset. What happens inside of functions leaves none, but for
``DO`` and ``CALL``, which are one. A statement whose text has not come by here (psycopg's own
`!stream` and `!copy`, or what failed before it was sent) may have left anything.
"""

from __future__ import annotations

import re
from enum import IntFlag
from typing import TYPE_CHECKING, Any, Final, cast, final
from weakref import ref

from psycopg._preparing import PrepareManager

if TYPE_CHECKING:
    import psycopg
    from psycopg._preparing import Key, Prepare
    from psycopg._queries import PostgresQuery
    from psycopg.abc import PQGen


class Trace(IntFlag):
    """What a statement may have left in the session."""

    NONE = 0
    SESSION = 1
    """Advisory locks, LISTEN, cursors WITH HOLD."""
    SETTINGS = 2
    """SET and its like."""
    TEMPORARY = 4
    """Temporary tables."""
    PREPARED = 8
    """PREPARE, which can't be undone without psycopg's own statements."""


_ANY: Final = Trace.SESSION | Trace.SETTINGS | Trace.TEMPORARY

_BEGINS: Final = rb"(?:^|;|\*/|--[^\n]*\n)\s*"
_GAP: Final = rb"(?:\s|/\*(?s:.*?)\*/|--[^\n]*\n)+"
_TEMPORARY: Final = rb"(?:(?:local|global)" + _GAP + rb")?temp(?:orary)?\b"
_SIGNS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), trace)
    for pattern, trace in (
        (rb"pg_(?:try_)?advisory_lock|\bwith" + _GAP + rb"hold\b", Trace.SESSION),
        (_BEGINS + rb"listen\b", Trace.SESSION),
        (_BEGINS + rb"set\b(?!\s+(?:local|transaction|constraints)\s)", Trace.SETTINGS),
        (_BEGINS + rb"reset\b", Trace.SETTINGS),
        # The third argument says whether it is for the transaction only.
        (rb"\bset_config\s*\((?![^()]*,\s*true\s*\))", Trace.SETTINGS),
        (
            rb"\bcreate" + _GAP + rb"(?:or" + _GAP + rb"replace" + _GAP + rb")?" + _TEMPORARY,
            Trace.TEMPORARY,
        ),
        # Not INSERT INTO temp VALUES ...
        (
            rb"\binto" + _GAP + _TEMPORARY + _GAP + rb"(?!(?:values|select|default|with)\b)[\w\"]",
            Trace.TEMPORARY,
        ),
        (rb"\bpg_temp", Trace.TEMPORARY),
        (_BEGINS + rb"prepare\b(?!\s+transaction\s)", Trace.PREPARED),
        (_BEGINS + rb"(?:do|call)\b", _ANY),
    )
)
_LOOKED_AT: Final = 16_384
"""Bytes at the beginning of a statement; what is longer carries data."""
_REMEMBERED: Final = 1024
_REMEMBERED_BYTES: Final = 2048
"""Statements that are longer are looked at each time."""

_traces_of: Final[dict[bytes, Trace]] = {}


def find_traces(text: bytes) -> Trace:
    """Return what the statement ``text`` may leave in its session."""
    found = _traces_of.get(text)
    if found is None:
        found = Trace.NONE
        for sign, trace in _SIGNS:
            if sign.search(text, 0, _LOOKED_AT):
                found |= trace
        if len(text) <= _REMEMBERED_BYTES:
            if len(_traces_of) >= _REMEMBERED:
                _traces_of.clear()
            _traces_of[text] = found
    return found


@final
class NotingPrepareManager(PrepareManager):
    """psycopg's, which is shown every statement that a cursor executes."""

    def __init__(self) -> None:
        super().__init__()
        self.traces = Trace.NONE
        self.is_blind = False
        """A statement was begun whose text it has not been shown."""

    def maybe_add_to_cache(self, query: PostgresQuery, prep: Prepare, name: bytes) -> Key | None:
        text = query.query
        traces = _traces_of.get(text)
        if traces is None:
            traces = find_traces(text)
        if traces:
            self.traces |= traces
        self.is_blind = False
        return super().maybe_add_to_cache(query, prep, name)

    def sum_up(self) -> Trace:
        """Return all traces since the last `forget`."""
        if self.is_blind:
            self.is_blind = False
            self.traces |= _ANY
        return self.traces

    def forget(self) -> None:
        """Begin anew."""
        self.traces = Trace.NONE
        self.is_blind = False


def note_statements(conn: psycopg.AsyncConnection[Any]) -> NotingPrepareManager:
    """Note what the statements of ``conn`` may leave behind, from now on."""
    noted = NotingPrepareManager()
    noted.prepare_threshold = conn.prepare_threshold
    conn._prepared = noted
    start = type(conn)._start_query
    itself = ref(conn)  # not itself, which would keep it alive

    def start_query() -> PQGen[None]:
        if noted.is_blind:
            noted.traces |= _ANY
        noted.is_blind = True
        return start(cast("Any", itself()))

    cast("Any", conn)._start_query = start_query
    return noted


def note(conn: psycopg.AsyncConnection[Any], query: PostgresQuery | None) -> None:
    """Show what was begun on ``conn`` and doesn't come by by itself, if somebody notes it."""
    noted = conn._prepared
    if isinstance(noted, NotingPrepareManager) and query is not None:
        noted.traces |= find_traces(bytes(query.query))
        noted.is_blind = False
