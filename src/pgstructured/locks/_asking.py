"""Asking the server for a lock, on behalf of the task whose turn it is.

A try first, on a session that others' locks are on; then the server's queue, on a
session of its own, which becomes one of the shared ones when the lock is granted; or,
where too many wait there, tries now and then.
"""

from __future__ import annotations

import random
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, final

import anyio
import psycopg

from pgstructured.errors import ConnectionLostError, LockAlreadyHeldError, LockCapacityError
from pgstructured.observe import emit

from ._fencing import TokenWithheldError
from ._names import note
from ._queues import Hold
from ._refusals import already_held, translated
from ._retrying import Retries
from ._statements import TRY, held_condition, params_of, unlock_statement, wait_statement
from ._tasks import holds_elsewhere
from ._waits import ServerWait, settle

if TYPE_CHECKING:
    from pgstructured.driver import Command

    from ._bell import Bell
    from ._fencing import FenceGrant
    from ._fleet import Fleet
    from ._grip import LockRequest
    from ._keys import LockKey
    from ._lanes import Lane
    from ._options import LockOptions
    from ._queues import KeyQueue, Place
    from ._unlocking import Unlocker

_FIRST_POLL: Final = 0.05
_LAST_POLL: Final = 1.0


@final
class Failures:
    """What has gone wrong on the way of an acquire, for whom its time runs out meanwhile."""

    last: psycopg.Error | None = None


