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
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg

from pgstructured.driver import ConnectionState, current_task_id
from pgstructured.errors import ConnectionLostError, LockAlreadyHeldError
from pgstructured.observe import emit

from ._fencing import FenceGrant, FenceTable
from ._loss import Loss, diagnose
from ._names import note
from ._queues import Hold, KeyQueue
from ._refusals import already_held, not_in_time, translated
from ._retrying import Retries
from ._statements import (
    TRY,
    UNLOCK,
    WAKE,
    held_condition,
    params_of,
    unlock_statement,
    wait_statement,
)
from ._tasks import holds_elsewhere
from ._waits import ServerWait, settle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

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
class Failures:
    """What has gone wrong on the way of an acquire, for whom its time runs out meanwhile."""

    last: psycopg.Error | None = None


@final
class ManagedGrip:
    """A share of a lock on a `Lane`."""

    __slots__ = (
        "_is_gone",
        "_lane",
        "_now",
        "_share",
        "_source",
        "backend_pid",
        "fencing",
        "identity",
        "watch",
    )

    connection: None = None

    def __init__(self, source: ManagedSource, share: Share, fencing: FenceGrant | None) -> None:
        lane = share.hold.lane
        self._source = source
        self._share = share
        self._lane = lane
        self._is_gone = False
        self.fencing: FenceGrant | None = fencing
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
        return self._source.fence

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
        await self._lane.session.execute(self._lane.note())
        return True  # nobody else can unlock on this session

    def unlock(self) -> Awaitable[bool]:
        if self._is_gone:
            return _done(is_held=True)
        self._is_gone = True
        self._source.counters.released += 1
        return self._source.let_go(self._share)

    async def abandon(self) -> None:
        lane = self._lane
        # Before its slot is handed on. What became of the lock is not known, but that it ends
        # with its session.
        lane.is_doomed = True
        hold = self._share.hold
        if not self._is_gone:
            self._is_gone = True
            self._source.let_go_unseen(self._share)
        # A lost lock's body may not have ended yet, nor that of a task which shares this one.
        if hold.shares == 0 and lane.slots - hold.has_slot <= 0:
            await lane.session.aclose(close_timeout=0)
        else:
            await anyio.lowlevel.checkpoint()

    def forget(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            lane = self._lane
            lane.is_doomed = lane.is_doomed or anyio.current_time() >= lane.overdue_at()
            self._source.let_go_unseen(self._share)

    def detach(self) -> None:
        self._share.task_id = None  # another task may have that number one day

    def attend(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()


@final
class _Taking(AbstractAsyncContextManager["ManagedGrip | None"]):
    """`ManagedSource.acquire` as the block that a source gives; nothing has to end with it."""

    __slots__ = ("_place", "_request", "_source")

    def __init__(self, source: ManagedSource, request: LockRequest, place: Place | None) -> None:
        self._source = source
        self._request = request
        self._place = place

    async def __aenter__(self) -> ManagedGrip | None:
        return await self._source.acquire(self._request, self._place)

    async def __aexit__(self, *_: object) -> None:
        """The grip was unlocked, or detached."""


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
        self._bumping = anyio.Semaphore(options.max_waiting_sessions)
        self.fence: FenceTable = FenceTable(options.fence_table)
        self.counters: Counters = Counters()

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

    def take(self, request: LockRequest) -> AbstractAsyncContextManager[Grip | None]:
        """Take a lock for the length of a block; see `LockSource.take`.

        Where nobody else here wants the key the server is asked before the block is entered,
        which has to be at once: what the caller does until then costs no time.
        """
        return _Taking(self, request, self._begin(request))

    async def acquire(self, request: LockRequest, place: Place | None = None) -> ManagedGrip | None:
        """Take a lock.

        Args:
            request: What is asked for.
            place: The place in line, where it was begun already.

        Returns:
            The grip on it, to be unlocked; None after a refused try.

        Raises:
            As `LockSource.take`.

        Cancellation:
            A checkpoint. Nothing is left, after ``release_timeout`` at most.
        """
        if not request.acquire_timeout:
            return await self._acquire(request, place, None)
        failures = Failures()
        with anyio.move_on_after(request.acquire_timeout):
            return await self._acquire(request, place, failures)
        raise not_in_time(request) from failures.last

    def is_in_use(self, key: LockKey) -> bool:
        """Whether a task of this process holds ``key`` by it, or wants it."""
        return key in self._queues

    def holds(self, key: LockKey) -> bool:
        """Whether the current task holds ``key`` by it."""
        queue, task_id = self._queues.get(key), current_task_id()
        return queue is not None and any(share.task_id == task_id for share in queue.shares)

    def adopt(self, hold: Hold) -> ManagedGrip | None:
        """Take on a lock that was granted beside the queue; None if its key is in use."""
        if self.is_in_use(hold.key):
            return None
        queue = self._queues[hold.key] = KeyQueue(hold.key)
        place = queue.enter(current_task_id(), shared=hold.shared, is_try=True)
        share = queue.grant(place, hold)
        self.counters.acquired += 1
        return ManagedGrip(self, share, None)

    def _begin(self, request: LockRequest) -> Place | None:
        """Ask the server at once, if nobody else here wants the key and a session has room."""
        key = request.key
        if request.fenced or key in self._queues:
            return None
        lane = self._fleet.reserve_now()
        if lane is None:
            return None
        try:
            command = self._send_try(lane, request)
        except (psycopg.Error, anyio.ClosedResourceError):
            self._fleet.give_back(lane)  # what is wrong is said by the next attempt
            return None
        queue = self._queues[key] = KeyQueue(key)
        place = queue.enter(current_task_id(), shared=request.shared, is_try=not request.may_wait)
        place.sent = (lane, command)
        return place

    async def _acquire(
        self, request: LockRequest, place: Place | None, failures: Failures | None
    ) -> ManagedGrip | None:
        key = request.key
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = KeyQueue(key)
        if place is None:
            is_try = not request.may_wait
            place = queue.enter(current_task_id(), shared=request.shared, is_try=is_try)
        fencing: FenceGrant | None = None
        try:
            if not place.is_settled:
                self._check_line(key)
                await place.wait()
            if place.has_turn:
                fencing = await self._ask(queue, place, request, failures)
            elif place.is_closed:
                raise anyio.ClosedResourceError
            else:
                await anyio.lowlevel.checkpoint_if_cancelled()
        except BaseException:
            await self._give_up(queue, place)  # noqa: ASYNC102 - shielded and bounded inside
            raise
        finally:
            self._tidy(queue)
        if place.share is not None:
            self.counters.acquired += 1
            return ManagedGrip(self, place.share, fencing)
        if request.is_try:
            return None
        raise not_in_time(request)

    async def _give_up(self, queue: KeyQueue, place: Place) -> None:
        """Take care of what a place has got that nobody will use."""
        share, wait = place.share, place.inherited
        if share is not None:
            await self._let_go_unused(share)
            return
        if wait is not None:
            place.inherited = None
            await self._leave_to_heir(queue, wait, shared=place.shared)
        queue.withdraw(place)

    async def _let_go_unused(self, share: Share) -> None:
        lane = share.hold.lane
        with anyio.move_on_after(self.release_timeout, shield=True):
            with suppress(psycopg.Error, anyio.ClosedResourceError):  # ended with its session
                await self.let_go(share)
            return
        if lane.slots <= 1:
            with anyio.CancelScope(shield=True):  # doesn't wait for the server
                await lane.session.aclose(close_timeout=0)

    # ------------------------------------------------------------ asking the server

    async def _ask(
        self, queue: KeyQueue, place: Place, request: LockRequest, failures: Failures | None
    ) -> FenceGrant | None:
        """Ask until the server has granted or refused; sessions may die meanwhile.

        Returns:
            The fencing token, if one was asked for and the lock granted.
        """
        retries: Retries | None = None
        while True:
            try:
                if place.share is None:
                    hold = await self._ask_once(queue, place, request)
                    if hold is None:
                        queue.withdraw(place)
                        return None
                    queue.grant(place, hold)
                else:
                    hold = place.share.hold
                if queue.writer is not None and len(queue.shares) > 1:
                    await queue.wait_alone()
                return await self._fence(hold, request) if request.fenced else None
            except psycopg.OperationalError as exc:
                error = exc
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
            if queue.shares and not request.may_wait:
                return await self._try_aside(queue, request)
            if not queue.shares:
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

    def _check_line(self, key: LockKey) -> None:
        """Refuse as `_check_task`, before the server is asked: those in line may wait for us."""
        lane = next((lane for lane in self._fleet.lanes if lane.is_open and lane.is_known), None)
        if lane is not None:
            self._check_task(lane, key)

    def _check_task(self, lane: Lane, key: LockKey) -> None:
        """Refuse a task that would wait for a lock that it holds by another source."""
        if holds_elsewhere(lane.identity, key, lane.backend_pid):
            raise already_held(key)

    def _send_try(self, lane: Lane, request: LockRequest) -> Command:
        key = request.key
        statement = TRY[key.as_pair is not None, request.shared]
        return lane.session.send_prepared(statement, params_of(key))

    async def _try(
        self, lane: Lane, request: LockRequest, command: Command | None = None
    ) -> Hold | None:
        """Take the lock if it is free. The lane's slot stays reserved, but for an error.

        Args:
            lane: Where.
            request: What is asked for.
            command: The question, if it was sent already.
        """
        key = request.key
        try:
            if request.fenced:
                hold = await self._try_fenced(lane, key)
            else:
                if command is None:
                    command = self._send_try(lane, request)
                lane.add_name(key)
                hold = Hold(lane, key, shared=request.shared)
                # The answer may be here before a cancellation that was pending then.
                await lane.session.checkpoint_if_cancelled()
                await command.signal
                if command.result().scalar() != "true":
                    hold = None
        except psycopg.Error:
            await self._undo(lane, request)  # noqa: ASYNC120 - shielded and bounded inside
            with translated(key):
                raise
        except BaseException:
            await self._undo(lane, request)  # noqa: ASYNC102 - shielded and bounded inside
            raise
        return hold

    async def _try_fenced(self, lane: Lane, key: LockKey) -> Hold | None:
        lane.add_name(key)
        taken = await self.fence.take(lane.session, key)
        if not taken.is_granted:
            return None
        hold = Hold(lane, key, shared=False)
        hold.fencing = taken.grant
        return hold

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

    async def _undo(self, lane: Lane, request: LockRequest) -> None:
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
        await self._finish(lane, command)

    async def _finish(self, lane: Lane, command: Command) -> None:
        """Wait for the last that is asked for a slot, and give it back; as `_undo`."""
        with anyio.move_on_after(self.release_timeout, shield=True):
            await command.wait()
            self._fleet.give_back(lane)
            return
        self._reap_soon(command, lane)
        if lane.slots <= 1:
            with anyio.CancelScope(shield=True):  # doesn't wait for the server
                await lane.session.aclose(close_timeout=0)

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
            await self._leave_to_heir(queue, wait, shared=shared)  # noqa: ASYNC102 - shielded and bounded inside
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
            await self._undo(lane, request)  # noqa: ASYNC102 - shielded and bounded inside
            raise
        return Hold(lane, key, shared=shared)

    async def _leave_to_heir(self, queue: KeyQueue, wait: ServerWait, *, shared: bool) -> None:
        """Leave a place in the server's queue to the next task in line, or give it up."""
        heir = queue.find_heir(shared=shared)
        if heir is not None:
            heir.inherited = wait
        else:
            await self._clean(wait.lane)

    async def _clean(self, lane: Lane) -> None:
        await settle(lane, within=self.release_timeout)
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

    async def _fence(self, hold: Hold, request: LockRequest) -> FenceGrant:
        """Return the token of a lock that was granted."""
        if hold.fencing is None:
            # It may have to wait for guarded transactions, so it is given where nothing is held.
            # A thousand such tasks at once are not to open a thousand sessions.
            async with self._bumping:
                lane = await self._fleet.reserve_whole()
                try:
                    hold.fencing = await self.fence.bump(lane.session, request.key)
                except BaseException:
                    await settle(lane, within=self.release_timeout)  # noqa: ASYNC102 - shields itself
                    raise
                finally:
                    self._fleet.give_back_whole(lane)
        return hold.fencing

    # ------------------------------------------------------------ letting go

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
        hold = share.hold
        lane, queue = hold.lane, self._queues[hold.key]
        command: Command | None = None
        is_last = queue.let_go(share)
        try:
            if is_last:
                command = self._send_unlock(hold)
                queue.last_lane = lane
        finally:
            if is_last and command is None:
                self._free(hold)
            queue.advance()
            self._tidy(queue)
        return _done(is_held=True) if command is None else self._finish_let_go(hold, command)

    async def _finish_let_go(self, hold: Hold, command: Command) -> bool:
        lane = hold.lane
        try:
            await command.signal
            if hold.fencing is not None:
                command = await self._unlock_plainly(hold, command)
        except BaseException:
            self._reap_soon(command, lane, hold)
            raise
        self._free(hold)
        return command.result().scalar() == "true"

    def let_go_unseen(self, share: Share) -> None:
        """As `let_go`, and wait for nothing.

        The lock was lost, but maybe not for the server: its session may be heard of again, and
        others' locks be on it.
        """
        hold = share.hold
        queue = self._queues[hold.key]
        if queue.let_go(share):
            try:
                command = self._send_plain_unlock(hold)
            except (psycopg.Error, anyio.ClosedResourceError):
                self._free(hold)  # it has ended with its session
            else:
                self._reap_soon(command, hold.lane, hold)
        queue.advance()
        self._tidy(queue)

    async def _unlock_plainly(self, hold: Hold, command: Command) -> Command:
        """Unlock without a mark in the fence table, if that was what has failed."""
        try:
            command.results()
        except psycopg.Error:
            if hold.lane.session.state is ConnectionState.OPEN:
                command = self._send_plain_unlock(hold)
                await command.signal
        return command

    def close(self) -> None:
        """Tell everybody who waits in this process that there is nothing to wait for."""
        for queue in self._queues.values():
            queue.close()

    def _free(self, hold: Hold) -> None:
        hold.has_slot = False
        self._fleet.give_back(hold.lane)

    def _reap_soon(self, command: Command, lane: Lane, hold: Hold | None = None) -> None:
        """Free the slot of ``lane``, which ``hold`` may have, once ``command`` is answered."""

        async def reap() -> None:
            await command.wait()
            free()

        def free() -> None:
            if hold is None:
                self._fleet.give_back(lane)
            else:
                self._free(hold)

        if lane.session.state in (ConnectionState.CLOSED, ConnectionState.FAILED):
            free()  # answered as well as it ever will be; and there may be no background now
        else:
            self._fleet.start_soon(reap)

    def _send_unlock(self, hold: Hold) -> Command:
        if hold.fencing is None:
            return self._send_plain_unlock(hold)
        session, key = hold.lane.session, hold.key
        unlock = self.fence.unlock_statement(key, hold.fencing.token, session=session)
        command = session.send([(unlock, ())])
        session.send_prepared(WAKE[key.as_pair is not None], params_of(key))  # nobody waits for it
        return command

    def _send_plain_unlock(self, hold: Hold) -> Command:
        key = hold.key
        statement = UNLOCK[key.as_pair is not None, hold.shared]
        return hold.lane.session.send_prepared(statement, params_of(key))

    def _tidy(self, queue: KeyQueue) -> None:
        # Whoever comes late may have an old one, and the key another one by now.
        if queue.is_idle and self._queues.get(queue.key) is queue:
            del self._queues[queue.key]


async def _done(*, is_held: bool) -> bool:  # noqa: ASYNC124 - what is awaited elsewhere
    """Return at once, where others have to wait."""
    return is_held
