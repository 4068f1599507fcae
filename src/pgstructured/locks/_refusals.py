"""What the server or our own checks refuse, as errors."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
import psycopg.errors

from pgstructured.errors import (
    LockAlreadyHeldError,
    LockCapacityError,
    LockDeadlockError,
    LockTimeout,
    NotPrimaryError,
    SessionRequiredError,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from ._grip import LockRequest
    from ._keys import LockKey


@contextmanager
def translated(key: LockKey) -> Generator[None]:
    """Turn what the server says of locks into this library's errors; its own is the cause."""
    try:
        yield
    except psycopg.errors.OutOfMemory as exc:
        raise table_full() from exc
    except psycopg.errors.DeadlockDetected as exc:
        raise LockDeadlockError(
            f"waiting for the lock {key} has closed a circle; take locks in one order"
        ) from exc


def check_connection(conn: object) -> None:
    """Refuse what has no transaction of the caller's.

    Raises:
        TypeError: if it is no connection; a pool, for instance.
    """
    if not isinstance(conn, psycopg.AsyncConnection):
        raise TypeError(f"conn must be a connection in a transaction, not {type(conn).__name__}")


def table_full() -> LockCapacityError:
    """Return the error for a lock table without room."""
    return LockCapacityError("the server's lock table is full; raise its max_locks_per_transaction")


def not_primary() -> NotPrimaryError:
    """Return the error for a standby."""
    return NotPrimaryError("a standby grants locks of its own; connect to the primary")


def session_required() -> SessionRequiredError:
    """Return the error for a transaction pooler."""
    return SessionRequiredError(
        "session locks don't work through a transaction pooler; connect to the server itself,"
        ' or through a pool in session mode that is declared with pooler="session"'
    )


def already_held(key: LockKey) -> LockAlreadyHeldError:
    """Return the error for a task that would wait for itself."""
    return LockAlreadyHeldError(f"this task holds the lock {key} already, on another session")


def refuse(request: LockRequest) -> None:
    """Raise for a lock that was not granted, unless it is a try, which gives None."""
    if not request.is_try:
        raise not_in_time(request)


def not_in_time(request: LockRequest) -> LockTimeout:
    """Return the error for a lock that was not granted."""
    if request.acquire_timeout == 0:
        return LockTimeout(f"the lock {request.key} is not free")
    return LockTimeout(
        f"the lock {request.key} was not granted within {request.acquire_timeout:g} s"
    )
