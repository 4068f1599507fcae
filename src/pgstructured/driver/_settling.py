"""Cancel and settle: how an interrupted operation ends.

A connection whose operation was interrupted is busy: the server works on, and
libpq waits for results that nobody reads. It becomes usable again like this,
shielded, and bounded by one budget for everything a cancellation costs:

===========================  =================================================
while                        do
===========================  =================================================
the server is at work        ask it to cancel; again after 50 ms, 100 ms, ...:
                             a request that arrives before its query is lost,
                             and the generator goes on with its next step
the generator is not done    run it to its own end, dropping errors
results are still coming     read and drop them, refuse or drop a COPY
the budget is used up        close the socket: the connection is FAILED
===========================  =================================================

What was begun and must not be cancelled (COMMIT, ROLLBACK, PREPARE
TRANSACTION) settles the same way, without asking the server to cancel.

asyncio can cancel a task again natively in spite of a shield. That is noted and
changes nothing: the cancellation that is being settled is raised in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio
import anyio.to_thread
import psycopg
from psycopg import generators, pq
from psycopg._capabilities import capabilities
from psycopg.errors import ConnectionTimeout

from pgstructured.observe import emit

from ._connecting import drive_connecting
from ._driving import Work, discard_results

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

    from ._waiting import SocketWaiter

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_OK: Final = pq.ConnStatus.OK
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0


async def request_cancel(pgconn: PGconn) -> None:
    """Ask the server to cancel what the session does, and wait until it has been told.

    Raises:
        psycopg.OperationalError: if the server can't be reached.

    Cancellation:
        A checkpoint. A cancelled call closes its socket; the server may have been told.
    """
    if not capabilities.has_cancel_safe():
        # libpq before 17 can only do it blocking; the thread ends with its TCP connection.
        cancel = pgconn.get_cancel()
        await anyio.to_thread.run_sync(cancel.cancel, abandon_on_cancel=True)
        return
    request = pgconn.cancel_conn()
    try:
        request.start()
        await drive_connecting(generators.cancel(request))
    finally:
        request.finish()


async def settle(
    pgconn: PGconn,
    waiter: SocketWaiter,
    work: Work[Any] | None,
    *,
    may_cancel: bool,
    to_idle: bool,
    budget: float,
) -> Settlement:
    """Make a connection idle, or find out that it can't be done.

    Args:
        pgconn: The connection.
        waiter: Waits for its socket.
        work: The operation to bring to its end, if one was begun; its errors are kept in it.
        may_cancel: Whether the server may be asked to cancel.
        to_idle: Whether to go on until no command is in flight; else ``work`` is all, for
            the block of a COPY, a stream or a pipeline has an end of its own.
        budget: Seconds it may take.

    Returns:
        How it ended; never raises what interrupts it, which is the caller's to raise.

    Cancellation:
        Shielded; takes at most ``budget`` seconds.
    """
    started = anyio.current_time()
    settling = _Settling(pgconn, waiter, work, may_cancel=may_cancel, to_idle=to_idle)
    interruption: BaseException | None = None
    fault: str | None = None
    while True:
        try:
            with anyio.CancelScope(deadline=started + budget, shield=True):
                await settling.run()
        except anyio.get_cancelled_exc_class() as exc:  # noqa: ASYNC103 - raised by the caller
            # Native, in spite of the shield. It also keeps the scope from swallowing its own
            # timeout, so the clock says when it is enough.
            interruption = exc
            if anyio.current_time() < started + budget:  # pragma: no branch - a matter of time
                continue  # noqa: ASYNC104
        except (anyio.ClosedResourceError, anyio.BusyResourceError) as exc:
            fault = f"its socket can't be read: {exc!r}"
        break
    fault = fault or settling.find_fault(budget)
    if fault is None and may_cancel:
        emit("driver.cancel_settled", took=anyio.current_time() - started)
    error = settling.error if pgconn.status != _OK else None
    if error is None and pgconn.status == _OK and not settling.is_done:
        error = ConnectionTimeout(str(fault))  # it was silence, not a word or an end
    return Settlement(fault, error, interruption)


class Settlement(NamedTuple):
    """How settling ended."""

    fault: str | None
    """None if the connection is idle, or in a pipeline whose books are right; else what is
    wrong with it."""
    error: Exception | None
    """What ended the connection, if it ended by itself and something was said; a
    `ConnectionTimeout` if nothing was."""
    interruption: BaseException | None
    """A native cancellation that came meanwhile, for the caller to raise."""


class _Settling:
    """One run of the protocol, so that it can be taken up again after an interruption."""

    def __init__(
        self,
        pgconn: PGconn,
        waiter: SocketWaiter,
        work: Work[Any] | None,
        *,
        may_cancel: bool,
        to_idle: bool,
    ) -> None:
        self._pgconn = pgconn
        self._waiter = waiter
        self._may_cancel = may_cancel
        self._pause = _FIRST_PAUSE
        self._steps: list[Work[Any]] = [] if work is None else [work]
        self._refusal: Exception | None = None
        self._to_idle = to_idle and not pgconn.pipeline_status
        if self._to_idle:
            self._steps.append(Work(discard_results(pgconn)))
        self.is_done = False

    async def run(self) -> None:
        if not self._may_cancel:
            await self._drain()
            return
        if self._is_copying_in():
            # Refused, it ends; a cancel request could overtake the Sync that its statement has
            # brought along. The one of the refusal would then be answered to the next query.
            with anyio.move_on_after(_LONGEST_PAUSE):
                await self._drain()
        while not self.is_done:
            if self._pgconn.transaction_status == _ACTIVE:
                await self._ask()
            with anyio.move_on_after(self._pause):
                await self._drain()
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    def _is_copying_in(self) -> bool:
        """Tell whether nothing but a COPY is left, for which the server waits."""
        pgconn = self._pgconn
        if len(self._steps) > 1 or not self._to_idle or pgconn.transaction_status != _ACTIVE:
            return False
        if pgconn.is_busy():
            return False
        result = pgconn.get_result()  # as often as one asks, until it is ended
        return result is not None and result.status == pq.ExecStatus.COPY_IN

    async def _ask(self) -> None:
        # Never given up half-way and then gone on from: a request that arrives late would
        # cancel the next query.
        try:
            await request_cancel(self._pgconn)
        except (psycopg.Error, OSError) as exc:
            self._refusal = exc  # the server may still finish by itself, so go on

    async def _drain(self) -> None:
        for step in self._steps:
            await step.advance(self._waiter)
        while self._to_idle and self._is_interrupted_by_a_callback():
            self._steps[-1] = Work(discard_results(self._pgconn))
            await self._steps[-1].advance(self._waiter)
        self.is_done = True

    def _is_interrupted_by_a_callback(self) -> bool:
        """Tell whether a handler of the user's has raised in the middle of reading."""
        is_reading = self._pgconn.transaction_status == _ACTIVE and self._pgconn.status == _OK
        return is_reading and not isinstance(self._steps[-1].error, psycopg.Error)

    @property
    def error(self) -> Exception | None:
        """The first thing that went wrong, if anything did."""
        return next((step.error for step in self._steps if step.error is not None), None)

    def find_fault(self, budget: float) -> str | None:
        """Return why the connection can't be used any more, or None."""
        if self._pgconn.status != _OK:
            return "the connection ended"
        if self.is_done:
            if self._pgconn.pipeline_status:
                is_foreign = not isinstance(self.error, psycopg.Error | None)
                return f"a pipeline's books are wrong: {self.error!r}" if is_foreign else None
            if self._to_idle and self._pgconn.transaction_status == _ACTIVE:
                return f"its results can't be read: {self.error!r}"  # pragma: no cover - libpq's
            return None
        asked = "after a cancel request" if self._may_cancel else "to what was begun"
        why = f"; {self._refusal}" if self._refusal is not None else ""
        return f"no answer from the server within {budget:.3g} s {asked}{why}"
