"""When there may be something new in a log: the bus says so, and a clock where it could not."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, final

import anyio

from pgstructured._util import NoPublicConstructor, create
from pgstructured.errors import BusUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pgstructured.notify import NotifyBus, Subscription


@final
class WakeUps(anyio.abc.ObjectReceiveStream[None], metaclass=NoPublicConstructor):
    """Tells when to read; made by `EventLog.wake_ups`."""

    def __init__(self, subscription: Subscription[str], poll: float) -> None:
        self._subscription = subscription
        self._poll = poll
        self._is_new = True
        # How the bus has ended; then the wake-up that came instead was the last.
        self._ending: Exception | None = None

    async def receive(self) -> None:
        """Wait until there may be something new: at once for the first time.

        Any number of appends that come before the next call are one wake-up. The end of the
        bus is one too, for what it could not tell any more.

        Raises:
            anyio.EndOfStream: once the bus was closed, and a last wake-up has come.
            BusUnavailableError: once the bus has died, and a last wake-up has come.
            ListenRejectedError: if the server refused to listen again after an outage; once.
            anyio.ClosedResourceError: if this stream was closed, or has raised its last.
            anyio.BusyResourceError: if another task is receiving.

        Cancellation:
            A checkpoint. A wake-up is not lost by it.
        """
        if self._is_new:
            await anyio.lowlevel.checkpoint()
            self._is_new = False
            return
        with anyio.move_on_after(self._poll):
            try:
                await self._subscription.receive()
            except (anyio.EndOfStream, BusUnavailableError) as exc:
                if self._ending is not None:
                    raise
                self._ending = exc  # and comes again

    async def aclose(self) -> None:
        """Stop being woken; a task that waits in `receive` is told.

        Cancellation:
            A checkpoint; nothing is left to be done.
        """
        await self._subscription.aclose()


@asynccontextmanager
async def open_wake_ups(bus: NotifyBus, channel: str, poll: float) -> AsyncGenerator[WakeUps]:
    """Be woken for the length of a block."""
    # One wake-up is as good as many, a gap as good as any.
    async with bus.subscribe(channel, overflow="latest") as subscription:
        yield create(WakeUps, subscription, poll)


def check_poll(poll: float) -> float:
    """Return ``poll`` if it is a time to wait."""
    given: Any = poll
    if not isinstance(given, (int, float)) or not 0 < given < math.inf:
        raise ValueError(f"poll must be more than 0 seconds, and not for ever: {given!r}")
    return poll
