"""Taking locks on the shared sessions of one `Locks`.

The way of an acquire; each step is skipped where it is not needed:

1. its place in the process' own line for the key (`_queues`);
2. a try, on a session that others' locks are on;
3. the server's queue, on a session of its own, which becomes one of the shared ones
   when the lock is granted; or, where too many wait there, tries now and then;
4. a round trip that proves the session alive after the wait;
5. a fencing token, from another session.

A cancellation at any of them gives back what may have been granted, before it goes on.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg

from pgstructured.driver import running_event_loop

from ._asking import Asker, Failures
from ._fencing import FenceTable, TokenWithheldError
from ._queues import Hold, KeyQueue, Place, Queues
from ._refusals import not_in_time, refuse
from ._shares import ManagedGrip
from ._unlocking import Unlocker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from ._bell import Bell
    from ._fleet import Fleet
    from ._grip import Grip, LockRequest
    from ._keys import LockKey
    from ._options import LockOptions
    from ._queues import Share


@final
class ManagedSource:
    """Takes locks on shared sessions.

    Args:
        fleet: The sessions.
        bell: What tells that a lock was let go elsewhere.
        options: Figures.
    """

    def __init__(self, fleet: Fleet, bell: Bell, options: LockOptions) -> None:
        self._fleet = fleet
        self._queues = Queues()
        self._unlocker = Unlocker(fleet, self._queues, FenceTable(options.fence_table))
        self._asker = Asker(fleet, bell, self._unlocker, options)
        self.release_timeout: Final = options.release_timeout
        loop = running_event_loop()
        self.now: Callable[[], float] = loop.now
        self.create_scope: Callable[[], anyio.CancelScope] = loop.create_scope
        self._task_id = loop.task_id
        self.acquired: int = 0
        """How many were taken, ever."""

    @property
    def fence(self) -> FenceTable:
        """Where tokens are kept."""
        return self._unlocker.fence

    @property
    def contended(self) -> int:
        """How many found their lock taken by another process, ever."""
        return self._asker.contended

    def count_contended(self) -> None:
        """Count one that another way of asking has found taken."""
        self._asker.contended += 1

    @property
    def released(self) -> int:
        """How many were let go, ever."""
        return self._unlocker.released

    @property
    def keys(self) -> list[LockKey]:
        """The keys that this process holds or wants by it."""
        return list(self._queues)

    @property
    def held(self) -> int:
        """How many locks this process holds on the server by it."""
        return sum(len({id(s.hold) for s in queue.shares}) for queue in self._queues.values())

    @property
    def tasks_waiting(self) -> int:
        """How many tasks want a lock and don't have it."""
        return sum(queue.waiting for queue in self._queues.values())

    @asynccontextmanager
    async def take(self, request: LockRequest) -> AsyncGenerator[Grip | None]:
        """Take a lock for the length of a block; see `LockSource.take`."""
        yield await self.ask(request)  # nothing has to end with it

    def ask(self, request: LockRequest) -> Coroutine[Any, Any, ManagedGrip | None]:
        """Take a lock, to be unlocked by its grip; see `LockSource.ask`.

        Where nobody else here wants the key the server is asked at once: what the caller does
        until it waits for the answer costs no time.

        Raises:
            As `LockSource.take`.

        Cancellation:
            A checkpoint. Nothing is left, after ``release_timeout`` at most.
        """
        place = self._begin(request)
        if request.acquire_timeout:
            return self._acquire_in_time(request, place, request.acquire_timeout)
        if place is not None:
            return self._finish(request, place)
        return self._acquire(request, None, None)

    def is_in_use(self, key: LockKey) -> bool:
        """Whether a task of this process holds ``key`` by it, or wants it."""
        return key in self._queues

    def holds(self, key: LockKey) -> bool:
        """Whether the current task holds ``key`` by it."""
        task_id, queue = self._task_id(), self._queues.get(key)
        return queue is not None and any(share.task_id == task_id for share in queue.shares)

    def sessions_of(self, task_id: int, identity: str, key: LockKey) -> list[int]:
        """Return the sessions on which a task holds ``key`` by it; see `_tasks`."""
        queue = self._queues.get(key)  # asked by other threads, too: it must not make one
        shares = () if queue is None else queue.shares
        lanes = [share.hold.lane for share in shares if share.task_id == task_id]
        return [lane.backend_pid for lane in lanes if lane.identity == identity]

    def adopt(self, hold: Hold) -> ManagedGrip | None:
        """Take on a lock that was granted beside the queue; None if its key is in use."""
        if self.is_in_use(hold.key):
            return None
        queue = self._queues[hold.key]
        place = queue.enter(self._task_id(), shared=hold.shared, is_try=True)
        share = queue.grant(place, hold)
        self.acquired += 1
        return ManagedGrip(self._unlocker, share)

    def _begin(self, request: LockRequest) -> Place | None:
        """Ask the server at once, if nobody else here wants the key and a session has room."""
        key, queues = request.key, self._queues
        if key in queues:
            return None
        lane = self._fleet.reserve_now()
        if lane is None:
            return None
        if request.fenced and not self.fence.is_prepared(lane.session):
            self._fleet.give_back(lane)
            return None
        try:
            command = self._asker.send_try(lane, request)
        except (psycopg.Error, anyio.ClosedResourceError):
            self._fleet.give_back(lane)  # what is wrong is said by the next attempt
            return None
        place = Place(self._task_id(), shared=request.shared, is_try=not request.may_wait)
        place.sent = (lane, command)
        queues[key] = queue = KeyQueue(key)
        queue.begin(place)
        return place

    async def _finish(self, request: LockRequest, place: Place) -> ManagedGrip | None:
        """Wait for the answer to what `_begin` has asked; the way of most locks."""
        if place.sent is None:
            raise AssertionError("nothing was asked")  # pragma: no cover - for the types
        (lane, command), key = place.sent, request.key
        if key not in lane.noted:
            lane.add_name(key)
        hold = Hold(lane, key, shared=request.shared)  # while the answer is on its way
        try:
            if not command.signal.is_checkpoint:
                # The answer may be here before a cancellation that was pending then.
                await lane.session.checkpoint_if_cancelled()
            await command.signal
        except BaseException:
            try:
                await self._asker.undo(lane, request)  # noqa: ASYNC102 - shielded and bounded inside
            finally:
                queue = self._queues[key]
                queue.withdraw(place)
                self._queues.tidy(queue)
            raise
        if not command.says_true or (request.fenced and not command.is_committed):
            return await self._acquire(request, place, None)
        place.sent = None
        share = self._queues[key].grant(place, hold)
        if request.fenced:
            hold.fencing = self.fence.read_take(command).grant
            if hold.fencing is None:
                return await self._acquire(request, place, None)
        self.acquired += 1
        return ManagedGrip(self._unlocker, share)

    async def _acquire_in_time(
        self, request: LockRequest, place: Place | None, limit: float
    ) -> ManagedGrip | None:
        failures = Failures()
        with anyio.move_on_after(limit):
            return await self._acquire(request, place, failures)
        raise not_in_time(request) from failures.last

    async def _acquire(
        self, request: LockRequest, place: Place | None, failures: Failures | None
    ) -> ManagedGrip | None:
        key = request.key
        queue = self._queues[key]
        if place is None:
            is_try = not request.may_wait
            place = queue.enter(self._task_id(), shared=request.shared, is_try=is_try)
        try:
            if not place.is_settled:
                self._asker.check_line(key)
                await place.wait()
            if place.has_turn:
                await self._asker.ask(queue, place, request, failures)
            elif place.is_closed:
                raise anyio.ClosedResourceError("the block of open_locks was left")
            else:
                await anyio.lowlevel.checkpoint_if_cancelled()
        except TokenWithheldError:
            await self._give_up(queue, place)
            place.share = None
        except BaseException:
            await self._give_up(queue, place)  # noqa: ASYNC102 - shielded and bounded inside
            raise
        finally:
            self._queues.tidy(queue)
        if place.share is not None:
            self.acquired += 1
            return ManagedGrip(self._unlocker, place.share)
        refuse(request)
        return None

    async def _give_up(self, queue: KeyQueue, place: Place) -> None:
        """Take care of what a place has got that nobody will use."""
        if place.share is not None:
            await self._let_go_unused(place.share)
            return
        wait, place.inherited = place.inherited, None
        try:
            if wait is not None:
                await self._asker.leave_to_heir(queue, wait, shared=place.shared)
        finally:
            queue.withdraw(place)

    async def _let_go_unused(self, share: Share) -> None:
        lane = share.hold.lane
        with anyio.move_on_after(self.release_timeout, shield=True):
            with suppress(psycopg.Error, anyio.ClosedResourceError):  # ended with its session
                await self._unlocker.let_go(share)
            return
        if lane.is_given_up:
            with anyio.CancelScope(shield=True):  # doesn't wait for the server
                await lane.session.aclose(close_timeout=0)

    def close(self) -> None:
        """Tell everybody who waits in this process that there is nothing to wait for."""
        for queue in self._queues.values():
            queue.close()
