"""Cursors: where in an event log a reader is.

Identities are given out before the commit, so they can't tell what a reader has seen: the
event of a slower transaction comes to light below them. A snapshot can (manual: "Transaction
IDs and snapshots"): what it shows has been seen, whatever is committed later has not.

========================  =====================================================================
a cursor is               it has seen
========================  =====================================================================
the beginning             nothing of what is kept
settled                   what ``seen`` shows, up to its ``last_id``
in the middle of a page   what ``seen`` shows, and of what ``window`` shows more, ids to ``after``
========================  =====================================================================

A snapshot alone is not enough after a crash: the server may give out again transaction ids
whose end nobody had written down, while a reader has a snapshot that counts them among those
that have ended. Their events have greater ids than anything that was seen, hence ``last_id``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NewType, final

from pgstructured._util import NoPublicConstructor, create

if TYPE_CHECKING:
    from typing import Self

EventId = NewType("EventId", int)
"""Number of an event: unique in its log, and never given out again."""

_BEGINNING: Final = "beginning"
_NUMBER: Final = "(?:0|[1-9][0-9]{0,17})"
_REACH: Final = f"{_NUMBER}-{_NUMBER}(?:-{_NUMBER}(?:_{_NUMBER})*)?~{_NUMBER}"
_TEXT: Final = re.compile(
    f"(?P<epoch>{_NUMBER})"
    rf"\.(?:b(?P<base>{_NUMBER})|(?P<seen>{_REACH}))"
    rf"(?:\.(?P<window>{_REACH})\.(?P<after>{_NUMBER}))?",
    re.ASCII,
)
_SHOWN: Final = 80
"""Characters of a text that can't be understood, in the error."""


@final
class Snapshot(NamedTuple):
    """Which transactions have ended, as ``pg_snapshot`` says it."""

    xmin: int
    xmax: int
    running: tuple[int, ...] = ()
    """Those below ``xmax`` that have not ended, in order."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what the server writes."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), tuple(map(int, running.split(","))) if running else ())

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, self.running))}"

    def without(self, xid: int) -> Snapshot:
        """Return the same with a transaction among those that have not ended.

        The server leaves a transaction out of its own snapshots: below ``xmax`` it would count as
        one that has ended, and what it appends later as seen.
        """
        if xid >= self.xmax or xid in self.running:
            return self
        return self._replace(running=tuple(sorted((*self.running, xid))))

    def covers(self, other: Snapshot) -> bool:
        """Whether everything that ``other`` shows is shown."""
        before = set(other.running)
        return self.xmax >= other.xmax and all(
            xid in before for xid in self.running if xid < other.xmax
        )


@final
class Reach(NamedTuple):
    """The events that a snapshot shows, up to an id."""

    snapshot: Snapshot
    last_id: EventId

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `encode` makes; raises `ValueError` if that makes something else."""
        snapshot, _, last_id = text.partition("~")
        xmin, xmax, *running = snapshot.split("-")
        first = int(xmin)
        xids = [first + int(each) for each in running[0].split("_")] if running else []
        if xids != sorted(set(xids)) or (xids and xids[-1] >= first + int(xmax)) or not first:
            raise ValueError(text)
        return cls(Snapshot(first, first + int(xmax), tuple(xids)), EventId(int(last_id)))

    def encode(self) -> str:
        """Return it as a cursor's text has it."""
        xmin, xmax, running = self.snapshot
        encoded = f"{xmin}-{xmax - xmin}"
        if running:
            encoded += "-" + "_".join([str(xid - xmin) for xid in running])
        return f"{encoded}~{self.last_id}"


NOTHING: Final = Reach(Snapshot(1, 1), EventId(0))
"""A reach without any event."""


@final
class CursorParts(NamedTuple):
    """What a cursor is made of."""

    epoch: int | None
    """Which life of the log it belongs to; None at the very beginning, of any log."""
    base: int = 0
    """How often the log had been trimmed when reading began; of use where ``seen`` is None."""
    seen: Reach | None = None
    window: Reach | None = None
    after: EventId = EventId(0)


@final
class Cursor(metaclass=NoPublicConstructor):
    """A place in an event log, from which reading goes on; an immutable value.

    ``str()`` gives it as text of digits and ``-._~`` and letters, which needs no quoting in
    URLs, headers and cookies; `parse` reads that. It has some ten characters for each
    transaction that was running.

    It belongs to the log that it comes from, and to one set of topics: what another set had
    left out counts as seen.
    """

    __slots__ = ("_parts", "_text")

    def __init__(self, parts: CursorParts) -> None:
        self._parts = parts
        self._text: str | None = None

    @classmethod
    def beginning(cls) -> Cursor:
        """Return the place before the first event that is kept when reading begins."""
        return create(cls, CursorParts(None))

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Return the cursor whose text this is.

        Raises:
            ValueError: if it is no cursor's text.
        """
        given: Any = text
        if not isinstance(given, str):
            raise TypeError(f"a cursor's text must be a str, not {type(given).__name__}")
        if text == _BEGINNING:
            return cls.beginning()
        found = _TEXT.fullmatch(text)
        try:
            if found is None:
                raise ValueError(text)
            parts = CursorParts(
                epoch=int(found["epoch"]),
                base=int(found["base"] or 0),
                seen=Reach.parse(found["seen"]) if found["seen"] else None,
                window=Reach.parse(found["window"]) if found["window"] else None,
                after=EventId(int(found["after"] or 0)),
            )
        except ValueError:
            shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
            raise ValueError(f"this is not the text of an event log's cursor: {shown!r}") from None
        return create(cls, parts)

    def __str__(self) -> str:
        text = self._text
        if text is None:
            text = self._text = self._encode()
        return text

    def _encode(self) -> str:
        epoch, base, seen, window, after = self._parts
        if epoch is None:
            return _BEGINNING
        text = f"{epoch}.b{base}" if seen is None else f"{epoch}.{seen.encode()}"
        return text if window is None else f"{text}.{window.encode()}.{after}"

    def __repr__(self) -> str:
        return f"<Cursor {self}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Cursor):
            return NotImplemented
        return str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


def as_cursor(cursor: Cursor | str) -> Cursor:
    """Return a cursor that was given as such or as its text.

    Raises:
        ValueError: if it is no cursor's text.
    """
    return cursor if isinstance(cursor, Cursor) else Cursor.parse(cursor)


def parts_of(cursor: Cursor) -> CursorParts:
    """Return what a cursor is made of."""
    return cursor._parts  # noqa: SLF001 - one room # pyright: ignore[reportPrivateUsage]
