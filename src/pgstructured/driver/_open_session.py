"""Opening a server session for the library's own use: connected, set up, watched, closed."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import psycopg
from psycopg import generators

from pgstructured._util import create, open_background
from pgstructured.errors import NotPrimaryError
from pgstructured.observe import emit

from ._connecting import connect_first
from ._conninfo import Conninfo, clean_application_name, parse_conninfo, resolve_conninfo
from ._heartbeats import beat
from ._open import check_seconds
from ._session import Session
from ._wire import Wire
from ._wire_closing import close

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from ._commands import SessionParam, SessionResult
    from ._wire import NoticeHandler, NotificationHandler

    SessionSettings = Mapping[str, str] | Callable[[int], Mapping[str, str]]


_READ_ONLY: Final = "25006"
_SET: Final = (
    "SELECT CASE WHEN pg_catalog.pg_backend_pid() = $1::int"
    " THEN pg_catalog.set_config($2, $3, false) END"
)
"""Makes a setting, but not through a pooler: it would stay there for others."""
_SET_ANYWHERE: Final = "SELECT pg_catalog.set_config($1, $2, false)"


@asynccontextmanager
async def open_session(
    conninfo: Conninfo = "",
    *,
    application_name: str | None = None,
    connect_timeout: float = 10.0,
    heartbeat: float | None = None,
    heartbeat_timeout: float | Callable[[], float] = 5.0,
    heartbeat_statement: Callable[[], str] | None = None,
    close_timeout: float = 1.0,
    settings: SessionSettings | None = None,
    is_session_pooled: bool = False,
    on_notifications: NotificationHandler | None = None,
    on_notice: NoticeHandler | None = None,
    **params: Any,
) -> AsyncGenerator[Session]:
    """Hold one server session for the length of a block.

    The block is not cancelled when the session fails; `Session.wait_closed` tells.

    Args:
        conninfo: Where to connect, see `Conninfo`.
        application_name: Shown in ``pg_stat_activity``, unless the conninfo names one.
        connect_timeout: Seconds for connecting, all hosts together, and for ``settings``.
        heartbeat: Seconds of silence after which the server is asked for a sign of life;
            None for never.
        heartbeat_timeout: Seconds it has for that, or a function that returns them, asked now
            and then; then the session has failed.
        heartbeat_statement: Returns what to ask with: something that gives nothing, as the
            empty statement, the default, or a comment for others to read.
        close_timeout: Seconds that leaving may take on top, to end what still runs.
        settings: Server settings to make first, as ``{"statement_timeout": "0"}``, or a
            function that returns them for the server's version (150004). Not made behind a
            pooler, whose other clients would have them too.
        is_session_pooled: A pooler in between gives each of its clients a backend to itself
            and cleans that afterwards, so settings are made there too.
        on_notifications: Called with the notifications of each read, in order; sync, must
            not raise.
        on_notice: Called with each notice's diagnostics, valid during the call only.
        params: More connection parameters, over the conninfo's.

    Yields:
        The open session.

    Raises:
        psycopg.OperationalError: if connecting fails; `psycopg.errors.ConnectionTimeout` if
            it takes too long.
        NotPrimaryError: if ``target_session_attrs`` asks for a primary and no host is one.
        ConninfoError: if the conninfo can't be understood.
        ValueError: if ``heartbeat`` or ``heartbeat_timeout`` is no time to wait.

    Cancellation:
        Entering is a checkpoint; a cancelled entry leaves no session behind. Leaving is
        shielded for at most ``close_timeout``.
    """
    if heartbeat is not None:
        check_seconds("heartbeat", heartbeat)
    if not callable(heartbeat_timeout):
        check_seconds("heartbeat_timeout", heartbeat_timeout)
    began = anyio.current_time()
    deadline = began + connect_timeout
    parsed = parse_conninfo(await resolve_conninfo(conninfo), **params)
    parsed.setdefault(
        "application_name", clean_application_name(application_name or "pgstructured")
    )
    parsed["client_encoding"] = "utf8"
    try:
        pgconn = await connect_first(parsed, generators.connect, total_timeout=connect_timeout)
    except psycopg.OperationalError as exc:
        if exc.sqlstate == _READ_ONLY:
            raise NotPrimaryError(f"no host is a primary: {exc}") from exc
        raise
    wire = Wire(pgconn, on_notifications=on_notifications, on_notice=on_notice)
    async with open_background() as tasks:
        try:
            tasks.start_soon(wire.run_until_ended, wire.read)
            tasks.start_soon(wire.run_until_ended, wire.write)
            made = settings(pgconn.server_version) if callable(settings) else settings
            session = await _prepare(wire, made or {}, deadline, anywhere=is_session_pooled)
            emit(
                "driver.connected",
                backend_pid=session.backend_pid,
                took=anyio.current_time() - began,
            )
            if heartbeat is not None:
                limit = heartbeat_timeout
                patience = limit if callable(limit) else lambda: limit
                work = partial(beat, wire, heartbeat, patience, heartbeat_statement or str)
                tasks.start_soon(wire.run_until_ended, work)
            yield session
        finally:
            if wire.is_kept:
                wire.stop_background()
            else:
                with anyio.CancelScope(shield=True):  # bounded by close_timeout, inside
                    await close(wire, close_timeout)


async def _prepare(
    wire: Wire, settings: Mapping[str, str], deadline: float, *, anywhere: bool
) -> Session:
    """Make the settings and learn what kind of server this is, in one round trip."""
    statements: list[tuple[str, Sequence[SessionParam]]] = [
        (_SET_ANYWHERE, (name, value)) if anywhere else (_SET, (wire.backend_pid, name, value))
        for name, value in settings.items()
    ]
    statements.append(("SELECT pg_backend_pid(), pg_is_in_recovery()", ()))
    results: list[SessionResult] = []
    with anyio.move_on_after(deadline - anyio.current_time()):
        await wire.checkpoint_if_cancelled()
        command = wire.send(statements)
        await command.signal
        results = command.results()
    if not results:
        raise psycopg.errors.ConnectionTimeout("connection timeout expired")
    pid, in_recovery = results[-1].rows[0]
    return create(
        Session,
        wire,
        behind_pooler=pid != str(wire.backend_pid),
        is_standby=in_recovery == "t",
    )
