"""One subscriber's stream of notifications and gaps.

==========  ==================================================  ==================
state       `Subscription.receive` does                         next
==========  ==================================================  ==================
waiting     waits for `Bus.subscribe` to be entered             open
open        returns what is buffered, or waits                  ending, closed
ending      returns what is buffered, then raises why it ended  closed, or ending
closed      raises `anyio.ClosedResourceError`                  -
==========  ==================================================  ==================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeAlias, TypeVar, final

import anyio
from anyio.abc import ObjectReceiveStream

from pgstructured._util import NoPublicConstructor
from pgstructured.driver import create_parking
from pgstructured.errors import GapError, SubscriptionOverflowError

from ._events import Gap, Notification

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._backlog import Backlog, Run

T = TypeVar("T")

GapHandling: TypeAlias = Literal["yield", "raise", "ignore"]
"""What a subscription does with a `Gap`."""

_CHECKPOINT_EVERY: Final = 32
_EVERYTHING: Final = 1 << 60


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionStatistics:
    """What has become of one subscriber's notifications: ``received + lost + depth`` is all."""

    depth: int
    """How many wait in the buffer."""
    received: int
    """How many it has received."""
    lost: int
    """How many it has missed because its buffer was full."""


@final
class Subscription(
    ObjectReceiveStream["Notification[T] | Gap"], Generic[T], metaclass=NoPublicConstructor
):
    """The notifications of some channels, for one subscriber; made by `NotifyBus.subscribe`.

    An AnyIO stream of `Notification` and `Gap`. One task at a time receives from it. What
    is in its buffer stays there when a receiver is cancelled.
    """

    def __init__(
        self,
        backlog: Backlog,
        *,
        channels: frozenset[str],
        gaps: GapHandling,
        where: Callable[[Notification[T]], bool] | None,
    ) -> None:
        self._backlog = backlog
        self._ready = backlog.ready
        self._channels = channels
        self._raises_gaps = gaps == "raise"
        self._where = where
        self._is_open = False
        self._is_receiving = False
        self._parking = create_parking()
        self._turns = _CHECKPOINT_EVERY
        """How many times something may be handed out before others run; 0 while a task waits."""
        self._ending: Callable[[], Exception] | None = None
        self._ends_once = False

    def __repr__(self) -> str:
        channels = ", ".join(sorted(self._channels))
        return f"<Subscription to {channels}: {self._backlog.depth} buffered>"

    @property
    def channels(self) -> frozenset[str]:
        """Names of the channels it listens to."""
        return self._channels

    # ------------------------------------------------------------ receiving

    async def receive(self) -> Notification[T] | Gap:
        """Return the next notification or gap, waiting for one.

        Raises:
            GapError: instead of returning a gap, with ``gaps="raise"``; the stream goes on.
            anyio.EndOfStream: once the bus was closed and nothing is buffered any more.
            BusUnavailableError: once the bus has died and nothing is buffered any more.
            ListenRejectedError: if the server refused to listen again after an outage; once.
            SubscriptionOverflowError: if the buffer overflowed with ``overflow="close"``; once.
            Exception: what ``where`` raised; once.
            anyio.ClosedResourceError: if this stream was closed, or has raised its last.
            anyio.BusyResourceError: if another task is receiving.

        Cancellation:
            A checkpoint where it has to wait, and after every 32 items that needed no waiting: then
            other tasks run, and a cancellation is noticed. What is buffered stays there.
        """
        backlog, ready = self._backlog, self._ready
        while True:
            if ready and self._turns:
                self._turns -= 1
                return ready.pop()
            is_filled = bool(backlog.waiting or backlog)
            if self._turns and is_filled:
                self._turns -= 1
                item = backlog.take()
                if item is not None:  # pragma: no branch - what is there can be taken
                    return self._hand_out(item) if self._raises_gaps else item
            elif self._is_receiving:
                raise anyio.BusyResourceError("receiving from")
            elif is_filled:
                await self._let_others_run()
            elif self._ending is not None:
                await anyio.lowlevel.checkpoint()
                raise self._take_ending(self._ending)
            else:
                # Not a call: parking and waking is what one notification at a time costs.
                self._turns, self._is_receiving = 0, True
                try:
                    await self._parking.wait()
                finally:
                    self._turns, self._is_receiving = _CHECKPOINT_EVERY, False

    async def receive_many(self, max_items: int | None = None) -> Sequence[Notification[T] | Gap]:
        """Return everything that is buffered, waiting until there is something.

        With ``gaps="raise"`` the items end before a gap, which the next call raises.

        Args:
            max_items: The most to return; None for no limit.

        Returns:
            At least one item.

        Raises:
            ValueError: if ``max_items`` is less than 1.
            Exception: as `receive`.

        Cancellation:
            As `receive`; counts as one item.
        """
        most: Any = max_items
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ValueError(f"max_items must be a whole number of at least 1, not {most!r}")
        limit = _EVERYTHING if max_items is None else max_items
        backlog = self._backlog
        while True:
            is_filled = bool(backlog.waiting or backlog)
            if self._turns and is_filled:
                self._turns -= 1
                items = backlog.take_many(limit, with_gaps=not self._raises_gaps)
                if items:
                    return items
                item = backlog.take()
                if item is not None:  # pragma: no branch - a gap, to be raised
                    self._hand_out(item)
            elif self._is_receiving:
                raise anyio.BusyResourceError("receiving from")
            elif is_filled:
                await self._let_others_run()
            elif self._ending is not None:
                await anyio.lowlevel.checkpoint()
                raise self._take_ending(self._ending)
            else:
                self._turns, self._is_receiving = 0, True
                try:
                    await self._parking.wait()
                finally:
                    self._turns, self._is_receiving = _CHECKPOINT_EVERY, False

    def receive_nowait(self) -> Notification[T] | Gap:
        """Return the next notification or gap if one is buffered.

        Raises:
            anyio.WouldBlock: if nothing is.
            Exception: as `receive`.
        """
        if self._is_receiving:
            raise anyio.BusyResourceError("receiving from")
        item = self._backlog.take()
        if item is not None:
            return self._hand_out(item)
        if self._ending is not None:
            raise self._take_ending(self._ending)
        raise anyio.WouldBlock

    def statistics(self) -> SubscriptionStatistics:
        """Return what has become of this subscriber's notifications so far."""
        backlog = self._backlog
        return SubscriptionStatistics(
            depth=backlog.depth,
            received=backlog.offered - backlog.lost - backlog.depth,
            lost=backlog.lost,
        )

    async def aclose(self) -> None:
        """Close the stream; a task that waits in it gets `anyio.ClosedResourceError`.

        The channels are let go of when the block of `NotifyBus.subscribe` ends.

        Cancellation:
            A checkpoint; closed in any case.
        """
        self._close()
        await anyio.lowlevel.checkpoint()

    async def _let_others_run(self) -> None:
        self._is_receiving = True
        try:
            await anyio.lowlevel.checkpoint()
        finally:
            self._turns, self._is_receiving = _CHECKPOINT_EVERY, False

    def _hand_out(self, item: Notification[Any] | Gap) -> Notification[T] | Gap:
        if self._raises_gaps and isinstance(item, Gap):
            missing = "" if item.lost is None else f", {item.lost} notifications lost"
            raise GapError(f"a gap in the stream: {item.reason}{missing}", gap=item)
        return item

    def _take_ending(self, ending: Callable[[], Exception]) -> Exception:
        error = ending()
        if self._ends_once:
            self._ending, self._ends_once = anyio.ClosedResourceError, False
        return error

    # ------------------------------------------------------------ for the bus

    def _offer(self, run: Run) -> None:
        """Buffer what is for this subscriber; never waits, never raises."""
        if self._ending is not None:
            return
        failure: Exception | None = None
        if self._where is not None:
            run, failure = self._filter(run, self._where)
        if run:
            if not self._backlog.offer(run):
                failure = SubscriptionOverflowError(
                    "the buffer of this subscription was full (overflow='close'); take a larger"
                    " buffer, or another policy"
                )
            if self._is_receiving:
                self._parking.wake()
        if failure is not None:
            self._end_once(failure)

    @staticmethod
    def _filter(run: Run, where: Callable[[Notification[T]], bool]) -> tuple[Run, Exception | None]:
        wanted: Run = []
        for notification in run:
            try:
                if where(notification):
                    wanted.append(notification)
            except Exception as exc:  # noqa: BLE001 - it ends this subscription, and is raised there
                return wanted, exc
        return wanted, None

    def _open(self, generation: int, *, initial_gap: bool) -> None:
        """Take note that every channel is listened to."""
        self._is_open = True
        if initial_gap:
            self._backlog.mark_subscribed(generation)

    def _note_reconnect(self, generation: int, outage: float) -> None:
        """Take note that the bus is live again after an outage."""
        if self._ending is not None:
            return
        if not self._is_open:  # it has promised nothing yet
            self._backlog.clear()
            return
        self._backlog.mark_reconnected(generation, outage)
        if self._backlog:
            self._parking.wake()

    def _end(self, ending: Callable[[], Exception]) -> None:
        """Raise what ``ending`` makes, every time, once nothing is buffered any more."""
        if self._ending is None:
            self._ending = ending
            self._parking.wake()

    def _end_once(self, error: Exception) -> None:
        """Raise ``error`` once when nothing is buffered any more, then that it is closed."""
        if self._ending is None:
            self._ends_once = True
            self._end(lambda: error)

    def _close(self) -> None:
        self._ending, self._ends_once = anyio.ClosedResourceError, False
        self._backlog.close()
        self._parking.wake()
