"""psycopg on AnyIO: connections for the user's SQL, sessions for the library's own."""

from pgstructured._util import publish

from ._commands import (
    Command as Command,
    Prepared as Prepared,
    SessionParam as SessionParam,
    SessionResult as SessionResult,
)
from ._connection import Connection as Connection
from ._conninfo import (
    Conninfo as Conninfo,
    default_application_name as default_application_name,
    mask_conninfo as mask_conninfo,
    parse_conninfo as parse_conninfo,
    resolve_conninfo as resolve_conninfo,
)
from ._copying_in import CopyIn as CopyIn
from ._copying_out import CopyOut as CopyOut
from ._encodings import foreign_codec as foreign_codec
from ._gathering import Gatherable as Gatherable
from ._lending import (
    Statement as Statement,
    conninfo_of as conninfo_of,
    hold_turn as hold_turn,
    is_session_pooled as is_session_pooled,
)
from ._lifecycle import ConnectionState as ConnectionState
from ._open import Pooler as Pooler, connect as connect, open_connection as open_connection
from ._open_session import open_session as open_session
from ._pooling import (
    PooledConnection as PooledConnection,
    set_characteristics as set_characteristics,
)
from ._session import Session as Session
from ._streaming import RowStream as RowStream
from ._waiting import (
    current_task_id as current_task_id,
    running_event_loop as running_event_loop,
)
from ._waiting_parking import Parking as Parking, create_parking as create_parking
from ._watching import keep_watched as keep_watched
from ._wire import (
    NotificationHandler as NotificationHandler,
    SessionNotification as SessionNotification,
)

__all__ = (
    "Connection",
    "ConnectionState",
    "Conninfo",
    "CopyIn",
    "CopyOut",
    "Pooler",
    "RowStream",
    "Session",
    "SessionParam",
    "SessionResult",
    "connect",
    "mask_conninfo",
    "open_connection",
    "open_session",
    "parse_conninfo",
    "resolve_conninfo",
)

publish(__name__, globals())
