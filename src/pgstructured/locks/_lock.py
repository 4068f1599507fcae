"""`pg_lock` and `pg_try_lock`: a lock for the length of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pgstructured.driver import Connection
from pgstructured.pool import Pool

from ._borrowed import ConnectionSource
from ._dedicated import DedicatedSource
from ._held import HeldLock
from ._keys import as_lock_key
from ._manager import Locks
from ._opening import never_none, new_request, open_held
from ._options import LockOptions
from ._pooled import PoolSource

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from pgstructured.driver import Conninfo

    from ._grip import LockSource
    from ._keys import LockKey, LockKeyLike

_DEFAULTS: Final = LockOptions()


def pg_lock(
    source: Locks | Pool | Connection[Any] | Conninfo,
    key: LockKeyLike,
    *,
    shared: bool = False,
    acquire_timeout: float | None = None,
    ttl: float | None = None,
    fenced: bool = False,
) -> AbstractAsyncContextManager[HeldLock]:
    """Run a block under a Postgres advisory lock, waiting for it first.

    The body is cancelled as soon as the lock is lost: its session was killed, the server
    crashed, stopped or fell silent for 15 seconds, or ``ttl`` is over. The block then raises
    `LockLost`, also if the body has ended well in the meantime. A lock is never silently
    acquired anew.

    With a conninfo the lock has a server session of its own, told to free the lock of a
    client that has vanished after 30 seconds. Connecting is tried again where that may help,
    for ``acquire_timeout`` (else 10) seconds. A task that asks for a key that it holds on
    another session is refused at once.

    With `Locks` it shares a session with other locks, and waiting for it costs one session for
    all tasks of the process.

    With a `Connection` it is on your own session, which you may use for queries under it; no
    setting of it is changed. Taking a lock there again counts, as Postgres counts. If the
    unlock can't be confirmed (in a transaction that has failed, say) the connection is closed.

    With a `Pool` it is on a connection borrowed for the block, `HeldLock.connection`, which
    the task also gets if it acquires one of the pool meanwhile; behind a transaction pooler on
    one that the pool's ``direct_conninfo`` leads to. The pool replaces one that is lost.

    Args:
        source: Where to hold the lock.
        key: What to lock, see `LockKeyLike`.
        shared: Let others hold it too, shared.
        acquire_timeout: Seconds to wait for the lock; None for as long as it takes, 0 for
            one try.
        ttl: Seconds after which it is lost, unless `HeldLock.refresh` is called in time; None
            for never.
        fenced: Give it a `HeldLock.fencing_token`, from the table that
            `Locks.create_fence_table` or ``pgstructured lock --create`` makes.

    Returns:
        A context manager, to be entered once, that gives the lock.

    Raises:
        LockTimeout: if it could not be had in time.
        LockLost: if it was lost; the body's own error, if any, is ``__cause__``.
        LockAlreadyHeldError: if this task holds it on another session.
        LockKeyError: if the key is empty or out of range.
        LockCapacityError: if the server's lock table is full.
        FenceTableMissingError: if ``fenced`` and there is no table for it.
        LockDeadlockError: if the server has broken a deadlock by refusing this wait: on your
            connection; or with CREATE INDEX CONCURRENTLY under the lock, which waits for everybody
            who waits on the server.
        NotPrimaryError: on a standby.
        SessionRequiredError: behind a transaction pooler.
        ValueError: if a time is out of range.
        psycopg.Error: what the server says; without ``acquire_timeout`` also why connecting
            failed.

    Cancellation:
        Entering is a checkpoint. A cancelled or failed entry leaves no lock and no waiting
        session on the server, and takes at most 2 seconds for that (on a `Connection`: its
        own ``cancel_timeout`` more). Leaving unlocks at once, shielded, and takes at most 2
        seconds. A cancellation from outside wins over `LockLost`.
    """
    request = new_request(
        _make_key(source, key), shared=shared, acquire_timeout=acquire_timeout, fenced=fenced
    )
    return never_none(open_held(find_source(source), request, HeldLock, ttl=ttl))


def pg_try_lock(
    source: Locks | Pool | Connection[Any] | Conninfo,
    key: LockKeyLike,
    *,
    shared: bool = False,
    ttl: float | None = None,
    fenced: bool = False,
) -> AbstractAsyncContextManager[HeldLock | None]:
    """Run a block under a Postgres advisory lock if it is free; else without.

    Args:
        source: Where to hold the lock, as for `pg_lock`.
        key: What to lock.
        shared: Let others hold it too, shared.
        ttl: Seconds after which it is lost, as for `pg_lock`.
        fenced: Give it a token, as for `pg_lock`.

    Returns:
        A context manager, to be entered once, that gives the lock, or None if it was not free.

    Raises:
        PgStructuredError: as `pg_lock`, but no `LockTimeout`.
        psycopg.Error: what the server says, or why connecting failed.

    Cancellation:
        As `pg_lock`.
    """
    request = new_request(_make_key(source, key), shared=shared, is_try=True, fenced=fenced)
    return open_held(find_source(source), request, HeldLock, ttl=ttl)


def find_source(
    source: Locks | Pool | Connection[Any] | Conninfo, options: LockOptions = _DEFAULTS
) -> LockSource:
    """Return what takes locks on ``source``."""
    if isinstance(source, Locks):
        return source._source  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    if isinstance(source, Connection):
        return ConnectionSource(source, options)  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(source, Pool):
        return PoolSource(source, options)
    given: object = source
    if not isinstance(given, str) and not callable(given):
        raise TypeError(
            "source must be a Locks, a Pool, a Connection of pgstructured or a conninfo, not"
            f" {type(given).__module__}.{type(given).__name__}"
        )
    return DedicatedSource(source, options)


def _make_key(source: Locks | Pool | Connection[Any] | Conninfo, key: LockKeyLike) -> LockKey:
    return source.key(key) if isinstance(source, Locks) else as_lock_key(key)
