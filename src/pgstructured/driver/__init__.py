"""psycopg on AnyIO: connections for the user's SQL, sessions for the library's own."""

from ._commands import SessionParam as SessionParam, SessionResult as SessionResult
from ._conninfo import (
    Conninfo as Conninfo,
    mask_conninfo as mask_conninfo,
    resolve_conninfo as resolve_conninfo,
)
from ._session import Session as Session, open_session as open_session

__all__ = (
    "Conninfo",
    "Session",
    "SessionParam",
    "SessionResult",
    "mask_conninfo",
    "open_session",
    "resolve_conninfo",
)
