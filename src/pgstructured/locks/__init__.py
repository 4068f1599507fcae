"""Locks between processes, on Postgres, that stop the work they protect when they are lost."""

from pgstructured._util import publish

from ._held import HeldLock as HeldLock
from ._keys import LockKey as LockKey, LockKeyLike as LockKeyLike
from ._lock import pg_lock as pg_lock, pg_try_lock as pg_try_lock
from ._xact import pg_try_xact_lock as pg_try_xact_lock, pg_xact_lock as pg_xact_lock

__all__ = (
    "HeldLock",
    "LockKey",
    "LockKeyLike",
    "pg_lock",
    "pg_try_lock",
    "pg_try_xact_lock",
    "pg_xact_lock",
)

publish(__name__, globals())
