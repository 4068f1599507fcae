# pyright: reportPrivateUsage=false
# A subclass of psycopg's connection has to know psycopg's private names; only this room may.
"""How operations on a connection run and settle.

psycopg's cursors, COPY and streams do all their waiting through ``wait`` and take
turns through ``lock``. So two rules make every one of them cancellable, psycopg's own
classes and their subclasses alike:

* an operation that is interrupted in ``wait`` settles there (see `_settling`);
* whoever leaves the lock leaves an idle connection (see `_locking`).
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
import psycopg
from psycopg import errors, pq
from psycopg.errors import ConnectionTimeout
from psycopg.rows import Row

from ._driving import Work, abandon, drive, drive_within
from ._lifecycle import ConnectionState
from ._living import LivingConnection
from ._quoting import quote_query
from ._settling import request_cancel, settle

if TYPE_CHECKING:
    from psycopg.abc import RV, PQGen

    from ._pipelines import AsyncPipeline
    from ._waiting import SocketWaiter

_ACTIVE: Final = pq.TransactionStatus.ACTIVE


class OperatingConnection(LivingConnection[Row]):
    """A psycopg connection whose every operation can be cancelled."""

    async def wait(self, gen: PQGen[RV], interval: float = 0.0, timeout: float | None = None) -> RV:  # noqa: ASYNC109, ARG002 - psycopg's signature
        """Run a generator that operates on the connection, as psycopg's `!wait` does.

        Args:
            gen: The generator; it mustn't change sockets.
            interval: Taken for compatibility; there is no polling.
            timeout: Seconds until it is left as it is, with psycopg's internal wait timeout.

        Cancellation:
            A checkpoint where there is something to wait for. A cancelled call settles:
            the server is asked to cancel, its results are dropped, and what can't be ended
            within ``cancel_timeout`` is ended by closing the socket.
        """
        waiter = self._waiter
        if waiter is None:
            waiter = self._attach()
        if self._is_ending:
            return await self._wait_to_end(gen)
        if self._cleaned_up_for:
            self._renew_budget()
        try:
            if timeout is None:
                result = await drive(waiter, gen, None, self._take_turn)
            else:
                result = await drive_within(waiter, gen, timeout)
        except Exception as exc:
            quote_query(exc)
            self._take_note(exc)
            raise
        except GeneratorExit:
            # The coroutine is being closed, so nothing can be awaited any more.
            if self.pgconn.transaction_status == _ACTIVE:
                self._fail(psycopg.OperationalError("an operation was abandoned half-way"))
                abandon(gen)
            raise
        except BaseException:
            if self.pgconn.transaction_status == _ACTIVE or self.pgconn.pipeline_status:
                await self._settle_operation(gen)  # noqa: ASYNC102 - bounded by cancel_timeout inside
            raise
        return result

    async def _take_turn(self) -> None:
        """Let other tasks run; a cancellation is noticed where more of the operation is to come.

        A COPY whose server keeps up never has to wait, and is to be cancelled all the same.
        """
        if self.pgconn.transaction_status == _ACTIVE:
            await anyio.lowlevel.checkpoint()
        else:
            await anyio.lowlevel.cancel_shielded_checkpoint()

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - psycopg's signature
        """Ask the server to cancel what the connection does now, as psycopg's does.

        Args:
            timeout: Seconds until `psycopg.errors.CancellationTimeout`; 0 for no limit.

        Cancellation:
            A checkpoint. A cancelled call may or may not have reached the server.
        """
        if not self._should_cancel():
            return
        with anyio.move_on_after(timeout or None):
            await request_cancel(self.pgconn)
            return
        raise errors.CancellationTimeout("cancellation timeout expired")

    async def _try_cancel(self, *, timeout: float = 5.0) -> None:  # noqa: ARG002, ASYNC109 - psycopg's signature
        # psycopg is about to cancel and drain a COPY or a stream, in steps that neither a
        # shield nor a bound protects: from here to the end of it, `wait` settles.
        self._is_ending = self.pgconn.transaction_status == _ACTIVE

    # ------------------------------------------------------------------ inside

    def _renew_budget(self) -> None:
        """Give a new operation a ``cancel_timeout`` of its own.

        Not to one that begins under a cancellation: it cleans up after that, as the end of a
        COPY does, and what the cancellation costs is bounded together.
        """
        if anyio.current_effective_deadline() != -math.inf:
            self._cleaned_up_for = 0.0

    async def _make_idle(self) -> None:
        await self._settle(None, may_cancel=True)

    async def _settle_operation(self, gen: PQGen[Any]) -> None:
        """Settle what was interrupted in `wait`; the end of its block is still to come."""
        pipeline = cast("AsyncPipeline | None", self._pipeline)
        if pipeline is not None:
            pipeline.stop_feeding()
        try:
            await self._settle(Work(gen, started=True), may_cancel=True, to_idle=False)
        finally:
            if pipeline is not None:
                pipeline.feed_again()

    async def _settle(
        self,
        work: Work[Any] | None,
        *,
        may_cancel: bool,
        to_idle: bool = True,
        remark: str = "",
    ) -> bool:
        """Settle within the budget that is left, or let the connection fail.

        Returns:
            Whether it is usable.
        """
        if self._registered is None:
            if self.state is not ConnectionState.OPEN:
                return False
            self._attach()
        waiter = cast("SocketWaiter", self._registered)
        started = anyio.current_time()
        budget = max(self._cancel_timeout - self._cleaned_up_for, 0.0)
        try:
            settlement = await settle(
                self.pgconn,
                waiter,
                work,
                may_cancel=may_cancel,
                to_idle=to_idle,
                budget=budget,
            )
        except BaseException as exc:
            self._fail(psycopg.OperationalError(f"interrupted while cleaning up: {exc!r}"))
            raise
        self._cleaned_up_for += anyio.current_time() - started
        self._is_ending = False
        if settlement.fault is not None:
            message = f"{settlement.fault}; {remark}" if remark else settlement.fault
            if isinstance(settlement.error, ConnectionTimeout):
                self._fail(ConnectionTimeout(message))
            else:
                self._fail(settlement.error or psycopg.OperationalError(message))
            if work is not None:
                work.abandon()
        if settlement.interruption is not None and not (settlement.fault and remark):
            raise settlement.interruption
        return settlement.fault is None

    async def _wait_to_end(self, gen: PQGen[RV]) -> RV:
        work = Work(gen)
        if not await self._settle(work, may_cancel=True):
            raise self._refusal()
        return _outcome(work)

    async def _finish(self, work: Work[RV], *, remark: str = "") -> RV:
        """Run what must not be cancelled once it is begun; the lock is held.

        Cancellation:
            Waited for until ``cancel_timeout`` has passed, then the connection has failed.
        """
        waiter = self._waiter
        if waiter is None:
            waiter = self._attach()
        if self._cleaned_up_for:
            self._renew_budget()
        try:
            await work.advance(waiter)
        except Exception as exc:
            self._take_note(exc)
            raise
        except GeneratorExit:
            self._fail(psycopg.OperationalError(f"abandoned half-way; {remark}"))
            work.abandon()
            raise
        except BaseException as exc:
            may_cancel = bool(self.pgconn.pipeline_status)
            # Bounded by cancel_timeout inside.
            is_settled = await self._settle(work, may_cancel=may_cancel, remark=remark)  # noqa: ASYNC102
            if not is_settled and remark:
                raise self._refusal() from exc  # noqa: ASYNC104 - the outcome is unknown: that comes first
            raise
        if work.error is not None:
            quote_query(work.error)
            self._take_note(work.error)
            if remark and self._state is ConnectionState.FAILED:
                work.error.add_note(remark)
        return _outcome(work)

    async def _clean_up(self, work: Work[RV]) -> RV:
        """Run a ROLLBACK or the like, shielded and bounded; the lock is held.

        Raises:
            ConnectionLostError: if it was not answered in time.
        """
        if not await self._settle(work, may_cancel=False) and not work.is_done:
            raise self._refusal()
        return _outcome(work)

    async def _take_to_clean_up(self, exc: BaseException | None) -> BaseException | None:
        """Take the lock although a cancellation may be pending, within the budget then.

        Another task's operation that stands in the way for long is cancelled; a stream or
        COPY that is still open ends here.

        Args:
            exc: What the block ends with.

        Returns:
            A cancellation that came meanwhile, to be raised after cleaning up.
        """
        is_interrupted = exc is not None and not isinstance(exc, Exception)
        if not is_interrupted:
            self._renew_budget()
        if self._lock.occupant is not None:
            await self._lock.occupant.end()
        if self._lock.try_acquire():
            return None
        interruption: BaseException | None = None
        if not is_interrupted:
            try:
                await self._lock.acquire()
            except anyio.get_cancelled_exc_class() as cancelled:  # noqa: ASYNC103 - raised below
                interruption = cancelled
            else:
                return None
        started = anyio.current_time()
        limit = max(self._cancel_timeout - self._cleaned_up_for, 0.0)
        is_taken = False
        try:
            with anyio.move_on_after(limit, shield=True):
                with anyio.move_on_after(limit / 2):
                    await self._lock.acquire()
                    is_taken = True
                if not is_taken:
                    # It works for what is to be rolled back; better it than the connection.
                    with suppress(psycopg.Error, OSError):
                        await request_cancel(self.pgconn)
                    await self._lock.acquire()
                    is_taken = True
        finally:
            self._cleaned_up_for += anyio.current_time() - started
            if not is_taken:
                self._fail(
                    psycopg.OperationalError(
                        "another task's operation stood in the way of cleaning up"
                    )
                )
        if not is_taken:
            raise interruption or self._refusal()
        return interruption


def _outcome(work: Work[RV]) -> RV:
    if work.error is not None:
        raise work.error
    return cast("RV", work.value)
