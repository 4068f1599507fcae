"""An event log: durable catch-up, from any cursor, without a loss."""

from pgstructured._util import publish

from ._cursor_store import CursorStore as CursorStore, StoredCursor as StoredCursor
from ._cursors import Cursor as Cursor, EventId as EventId
from ._events import Event as Event, Page as Page
from ._following import Following as Following
from ._log import EventLog as EventLog
from ._waking import WakeUps as WakeUps

__all__ = (
    "Cursor",
    "CursorStore",
    "Event",
    "EventId",
    "EventLog",
    "Following",
    "Page",
    "StoredCursor",
    "WakeUps",
)

publish(__name__, globals())
