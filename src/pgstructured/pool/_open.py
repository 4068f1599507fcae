"""`open_pool`: connections for many tasks, for the length of a block."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio

from pgstructured._util import create, open_background
from pgstructured.driver import (
    default_application_name,
    parse_conninfo,
    resolve_conninfo,
    running_event_loop,
)

from ._keeping import Keeper
from ._ledger import Ledger
from ._lender import Lender
from ._opening import Opener
from ._options import PoolOptions, check_sizes
from ._pool import Pool
from ._statistics import Counters

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from pgstructured.driver import Conninfo, Pooler

    from ._options import ConnectionHook

_OF_CONNECT: Final = (
    "autocommit",
    "row_factory",
    "application_name",
    "prepare_threshold",
    "context",
    "cursor_factory",
)
"""What `connect` takes besides parameters of libpq's."""
_TO_END: Final = 1.0
"""Seconds for tasks that were connecting when the pool closed to give that up."""


@asynccontextmanager
async def open_pool(
    conninfo: Conninfo = "",
    *,
    name: str | None = None,
    namespace: str | None = None,
    min_size: int = 0,
    max_size: int = 10,
    acquire_timeout: float | None = 30.0,
    max_waiting: int | None = None,
    max_lifetime: float | None = 3600.0,
    max_idle: float | None = 600.0,
    check_after_idle: float | None = 30.0,
    on_connect: ConnectionHook | None = None,
    on_acquire: ConnectionHook | None = None,
    on_release: ConnectionHook | None = None,
    reconnect_timeout: float | None = None,
    close_timeout: float = 5.0,
    pooler: Pooler = "auto",
    direct_conninfo: Conninfo | None = None,
    connect_timeout: float | None = 10.0,
    cancel_timeout: float = 5.0,
    **as_connect: Any,
) -> AsyncGenerator[Pool]:
    """Keep connections for many tasks, for the length of a block.

    No connection is made before one is wanted, or ``min_size`` says so: a server that is down
    keeps nobody from entering. It recovers from outages by itself.

    Args:
        conninfo: Where to connect, see `Conninfo`; a callable is asked at each attempt.
        name: What events, errors and, where the conninfo names no application, the server call
            it: ``pgstructured/<name>/<namespace>``.
        namespace: A tenant, or the like.
        min_size: Connections to keep open.
        max_size: Connections that there may be.
        acquire_timeout: Seconds that an acquire may take, to wait, to connect, to ask a connection
            that has rested, and for ``on_acquire``; None for as long as it takes.
        max_waiting: Tasks that may wait for a connection; None for any number, 0 for none.
        max_lifetime: Seconds after which a connection is replaced, less up to a tenth, by
            chance; None for never.
        max_idle: Seconds after which an idle connection is closed if there are more than
            ``min_size``, less up to a tenth; None for never, 0 for at once.
        check_after_idle: Seconds of rest after which the server is asked for a sign of life
            before a connection is given out; None for never. That a session has ended is noticed
            without asking.
        on_connect: Given each new connection, and again one that had to be reset; what it
            leaves is what the connection is to be.
        on_acquire: Given a connection before its borrower.
        on_release: Given a connection after its borrower, with no transaction open. A hook
            that raises closes its connection, and raises at the borrower; one that closes its
            connection refuses it, and another takes its place.
        reconnect_timeout: Seconds without a server after which the pool gives up; None for never.
        close_timeout: Seconds that borrowers have to give back theirs when the block has ended
            well; then, or if it has not, their connections are closed.
        pooler: What stands between us and the server; see `pgstructured.driver.connect`.
        direct_conninfo: Leads past the pooler, for what needs a session: locks, subscriptions.
        connect_timeout: Seconds that one attempt to connect may take, with ``on_connect``.
        cancel_timeout: Seconds that a cancelled operation may take to settle, or a connection
            that comes back to be made as it was.
        as_connect: What else `pgstructured.driver.connect` takes.

    Yields:
        The pool.

    Raises:
        ValueError: if an option is out of its range.
        ConninfoError: if a conninfo is malformed.
        PoolUnavailableError: if there was no server for ``reconnect_timeout`` seconds; the block
            is cancelled.

    Cancellation:
        Entering is a checkpoint. Leaving takes ``close_timeout`` at most if the block has ended
        well, and in any case a second more, shielded, to cancel what still runs and to close.
    """
    check_sizes(min_size, max_size)
    full_name = default_application_name(name, namespace)
    connect_options = dict(as_connect)
    if connect_options.get("application_name") is None:
        connect_options["fallback_application_name"] = full_name
    options = PoolOptions(
        conninfo=conninfo,
        name="/".join(filter(None, (name, namespace))) or "unnamed",
        acquire_timeout=acquire_timeout,
        max_waiting=max_waiting,
        max_lifetime=max_lifetime,
        max_idle=max_idle,
        check_after_idle=check_after_idle,
        on_connect=on_connect,
        on_acquire=on_acquire,
        on_release=on_release,
        reconnect_timeout=reconnect_timeout,
        close_timeout=close_timeout,
        pooler=pooler,
        direct_conninfo=direct_conninfo,
        connect_timeout=connect_timeout,
        cancel_timeout=cancel_timeout,
        connect_options=connect_options,
    )
    await _look_at(conninfo, params_of(connect_options))
    if direct_conninfo is not None:
        await _look_at(direct_conninfo, {})
    await anyio.lowlevel.checkpoint()
    now = running_event_loop().now
    counters = Counters()
    lender = Lender(
        options, Ledger(min_size, max_size), counters, Opener(options, counters, now), now
    )
    keeper = Keeper(lender)
    async with open_background() as tasks:
        keeper.start(tasks)
        try:
            yield create(Pool, lender)
            lender.begin_closing()
            with anyio.move_on_after(close_timeout):
                await lender.wait_returned()
        finally:
            lender.begin_closing()
            with anyio.CancelScope(shield=True):  # bounded by the connections' close_timeout
                await lender.close_borrowed()
            with anyio.move_on_after(_TO_END, shield=True):
                await lender.wait_returned(but_borrowed=True)


def params_of(connect_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of ``connect_options`` are parameters of libpq's."""
    return {key: value for key, value in connect_options.items() if key not in _OF_CONNECT}


async def _look_at(conninfo: Conninfo, params: dict[str, Any]) -> None:
    """Find mistakes that don't heal; what a callable will say is not known yet."""
    if callable(conninfo):
        return
    parse_conninfo(await resolve_conninfo(conninfo), **params)
