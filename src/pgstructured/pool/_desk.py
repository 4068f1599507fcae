"""The desk of a pool: its books, what becomes of a connection that nobody has, its end."""

from __future__ import annotations

import math
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Final, Literal

import anyio

from pgstructured.driver import running_event_loop
from pgstructured.errors import PoolClosedError, PoolTimeoutError
from pgstructured.observe import emit

from ._waiters import Grant

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from pgstructured.driver import Parking

    from ._ledger import Ledger
    from ._members import Member
    from ._opening import Opener
    from ._options import PoolOptions
    from ._statistics import Counters

End = Literal["expired", "idle", "drained", "broken", "unusable", "surplus", "closed"]
"""Why a connection is closed."""


class Desk:
    """The desk of one pool.

    Args:
        options: How the pool lives.
        ledger: Who has what.
        counters: What has been done.
        opener: Makes connections.
        now: Returns the event-loop time.
    """

    def __init__(
        self,
        options: PoolOptions,
        ledger: Ledger,
        counters: Counters,
        opener: Opener,
        now: Callable[[], float],
    ) -> None:
        self.options: Final = options
        self.ledger: Final = ledger
        self.counters: Final = counters
        self.opener: Final = opener
        self.now: Final = now
        self.holders: Final[dict[object, Member]] = {}
        """By task: what it holds, so that it must not wait for another one. The task itself: one
        that has ended leaves its number to another."""
        self.is_closing: bool = False
        self.wake_at: Callable[[float], None] = _nobody
        """Has the keeper look at the event-loop time that it is given, before ``looks_at``."""
        self.looks_at: float = math.inf
        """When the keeper is going to."""
        backend = anyio.lowlevel.current_token().backend_class
        self.check_cancelled: Callable[[], Awaitable[None]] = backend.checkpoint_if_cancelled
        self.current_task: Callable[[], object] = running_event_loop().task
        self._name = options.name
        self._turn_at = 0.0
        self._cleans_always = options.on_release is not None
        self._prepares_always = options.on_acquire is not None
        limit = options.check_after_idle
        self._check_after = math.inf if limit is None else limit
        self._tickets = 0
        self._parkings: list[Parking] = []
        self._changed: anyio.Event | None = None
        self._under_way: set[anyio.CancelScope] = set()

    # ------------------------------------------------------------ what nobody has

    def put_back(self, member: Member) -> None:
        """Give a connection that nobody has to the next in line, or let it rest, or close it."""
        if self.is_closing:
            self.retire(member, "closed")
        elif member.conn.closed:
            self.retire(member, "broken")
        else:
            self.shelve(member, self.now())

    def shelve(self, member: Member, now: float) -> None:
        """Do with a connection that lives what its times and the pool's size ask for."""
        ledger = self.ledger
        expires_at, idle_limit = member.expires_at, member.idle_limit
        end: End
        if member.generation != ledger.generation:
            end = "drained"
        elif ledger.size > ledger.max_size:
            end = "surplus"
        elif now >= expires_at:
            end = "expired"
        elif not idle_limit and not ledger.waiters and ledger.size > ledger.min_size:
            end = "idle"
        else:
            due = now + idle_limit
            if due > expires_at:  # noqa: PLR1730 - cheaper than min(), here and below
                due = expires_at
            if due < self.looks_at:
                self.wake_at(due)
            doubtful = now + self._check_after
            member.fresh_until = due if due < doubtful else doubtful  # noqa: FURB136 - ditto
            member.used_at = perf_counter()
            member.idle_since = now
            line = ledger.waiters.line
            if line:
                line.pop(0).give(member)
            else:
                ledger.idle.append(member)
            return
        self.retire(member, end)

    def retire(self, member: Member, end: End) -> None:
        """Close a connection that nobody has, and on which nothing runs."""
        member.session.discard()
        self.strike(end)

    async def close(self, member: Member, end: End) -> None:
        """Close a connection that nobody is to have, whatever runs on it."""
        if member.conn.failure is not None:
            end = "broken"
        with anyio.CancelScope(shield=True):  # bounded by the connection's close_timeout
            await member.session.aclose()
        self.strike(end)

    def strike(self, end: End) -> None:
        if end in {"expired", "idle", "drained"}:
            self.counters.closed_expired += 1
        elif end in {"broken", "unusable"} and not self.is_closing:
            self.counters.closed_broken += 1
        emit("pool.connection_closed", pool=self._name, reason=end)
        self.ledger.free_slot()
        self.tell_change()

    # ------------------------------------------------------------ closing

    def begin_closing(self) -> None:
        """Refuse whoever comes, tell whoever waits or connects, close what is idle; idempotent."""
        self.is_closing = True
        self.ledger.waiters.give_all(Grant.CLOSED)
        for scope in self._under_way:
            scope.cancel()
        idle, self.ledger.idle = self.ledger.idle, []
        for member in idle:
            self.retire(member, "closed")

    async def wait_returned(self, *, but_borrowed: bool = False) -> None:
        """Wait until every connection has come back, and none is being made any more.

        Args:
            but_borrowed: Don't wait for those that tasks have.

        Cancellation:
            A checkpoint where there is something to wait for.
        """
        ledger = self.ledger
        while ledger.size > (len(ledger.borrowed) if but_borrowed else 0):
            ledger.freed = anyio.Event()
            await ledger.freed.wait()

    async def close_borrowed(self) -> None:
        """Close the connections that tasks still have; what runs on them is cancelled.

        Cancellation:
            Shielded, and bounded by their ``close_timeout``.
        """
        async with anyio.create_task_group() as tasks:
            for member in self.ledger.borrowed:
                tasks.start_soon(member.session.aclose)

    @contextmanager
    def noted_under_way(self) -> Generator[None]:
        """Let the end of the pool cut a block short."""
        with anyio.CancelScope() as scope:
            self._under_way.add(scope)
            try:
                yield
            finally:
                self._under_way.discard(scope)
                self.tell_change()

    async def wait_change(self) -> None:
        """Wait until a connection that was neither idle nor borrowed is one of these, or gone.

        Cancellation:
            A checkpoint.
        """
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()

    def tell_change(self) -> None:
        """Wake whoever is in `wait_change`, to look once the current step is over."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    # ------------------------------------------------------------ telling

    def figures(self) -> str:
        """Return how many connections there are and who wants them."""
        ledger = self.ledger
        return (
            f"{len(ledger.borrowed)} of {ledger.max_size} connections in use,"
            f" {len(ledger.idle)} idle, {ledger.size - len(ledger.borrowed) - len(ledger.idle)}"
            f" being made, {len(ledger.waiters)} tasks waiting"
        )

    def __repr__(self) -> str:
        return f"<Pool {self._name}: {self.figures()}>"

    def closed(self) -> PoolClosedError:
        return PoolClosedError(f"the pool {self._name} is closed")

    def late(self, cause: Exception | None, why: str = "") -> PoolTimeoutError:
        limit = self.options.acquire_timeout
        text = f"no connection within {limit:g} s: {self.figures()}"
        if why:
            text = f"{text}; {why}"
        if cause is not None:
            first_line = str(cause).strip().partition("\n")[0]
            text = f"{text}; the last attempt to connect failed: {first_line}"
        error = PoolTimeoutError(text)
        error.__cause__ = cause
        emit("pool.acquire_timed_out", pool=self._name, error=cause)
        return error


def _nobody(_: float) -> None:
    """Stand in until there is a keeper."""
