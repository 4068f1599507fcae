"""`pg_lock` and `pg_try_lock`: a lock for the length of a block."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio

from pgstructured.driver import Connection
from pgstructured.errors import LockTimeout
from pgstructured.observe import emit

from ._borrowed import ConnectionSource
from ._dedicated import DedicatedSource
from ._grip import LockRequest
from ._held import check_ttl, hold
from ._keys import as_lock_key
from ._options import LockOptions
from ._tasks import holding

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pgstructured.driver import Conninfo

    from ._grip import LockSource
    from ._held import HeldLock
    from ._keys import LockKeyLike

_DEFAULTS: Final = LockOptions()


@asynccontextmanager
async def pg_lock(
    source: Connection[Any] | Conninfo,
    key: LockKeyLike,
    *,
    shared: bool = False,
    acquire_timeout: float | None = None,
    ttl: float | None = None,
) -> AsyncGenerator[HeldLock]:
    """Run a block under a Postgres advisory lock, waiting for it first.

    The body is cancelled as soon as the lock is lost: its session was killed, the server
    crashed, stopped or fell silent for 15 seconds, or ``ttl`` is over. The block then raises
    `LockLost`, also if the body has ended well in the meantime. A lock is never silently
    acquired anew.

    With a conninfo the lock has a server session of its own, told to free the lock of a
    client that has vanished after 30 seconds. Connecting is tried again where that may help,
    for ``acquire_timeout`` (else 10) seconds. A task that asks for a key that it holds on
    another session is refused at once.

    With a `Connection` it is on your own session, which you may use for queries under it; no
    setting of it is changed. Taking a lock there again counts, as Postgres counts. If the
    unlock can't be confirmed (in a transaction that has failed, say) the connection is closed.

    Args:
        source: Where to hold the lock.
        key: What to lock, see `LockKeyLike`.
        shared: Let others hold it too, shared.
        acquire_timeout: Seconds to wait for the lock; None for as long as it takes, 0 for
            one try.
        ttl: Seconds after which it is lost, unless `HeldLock.refresh` is called in time; None
            for never.

    Yields:
        The lock.

    Raises:
        LockTimeout: if it could not be had in time.
        LockLost: if it was lost; the body's own error, if any, is ``__cause__``.
        LockAlreadyHeldError: if this task holds it on another session.
        LockKeyError: if the key is empty or out of range.
        LockCapacityError: if the server's lock table is full.
        LockDeadlockError: if waiting for it, on your connection, has closed a circle.
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
    async with _open_lock(
        _find_source(source), key, shared=shared, acquire_timeout=acquire_timeout, ttl=ttl
    ) as held:
        if held is None:
            raise AssertionError("only a try gives None")  # pragma: no cover - for the types
        yield held


@asynccontextmanager
async def pg_try_lock(
    source: Connection[Any] | Conninfo,
    key: LockKeyLike,
    *,
    shared: bool = False,
    ttl: float | None = None,
) -> AsyncGenerator[HeldLock | None]:
    """Run a block under a Postgres advisory lock if it is free; else without.

    Args:
        source: Where to hold the lock, as for `pg_lock`.
        key: What to lock.
        shared: Let others hold it too, shared.
        ttl: Seconds after which it is lost, as for `pg_lock`.

    Yields:
        The lock, or None if it was not free.

    Raises:
        PgStructuredError: as `pg_lock`, but no `LockTimeout`.
        psycopg.Error: what the server says, or why connecting failed.

    Cancellation:
        As `pg_lock`.
    """
    async with _open_lock(_find_source(source), key, shared=shared, ttl=ttl, is_try=True) as held:
        yield held


@asynccontextmanager
async def _open_lock(
    source: LockSource,
    key: LockKeyLike,
    *,
    shared: bool = False,
    acquire_timeout: float | None = None,
    ttl: float | None = None,
    is_try: bool = False,
) -> AsyncGenerator[HeldLock | None]:
    lock_key = as_lock_key(key)
    check_ttl(ttl)
    if acquire_timeout is not None and not 0 <= acquire_timeout < math.inf:
        raise ValueError(
            f"acquire_timeout must be None, 0 or a positive number, not {acquire_timeout!r}"
        )
    request = LockRequest(
        key=lock_key, shared=shared, acquire_timeout=acquire_timeout, is_try=is_try
    )
    began = anyio.current_time()
    emit("lock.acquire_started", key=lock_key, shared=shared)
    is_acquired = False
    try:
        async with source.take(request) as grip:
            is_acquired = True
            if grip is None:
                yield None
                return
            waited = anyio.current_time() - began
            with holding(grip.identity, lock_key, grip.backend_pid):
                async with hold(
                    grip,
                    key=lock_key,
                    shared=shared,
                    ttl=ttl,
                    waited=waited,
                    release_timeout=source.release_timeout,
                ) as held:
                    yield held
    except LockTimeout:
        if not is_acquired:  # the body may raise one of its own
            waited = anyio.current_time() - began
            emit("lock.acquire_timed_out", key=lock_key, shared=shared, waited=waited)
        raise


def _find_source(
    source: Connection[Any] | Conninfo, options: LockOptions = _DEFAULTS
) -> LockSource:
    if isinstance(source, Connection):
        return ConnectionSource(source, options)  # pyright: ignore[reportUnknownArgumentType]
    return DedicatedSource(source, options)
