"""One loan: what `Pool.acquire` returns."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, final

from pgstructured.driver import Connection

if TYPE_CHECKING:
    from types import TracebackType

    from ._lender import Lender
    from ._members import Member


@final
class Borrowing(AbstractAsyncContextManager[Connection[Any], None]):
    """Lends a connection for the length of a block; a class, for it is made for every acquire.

    Args:
        lender: Who lends it.
    """

    __slots__ = ("_is_used", "_lender", "_member")

    def __init__(self, lender: Lender) -> None:
        self._lender = lender
        self._member: Member | None = None
        self._is_used = False

    async def __aenter__(self) -> Connection[Any]:
        if self._is_used:
            raise RuntimeError("entered already; call acquire() for every block")
        self._is_used = True
        lender = self._lender
        task = lender.current_task()
        held = lender.holders.get(task)
        if held is not None:
            return (await lender.share(held)).conn
        await lender.check_cancelled()
        member = lender.lend_now(task)
        if member is None:
            member = await lender.lend(task)
        self._member = member
        return member.conn

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        member = self._member
        if member is not None:
            self._member = None
            lender = self._lender
            if member.kept:
                member.is_left = True
                lender.unbind(member)
            elif not lender.take_back_now(member):
                await lender.take_back(member, exc_val)  # noqa: ASYNC102 - shielded and bounded inside


@final
class Loan:
    """What the task has of a pool, for one that may go on without its block.

    Args:
        lender: Who has lent it.
        member: The connection; the current task's.
    """

    __slots__ = ("_lender", "_member", "conn")

    def __init__(self, lender: Lender, member: Member) -> None:
        self._lender = lender
        self._member = member
        self.conn: Connection[Any] = member.conn

    @property
    def pools_transactions(self) -> bool:
        """Whether each transaction may have another session of the server's."""
        return self._member.session.pools_transactions

    def keep(self) -> None:
        """Keep the connection until `give_back`, whenever its block ends."""
        self._member.kept += 1

    async def give_back(self) -> None:
        """Give back what was kept.

        Cancellation:
            Shielded, and bounded by the connection's ``cancel_timeout``.
        """
        member = self._member
        if self._is_last() and not self._lender.take_back_now(member):
            await self._lender.take_back(member, None)

    def drop(self) -> None:
        """Give back what was kept and is closed."""
        if self._is_last():
            self._lender.take_back_closed(self._member)

    def _is_last(self) -> bool:
        member = self._member
        member.kept -= 1
        is_last = member.is_left and not member.kept
        if is_last:
            member.is_left = False
        return is_last
