"""Opening a lock session: fit to hold locks, or a clear error."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgstructured.driver import Session, open_session, resolve_conninfo
from pgstructured.errors import NotPrimaryError

from ._fencing import FenceGrant, FenceTable
from ._refusals import not_primary, session_required

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from pgstructured.driver import Conninfo, NotificationHandler

    from ._grip import LockRequest
    from ._options import LockOptions

_HEALING: Final = ("08", "57P", "532", "533")  # connection exceptions; server going or coming; full


@asynccontextmanager
async def open_lock_session(
    conninfo: Conninfo,
    options: LockOptions,
    *,
    connect_by: float,
    patience: float | Callable[[], float],
    heartbeat_statement: Callable[[], str] | None = None,
    on_notifications: NotificationHandler | None = None,
) -> AsyncGenerator[Session]:
    """Hold a session that is fit to hold locks.

    Args:
        conninfo: Where to connect.
        options: Its figures.
        connect_by: Event-loop time at which to give up connecting.
        patience: Seconds of silence after a heartbeat that end the session, with everything
            that is on it. While it holds a lock that is ``server_timeout``, for the lock's own
            watch decides, and a body that was cancelled may not have ended yet.
        heartbeat_statement: Returns a comment for the heartbeats.
        on_notifications: Called with the notifications of each read.

    Raises:
        NotPrimaryError: if the server is a standby, which grants locks of its own.
        SessionRequiredError: behind a transaction pooler.
        psycopg.OperationalError: if connecting fails.

    Cancellation:
        Entering is a checkpoint; a cancelled entry leaves no session behind. Leaving takes
        at most ``release_timeout``.
    """
    resolved: str | None = None
    with anyio.CancelScope(deadline=connect_by):
        resolved = await resolve_conninfo(conninfo)
    if resolved is None:
        raise psycopg.errors.ConnectionTimeout("connection timeout expired")
    async with open_session(
        _with_defaults(resolved, options),
        application_name=options.application_name,
        connect_timeout=connect_by - anyio.current_time(),
        heartbeat=options.heartbeat,
        heartbeat_timeout=patience,
        close_timeout=options.release_timeout,
        settings=options.server_settings,
        is_session_pooled=options.pooler == "session",
        heartbeat_statement=heartbeat_statement,
        on_notifications=on_notifications,
    ) as session:
        if session.behind_pooler and options.pooler != "session":
            raise session_required()
        if session.is_standby:
            raise not_primary()
        yield session


async def fetch_grant(
    conninfo: Conninfo, options: LockOptions, request: LockRequest, *, connect_by: float
) -> FenceGrant:
    """Return a new fencing token for a lock that was granted, from a session of its own.

    Raises:
        TokenWithheldError: if a guarded transaction is open, and the request must not wait.
        FenceTableMissingError: if there is no table for it.
        psycopg.Error: what the server says, or why connecting failed.

    Cancellation:
        A checkpoint. A cancelled call may have used a token up; a session that waits for a
        guarded transaction is ended, in ``release_timeout`` at most.
    """
    async with open_lock_session(
        conninfo, options, connect_by=connect_by, patience=options.lost_after
    ) as session:
        fence = FenceTable(options.fence_table)
        return await fence.bump(session, request.key, may_wait=request.may_wait)


def can_retry(error: psycopg.OperationalError) -> bool:
    """Tell whether another session may fare better.

    So it may after what ends connections, or keeps them from being made for now. Of a
    connection that could not be made libpq tells no SQLSTATE.
    """
    if isinstance(error, NotPrimaryError):
        return False
    return (error.sqlstate or "08").startswith(_HEALING)


def _with_defaults(conninfo: str, options: LockOptions) -> str:
    """Return ``conninfo`` with what a lock session wants where it says nothing."""
    try:
        params = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        return conninfo  # opening the session says what is wrong with it, and nothing secret
    hosts = str(params.get("host") or params.get("hostaddr") or os.environ.get("PGHOST", ""))
    if "," in hosts and "PGTARGETSESSIONATTRS" not in os.environ:
        params.setdefault("target_session_attrs", "read-write")
    if options.is_name_fixed:
        params["application_name"] = options.application_name
    return make_conninfo("", **{**options.client_params(), **params})
