"""Following a log.

``receive`` does all the work, in the task that calls it:

=============  ===================================================================
state          what ``receive`` does
=============  ===================================================================
has a page     gives the next event
may be behind  borrows a connection, reads a page, gives the connection back
caught up      waits to be woken; then it may be behind
at the end     the bus has ended: reads as if woken, for so long as ``LAST_READ``, and
               raises the end when that is done
=============  ===================================================================

So while the consumer is busy nothing is read, and a slow one keeps neither memory beyond one page
nor a connection. A wake-up that comes meanwhile waits in the subscription, until all that was
there before it has been read.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import anyio
import psycopg

from pgstructured._util import Backoff, NoPublicConstructor, create
from pgstructured.errors import (
    NotPrimaryError,
    PoolClosedError,
    PoolTimeoutError,
    TooManyWaitingError,
)
from pgstructured.observe import emit

from ._cursors import Cursor, parts_of
from ._waking import open_wake_ups

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from pgstructured.notify import NotifyBus
    from pgstructured.pool import Pool

    from ._events import Event, Page
    from ._names import Names
    from ._reading import Reader
    from ._waking import WakeUps

READ_TIMEOUT: Final = 30.0
"""Seconds that a read may take; twice as long each time that was not enough."""
_LONGEST_READ: Final = 600.0
LAST_READ: Final = 5.0
"""Seconds that a page may take, with all attempts, once the bus has ended."""
_BACKOFF: Final = Backoff(initial=0.1, maximum=5.0)
_CHECKPOINT_EVERY: Final = 32


@final
class Pages:
    """Reads page after page, over any number of lost sessions.

    Args:
        names: The log's.
        reader: Reads it.
        pool: Lends a connection for each page.
        cursor: Where to begin.
        topics: Which events; None for all.
        limit: The most in one page.
    """

    def __init__(
        self,
        names: Names,
        reader: Reader,
        pool: Pool,
        cursor: Cursor,
        *,
        topics: Sequence[str] | None,
        limit: int,
    ) -> None:
        self._names = names
        self._reader = reader
        self._pool = pool
        self._topics = topics
        self._limit = limit
        self._has_read = False
        self.cursor: Cursor = cursor
        """After what has been read."""
        self.is_last: bool = True
        """Whether whatever came after the last page has been told of, or will be."""
        # A page that was begun by somebody else is of a snapshot from before we were told.
        self._is_old = parts_of(cursor).window is not None

    async def read(self) -> list[Event]:
        """Return the next page's events, trying again while the server can't be reached.

        Raises:
            CursorExpiredError: if what comes next is gone.
            Exception: what another attempt would not heal.

        Cancellation:
            A checkpoint. A cancelled call changes nothing.
        """
        attempt, time_limit = 0, READ_TIMEOUT
        while True:
            try:
                page = await self._try(time_limit)
            except _Failed as failed:
                error, delay = failed.error, _BACKOFF.delay(attempt)
                if type(error) is TimeoutError:  # the read's own, not the pool's
                    time_limit = min(2 * time_limit, _LONGEST_READ)
                emit("log.read_failed", log=str(self._names), delay=delay, error=error)
                await anyio.sleep(delay)
                attempt += 1
            else:
                self._has_read = True
                self.cursor = page.cursor
                is_done = len(page.events) < self._limit
                self.is_last = is_done and not self._is_old
                self._is_old = self._is_old and not is_done
                return page.events

    async def _try(self, limit: float) -> Page:
        is_reading = False
        try:
            async with self._pool.acquire() as conn:
                # A pool lends none that is closed. One that the task has pinned may be, and
                # stays so.
                is_reading = not conn.closed
                with anyio.fail_after(limit):
                    return await self._reader.read(
                        conn, self.cursor, topics=self._topics, limit=self._limit
                    )
        except (PoolTimeoutError, TooManyWaitingError) as exc:
            raise _Failed(exc) from exc
        except NotPrimaryError as exc:
            # It was the primary, and there is to be another one; or it never was.
            if not self._has_read:
                raise
            raise _Failed(exc) from exc
        except (psycopg.OperationalError, TimeoutError) as exc:
            # What the pool itself says of connecting does not heal.
            if not is_reading:
                raise
            raise _Failed(exc) from exc


class _Failed(Exception):  # noqa: N818 - never seen by anybody else
    """An attempt failed, and another one may not."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@final
