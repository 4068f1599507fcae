"""What one task has of a lock on a shared session."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, final

import anyio

from pgstructured.driver import ConnectionState

from ._loss import Loss, diagnose

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._fencing import FenceGrant, FenceTable
    from ._queues import Share
    from ._unlocking import Unlocker
    from ._watch import Watch


@final
class ManagedGrip:
    """A share of a lock on a `Lane`."""

    __slots__ = (
        "_is_gone",
        "_lane",
        "_now",
        "_share",
        "_unlocker",
        "backend_pid",
        "fencing",
        "identity",
        "watch",
    )

    connection: None = None
    is_known_to_task = True  # see `ManagedSource.sessions_of`
    is_unlocked = False  # nobody looks any more
    patience: float = 1.0

    def __init__(self, unlocker: Unlocker, share: Share) -> None:
        hold = share.hold
        lane = hold.lane
        self._unlocker = unlocker
        self._share = share
        self._lane = lane
        self._is_gone = False
        self.fencing: FenceGrant | None = hold.fencing
        # Asked for several times on the way of each lock, and nothing that changes.
        self._now = lane.now
        self.watch: Watch = lane.watch
        self.identity: str = lane.identity
        self.backend_pid: int = lane.backend_pid

    @property
    def now(self) -> Callable[[], float]:
        return self._now

    @property
    def fence(self) -> FenceTable:
        return self._unlocker.fence

    @property
    def last_confirmed(self) -> float:
        return self._lane.pulse.last_confirmed

    @property
    def overdue_at(self) -> float:
        return self._lane.overdue_at()

    @property
    def has_ended(self) -> bool:
        lane = self._lane
        return lane.is_closing or lane.pulse.state is not ConnectionState.OPEN

    def diagnose(self) -> Loss:
        session = self._lane.session
        if session.failure is None:
            return Loss(reason="closed")
        return diagnose(session.failure, is_overdue=anyio.current_time() >= self.overdue_at)

    async def confirm(self) -> bool:
        await self._lane.session.execute(self._lane.note())
        return True  # nobody else can unlock on this session

    def unlock(self) -> Awaitable[bool]:
        self._is_gone = True
        return self._unlocker.let_go(self._share)

    async def abandon(self) -> None:
        lane = self._lane
        # Before its slot is handed on. What became of the lock is not known, but that it ends
        # with its session.
        lane.is_doomed = True
        hold = self._share.hold
        if not self._is_gone:
            self._is_gone = True
            self._unlocker.let_go_unseen(self._share)
        # A lost lock's body may not have ended yet, nor that of a task which shares this one.
        if hold.shares == 0 and lane.is_given_up:
            await lane.session.aclose(close_timeout=0)
        else:
            await anyio.lowlevel.checkpoint()

    def forget(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            lane = self._lane
            lane.is_doomed = lane.is_doomed or anyio.current_time() >= lane.overdue_at()
            self._unlocker.let_go_unseen(self._share)

    def detach(self) -> None:
        self._share.task_id = None  # another task may have that number one day

    def attend(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()
