"""Taking a connection back, and making it as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio
import psycopg

from pgstructured.driver import ConnectionState
from pgstructured.observe import emit

from ._desk import Desk
from ._opening import introduce

if TYPE_CHECKING:
    from ._members import Member

TELLING: Final = (psycopg.OperationalError, anyio.ClosedResourceError)
"""What operations raise on a connection that we have closed."""
_CLOSED_BY_US: Final = (ConnectionState.CLOSING, ConnectionState.CLOSED)


class Returns(Desk):
    """The side of the desk where connections are given back."""

    def take_back_now(self, member: Member) -> bool:
        """Take a connection back that is as it was.

        Returns:
            Whether that was all; else `take_back` is needed.
        """
        holder = member.holder
        if holder is not None:  # as `unbind` does: a call less for every loan
            del self.holders[holder]
            member.holder = None
            member.is_pinned = False
        if self._cleans_always or self.is_closing or not member.session.is_untouched():
            return False
        now = self.now()
        self.ledger.borrowed.discard(member)  # and as `end_loan` does
        used = now - member.borrowed_at
        self.counters.use_seconds += used
        emit("pool.released", pool=self._name, used=used)
        self.shelve(member, now)
        return True

    def take_back_closed(self, member: Member) -> None:
        """Take a connection back that is closed."""
        self.end_loan(member, self.now())
        self.put_back(member)

    async def take_back(self, member: Member, error: BaseException | None) -> None:
        """Take a connection back, and make it as it was.

        Args:
            member: The connection, unbound.
            error: What the borrower's block ends with.

        Raises:
            PoolClosedError: if the pool has closed the connection under the borrower.
            Exception: what a hook raises, if the block ended well.

        Cancellation:
            Shielded, for ``cancel_timeout`` at most; then the connection is closed. A native
            cancellation is raised once it is done.
        """
        is_fit = False
        failure: Exception | None = None
        was_closed = self.is_closed_under(member)
        try:
            with anyio.move_on_after(self.options.cancel_timeout, shield=True) as scope:
                is_fit, failure = await self._clean(member)
            if scope.cancelled_caught and self._cleans_always:
                failure = TimeoutError("on_release has not ended within cancel_timeout")
        finally:
            interruption, member.session.interruption = member.session.interruption, None
            self.end_loan(member, self.now())
            if is_fit:
                self.put_back(member)
            else:
                await self.close(member, "unusable")  # noqa: ASYNC102 - shielded and bounded inside
        if failure is not None:
            emit("pool.hook_failed", pool=self._name, error=failure)
        if interruption is not None:
            raise interruption
        if failure is not None and error is None:
            raise failure
        if was_closed and isinstance(error, TELLING):
            raise self.closed() from error

    async def _clean(self, member: Member) -> tuple[bool, Exception | None]:
        """Return whether it is as it was, and what a hook has raised."""
        session, options = member.session, self.options
        if self.is_closing or session.is_busy or not session.is_alive():
            return False, None
        if options.on_release is not None:
            if not await session.roll_back():
                return False, None
            try:
                await options.on_release(member.conn)
            except Exception as exc:  # noqa: BLE001 - raised by `take_back`, after the connection is closed
                return False, exc
        traces = await session.restore()
        if traces is None:
            return False, None
        if options.on_connect is not None and traces:
            try:
                await introduce(session, options.on_connect)
            except Exception as exc:  # noqa: BLE001 - as above
                return False, exc
        return True, None

    def is_closed_under(self, member: Member) -> bool:
        """Tell whether the pool has closed a connection that somebody has."""
        return self.is_closing and member.conn.state in _CLOSED_BY_US

    def unbind(self, member: Member) -> None:
        """Note that no task holds it any more; idempotent."""
        self.holders.pop(member.holder, None)
        member.holder = None
        member.is_pinned = False

    def end_loan(self, member: Member, now: float) -> None:
        self.ledger.borrowed.discard(member)
        used = now - member.borrowed_at
        self.counters.use_seconds += used
        emit("pool.released", pool=self._name, used=used)
