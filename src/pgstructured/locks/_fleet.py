"""The lock sessions of one `Locks`: opened when needed, filled up, given back when idle."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Final, final

import anyio

from pgstructured.driver import ConnectionState
from pgstructured.observe import emit

from ._lanes import Lane
from ._sessions import open_lock_session

if TYPE_CHECKING:
    from pgstructured.driver import Conninfo, NotificationHandler

    from ._options import LockOptions


@final
class _Want:
    """A task that waits for a slot, or for a whole lane."""

    __slots__ = ("error", "event", "is_whole", "lane")

    def __init__(self, *, is_whole: bool) -> None:
        self.is_whole = is_whole
        self.event = anyio.Event()
        self.lane: Lane | None = None
        self.error: Exception | None = None


@final
class Fleet:
    """Lanes, and who wants one.

    Args:
        conninfo: Where to connect.
        options: How the sessions live.
        tasks: Where their background tasks run.
    """

    def __init__(
        self, conninfo: Conninfo, options: LockOptions, tasks: anyio.abc.TaskGroup
    ) -> None:
        self._conninfo = conninfo
        self._options = options
        self._tasks = tasks
        self._wants: deque[_Want] = deque()
        self._opening = 0
        self._is_closed = False
        self._emptied = anyio.Event()
        self.lanes: Final[list[Lane]] = []
        self.on_notifications: NotificationHandler | None = None
        """Called with the notifications of each read of any session."""
        self.waiting: int = 0
        """How many lanes stand in the server's queue."""
        self.opened: int = 0
        """How many sessions were opened, ever."""
        self.lost: int = 0
        """How many of them have failed."""

    # ------------------------------------------------------------ slots

    async def reserve(self, hint: Lane | None = None) -> Lane:
        """Return a lane with a slot reserved.

        Args:
            hint: The lane to take if it is open, even if it is full: its unlock is under way.

        Raises:
            anyio.ClosedResourceError: if the fleet is closed.
            psycopg.OperationalError: if connecting fails.
            PgStructuredError: if the server can't hold locks for us.

        Cancellation:
            A checkpoint only if a session has to be opened; nothing is left reserved.
        """
        self.check_open()
        if hint is not None and self.reserve_again(hint):
            return hint
        lane = self._find_room()
        if lane is None:
            return await self._wait_for(_Want(is_whole=False))
        lane.slots += 1
        return lane

    def reserve_now(self) -> Lane | None:
        """Return a lane with a slot reserved, if there is one with room."""
        lane = None if self._is_closed else self._find_room()
        if lane is not None:
            lane.slots += 1
        return lane

    def reserve_again(self, lane: Lane) -> bool:
        """Reserve a slot of this lane, even if it is full; return whether it can be used."""
        if not lane.is_open or lane.is_whole:
            return False
        lane.slots += 1
        return True

    def give_back(self, lane: Lane) -> None:
        """A slot of ``lane`` is not needed any more."""
        lane.slots -= 1
        if self._wants or self._is_closed or lane.is_doomed:
            self._settle(lane)
        elif not lane.slots:
            lane.idle_since = lane.now()

    # ------------------------------------------------------------ whole lanes

    async def reserve_whole(self) -> Lane:
        """Return a lane that holds nothing, for one task.

        As `reserve` in everything else.
        """
        self.check_open()
        lane = next((lane for lane in self.lanes if lane.is_open and lane.is_unused), None)
        if lane is None:
            return await self._wait_for(_Want(is_whole=True))
        lane.is_whole = True
        return lane

    def give_back_whole(self, lane: Lane) -> None:
        """The task needs ``lane`` no more."""
        lane.is_whole = False
        self._settle(lane)

    def share_out(self, lane: Lane) -> None:
        """A whole lane has been granted a lock, and is for everybody now."""
        lane.is_whole = False
        lane.slots += 1
        lane.remind_of_names()
        self._settle(lane)

    # ------------------------------------------------------------ waiting lanes

    def convert_to_waiting(self, lane: Lane) -> bool:
        """Make a lane of which one slot is reserved a waiting one, if that is all it has to do.

        Returns:
            Whether it is one now, with its slot given back.
        """
        is_alone = lane.slots == 1 and not lane.is_whole and lane.is_open
        if not is_alone or self.waiting >= self._options.max_waiting_sessions:
            return False
        lane.slots = 0
        lane.is_whole = True
        self.waiting += 1
        return True

    async def reserve_waiting(self) -> Lane | None:
        """Return a whole lane to wait on; None if there are enough of them.

        As `reserve` in everything else.
        """
        self.check_open()
        if self.waiting >= self._options.max_waiting_sessions:
            return None
        self.waiting += 1
        try:
            return await self.reserve_whole()
        except BaseException:
            self.waiting -= 1
            raise

    def end_waiting(self) -> None:
        """One waiting lane waits no more."""
        self.waiting -= 1

    # ------------------------------------------------------------ life

    def start_soon(self, *args: object) -> None:
        """Run something in the background, for as long as the fleet is open."""
        self._tasks.start_soon(*args)  # type: ignore[arg-type]

    async def run_reaper(self) -> None:
        """Give back sessions that have been idle for long, but for one."""
        ttl = self._options.idle_session_ttl
        while True:
            await anyio.sleep(self._next_expiry(ttl))
            expired = anyio.current_time() - ttl
            idle = [lane for lane in self.lanes if lane.is_open and lane.is_unused]
            spare = sum(lane.is_open for lane in self.lanes) - 1
            doomed = [lane for lane in idle if lane.idle_since <= expired][: max(spare, 0)]
            for lane in doomed:
                lane.is_doomed = True  # before anything awaits: then they may be in use
            for lane in doomed:
                await lane.session.aclose(close_timeout=self._options.release_timeout)

    def _next_expiry(self, ttl: float) -> float:
        """Return how long to sleep until the next session may have been idle for too long."""
        now = anyio.current_time()
        ages = [now - lane.idle_since for lane in self.lanes if lane.is_unused]
        return max(ttl - max(ages, default=0.0), ttl / 4)

    async def close(self) -> None:
        """End every session, once nothing holds or wants anything of it, or time is over.

        Cancellation:
            Shielded, at most about twice ``release_timeout``.
        """
        self._is_closed = True
        self._refuse_all(_closed())
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as closing:
                for lane in tuple(self.lanes):
                    lane.begin_closing()
                    if lane.is_whole:  # what waits there is not to be waited for
                        closing.start_soon(self._close_lane, lane)
                try:
                    with anyio.move_on_after(self._options.release_timeout):
                        while any(lane.slots for lane in self.lanes):
                            self._emptied = anyio.Event()
                            await self._emptied.wait()
                finally:  # asyncio's own cancellation heeds no shield
                    for lane in tuple(self.lanes):
                        closing.start_soon(self._close_lane, lane)

    async def _close_lane(self, lane: Lane) -> None:
        await lane.session.aclose(close_timeout=self._options.release_timeout)

    def check_open(self) -> None:
        """Refuse if it is closed.

        Raises:
            anyio.ClosedResourceError: if it is.
        """
        if self._is_closed:
            raise _closed()

    # ------------------------------------------------------------ who gets what

    def _find_room(self) -> Lane | None:
        """Return the fullest lane with room, so that the others can fall idle."""
        limit = self._options.max_locks_per_session
        best: Lane | None = None
        for lane in self.lanes:
            if lane.slots < limit and not lane.is_whole and lane.is_open:
                if lane.slots + 1 == limit:
                    return lane
                if best is None or lane.slots > best.slots:
                    best = lane
        return best

    async def _wait_for(self, want: _Want) -> Lane:
        self._wants.append(want)
        self._open_for_wants()
        try:
            await want.event.wait()
        except BaseException:
            if want.lane is None:
                if want in self._wants:
                    self._wants.remove(want)
            elif want.is_whole:
                self.give_back_whole(want.lane)
            else:
                self.give_back(want.lane)
            raise
        if want.lane is None:
            raise want.error or _closed()
        return want.lane

    def _open_for_wants(self) -> None:
        """Open as many sessions as the tasks need that wait for one, and no more."""
        wholes = sum(want.is_whole for want in self._wants)
        slots = len(self._wants) - wholes
        needed = wholes + math.ceil(slots / self._options.max_locks_per_session)
        for _ in range(needed - self._opening):
            self._opening += 1
            self._tasks.start_soon(self._run_lane)

    def _settle(self, lane: Lane) -> None:
        """Something of ``lane`` has become free: hand it on, or let it rest, or end."""
        if self._wants and lane.is_open:
            self._serve(lane)
        if not lane.is_unused:
            return
        lane.idle_since = lane.now()
        if self._is_closed:
            self._emptied.set()
        if lane.is_doomed and lane.session.state is ConnectionState.OPEN:
            self._tasks.start_soon(self._close_lane, lane)

    def _serve(self, lane: Lane) -> None:
        """Give tasks that wait what ``lane`` has to give, first come first served."""
        limit = self._options.max_locks_per_session
        for want in tuple(self._wants):
            if lane.is_whole:
                return
            if want.is_whole and lane.is_unused:
                lane.is_whole = True
            elif not want.is_whole and lane.slots < limit:
                lane.slots += 1
            else:
                continue
            self._wants.remove(want)
            want.lane = lane
            want.event.set()

    # ------------------------------------------------------------ one session

    async def _run_lane(self) -> None:
        """Open one session, and keep it until it ends."""
        is_open = False
        lane: Lane | None = None
        try:
            async with open_lock_session(
                self._conninfo,
                self._options,
                connect_by=anyio.current_time() + self._options.connect_timeout,
                patience=lambda: lane.patience if lane else self._options.lost_after,
                heartbeat_statement=lambda: lane.note() if lane else "",
                on_notifications=self.on_notifications,
            ) as session:
                lane = Lane(session, self._options)  # it may have died already
                await lane.identify()
                is_open = True
                self._opening -= 1
                await self._keep(lane)
        except Exception as exc:
            if is_open:
                raise
            self._opening -= 1
            is_open = True
            emit("lock.session_failed", error=exc)  # whoever waited for it may have left
            if not self._opening:
                self._refuse_all(exc)
        finally:
            if not is_open:
                self._opening -= 1

    async def _keep(self, lane: Lane) -> None:
        session = lane.session
        self.lanes.append(lane)
        self.opened += 1
        emit("lock.session_opened", backend_pid=session.backend_pid)
        try:
            if not self._is_closed:  # else it comes too late, and nobody would end it
                self._settle(lane)
                self._open_for_wants()
                await lane.watch.run(session.wait_closed)
        finally:
            self.lanes.remove(lane)
            self.lost += session.failure is not None
            self._emptied.set()
            emit("lock.session_closed", backend_pid=session.backend_pid, error=session.failure)

    def _refuse_all(self, error: Exception) -> None:
        wants, self._wants = self._wants, deque()
        for want in wants:
            want.error = error
            want.event.set()


def _closed() -> anyio.ClosedResourceError:
    return anyio.ClosedResourceError("the block of open_locks was left")
