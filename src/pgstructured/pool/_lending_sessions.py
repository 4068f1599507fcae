# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# Of a pool, which is a handle without a public inside.
"""What other rooms need of a pool for what needs a session: locks, subscriptions."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from psycopg.conninfo import make_conninfo

from pgstructured.driver import resolve_conninfo
from pgstructured.errors import SessionRequiredError

from ._borrowing import Loan
from ._open import params_of
from ._pinning import hold

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pgstructured.driver import Conninfo, Pooler

    from ._pool import Pool


@asynccontextmanager
async def lend_session(pool: Pool) -> AsyncGenerator[Loan]:
    """Bind a connection to the current task as `Pool.pin` does, for one that may keep it.

    Raises:
        Exception: as `Pool.acquire`.

    Cancellation:
        As `Pool.acquire`.
    """
    lender = pool._lender
    async with hold(lender) as member:
        yield Loan(lender, member)


def session_conninfo(pool: Pool) -> Conninfo:
    """Return what connects to sessions of one's own, where the pool connects.

    Raises:
        SessionRequiredError: if that is known to lead to a transaction pooler.
    """
    options = pool._lender.options
    if options.direct_conninfo is not None:
        return options.direct_conninfo
    if options.pooler == "transaction":
        raise session_required()

    async def ask() -> str:
        params = params_of(options.connect_options)
        params.pop("fallback_application_name", None)  # theirs says what it is for
        return make_conninfo(await resolve_conninfo(options.conninfo), **params)

    return ask


def session_pooler(pool: Pool, asked: Pooler) -> Pooler:
    """Return what stands before those sessions: what was asked for, or what the pool was told."""
    options = pool._lender.options
    is_told = asked == "auto" and options.direct_conninfo is None
    return options.pooler if is_told else asked


def direct_conninfo(pool: Pool) -> Conninfo | None:
    """Return what leads past the pool's pooler, if it was told."""
    return pool._lender.options.direct_conninfo


def session_required() -> SessionRequiredError:
    """Return the error for a feature of sessions on a pool that has none to offer."""
    return SessionRequiredError(
        "locks and subscriptions need a session, and the pool's connections lead to a transaction"
        " pooler; give open_pool a direct_conninfo that leads past it"
    )
