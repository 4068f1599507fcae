"""psycopg on AnyIO: connections for the user's SQL, sessions for the library's own."""

from ._conninfo import (
    Conninfo as Conninfo,
    mask_conninfo as mask_conninfo,
    resolve_conninfo as resolve_conninfo,
)

__all__ = ("Conninfo", "mask_conninfo", "resolve_conninfo")
