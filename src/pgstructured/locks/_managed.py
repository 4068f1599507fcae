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

import random
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import anyio
import psycopg

from pgstructured.driver import ConnectionState
from pgstructured.errors import ConnectionLostError, LockAlreadyHeldError, LockError
from pgstructured.observe import emit

from ._fencing import FenceTable
from ._loss import Loss, diagnose
from ._queues import Hold, KeyQueue
from ._refusals import already_held, not_in_time, translated
from ._retrying import Retries
from ._statements import (
    bare_try_statement,
    unlock_statement,
    wait_statement,
    waking_statement,
    waking_unlock_statement,
)
from ._tasks import current_task_id, holds_elsewhere
from ._waits import ServerWait, settle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from pgstructured.driver import Command

    from ._bell import Bell
    from ._fleet import Fleet
    from ._grip import Grip, LockRequest
    from ._keys import LockKey
    from ._lanes import Lane
    from ._options import LockOptions
    from ._queues import Place, Share
    from ._watch import Watch

_FIRST_POLL: Final = 0.05
_LAST_POLL: Final = 1.0


@final
@dataclass(slots=True, kw_only=True)
class Counters:
    """What has happened, ever."""

    acquired: int = 0
    contended: int = 0
    released: int = 0


@final
class ManagedGrip:
    """A share of a lock on a `Lane`."""

    __slots__ = ("_is_gone", "_share", "_source", "fencing_token")

    connection: None = None

    def __init__(self, source: ManagedSource, share: Share, fencing_token: int | None) -> None:
        self._source = source
        self._share = share
        self._is_gone = False
        self.fencing_token = fencing_token

    @property
    def _lane(self) -> Lane:
        return self._share.hold.lane

    @property
    def backend_pid(self) -> int:
        return self._lane.backend_pid

    @property
    def identity(self) -> str:
        return self._lane.identity

    @property
    def fence(self) -> FenceTable:
        return self._source.fence

    @property
    def watch(self) -> Watch:
        return self._lane.watch

    @property
    def last_confirmed(self) -> float:
        return self._lane.session.last_confirmed

    @property
    def overdue_at(self) -> float:
        return self._lane.overdue_at()

    @property
    def has_ended(self) -> bool:
        lane = self._lane
        return lane.is_closing or lane.session.state is not ConnectionState.OPEN

    def diagnose(self) -> Loss:
        session = self._lane.session
        if session.failure is None:
            return Loss(reason="closed")
        return diagnose(session.failure, is_overdue=anyio.current_time() >= self.overdue_at)

    async def confirm(self) -> bool:
        await self._lane.session.ping()
        return True  # nobody else can unlock on this session

    async def unlock(self) -> bool:
        if self._is_gone:
            return True
        self._is_gone = True
        self._source.counters.released += 1
        return await self._source.let_go(self._share, self.fencing_token)

    async def abandon(self) -> None:
        lane = self._lane
        # Before its slot is handed on.
        lane.is_doomed = lane.is_doomed or anyio.current_time() >= lane.overdue_at()
        others = lane.slots - 1  # its own one stays taken until the unlock is answered
        if not self._is_gone:
            self._is_gone = True
            self._source.drop(self._share)
            others = lane.slots  # a lost lock's body may not have ended yet
        if others <= 0:
            await lane.session.aclose(close_timeout=0)
        else:
            await anyio.lowlevel.checkpoint()

    def forget(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            lane = self._lane
            lane.is_doomed = lane.is_doomed or anyio.current_time() >= lane.overdue_at()
            self._source.drop(self._share)

    def detach(self) -> None:
        """Nothing has to change: the session is not the block's."""

    def attend(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()


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
        self._bell = bell
        self._options = options
        self._queues: dict[LockKey, KeyQueue] = {}
        self.fence = FenceTable(options.fence_table)
        self.counters = Counters()

    @property
    def release_timeout(self) -> float:
        """Seconds an unlock may take."""
        return self._options.release_timeout

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
        yield await self.acquire(request)

    async def acquire(self, request: LockRequest) -> ManagedGrip | None:
        """Take a lock.

        Returns:
            The grip on it, to be unlocked; None after a refused try.

        Raises:
            As `LockSource.take`.

        Cancellation:
            A checkpoint. Nothing is left, after ``release_timeout`` at most.
        """
        retries = Retries(self._options, request)
        if not request.acquire_timeout:
            return await self._acquire(request, retries)
        with anyio.CancelScope(deadline=retries.deadline):
            return await self._acquire(request, retries)
        raise not_in_time(request)

    async def _acquire(self, request: LockRequest, retries: Retries) -> ManagedGrip | None:
        key = request.key
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = KeyQueue(key)
        place = queue.enter(current_task_id(), shared=request.shared, is_try=not request.may_wait)
        try:
            await place.wait()
            if place.is_closed:
                raise anyio.ClosedResourceError
            if place.has_turn:
                await self._ask(queue, place, request, retries)
            else:
                await anyio.lowlevel.checkpoint_if_cancelled()
            token: int | None = None
            if request.fenced and place.share is not None:
                token = await self._fence(request, retries)
        except BaseException:
            await self._give_up(queue, place)  # noqa: ASYNC102 - shielded and bounded inside
            raise
        finally:
            self._tidy(queue)
        if place.share is not None:
            self.counters.acquired += 1
            return ManagedGrip(self, place.share, token)
        if request.is_try:
            return None
        raise not_in_time(request)

    async def _give_up(self, queue: KeyQueue, place: Place) -> None:
        """Take care of what a place has got that nobody will use."""
        share, wait = place.share, place.inherited
        if share is not None:
            with anyio.move_on_after(self.release_timeout, shield=True):
                await self.let_go(share, None)
            return
        if wait is not None:
            place.inherited = None
            await self._leave_to_heir(queue, wait, shared=place.shared)
        queue.withdraw(place)

    # ------------------------------------------------------------ asking the server

    async def _ask(
        self, queue: KeyQueue, place: Place, request: LockRequest, retries: Retries
    ) -> None:
        """Ask until the server has granted or refused; sessions may die meanwhile."""
        while True:
            try:
                hold = await self._ask_once(queue, place, request)
                break
            except psycopg.OperationalError as exc:
                error = exc
            if isinstance(error, ConnectionLostError):
                retries.begin()  # it was connected until now; queue anew
            await retries.back_off(error)
        if hold is None:
            queue.withdraw(place)
        else:
            queue.grant(place, hold)

    async def _ask_once(self, queue: KeyQueue, place: Place, request: LockRequest) -> Hold | None:
        wait, place.inherited = place.inherited, None
        if wait is None:
            lane: Lane | None = None
            if queue.shares and not request.may_wait:
                return await self._try_aside(queue, request)
            if not queue.shares:
                hint, queue.last_lane = queue.last_lane, None
                lane = await self._fleet.reserve(hint)
                hold = await self._try(lane, request)
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
            self.counters.contended += 1
            emit("lock.contended", key=request.key, shared=request.shared)
            if lane is None or not self._fleet.convert_to_waiting(lane):
                if lane is not None:
                    self._fleet.give_back(lane)
                lane = await self._fleet.reserve_waiting()
                if lane is None:
                    return await self._poll(queue, request)
            wait = self._begin_wait(lane, request)
        return await self._stand_in_queue(queue, request, wait)

    def _check_task(self, lane: Lane, key: LockKey) -> None:
        """Refuse a task that would wait for a lock that it holds by another source."""
        if holds_elsewhere(lane.identity, key, lane.backend_pid):
            raise already_held(key)

    async def _try(self, lane: Lane, request: LockRequest) -> Hold | None:
        """Take the lock if it is free. The lane's slot stays reserved, but for an error."""
        key, shared = request.key, request.shared
        lane.add_name(key)
        try:
            command = lane.send(bare_try_statement(key, shared=shared))
            try:
                await command.wait()
            except BaseException:
                await self._undo(lane, request, command)
                raise
            with translated(key):
                is_granted = command.result().scalar() == "true"
        except (psycopg.Error, LockError, anyio.ClosedResourceError):
            lane.remove_name(key)
            self._fleet.give_back(lane)
            raise
        if is_granted:
            return Hold(lane, key, shared=shared)
        lane.remove_name(key)
        return None

    async def _try_aside(self, queue: KeyQueue, request: LockRequest) -> Hold | None:
        """Try on a session that doesn't hold the key already, which would grant anything."""
        if not request.shared and queue.shares:
            return None
        lane = await self._fleet.reserve_whole()
        self._fleet.share_out(lane)
        hold = await self._try(lane, request)
        if hold is None:
            self._fleet.give_back(lane)
        return hold

    async def _undo(
        self, lane: Lane, request: LockRequest, command: Command, *, is_granted: bool = False
    ) -> None:
        """Give back what a command may have got, and the slot; go on in the background if slow.

        Cancellation:
            Shielded, at most ``release_timeout``.
        """
        undone = anyio.Event()

        async def undo() -> None:
            try:
                await command.wait()
                if is_granted or command.result().scalar() == "true":
                    await lane.session.execute(unlock_statement(request.key, shared=request.shared))
            except (psycopg.Error, anyio.ClosedResourceError):
                pass  # nothing was granted, or it has ended with its session
            finally:
                lane.remove_name(request.key)
                self._fleet.give_back(lane)
                undone.set()

        self._fleet.start_soon(undo)
        with anyio.move_on_after(self.release_timeout, shield=True):
            await undone.wait()
        if not undone.is_set() and lane.slots <= 1:
            with anyio.CancelScope(shield=True):  # doesn't wait for the server
                await lane.session.aclose(close_timeout=0)

    # ------------------------------------------------------------ the server's queue

    def _begin_wait(self, lane: Lane, request: LockRequest) -> ServerWait:
        lane.add_name(request.key)
        statement = wait_statement(request.key, shared=request.shared)
        try:
            return ServerWait(lane, lane.send(statement, may_block=True))
        except BaseException:
            self._end_wait(lane, request.key)
            raise

    async def _stand_in_queue(
        self, queue: KeyQueue, request: LockRequest, wait: ServerWait
    ) -> Hold:
        lane, command = wait
        key, shared = request.key, request.shared
        try:
            await command.wait()
        except BaseException:
            await self._leave_to_heir(queue, wait, shared=shared)
            raise
        try:
            with translated(key):
                command.results()
        except BaseException:
            await self._clean(wait, key)
            raise
        self._fleet.end_waiting()
        self._fleet.share_out(lane)
        try:
            # The lease runs from a round trip after the grant, not from before the wait.
            await lane.session.ping()
        except BaseException:
            await self._undo(lane, request, command, is_granted=True)
            raise
        return Hold(lane, key, shared=shared)

    async def _leave_to_heir(self, queue: KeyQueue, wait: ServerWait, *, shared: bool) -> None:
        """Leave a place in the server's queue to the next task in line, or give it up."""
        heir = queue.find_heir(shared=shared)
        if heir is not None:
            heir.inherited = wait
        else:
            await self._clean(wait, queue.key)

    async def _clean(self, wait: ServerWait, key: LockKey) -> None:
        await settle(wait.lane, within=self.release_timeout)
        self._end_wait(wait.lane, key)

    def _end_wait(self, lane: Lane, key: LockKey) -> None:
        lane.remove_name(key)
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

    async def _fence(self, request: LockRequest, retries: Retries) -> int:
        """Return a new token for a lock that was granted, from a session that holds nothing."""
        while True:
            try:
                lane = await self._fleet.reserve_whole()
                try:
                    grant = await self.fence.bump(lane.session, request.key)
                except BaseException:
                    await settle(lane, within=self.release_timeout)
                    raise
                finally:
                    self._fleet.give_back_whole(lane)
            except psycopg.OperationalError as exc:
                error = exc
            else:
                return grant.token
            await retries.back_off(error)

    # ------------------------------------------------------------ letting go

    async def let_go(self, share: Share, token: int | None) -> bool:
        """Release a share, and with the last one the lock.

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
        hold = share.hold
        queue = self._queues[hold.key]
        is_last = queue.let_go(share)
        command: Command | None = None
        try:
            if is_last:
                hold.lane.remove_name(hold.key)
                command = self._send_unlock(hold, token)
                queue.last_lane = hold.lane
        finally:
            if is_last and command is None:
                self._fleet.give_back(hold.lane)
            queue.advance()
            self._tidy(queue)
        if command is None:
            return True
        try:
            await command.wait()
        except BaseException:
            self._fleet.start_soon(self._reap, hold.lane, command)
            raise
        self._fleet.give_back(hold.lane)
        return command.result().scalar() == "true"

    def drop(self, share: Share) -> None:
        """Take note that a share is gone without an unlock."""
        hold = share.hold
        queue = self._queues[hold.key]
        if queue.let_go(share):
            hold.lane.remove_name(hold.key)
            self._fleet.give_back(hold.lane)
        queue.advance()
        self._tidy(queue)

    def close(self) -> None:
        """Tell everybody who waits in this process that there is nothing to wait for."""
        for queue in self._queues.values():
            queue.close()

    async def _reap(self, lane: Lane, command: Command) -> None:
        await command.wait()
        self._fleet.give_back(lane)

    def _send_unlock(self, hold: Hold, token: int | None) -> Command:
        lane, key = hold.lane, hold.key
        if token is None:
            return lane.send(waking_unlock_statement(key, shared=hold.shared))
        unlock = self.fence.unlock_statement(key, token, session=lane.session)
        return lane.session.send([(unlock + lane.note(), ()), (waking_statement(key), ())])

    def _tidy(self, queue: KeyQueue) -> None:
        # Whoever comes late may have an old one, and the key another one by now.
        if queue.is_idle and self._queues.get(queue.key) is queue:
            del self._queues[queue.key]
