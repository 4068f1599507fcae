"""One connection for one task, for the length of a block.

What keeps one session of the server's depends on what stands between:

==================  ===========================  ============================
``transaction=``    direct, or sessions pooled   transactions pooled
==================  ===========================  ============================
None                the connection               a transaction
True                a transaction                a transaction
False               the connection               `SessionRequiredError`
==================  ===========================  ============================
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psycopg

from pgstructured.driver import set_characteristics
from pgstructured.errors import SessionRequiredError

from ._borrowing import Borrowing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from psycopg import IsolationLevel

    from pgstructured.driver import Connection

    from ._lender import Lender
    from ._members import Member


@asynccontextmanager
async def pin(lender: Lender, *, transaction: bool | None) -> AsyncGenerator[Connection[Any]]:
    """See `Pool.pin`."""
    async with hold(lender) as member:
        conn = member.conn
        pools_transactions = member.session.pools_transactions
        if pools_transactions and transaction is False:
            raise SessionRequiredError(
                "behind a transaction pooler only a transaction keeps its session; leave"
                " transaction=False away, or connect past the pooler"
            )
        if transaction is None:
            # One that is open already keeps it.
            transaction = pools_transactions and conn.info.transaction_status.name == "IDLE"
        if transaction:
            async with conn.transaction():
                yield conn
        else:
            yield conn


@asynccontextmanager
async def hold(lender: Lender) -> AsyncGenerator[Member]:
    """Bind a connection to the current task, or take the one that is bound to it."""
    async with Borrowing(lender):
        member = lender.holders[lender.current_task()]
        member.is_pinned = True
        yield member


@asynccontextmanager
async def transact(
    lender: Lender,
    *,
    isolation_level: IsolationLevel | None,
    read_only: bool | None,
    deferrable: bool | None,
) -> AsyncGenerator[Connection[Any]]:
    """See `Pool.transaction`."""
    async with Borrowing(lender) as conn:
        asked = (isolation_level, read_only, deferrable)
        if asked == (None, None, None):
            async with conn.transaction():
                yield conn
            return
        if conn.info.transaction_status.name != "IDLE":
            raise psycopg.ProgrammingError("a transaction is open: it is what it was begun as")
        before = (conn.isolation_level, conn.read_only, conn.deferrable)
        set_characteristics(
            conn,
            before[0] if isolation_level is None else psycopg.IsolationLevel(isolation_level),
            before[1] if read_only is None else read_only,
            before[2] if deferrable is None else deferrable,
        )
        try:
            async with conn.transaction():
                yield conn
        finally:
            set_characteristics(conn, *before)