@final
class Asker:
    """Asks the server for what the tasks of one `Locks` want.

    Args:
        fleet: The sessions.
        bell: What tells that a lock was let go elsewhere.
        unlocker: What frees a slot when its last answer comes late.
        options: Figures.
    """

    def __init__(self, fleet: Fleet, bell: Bell, unlocker: Unlocker, options: LockOptions) -> None:
        self._fleet = fleet
        self._bell = bell
        self._unlocker = unlocker
        self._fence = unlocker.fence
        self._options = options
        self._release_timeout = options.release_timeout
        self._bumping = anyio.Semaphore(options.max_waiting_sessions)
        self.contended: int = 0
        """How many found the lock taken, ever."""

    async def ask(
        self, queue: KeyQueue, place: Place, request: LockRequest, failures: Failures | None
    ) -> None:
        """Ask until the server has granted or refused; sessions may die meanwhile.

        What is granted becomes the place's share, with a token where one is asked for. After
        an error, or a cancellation, it may be there all the same.
        """
        retries: Retries | None = None
        while True:
            try:
                if place.share is None:
                    hold = await self._ask_once(queue, place, request)
                    if hold is None:
                        queue.withdraw(place)
                        return
                    queue.grant(place, hold)
                else:
                    hold = place.share.hold
                if queue.writer is not None and len(queue.shares) > 1:
                    await queue.wait_alone()
                if request.fenced and hold.fencing is None:
                    hold.fencing = await self._bump(request)
            except psycopg.OperationalError as exc:
                error = exc
            else:
                return
            self._fleet.check_open()  # closing cancels what waits on the server
            if failures is not None:
                failures.last = error
            if retries is None:
                retries = Retries(self._options, request)
            if isinstance(error, ConnectionLostError):
                retries.begin()  # it was connected until now; queue anew
            await retries.back_off(error)

    async def _ask_once(self, queue: KeyQueue, place: Place, request: LockRequest) -> Hold | None:
        wait, place.inherited = place.inherited, None
        if wait is None:
            lane: Lane | None = None
            if queue.shares:
                hold = await self._try_aside(queue, request)
                if hold is not None or not request.may_wait:
                    return hold
            else:
                command: Command | None = None
                if place.sent is not None:
                    (lane, command), place.sent = place.sent, None
                else:
                    hint, queue.last_lane = queue.last_lane, None
                    lane = await self._fleet.reserve(hint)
                hold = await self._try(lane, request, command)
                if hold is not None:
                    return hold
                try:
                    self._check_task(lane, request.key)
                except LockAlreadyHeldError:
                    self._fleet.give_back(lane)
                    raise
                if not request.may_wait:
                    self._fleet.give_back(lane)
                    return None
            queue.begin_waiting(place)
            self.contended += 1
            emit("lock.contended", key=request.key, shared=request.shared)
            if lane is None or not self._fleet.convert_to_waiting(lane):
                if lane is not None:
                    self._fleet.give_back(lane)
                lane = await self._fleet.reserve_waiting()
                if lane is None:
                    return await self._poll(queue, request)
            wait = self._begin_wait(lane, request)
        return await self._stand_in_queue(queue, request, wait)

    def check_line(self, key: LockKey) -> None:
        """Refuse as `_check_task`, before the server is asked: those in line may wait for us."""
        lane = next((lane for lane in self._fleet.lanes if lane.is_open), None)
        if lane is not None:
            self._check_task(lane, key)

    def _check_task(self, lane: Lane, key: LockKey) -> None:
        """Refuse a task that would wait for a lock that it holds by another source."""
        if holds_elsewhere(lane.identity, key, lane.backend_pid):
            raise already_held(key)

    def send_try(self, lane: Lane, request: LockRequest) -> Command:
        """Ask for the lock if it is free; for a fenced one the session has to be prepared."""
        key = request.key
        if request.fenced:
            return self._fence.send_take(lane.session, key)
        statement = TRY[key.as_pair is not None, request.shared]
        return lane.session.gather(statement, params_of(key))

    def read_try(self, lane: Lane, request: LockRequest, command: Command) -> Hold | None:
        """Return what `send_try` has got, from its answer; None if the lock is not free.

        Raises:
            psycopg.Error: what the server says.
            FenceTableMissingError: if a fenced one finds no table.
        """
        if not request.fenced:
            is_granted = command.scalar() == b"true"
            return Hold(lane, request.key, shared=request.shared) if is_granted else None
        taken = self._fence.read_take(command)
        if not taken.is_granted:
            return None
        hold = Hold(lane, request.key, shared=False)
        hold.fencing = taken.grant
        return hold

    async def _try(
        self, lane: Lane, request: LockRequest, command: Command | None = None
    ) -> Hold | None:
        """Take the lock if it is free. The lane's slot stays reserved, but for an error.

        Args:
            lane: Where.
            request: What is asked for.
            command: The question, if it was sent already.
        """
        try:
            return await self._try_once(lane, request, command)
        except LockCapacityError:
            # There may have been no room for all that was asked for by the same statement.
            if request.fenced or not self._fleet.reserve_again(lane):
                raise
        return await self._try_once(lane, request, None, is_alone=True)

    async def _try_once(
        self,
        lane: Lane,
        request: LockRequest,
        command: Command | None,
        *,
        is_alone: bool = False,
    ) -> Hold | None:
        key = request.key
        try:
            if is_alone:
                statement = TRY[key.as_pair is not None, request.shared].alone
                command = lane.session.send_prepared(statement, params_of(key))
            elif command is None:
                if request.fenced:
                    await self._fence.prepare(lane.session)
                command = self.send_try(lane, request)
            lane.add_name(key)
            # The answer may be here before a cancellation that was pending then.
            await lane.session.checkpoint_if_cancelled()
            await command.signal
            hold = self.read_try(lane, request, command)
        except psycopg.Error:
            await self.undo(lane, request)  # noqa: ASYNC120 - shielded and bounded inside
            with translated(key):
                raise
        except BaseException:
            await self.undo(lane, request)  # noqa: ASYNC102 - shielded and bounded inside
            raise
        return hold

    async def _try_aside(self, queue: KeyQueue, request: LockRequest) -> Hold | None:
        """Ask for a share of what this process holds, on a session that doesn't hold it.

        One that does would be granted anything. A grant says that nobody waits for the key
        exclusively, so the hold that is there may be shared for another while; else every
        reader that comes late would cost a session.
        """
        if not request.shared:
            return None
        lane = await self._fleet.reserve_whole()
        self._fleet.share_out(lane)
        granted = await self._try(lane, request)
        if granted is None:
            self._fleet.give_back(lane)
            return None
        hold = queue.find_shared()
        if hold is None:  # it has been let go, or lost, in the meantime
            return granted
        hold.granted_at = granted.granted_at
        self._unlocker.drop(granted)
        return hold

    async def undo(self, lane: Lane, request: LockRequest) -> None:
        """Give back what was asked for on ``lane``, if it was or will be granted, and the slot.

        Cancellation:
            Shielded, at most ``release_timeout``; what takes longer goes on in the background.
        """
        unlock = unlock_statement(request.key, shared=request.shared)
        # Sent at once, and so done after the question, and before what anybody asks next.
        statement = unlock + held_condition(request.key, shared=request.shared)
        try:
            command = lane.session.send([(statement, ())])
        except (psycopg.Error, anyio.ClosedResourceError):
            self._fleet.give_back(lane)  # it has ended with its session
            return
        is_undone = False
        try:
            with anyio.move_on_after(self._release_timeout, shield=True):
                await self._finish_undo(lane, command, unlock)
                is_undone = True
        finally:  # asyncio's own cancellation heeds no shield
            if is_undone:
                self._fleet.give_back(lane)
            else:
                self._unlocker.reap_soon(command, lane, partial(self._end_undo, lane, command))
        if not is_undone and lane.is_given_up:
            with anyio.CancelScope(shield=True):  # doesn't wait for the server
                await lane.session.aclose(close_timeout=0)

    async def _finish_undo(self, lane: Lane, command: Command, unlock: str) -> None:
        await command.wait()
        if command.has_failed:
            # To look whether it is held takes locks, and there may be no room for them. Not to
            # look is right too: at worst the server's log is told that it was not held.
            with suppress(psycopg.Error, anyio.ClosedResourceError):  # ended with its session
                again = lane.session.send([(unlock, ())])
                await again.wait()
                lane.is_doomed = lane.is_doomed or again.has_failed  # what is left ends with it

    def _end_undo(self, lane: Lane, command: Command) -> None:
        """End what took too long: the key may be somebody else's by now, on the same session."""
        lane.is_doomed = lane.is_doomed or command.has_failed
        self._fleet.give_back(lane)

    # ------------------------------------------------------------ the server's queue

    def _begin_wait(self, lane: Lane, request: LockRequest) -> ServerWait:
        key = request.key
        statement = wait_statement(key, shared=request.shared) + note([key])
        try:
            command = lane.session.send([(statement, ())], may_block=True)
        except BaseException:
            self._end_wait(lane)
            raise
        return ServerWait(lane, command)

    async def _stand_in_queue(
        self, queue: KeyQueue, request: LockRequest, wait: ServerWait
    ) -> Hold:
        lane, command = wait
        key, shared = request.key, request.shared
        try:
            await command.wait()
        except BaseException:
            await self.leave_to_heir(queue, wait, shared=shared)  # noqa: ASYNC102 - shielded and bounded inside
            raise
        try:
            with translated(key):
                command.result()
        except BaseException:
            await self._clean(lane)  # noqa: ASYNC102 - shielded and bounded inside
            raise
        lane.add_name(key)
        self._fleet.end_waiting()
        self._fleet.share_out(lane)
        try:
            # The lease runs from a round trip after the grant, not from before the wait.
            await lane.session.execute(lane.note())
        except BaseException:
            await self.undo(lane, request)  # noqa: ASYNC102 - shielded and bounded inside
            raise
        return Hold(lane, key, shared=shared)

    async def leave_to_heir(self, queue: KeyQueue, wait: ServerWait, *, shared: bool) -> None:
        """Leave a place in the server's queue to the next task in line, or give it up."""
        heir = queue.find_heir(shared=shared)
        if heir is not None:
            heir.inherited = wait
            heir.is_at_server = True
        else:
            await self._clean(wait.lane)

    async def _clean(self, lane: Lane) -> None:
        try:
            await settle(lane, within=self._release_timeout)
        finally:
            self._end_wait(lane)

    def _end_wait(self, lane: Lane) -> None:
        self._fleet.end_waiting()
        self._fleet.give_back_whole(lane)

    async def _poll(self, queue: KeyQueue, request: LockRequest) -> Hold:
        """Try now and then, and whenever somebody says that the lock was let go."""
        pause = _FIRST_POLL
        with self._bell.listening(request.key) as ring:
            while True:
                hold: Hold | None
                if queue.shares:
                    hold = await self._try_aside(queue, request)
                else:
                    lane = await self._fleet.reserve()
                    hold = await self._try(lane, request)
                    if hold is None:
                        self._fleet.give_back(lane)
                if hold is not None:
                    return hold
                # Jitter, for whoever polls elsewhere has been told at the same moment.
                with anyio.move_on_after(random.uniform(pause / 2, pause)):  # noqa: S311
                    await ring.wait()
                pause = min(pause * 2, _LAST_POLL)

    # ------------------------------------------------------------ fencing

    async def _bump(self, request: LockRequest) -> FenceGrant:
        """Return a new token for a lock that was granted; raises as `FenceTable.bump`.

        It may have to wait for guarded transactions, so it is given where nothing is held. A
        thousand such tasks at once are not to open a thousand sessions.
        """
        async with self._bumping:
            lane = await self._fleet.reserve_whole()
            try:
                grant = await self._fence.bump(lane.session, request.key, may_wait=request.may_wait)
            except TokenWithheldError:
                self._fleet.give_back_whole(lane)
                raise
            except BaseException:
                # In the background, for the lock itself has to be given back at the same time.
                self._fleet.start_soon(self._settle_whole, lane)
                raise
        self._fleet.give_back_whole(lane)
        return grant

    async def _settle_whole(self, lane: Lane) -> None:
        try:
            await settle(lane, within=self._release_timeout)
        finally:
            self._fleet.give_back_whole(lane)
