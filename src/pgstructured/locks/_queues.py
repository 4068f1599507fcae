"""Who is next for a key, within this process.

One task at a time asks the server for a key. The others wait here, first come first
served, so that a thousand tasks cost the server one waiter. Pure bookkeeping: nothing
here awaits, and nothing here is sent.

=================  =======================================================
who comes          may ask the server
=================  =======================================================
anybody            when it is first in line and nobody else asks
over an            when that is let go: the question then follows the unlock
exclusive hold     on the same session
over shared holds  at once, on another session. A writer stands in the server's
                   queue then, where other processes' readers come behind it; a reader
                   that is granted it shares the hold that is there
a reader over a    not at all: it is given a share, if nobody stands in line
young shared hold  and the hold is not older than `SHARE_FOR`
=================  =======================================================

`SHARE_FOR` keeps the readers of one process from passing the lock around for ever
while another process' writer waits at the server, which knows of no new readers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import anyio

from ._refusals import already_held

if TYPE_CHECKING:
    from pgstructured.driver import Command

    from ._fencing import FenceGrant
    from ._keys import LockKey
    from ._lanes import Lane
    from ._waits import ServerWait

SHARE_FOR: Final = 1.0
"""Seconds after its grant for which a shared hold takes in new readers."""


@final
class Hold:
    """One lock on the server, and how many tasks of this process share it."""

    __slots__ = ("fencing", "granted_at", "key", "lane", "shared", "shares")

    def __init__(self, lane: Lane, key: LockKey, *, shared: bool) -> None:
        self.lane: Lane = lane
        self.key: LockKey = key
        self.shared: bool = shared
        self.shares: int = 0
        self.fencing: FenceGrant | None = None
        """Its token, if it has one."""
        self.granted_at: float = lane.now() if shared else 0.0
        """Event-loop time of the last grant, for one that is shared."""


@final
class Share:
    """What one task has of a `Hold`."""

    __slots__ = ("hold", "queue", "task_id")

    def __init__(self, hold: Hold, task_id: int, queue: KeyQueue) -> None:
        self.hold: Hold = hold
        self.queue: KeyQueue = queue
        self.task_id: int | None = task_id
        """The task that has it; None once it was detached, and is nobody's."""


