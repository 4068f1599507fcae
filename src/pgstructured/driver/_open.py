# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# Making a connection is a part of it.
"""Opening connections: what a user says, checked and made into a `Connection`."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast, get_args, overload

import anyio
from psycopg import errors, generators, pq
from psycopg.adapt import AdaptersMap
from psycopg.rows import Row, TupleRow, tuple_row

from pgstructured._util import open_background
from pgstructured.errors import ConninfoError
from pgstructured.observe import emit

from ._connecting import connect_first
from ._connection import Connection
from ._conninfo import (
    Conninfo,
    clean_application_name,
    default_application_name,
    parse_conninfo,
    resolve_conninfo,
)
from ._driving import drive
from ._lending import declare_session_pooled
from ._watching import watch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from psycopg.rows import AsyncRowFactory

Pooler: TypeAlias = Literal["auto", "none", "session", "transaction"]
"""What stands between us and the server: ``"auto"`` finds out, the others declare it."""

_PSYCOPG_OPTIONS: Final = ("prepare_threshold", "context", "cursor_factory")
_PREPARE_THRESHOLD: Final = 5  # psycopg's default


@overload
async def connect(
    conninfo: Conninfo = "",
    *,
    application_name: str | None = None,
    connect_timeout: float | None = 10.0,
    cancel_timeout: float = 5.0,
    pooler: Pooler = "auto",
    autocommit: bool = True,
    row_factory: AsyncRowFactory[Row],
    **params: Any,
) -> Connection[Row]: ...
@overload
async def connect(
    conninfo: Conninfo = "",
    *,
    application_name: str | None = None,
    connect_timeout: float | None = 10.0,
    cancel_timeout: float = 5.0,
    pooler: Pooler = "auto",
    autocommit: bool = True,
    row_factory: AsyncRowFactory[TupleRow] = tuple_row,
    **params: Any,
) -> Connection[TupleRow]: ...
async def connect(
    conninfo: Conninfo = "",
    *,
    application_name: str | None = None,
    connect_timeout: float | None = 10.0,
    cancel_timeout: float = 5.0,
    pooler: Pooler = "auto",
    autocommit: bool = True,
    row_factory: AsyncRowFactory[Any] = tuple_row,
    **params: Any,
) -> Connection[Any]:
    """Connect to a server; the caller closes the connection.

    Args:
        conninfo: Where to; see `Conninfo`. Several hosts are tried in turn, as
            ``target_session_attrs`` says.
        application_name: Shown by the server, instead of the conninfo's; ``pgstructured``
            if neither names one.
        connect_timeout: Seconds for all of it: every host, name resolution, finding out about
            a pooler. A shorter ``connect_timeout`` in the conninfo counts; None for no limit.
        cancel_timeout: Seconds that a cancelled operation may take to settle, before the
            connection is given up.
        pooler: ``"auto"`` asks the server once whether a pooler stands between, and takes it
            for one that pools transactions; the others declare what there is. Behind a
            transaction pooler nothing is prepared on the server, unless ``params`` says so.
        autocommit: Whether each statement commits by itself outside of `transaction` blocks.
        row_factory: Makes rows; see `psycopg.rows`.
        params: Further connection parameters of libpq's, over the conninfo's, and
            psycopg's ``prepare_threshold``, ``context`` and ``cursor_factory``.

    Returns:
        An open connection.

    Raises:
        ConninfoError: if the conninfo is malformed.
        ValueError: if an option is out of its range.
        psycopg.errors.ConnectionTimeout: if ``connect_timeout`` has run out.
        psycopg.OperationalError: if no host accepts the connection; the server's own error.

    Cancellation:
        A checkpoint. A cancelled call closes the socket it was connecting, at once.
    """
    limit = None if connect_timeout is None else check_seconds("connect_timeout", connect_timeout)
    cancel_limit = check_seconds("cancel_timeout", cancel_timeout)
    if pooler not in get_args(Pooler):
        choices = ", ".join(map(repr, get_args(Pooler)))
        raise ValueError(f"pooler must be one of {choices}, not {pooler!r}")
    options = {key: params.pop(key) for key in _PSYCOPG_OPTIONS if key in params}
    started = anyio.current_time()
    resolved = await _resolve_within(conninfo, limit)
    settings = parse_conninfo(resolved, **params)
    _name(settings, application_name)
    limit = _shorter_limit(limit, settings.pop("connect_timeout", None))
    deadline = math.inf if limit is None else started + limit
    conn = cast(
        "Connection[Any]",
        await connect_first(settings, Connection._connect_gen, total_timeout=_left(deadline)),
    )
    try:
        conn.row_factory = row_factory
        conn._autocommit = bool(autocommit)
        conn._cancel_timeout = cancel_limit
        is_pooled = pooler in {"session", "transaction"}
        if pooler == "auto":
            is_pooled = await _find_pooler(conn, _left(deadline))
        conn._behind_pooler = is_pooled
        if pooler == "session":
            declare_session_pooled(conn)
        pools_transactions = is_pooled and pooler != "session"
        conn.prepare_threshold = options.get(
            "prepare_threshold", None if pools_transactions else _PREPARE_THRESHOLD
        )
        if (context := options.get("context")) is not None:
            conn._adapters = AdaptersMap(context.adapters)
        if (cursor_factory := options.get("cursor_factory")) is not None:
            conn.cursor_factory = cursor_factory
    except BaseException:
        conn._discard()
        raise
    emit("driver.connected", backend_pid=conn._backend_pid, took=anyio.current_time() - started)
    return conn


@asynccontextmanager
async def open_connection(
    conninfo: Conninfo = "",
    *,
    heartbeat: float | None = None,
    heartbeat_timeout: float = 5.0,
    close_timeout: float = 1.0,
    **as_connect: Any,
) -> AsyncGenerator[Connection[Any]]:
    """Hold a connection for the length of a block, and watch it while it is idle.

    A session that is killed makes the connection FAILED within milliseconds, not at its next
    query; notifications and notices are taken as they come. The body is not cancelled by
    it, and leaving the block doesn't raise for it: wait with `Connection.wait_closed`.

    Args:
        conninfo: Where to; see `Conninfo`.
        heartbeat: After that many silent seconds the server is asked for a sign of life, also
            in an open transaction; None for never.
        heartbeat_timeout: Seconds that it has for it; then the socket is closed.
        close_timeout: Seconds that leaving may take, to end a statement that is running.
        as_connect: Everything that `connect` takes.

    Yields:
        The open connection.

    Raises:
        ConninfoError: if the conninfo is malformed.
        ValueError: if an option is out of its range.
        psycopg.OperationalError: if no host accepts the connection; the server's own error.

    Cancellation:
        Entering is a checkpoint; a cancelled entry leaves no session behind. Leaving is
        shielded, and bounded by ``close_timeout``.
    """
    interval = None if heartbeat is None else check_seconds("heartbeat", heartbeat)
    patience = check_seconds("heartbeat_timeout", heartbeat_timeout)
    close_limit = check_seconds("close_timeout", close_timeout)
    conn: Connection[Any] = await connect(conninfo, **as_connect)
    conn._close_timeout = close_limit
    try:
        async with open_background() as tasks:
            tasks.start_soon(watch, conn, interval, patience)
            yield conn
    finally:
        with anyio.CancelScope(shield=True):  # bounded by aclose itself
            await conn.aclose()


def check_seconds(name: str, value: object) -> float:
    """Return ``value`` if it can be a number of seconds to wait."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number of seconds above 0, not {value!r}")
    return float(value)


