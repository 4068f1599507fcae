"""A deterministic order for blocks of different tasks."""

from __future__ import annotations

from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, final

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@final
class Sequencer:
    """Run blocks of different tasks in an explicit order.

    ``async with sequencer(n):`` waits until block ``n - 1`` has ended.
    """

    __slots__ = ("_claimed", "_points")

    def __init__(self) -> None:
        self._points: defaultdict[int, anyio.Event] = defaultdict(anyio.Event)
        self._claimed: set[int] = set()

    @asynccontextmanager
    async def __call__(self, position: int) -> AsyncGenerator[None]:
        """Wait for this block's turn; end it when the block ends.

        Args:
            position: 0 for the first block; each is used once.

        Raises:
            RuntimeError: the position has been used.

        Cancellation:
            A checkpoint on entering, unless it is block 0. A block that is
            cancelled while waiting or inside lets the next one in.
        """
        if position in self._claimed:
            raise RuntimeError(f"block {position} of the sequence was entered before")
        self._claimed.add(position)
        try:
            if position:
                await self._points[position].wait()
            yield
        finally:
            self._points[position + 1].set()
