"""Connect, serve, back off, count generations: the one place that reconnects.

==========  ===========================================  ========================
state       what ends it                                 next
==========  ===========================================  ========================
connecting  `Supervision.declare_live`                   live
connecting  an error that heals                          waiting
live        an error that heals, or the attempt returns  waiting
waiting     the backoff's delay                          connecting
any         an error that does not heal                  that error, out of `supervise`
not live    ``max_outage`` since the last live moment    `GaveUp`
==========  ===========================================  ========================

The count of failed attempts, which makes delays longer, starts anew only after
``Backoff.reset_after`` live seconds: a server that accepts and hangs up at once
is as expensive to hammer as one that refuses.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn, final

import anyio
import psycopg

from pgstructured.observe import emit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pgstructured._util import Backoff

_DOES_NOT_HEAL = (
    "28",  # invalid authorization: password, no such role, no pg_hba entry
    "3D",  # no such database
    "42501",  # insufficient privilege
    "0A",  # not supported
)


def heals(error: BaseException) -> bool:
    """Tell whether trying again can help: the network, restarts and full servers do heal.

    Wrong passwords, missing databases and programming errors don't.
    """
    if isinstance(error, psycopg.Error):
        return not (error.sqlstate or "").startswith(_DOES_NOT_HEAL)
    return isinstance(error, OSError)


@final
class GaveUp(Exception):  # noqa: N818 - an outcome, turned into a public error by its catcher
    """Nothing was live for ``max_outage`` seconds."""

    def __init__(self, outage: float, last_error: BaseException | None) -> None:
        super().__init__(f"not live for {outage:.3g} s")
        self.outage: float = outage
        """Seconds since the last live moment."""
        self.last_error: BaseException | None = last_error
        """What the last failed attempt raised."""


@final
class Supervision:
    """What `supervise` knows; attempts are given it, owners may look at any time."""

    def __init__(self) -> None:
        self.generation: int = 0
        """How many times it has become live."""
        self.attempts: int = 0
        """How many attempts were begun, in all."""
        self.failures: int = 0
        """How many attempts have failed since the count started anew."""
        self.live_since: float | None = None
        """Event-loop time at which it became live, if it is."""
        self.last_live_at: float | None = None
        """Event-loop time at which it last ceased to be live, or supervision began."""
        self.last_error: BaseException | None = None
        """Why the last attempt ended."""
        self._outage_scope: anyio.CancelScope | None = None

    def declare_live(self) -> int:
        """Say that the attempt is up and serving; return the new generation."""
        self.generation += 1
        self.live_since = anyio.current_time()
        if self._outage_scope is not None:
            self._outage_scope.deadline = math.inf
        return self.generation

    def _begin(self, max_outage: float) -> anyio.CancelScope:
        self.attempts += 1
        if self.last_live_at is None:
            self.last_live_at = anyio.current_time()
        self._outage_scope = anyio.CancelScope(deadline=self.last_live_at + max_outage)
        return self._outage_scope

    def _end(self, error: BaseException, reset_after: float) -> None:
        self.last_error = error
        if self.live_since is not None:
            now = anyio.current_time()
            if now - self.live_since >= reset_after:
                self.failures = 0
            self.last_live_at = now
            self.live_since = None
        self.failures += 1


async def supervise(
    attempt: Callable[[Supervision], Awaitable[object]],
    *,
    what: str,
    backoff: Backoff,
    max_outage: float | None = None,
    is_transient: Callable[[BaseException], bool] = heals,
    supervision: Supervision | None = None,
) -> NoReturn:
    """Run ``attempt`` again and again, for ever.

    Args:
        attempt: Connects, calls `Supervision.declare_live`, serves, and raises or returns
            when what it served is lost.
        what: Name of what is supervised, for events.
        backoff: How long to wait after a failed attempt.
        max_outage: Seconds without a live moment after which to give up, cutting a
            running attempt short; None for never.
        is_transient: Tells which errors another attempt may heal.
        supervision: Where to keep count; a new one by default.

    Raises:
        GaveUp: after ``max_outage``.
        BaseException: what ``attempt`` raises and ``is_transient`` does not recognise.

    Cancellation:
        A checkpoint; cancels the running attempt.
    """
    state = Supervision() if supervision is None else supervision
    limit = math.inf if max_outage is None else max_outage
    while True:
        error: BaseException
        delay = 0.0
        with state._begin(limit) as outage_scope:  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
            try:
                await attempt(state)
                error = psycopg.OperationalError(f"{what} ended")
            except Exception as exc:
                if not is_transient(exc):
                    raise
                error = exc
            state._end(error, backoff.reset_after)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
            delay = backoff.delay(state.failures - 1)
            emit(
                "supervise.attempt_failed",
                what=what,
                attempt=state.failures,
                delay=delay,
                error=error,
            )
        if not outage_scope.cancelled_caught:
            with anyio.CancelScope(deadline=(state.last_live_at or 0.0) + limit) as outage_scope:
                await anyio.sleep(delay)
        if outage_scope.cancelled_caught:
            if state.last_error is None:
                state.last_error = psycopg.errors.ConnectionTimeout(f"{what} was still connecting")
            raise GaveUp(limit, state.last_error) from state.last_error
