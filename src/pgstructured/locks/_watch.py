"""Telling the locks of one session of its end, of its silence and of their own ttl, in time."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, final

import anyio

from pgstructured._util import open_background

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable


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
        self._bounds: dict[anyio.CancelScope, float] = {}
        self._scope = anyio.CancelScope()
        self._is_over = False

    def add(self, look: Callable[[], None], expires_at: float) -> None:
        """Look after a lock until `discard`.

        Args:
            look: Lets it take note of what has happened to it.
            expires_at: Event-loop time at which its ttl is over; infinite without one.
        """
        self._locks[look] = expires_at
        if self._is_over:
            look()
        else:
            self._wake_at(min(expires_at, self._overdue_at()))

    def discard(self, look: Callable[[], None]) -> None:
        """Forget a lock; without effect if it is not known."""
        # The deadline stays: waking once too early costs less than a timer for each lock.
        self._locks.pop(look, None)

    def bound(self, scope: anyio.CancelScope, deadline: float) -> None:
        """Cancel ``scope`` at ``deadline``, unless `unbound` comes first.

        What a deadline of its own would do, without a timer each time.
        """
        self._bounds[scope] = deadline
        self._wake_at(deadline)

    def unbound(self, scope: anyio.CancelScope) -> None:
        """Forget a scope."""
        self._bounds.pop(scope, None)

    def remind(self, at: float) -> None:
        """Call ``on_wake`` at that event-loop time, or soon after."""
        self._remind_at = min(self._remind_at, at)
        self._wake_at(at)

    def stop(self) -> None:
        """End `run`; idempotent."""
        self._is_over = True
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
            with anyio.CancelScope(deadline=self._deadline(), shield=True) as self._scope:
                await wait_ended()
                self._is_over = True
            with anyio.CancelScope(shield=True):
                # If this event loop was late, and not the server, its word is read first.
                await anyio.lowlevel.checkpoint()
            self.look()
            now = anyio.current_time()
            if now >= self._remind_at and self._on_wake is not None:
                self._remind_at = math.inf
                self._on_wake()
            for scope, deadline in tuple(self._bounds.items()):
                if now >= deadline:
                    scope.cancel()

    def look(self) -> None:
        """Let every lock take note of what has happened to it."""
        for look in tuple(self._locks):
            look()

    def _wake_at(self, at: float) -> None:
        if at < self._scope.deadline:  # noqa: PLR1730 - setting it sets a timer
            self._scope.deadline = at

    def _deadline(self) -> float:
        deadline = min(self._remind_at, *self._bounds.values(), math.inf)
        if self._locks:
            deadline = min(deadline, self._overdue_at())
            deadline = min(deadline, *self._locks.values())
        return deadline
