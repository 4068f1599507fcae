"""Telling the locks of one session of its end, of its silence and of their own ttl, in time."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import anyio

from pgstructured._util import open_background

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

_LOOK_AGAIN: Final = 0.005
"""Seconds until those are told again who have been told already and are still there."""


@final
class Watch:
    """One task's work for any number of locks on one session.

    Args:
        overdue_at: Returns the event-loop time at which the session's silence is a loss.
        on_wake: Called whenever `remind` has asked for it.
    """

    def __init__(
        self, overdue_at: Callable[[], float], on_wake: Callable[[], None] | None = None
    ) -> None:
        self._overdue_at = overdue_at
        self._on_wake = on_wake
        self._remind_at = math.inf
        self._locks: dict[Callable[[], None], float] = {}
        self._scope = anyio.CancelScope()
        self._wakes_at = math.inf  # the scope's deadline, which costs more to ask for
        self._is_over = False

    def add(self, look: Callable[[], None], due_at: float) -> None:
        """Look after a lock until `discard`; anew, where it is known already.

        Args:
            look: Lets it take note of what has happened to it.
            due_at: Event-loop time at which to let it look in any case; may be infinite.
        """
        self._locks[look] = due_at
        if due_at < self._wakes_at or self._wakes_at == math.inf:
            if self._is_over:
                look()
            else:
                self._wake_at(min(due_at, self._overdue_at()))

    def discard(self, look: Callable[[], None]) -> None:
        """Forget a lock; without effect if it is not known."""
        # The deadline stays: waking once too early costs less than a timer for each lock.
        self._locks.pop(look, None)

    def remind(self, at: float) -> None:
        """Call ``on_wake`` at that event-loop time, or soon after."""
        if not self._is_over:
            self._remind_at = min(self._remind_at, at)
            self._wake_at(at)

    def stop(self) -> None:
        """End `run`; idempotent."""
        self._end()
        self._scope.cancel()

    @asynccontextmanager
    async def running(self, wait_ended: Callable[[], Awaitable[None]]) -> AsyncGenerator[None]:
        """`run` for the length of a block."""
        async with open_background() as tasks:
            tasks.start_soon(self.run, wait_ended)
            try:
                yield
            finally:
                self.stop()

    async def run(self, wait_ended: Callable[[], Awaitable[None]]) -> None:
        """Watch until the session has ended, or `stop`.

        Args:
            wait_ended: Waits until the session is known to have ended.

        Cancellation:
            Shielded: a body that is being cancelled may still shield itself, and its lock
            still be lost.
        """
        while not self._is_over:
            self._wakes_at = self._find_next()
            with anyio.CancelScope(deadline=self._wakes_at, shield=True) as self._scope:
                await wait_ended()
                self._end()
            with anyio.CancelScope(shield=True):
                # If this event loop was late, and not the server, its word is read first.
                await anyio.lowlevel.checkpoint()
            self.look()
            if anyio.current_time() >= self._remind_at and self._on_wake is not None:
                self._remind_at = math.inf
                self._on_wake()

    def look(self) -> None:
        """Let every lock take note of what has happened to it."""
        for look in tuple(self._locks):
            look()

    def _end(self) -> None:
        self._is_over = True
        self._wakes_at = math.inf  # for `add` to find

    def _wake_at(self, at: float) -> None:
        if at < self._wakes_at:
            self._wakes_at = at
            self._scope.deadline = at  # which sets a timer

    def _find_next(self) -> float:
        """Return when to wake: never later than the silence of the session is a loss."""
        next_at = min(self._remind_at, *self._locks.values(), math.inf)
        if not self._locks:
            return next_at
        next_at, now = min(next_at, self._overdue_at()), anyio.current_time()
        # What is due was told of it, and may need a while to leave.
        return next_at if next_at > now else now + _LOOK_AGAIN
