"""`open_publisher`: notifications that are sent after the commit, and not under its lock."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, final, overload

import anyio

from pgstructured._util import NoPublicConstructor, create, open_background
from pgstructured.errors import UndeliveredError
from pgstructured.observe import emit

from ._publish import prepare
from ._publisher_carriers import find_carrier
from ._publisher_delivery import Delivery
from ._publisher_queue import PublisherQueue

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pgstructured.driver import Connection, Conninfo
    from pgstructured.pool import Pool

    from ._channels import Channel

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherStatistics:
    """What a publisher has done so far."""

    pending: int
    """Notifications that wait to be sent."""
    in_flight: int
    """Notifications that were sent, or are to be sent again, and are not confirmed."""
    tasks_waiting: int
    """Tasks that wait in `Publisher.publish`."""
    delivered: int
    """Notifications that the server has confirmed."""
    refused: int
    """Notifications that the server has refused for good."""
    batches: int
    """Batches that the server has confirmed."""
    retries: int
    """How often a batch was not confirmed and had to be sent again."""
    last_error: BaseException | None
    """What went wrong last, if anything did."""


@final
class Publisher(metaclass=NoPublicConstructor):
    """Sends notifications on a session of its own; made by `open_publisher`."""

    def __init__(self, queue: PublisherQueue, delivery: Delivery) -> None:
        self._queue = queue
        self._delivery = delivery

    def __repr__(self) -> str:
        return f"<Publisher pending={self._queue.pending} delivered={self._queue.delivered}>"

    @overload
    async def publish(self, channel: str, payload: str = "") -> None: ...
    @overload
    async def publish(self, channel: Channel[T], payload: T) -> None: ...
    async def publish(self, channel: str | Channel[Any], payload: Any = "") -> None:
        """Put a notification in line, as soon as there is room.

        It is sent with what else is published within ``interval`` seconds, in one
        transaction, where the server delivers one of several that are equal. `flush` waits
        until it has been sent.

        Args:
            channel: A name and a text as payload, or a `Channel` and a value for it.
            payload: What to send with it, at most 7999 bytes.

        Raises:
            ChannelNameError: if the name is impossible.
            PayloadTooLargeError: if the payload is too long.
            ValueError: if the payload has a NUL in it, or is no valid text.
            anyio.ClosedResourceError: if the publisher's block has been left.
            anyio.BrokenResourceError: if the publisher has ended by an error, the cause.

        Cancellation:
            Noticed in any case; a checkpoint where it has to wait, and each 32nd time. A
            cancelled call has published nothing.
        """
        name, text = prepare(channel, payload)
        queue = self._queue
        queue.check()
        await queue.checkpoint()
        if not queue.offer(name, text):
            await queue.put(name, text)

    @overload
    def publish_nowait(self, channel: str, payload: str = "") -> None: ...
    @overload
    def publish_nowait(self, channel: Channel[T], payload: T) -> None: ...
    def publish_nowait(self, channel: str | Channel[Any], payload: Any = "") -> None:
        """Put a notification in line at once; for `Connection.after_commit`, say.

        Args:
            channel: As `publish` takes it.
            payload: As `publish` takes it.

        Raises:
            anyio.WouldBlock: if ``max_pending`` are in line already; nothing was published.
            Exception: as `publish`.
        """
        if not self._queue.offer(*prepare(channel, payload)):
            raise anyio.WouldBlock

    async def flush(self) -> None:
        """Wait until everything that is in line now has been confirmed by the server.

        It is sent at once. In an outage this waits for its end; bound it with
        `anyio.fail_after`.

        Raises:
            UndeliveredError: if the server has meanwhile refused some of it for good.
            anyio.ClosedResourceError: if the publisher's block has been left.
            anyio.BrokenResourceError: if the publisher has ended by an error, the cause.

        Cancellation:
            A checkpoint. A cancelled call changes nothing: what is in line stays there.
        """
        queue = self._queue
        queue.check()
        count, refused = queue.accepted, queue.refused
        await anyio.lowlevel.checkpoint()
        await queue.wait_settled(count)
        if queue.settled < count:
            queue.check()
        if refused != queue.refused:
            raise UndeliveredError(
                f"notifications were refused by the server: {queue.refusal}",
                count=queue.refused - refused,
            ) from queue.refusal

    def statistics(self) -> PublisherStatistics:
        """Return what it has done so far."""
        queue = self._queue
        return PublisherStatistics(
            pending=queue.pending,
            in_flight=len(queue.in_flight),
            tasks_waiting=queue.tasks_waiting,
            delivered=queue.delivered,
            refused=queue.refused,
            batches=self._delivery.batches,
            retries=self._delivery.retries,
            last_error=self._delivery.last_error,
        )


@asynccontextmanager
async def open_publisher(
    source: Conninfo | Connection[Any] | Pool,
    *,
    interval: float = 0.010,
    max_batch: int = 1000,
    max_pending: int = 10_000,
    flush_timeout: float = 2.0,
) -> AsyncGenerator[Publisher]:
    """Publish notifications beside your transactions, for the length of a block.

    NOTIFY in a transaction makes it commit under one lock of the whole server. A publisher
    takes what is to be sent, from any number of tasks, and sends it in batches of its own,
    which have nothing to write and so hold that lock for a moment only.

    Everything is delivered in the order in which it was published, at least once: a batch that
    was not confirmed, because the session was lost, is sent again when there is another. In an
    outage at most ``max_pending`` and one batch are kept. What is in line when the process
    ends, or ``flush_timeout`` is over, is lost: use `notify` in the transaction, or an event
    log, for what must not be.

    Args:
        source: Where to send. With a conninfo the publisher has a session of its own, made in
            the background, and another one when that is lost; a callable is asked at
            each attempt, and of several hosts the primary is taken. With a pool each batch
            borrows a connection. A `Connection` is used while it is in no transaction, and
            when it is lost so is the publisher.
        interval: Seconds for which a batch waits for more, unless it is full or somebody
            flushes.
        max_batch: How many are sent in one transaction.
        max_pending: How many may be in line, those of the batch in flight not counted.
        flush_timeout: Seconds that leaving may take to send what is in line.

    Yields:
        The publisher.

    Raises:
        ValueError: if an option is out of its range.
        ConninfoError: if the connection string can't be understood.
        UndeliveredError: if the body has ended well, and not everything was confirmed in time.
        psycopg.Error: what another attempt would not heal, as a wrong password; the block
            is cancelled.

    Cancellation:
        Entering is a checkpoint. Leaving is shielded for at most ``flush_timeout``; closing
        the session takes no round trip, on a `Connection` or a pool's at most a second.
    """
    _check_seconds("interval", interval)
    _check_seconds("flush_timeout", flush_timeout)
    _check_count("max_batch", max_batch)
    _check_count("max_pending", max_pending)
    queue = PublisherQueue(interval=interval, max_batch=max_batch, max_pending=max_pending)
    delivery = Delivery(await find_carrier(source), queue)
    await anyio.lowlevel.checkpoint()
    has_ended_well = False
    try:
        async with open_background() as tasks:
            tasks.start_soon(delivery.run)
            try:
                yield create(Publisher, queue, delivery)
                has_ended_well = True
            except anyio.BrokenResourceError as exc:
                if queue.failure is None or exc.__cause__ is not queue.failure:
                    raise
                # The publisher's own end, met in the block as well: it comes out once.
            finally:
                queue.close()
                try:
                    with anyio.move_on_after(flush_timeout, shield=True):
                        await queue.wait_settled(queue.accepted)
                finally:  # asyncio's own `Task.cancel` knows no shields
                    delivery.stop()
    finally:
        queue.end()
        count = queue.accepted - queue.delivered
        error = queue.failure or delivery.trouble or queue.refusal
        if count:
            emit("publisher.undelivered", count=count, error=error)
    if has_ended_well and count:
        reason = error or f"flush_timeout ({flush_timeout:g} s) was over"
        raise UndeliveredError(
            f"{count} notifications were not confirmed by the server: {reason}", count=count
        ) from error


def _check_seconds(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be 0 or more seconds, not {value!r}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
