"""Locks between processes, on Postgres, that stop the work they protect when they are lost."""

from pgstructured._util import publish

from ._detached import DetachedLock as DetachedLock
from ._election import Election as Election, Leadership as Leadership
from ._held import HeldLock as HeldLock
from ._keys import LockKey as LockKey, LockKeyLike as LockKeyLike
from ._lock import pg_lock as pg_lock, pg_try_lock as pg_try_lock
from ._looking import LockHolder as LockHolder
from ._manager import (
    KeyScheme as KeyScheme,
    Locks as Locks,
    LocksStatistics as LocksStatistics,
    open_locks as open_locks,
)
from ._rwlock import RWLock as RWLock
from ._semaphore import HeldSlot as HeldSlot, Semaphore as Semaphore
from ._xact import pg_try_xact_lock as pg_try_xact_lock, pg_xact_lock as pg_xact_lock

__all__ = (
    "DetachedLock",
    "Election",
    "HeldLock",
    "HeldSlot",
    "KeyScheme",
    "Leadership",
    "LockHolder",
    "LockKey",
    "LockKeyLike",
    "Locks",
    "LocksStatistics",
    "RWLock",
    "Semaphore",
    "open_locks",
    "pg_lock",
    "pg_try_lock",
    "pg_try_xact_lock",
    "pg_xact_lock",
)

publish(__name__, globals())
