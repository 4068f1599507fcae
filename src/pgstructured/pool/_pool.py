"""`Pool`: what a program sees of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import anyio

from pgstructured._util import NoPublicConstructor

from ._borrowing import Borrowing
from ._options import check_sizes
from ._pinning import pin, transact
from ._statistics import PoolStatistics
from ._upkeep import check, wait_ready

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from psycopg import IsolationLevel

    from pgstructured.driver import Connection

    from ._lender import Lender


@final
class Pool(metaclass=NoPublicConstructor):
    """Connections for many tasks; made by `open_pool`."""

    def __init__(self, lender: Lender) -> None:
        self._lender = lender

    def __repr__(self) -> str:
        return repr(self._lender)

    @property
    def name(self) -> str:
        """What its events and errors call it."""
        return self._lender.options.name

    # ------------------------------------------------------------ borrowing

    def acquire(self) -> AbstractAsyncContextManager[Connection[Any], None]:
        """Borrow a connection for the length of a block.

        Who waits is served first come, first served; of the idle connections the one that was
        used last is given. If there is none, and less than ``max_size``, one is made here, in
        the calling task; while there is no server this is tried again.

        A block that ends rolls back what is open, and sets back what was changed: autocommit,
        row factory, isolation level and the like; and on the server, unless a pooler stands
        between, what SQL of the block has set, listened to, locked or created temporarily.

        In a task's own `pin` it gives the pinned connection.

        Returns:
            A context manager that gives the connection, once.

        Raises:
            PoolTimeoutError: if there was none within ``acquire_timeout``; the last error of
                connecting is its cause, if it is for that.
            PoolNestedAcquireError: if this task holds one already.
            TooManyWaitingError: if ``max_waiting`` tasks wait already.
            PoolClosedError: if the pool is closed. Also when the block ends by an error because
                the pool has closed the connection under it.
            psycopg.OperationalError: why connecting fails, where that can't heal: a wrong
                password, no such database.
            Exception: what a hook raises.

        Cancellation:
            Entering is a checkpoint. A cancelled entry gives up its place in the line, or the
            connection that it was making; what it was just given goes to the next. Leaving is
            not a checkpoint; to clean up is shielded, and takes ``cancel_timeout`` at most.
        """
        return Borrowing(self._lender)

    def transaction(
        self,
        *,
        isolation_level: IsolationLevel | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
    ) -> AbstractAsyncContextManager[Connection[Any]]:
        """Borrow a connection, and run a block in a transaction on it.

        In a task's own `pin` on the pinned connection: in a savepoint if a transaction is open.

        Args:
            isolation_level: psycopg's; None for the connection's own.
            read_only: Whether it may write; None for the connection's own.
            deferrable: Whether it may wait for a safe snapshot; None for the connection's own.

        Raises:
            psycopg.ProgrammingError: if one of these is given and a transaction is open.
            Exception: as `acquire`.

        Cancellation:
            As `acquire`; a cancelled block is rolled back.
        """
        return transact(
            self._lender,
            isolation_level=isolation_level,
            read_only=read_only,
            deferrable=deferrable,
        )

    def pin(
        self, *, transaction: bool | None = None
    ) -> AbstractAsyncContextManager[Connection[Any]]:
        """Bind one connection to the current task for the length of a block.

        What the task acquires of this pool meanwhile, itself or through what is given the
        pool, is that connection. Tasks that it starts don't inherit it.

        Args:
            transaction: Whether the block is a transaction. None: only behind a transaction
                pooler, where nothing else keeps a session of the server's.

        Raises:
            SessionRequiredError: if it is to be none, behind a transaction pooler.
            Exception: as `acquire`.

        Cancellation:
            As `acquire`.
        """
        return pin(self._lender, transaction=transaction)

    # ------------------------------------------------------------ looking after it

    async def wait_ready(self) -> None:
        """Wait until ``min_size`` connections are open, or one if that is 0.

        Raises:
            PoolTimeoutError: if that took longer than ``acquire_timeout``.
            PoolClosedError: if the pool is closed.
            psycopg.OperationalError: why connecting fails, where that can't heal.
            Exception: what ``on_connect`` raises.

        Cancellation:
            A checkpoint. What was connected stays.
        """
        await wait_ready(self._lender)

    async def resize(self, min_size: int, max_size: int) -> None:
        """Change how many connections there are to be.

        What is too much is closed: idle ones now, borrowed ones when they come back.

        Args:
            min_size: Connections to keep open.
            max_size: Connections that there may be.

        Raises:
            ValueError: if these are no sizes.

        Cancellation:
            A checkpoint, before anything is changed.
        """
        check_sizes(min_size, max_size)
        await anyio.lowlevel.checkpoint()
        lender, ledger = self._lender, self._lender.ledger
        ledger.min_size, ledger.max_size = min_size, max_size
        while ledger.idle and ledger.size > max_size:
            lender.retire(ledger.idle.pop(0), "surplus")
        ledger.grant_slots()
        ledger.on_free()
        lender.wake_at(lender.now())

    async def check(self) -> None:
        """Ask the server about every idle connection, and replace those that are dead.

        Raises:
            PoolTimeoutError: if no others could be made within ``acquire_timeout``.
            PoolClosedError: if the pool is closed.
            psycopg.OperationalError: why connecting fails, where that can't heal.

        Cancellation:
            A checkpoint. Connections that are being asked are put back, or closed.
        """
        await check(self._lender)

    async def drain(self) -> None:
        """Replace every connection: idle ones now, borrowed ones when they come back.

        For what a connection knows only from its beginning: another password, a setting of
        the database's, a new primary.

        Cancellation:
            A checkpoint, before anything is done.
        """
        await anyio.lowlevel.checkpoint()
        lender, ledger = self._lender, self._lender.ledger
        ledger.generation += 1
        idle, ledger.idle = ledger.idle, []
        for member in idle:
            lender.retire(member, "drained")

    def statistics(self) -> PoolStatistics:
        """Return what it has now, and has done."""
        ledger, counters = self._lender.ledger, self._lender.counters
        return PoolStatistics(
            size=ledger.size,
            idle=len(ledger.idle),
            in_use=len(ledger.borrowed),
            tasks_waiting=len(ledger.waiters),
            min_size=ledger.min_size,
            max_size=ledger.max_size,
            opened=counters.opened,
            closed_expired=counters.closed_expired,
            closed_broken=counters.closed_broken,
            connect_errors=counters.connect_errors,
            acquired=counters.acquired,
            acquire_timeouts=counters.acquire_timeouts,
            acquire_cancelled=counters.acquire_cancelled,
            acquire_wait_seconds=counters.acquire_wait_seconds,
            use_seconds=counters.use_seconds,
        )