async def _resolve_within(conninfo: Conninfo, limit: float | None) -> str:
    with anyio.move_on_after(limit):
        return await resolve_conninfo(conninfo)
    raise errors.ConnectionTimeout("connection timeout expired while asking for the conninfo")


def _name(settings: dict[str, Any], application_name: str | None) -> None:
    if application_name is not None:
        settings["application_name"] = clean_application_name(application_name)
    else:
        settings.setdefault("fallback_application_name", default_application_name())


def _shorter_limit(limit: float | None, in_conninfo: object) -> float | None:
    """Return the bound that counts, libpq's 0 for none understood."""
    if in_conninfo is None:
        return limit
    try:
        asked = float(str(in_conninfo))
    except ValueError:
        asked = math.nan
    if math.isnan(asked):
        raise ConninfoError(f"connect_timeout must be a number, not {in_conninfo!r}")
    if asked <= 0:
        return limit
    return asked if limit is None else min(asked, limit)


def _left(deadline: float) -> float | None:
    return None if math.isinf(deadline) else max(deadline - anyio.current_time(), 0.0)


async def _find_pooler(conn: Connection[Any], limit: float | None) -> bool:
    """Tell whether the session that answers is another than the one that was announced."""
    waiter = conn._attach()
    with anyio.move_on_after(limit):
        conn.pgconn.send_query(b"SELECT pg_backend_pid()")
        # The first: a pooler's farewell to a session that was killed may be one of two.
        result, *_ = await drive(waiter, generators.execute(conn.pgconn))
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise errors.error_from_result(result, encoding=conn.pgconn._encoding)
        return bool(result.get_value(0, 0) != str(conn._backend_pid).encode())
    raise errors.ConnectionTimeout("connection timeout expired while looking for a pooler")