class Following(anyio.abc.ObjectReceiveStream["Event"], metaclass=NoPublicConstructor):
    """The events of a log as they come; made by `EventLog.follow`."""

    def __init__(self, pages: Pages, wake_ups: WakeUps) -> None:
        self._pages = pages
        self._wake_ups = wake_ups
        self._position: Event | Cursor = pages.cursor
        self._events: list[Event] = []  # the next one last
        self._turns = _CHECKPOINT_EVERY
        self._scope: anyio.CancelScope | None = None
        self._is_closed = False

    @property
    def cursor(self) -> Cursor:
        """Resumes after what has been received."""
        position = self._position
        return position if isinstance(position, Cursor) else position.cursor

    async def receive(self) -> Event:
        """Return the next event, waiting for one.

        Raises:
            CursorExpiredError: if what comes next was trimmed; each time.
            anyio.EndOfStream: once the bus was closed, and what had been committed by then has
                been read. Where that can't be done within 5 seconds, or the pool is closed
                too, that is its cause; `cursor` is where to go on.
            BusUnavailableError: once the bus has died; likewise.
            ListenRejectedError: if the server refused to listen again after an outage; once.
            PoolClosedError: if the pool was closed.
            PoolNestedAcquireError: if this task has borrowed a connection of the pool.
            NotPrimaryError: if the first read met a standby.
            psycopg.Error: what the server says, where another attempt would not help.
            anyio.ClosedResourceError: if this stream was closed, or has raised its last.
            anyio.BusyResourceError: if another task is receiving.

        Cancellation:
            A checkpoint where it reads or waits, and after every 32 events. A cancelled call
            loses nothing.
        """
        await self._fill()
        event = self._events.pop()
        self._note(event)
        return event

    async def receive_many(self, max_items: int | None = None) -> Sequence[Event]:
        """Return what has been read already, waiting until there is something.

        Args:
            max_items: The most to return; None for no limit but the page's.

        Returns:
            At least one event.

        Raises:
            ValueError: if ``max_items`` is less than 1.
            Exception: as `receive`.

        Cancellation:
            As `receive`; counts as one event.
        """
        if max_items is not None and max_items < 1:
            raise ValueError(f"max_items must be at least 1, not {max_items}")
        await self._fill()
        first = 0 if max_items is None else max(0, len(self._events) - max_items)
        taken = self._events[first:]
        del self._events[first:]
        taken.reverse()
        self._note(taken[-1])
        return taken

    async def aclose(self) -> None:
        """End the stream; a task that waits in `receive` gets `anyio.ClosedResourceError`.

        Cancellation:
            A checkpoint; nothing is left to be done.
        """
        self._end()
        await anyio.lowlevel.checkpoint()

    def _end(self) -> None:
        self._is_closed = True
        self._events.clear()
        if self._scope is not None:
            self._scope.cancel()

    async def _fill(self) -> None:
        """See to it that there is an event."""
        if self._scope is not None:
            raise anyio.BusyResourceError("receiving from")
        if self._is_closed:
            raise anyio.ClosedResourceError
        if self._events and self._turns:
            self._turns -= 1
            return
        with anyio.CancelScope() as scope:
            self._scope = scope
            try:
                await anyio.lowlevel.checkpoint()
                while not self._events:
                    await self._read_on()
            finally:
                self._scope = None
                self._turns = _CHECKPOINT_EVERY
        if self._is_closed:
            raise anyio.ClosedResourceError

    async def _read_on(self) -> None:
        if self._pages.is_last:
            await self._wake_ups.receive()
            self._pages.is_last = False
        ending = self._wake_ups._ending  # noqa: SLF001 - one room # pyright: ignore[reportPrivateUsage]
        events = await (self._pages.read() if ending is None else self._read_last(ending))
        events.reverse()
        self._events = events
        if not events:
            self._position = self._pages.cursor

    async def _read_last(self, ending: Exception) -> list[Event]:
        """Read what the bus could not tell of before it ended, if that can be had soon."""
        try:
            with anyio.fail_after(LAST_READ):
                return await self._pages.read()
        except (TimeoutError, PoolClosedError) as exc:
            self._pages.is_last = True
            raise ending from exc

    def _note(self, event: Event) -> None:
        # Once the page is done its own cursor is there: shorter, and quicker to read from.
        self._position = event if self._events else self._pages.cursor


@asynccontextmanager
async def open_following(
    bus: NotifyBus, channel: str, pages: Pages, *, poll: float
) -> AsyncGenerator[Following]:
    """Follow for the length of a block."""
    async with open_wake_ups(bus, channel, poll) as wake_ups:
        following = create(Following, pages, wake_ups)
        try:
            yield following
        finally:
            following._end()  # noqa: SLF001 - one room # pyright: ignore[reportPrivateUsage]
