"""Letting go of locks on shared sessions."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg

from pgstructured.driver import ConnectionState

from ._releasing import done
from ._statements import UNLOCK, params_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from pgstructured.driver import Command

    from ._fencing import FenceTable
    from ._fleet import Fleet
    from ._lanes import Lane
    from ._queues import Hold, Queues, Share

_ENDED: Final = (ConnectionState.CLOSED, ConnectionState.FAILED)


@final
class Unlocker:
    """Lets go of what the tasks of one `Locks` hold.

    Args:
        fleet: The sessions.
        queues: Who comes next.
        fence: Where tokens are kept.
    """

    def __init__(self, fleet: Fleet, queues: Queues, fence: FenceTable) -> None:
        self._fleet = fleet
        self._queues = queues
        self.fence: FenceTable = fence
        self.released: int = 0
        """How many were let go, ever."""

    def let_go(self, share: Share) -> Coroutine[Any, Any, bool]:
        """Release a share, and with the last one the lock; sent before anything is awaited.

        The next task's question follows the unlock at once, on the same session, and does
        not wait for its answer.

        Returns:
            Whether it was held.

        Raises:
            psycopg.Error: if it can't be known.
            anyio.ClosedResourceError: if the session is closed.

        Cancellation:
            The unlock stays under way, and the lock's slot taken until it is answered.
        """
        self.released += 1
        hold, queue = share.hold, share.queue
        lane = hold.lane
        command: Command | None = None
        is_last = queue.let_go(share)
        try:
            if is_last:
                command = self._send_unlock(hold)
        finally:
            if is_last and command is None:
                self.free(hold)
            if queue.is_idle:
                del self._queues[hold.key]
            else:
                if is_last:
                    queue.last_lane = lane
                queue.advance()
        return done(is_held=True) if command is None else self._finish_let_go(hold, command)

    async def _finish_let_go(self, hold: Hold, command: Command) -> bool:
        lane = hold.lane
        is_refused = False
        try:
            await command.signal
            is_refused = hold.fencing is not None and command.has_failed
            if is_refused and lane.session.state is ConnectionState.OPEN:
                # Without a mark in the fence table, if that was what has failed.
                command = self._send_plain_unlock(hold)
                await command.signal
        except BaseException:
            self.reap_soon(command, lane, partial(self.free, hold))
            raise
        self.free(hold)
        # What was refused may have unlocked it all the same, and nobody else can have.
        return command.scalar() == b"true" or is_refused

    def let_go_unseen(self, share: Share) -> None:
        """As `let_go`, and wait for nothing.

        The lock was lost, but maybe not for the server: its session may be heard of again, and
        others' locks be on it.
        """
        hold, queue = share.hold, share.queue
        if queue.let_go(share):
            self.drop(hold)
        queue.advance()
        self._queues.tidy(queue)

    def drop(self, hold: Hold) -> None:
        """Unlock what nobody shares any more, and wait for nothing."""
        try:
            command = self._send_plain_unlock(hold)
        except (psycopg.Error, anyio.ClosedResourceError):
            self.free(hold)  # it has ended with its session
        else:
            self.reap_soon(command, hold.lane, partial(self.free, hold))

    def free(self, hold: Hold) -> None:
        self._fleet.give_back(hold.lane)

    def reap_soon(self, command: Command, lane: Lane, free: Callable[[], None]) -> None:
        """Free a slot of ``lane`` once ``command`` is answered."""

        async def reap() -> None:
            await command.wait()
            lane.given_up -= 1
            free()

        if lane.session.state in _ENDED:  # pragma: no cover - its end races a time limit
            free()  # answered as well as it ever will be; and there may be no background now
        else:
            lane.given_up += 1
            self._fleet.start_soon(reap)

    def _send_unlock(self, hold: Hold) -> Command:
        if hold.fencing is None:
            return self._send_plain_unlock(hold)
        return self.fence.send_unlock(hold.lane.session, hold.key, hold.fencing.token)

    def _send_plain_unlock(self, hold: Hold) -> Command:
        key = hold.key
        statement = UNLOCK[key.as_pair is not None, hold.shared]
        return hold.lane.session.gather(statement, params_of(key))