@final
class Place:
    """A task's place in line."""

    __slots__ = (
        "_event",
        "has_turn",
        "inherited",
        "is_at_server",
        "is_closed",
        "is_refused",
        "is_try",
        "sent",
        "share",
        "shared",
        "task_id",
    )

    def __init__(self, task_id: int, *, shared: bool, is_try: bool) -> None:
        self.task_id: int = task_id
        self.shared: bool = shared
        self.is_try: bool = is_try
        self.has_turn: bool = False
        """It is to ask the server."""
        self.is_at_server: bool = False
        """It stands in the server's queue."""
        self.is_refused: bool = False
        """It was only a try, and the lock is not free."""
        self.is_closed: bool = False
        """There is nothing to wait for any more."""
        self.share: Share | None = None
        """What it was given without having to ask."""
        self.inherited: ServerWait | None = None
        """A place in the server's queue, left by a task that gave up."""
        self.sent: tuple[Lane, Command] | None = None
        """A question that was sent when the line was entered, and where."""
        self._event: anyio.Event | None = None

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing more to wait for here."""
        return self.has_turn or self.is_refused or self.is_closed or self.share is not None

    async def wait(self) -> None:
        """Wait until it is settled."""
        if not self.is_settled:
            self._event = anyio.Event()
            await self._event.wait()

    def wake(self) -> None:
        """It is settled."""
        if self._event is not None:
            self._event.set()


@final
class KeyQueue:
    """The tasks of this process that hold a key, or want it."""

    __slots__ = ("_left", "asking", "key", "last_lane", "places", "shares", "writer")

    def __init__(self, key: LockKey) -> None:
        self.key: LockKey = key
        self.shares: list[Share] = []
        self.places: list[Place] = []  # a deque would be most of what a held lock costs
        self.writer: Share | None = None
        """The exclusive one of the shares."""
        self.asking: Place | None = None
        self.last_lane: Lane | None = None
        """Where the key was let go last: a question there follows the unlock."""
        self._left: anyio.Event | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nobody has to do with the key."""
        return not self.shares and self.asking is None and not self.places

    @property
    def waiting(self) -> int:
        """How many tasks want the key."""
        return len(self.places) + (self.asking is not None)

    def enter(self, task_id: int, *, shared: bool, is_try: bool) -> Place:
        """Stand in line, or be given at once what there is to have.

        Raises:
            LockAlreadyHeldError: if the task would wait for itself.
        """
        place = Place(task_id, shared=shared, is_try=is_try)
        if self.is_idle and self.writer is None:
            self.begin(place)
            return place
        own = [share for share in self.shares if share.task_id == task_id]
        if own:
            if not shared or not own[0].hold.shared:
                raise already_held(self.key)
            self._give(place, own[0].hold)  # whoever stands in line would wait for this task
            return place
        self.places.append(place)
        self.advance()
        if is_try and not place.is_settled and not self._may_be_settled_soon(place):
            self.places.remove(place)
            place.is_refused = True
        return place

    def begin(self, place: Place) -> None:
        """Stand in line where nobody has to do with the key."""
        self.asking = place
        place.has_turn = True

    def advance(self) -> None:
        """Give the turn, or a share, to whoever is first in line and may have it."""
        while self.places and self.asking is None:
            if self.writer is not None:
                return
            place = self.places.pop(0)
            young = self._find_young() if place.shared else None
            if young is not None:
                self._give(place, young)
                continue
            self.asking = place
            place.has_turn = True
            place.wake()

    def begin_waiting(self, place: Place) -> None:
        """The task whose turn it is goes to stand in the server's queue."""
        place.is_at_server = True
        for other in [other for other in self.places if other.is_try]:
            self.places.remove(other)
            other.is_refused = True
            other.wake()

    def grant(self, place: Place, hold: Hold) -> Share:
        """The server has granted what ``place`` asked for."""
        self.asking = None
        share = self._give(place, hold)
        if self.places:
            self.advance()
        return share

    async def wait_alone(self) -> None:
        """Wait until nobody but the writer is under the lock here, as the server says already.

        Readers whose session has died may not have ended yet.

        Cancellation:
            A checkpoint where there is somebody; nothing changes.
        """
        while len(self.shares) > 1:
            self._left = anyio.Event()
            await self._left.wait()

    def withdraw(self, place: Place) -> None:
        """The task asks no more, and waits no more; it was given nothing."""
        if self.asking is place:
            self.asking = None
            self.advance()
        elif place in self.places:
            self.places.remove(place)

    def find_heir(self, *, shared: bool) -> Place | None:
        """Return who is next in line, if a wait in the server's queue is of use to it."""
        if not self.places or (shared and self.shares):
            return None
        first = self.places[0]
        return first if first.shared == shared and not first.is_try else None

    def let_go(self, share: Share) -> bool:
        """Take a share back; return whether it was the last one of its hold.

        The lock is then to be unlocked, before `advance`.
        """
        self.shares.remove(share)
        if share is self.writer:
            self.writer = None
        if self._left is not None:
            self._left.set()
        share.hold.shares -= 1
        return share.hold.shares == 0

    def close(self) -> None:
        """Nobody gets anything any more."""
        places, self.places = self.places, []
        for place in places:
            place.is_closed = True
            place.wake()

    def _give(self, place: Place, hold: Hold) -> Share:
        hold.shares += 1
        place.share = share = Share(hold, place.task_id, self)
        self.shares.append(share)
        if not hold.shared:
            self.writer = share
        place.wake()
        return share

    def find_shared(self) -> Hold | None:
        """Return a hold that can be shared: of several the youngest."""
        for share in reversed(self.shares):
            if share.hold.shared and share.hold.lane.is_open:
                return share.hold
        return None

    def _find_young(self) -> Hold | None:
        hold = self.find_shared()
        is_old = hold is None or hold.lane.now() - hold.granted_at > SHARE_FOR
        return None if is_old else hold

    def _may_be_settled_soon(self, place: Place) -> bool:
        """Whether a try may get a share of what is being asked for, rather than be refused."""
        asking = self.asking
        return (
            place.shared
            and asking is not None
            and asking.shared
            and not asking.is_at_server
            and all(other.shared for other in self.places)
        )


@final
class Queues(dict["LockKey", KeyQueue]):
    """The lines of one `Locks`: made when asked for, and gone by `tidy`."""

    def __missing__(self, key: LockKey) -> KeyQueue:
        queue = self[key] = KeyQueue(key)
        return queue

    def tidy(self, queue: KeyQueue) -> None:
        """Forget ``queue`` if nobody has to do with its key any more."""
        # Whoever comes late may have an old one, and the key another one by now.
        if queue.is_idle and self.get(queue.key) is queue:
            del self[queue.key]
