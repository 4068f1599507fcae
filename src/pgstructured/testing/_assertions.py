"""Assertions about checkpoints that work on every backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def assert_cancellable(fn: Callable[[], Awaitable[object]]) -> None:
    """Fail unless an async function notices a cancellation that is pending already.

    Args:
        fn: called without arguments, inside a cancelled scope.

    Raises:
        AssertionError: it ran to its end.

    Cancellation:
        As far as ``fn`` is a checkpoint.
    """
    with anyio.CancelScope() as scope:
        scope.cancel()
        await fn()
    if not scope.cancelled_caught:
        raise AssertionError(f"{fn!r} ran to its end and never noticed the cancellation")
