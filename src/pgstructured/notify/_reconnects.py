"""The stream of new generations."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import anyio
from anyio.abc import ObjectReceiveStream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@final
class Reconnects(ObjectReceiveStream[int]):
    """Generations of a bus as they come; only the newest one waits to be received."""

    def __init__(self, wait_generation: Callable[[int], Awaitable[int]], seen: int) -> None:
        self._wait_generation = wait_generation
        self._seen = seen
        self._scope: anyio.CancelScope | None = None
        self._is_closed = False

    async def receive(self) -> int:
        """Return the present generation once it is another than the last one received.

        Raises:
            anyio.EndOfStream: if the bus is closed.
            BusUnavailableError: if the bus has died.
            anyio.ClosedResourceError: if this stream is closed.
            anyio.BusyResourceError: if another task is receiving.

        Cancellation:
            A checkpoint; nothing is lost.
        """
        if self._scope is not None:
            raise anyio.BusyResourceError("receiving from")
        if not self._is_closed:
            self._scope = anyio.CancelScope()
            try:
                with self._scope:
                    self._seen = await self._wait_generation(self._seen)
                    return self._seen
            except anyio.ClosedResourceError:
                raise anyio.EndOfStream from None
            finally:
                self._scope = None
        await anyio.lowlevel.checkpoint()
        raise anyio.ClosedResourceError

    async def aclose(self) -> None:
        """Close the stream; a task that waits in it gets `anyio.ClosedResourceError`.

        Cancellation:
            A checkpoint; closed in any case.
        """
        self._is_closed = True
        if self._scope is not None:
            self._scope.cancel()
        await anyio.lowlevel.checkpoint()
