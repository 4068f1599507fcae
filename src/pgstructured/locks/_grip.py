"""The seam between locks and what they are held on.

A source takes a lock and gives a `Grip`; `_block` and `_life` do all the rest, the same
for every source. Another kind of source is one more class with what `LockSource` asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    import anyio

    from pgstructured.driver import Connection

    from ._fencing import FenceGrant, FenceTable
    from ._keys import LockKey
    from ._loss import Loss
    from ._watch import Watch


@final
class LockRequest(NamedTuple):  # a tuple: made for every lock, and cheapest
    """What is asked of a source."""

    key: LockKey
    shared: bool
    acquire_timeout: float | None = None
    """Seconds to wait; None for as long as it takes, 0 for one try."""
    is_try: bool = False
    """Give None if the lock is not free, instead of waiting or raising."""
    fenced: bool = False
    """Give a fencing token with it."""

    @property
    def may_wait(self) -> bool:
        """Whether to stand in the server's queue if the lock is not free."""
        return not self.is_try and self.acquire_timeout != 0


class Grip(Protocol):
    """One granted lock on one session."""

    @property
    def backend_pid(self) -> int:
        """Process id of the session."""
        ...

    @property
    def identity(self) -> str:
        """The lock table that the key is in."""
        ...

    @property
    def connection(self) -> Connection[Any] | None:
        """The session, where it is the user's."""
        ...

    @property
    def fencing(self) -> FenceGrant | None:
        """What guards the lock's data, where that was asked for."""
        ...

    @property
    def fence(self) -> FenceTable:
        """Where the token is kept."""
        ...

    @property
    def watch(self) -> Watch:
        """What tells the session's locks of its end."""
        ...

    @property
    def now(self) -> Callable[[], float]:
        """Returns the event-loop time."""
        ...

    @property
    def is_known_to_task(self) -> bool:
        """Whether its source knows by itself which task holds it, see `_tasks`."""
        ...

    @property
    def last_confirmed(self) -> float:
        """Event-loop time of the last proof that the session lives."""
        ...

    @property
    def overdue_at(self) -> float:
        """Event-loop time at which silence is a loss; infinite where that is not watched."""
        ...

    @property
    def has_ended(self) -> bool:
        """Whether the session is known to have ended; of a detached one, asked now."""
        ...

    def diagnose(self) -> Loss:
        """Return why the session has ended."""
        ...

    async def confirm(self) -> bool:
        """Make a round trip; return whether the lock is held.

        Raises:
            psycopg.Error: if it can't be known.
            anyio.ClosedResourceError: if the session is closed.
        """
        ...

    def unlock(self) -> Awaitable[bool]:
        """Release the lock, sending at once where that can be; return whether it was held.

        Raises:
            psycopg.Error: if it can't be known.
            anyio.ClosedResourceError: if the session is closed.
        """
        ...

    @property
    def is_unlocked(self) -> bool:
        """Whether an `unlock` that was cancelled has been answered all the same: it was held."""
        ...

    @property
    def patience(self) -> float:
        """The part of ``release_timeout`` that `unlock` may wait; the rest is to settle it."""
        ...

    async def abandon(self) -> None:
        """Give up a lock that could not be unlocked, without waiting for the server.

        Ends its session, or where that holds others' locks too, leaves the unlock to come.
        """
        ...

    def forget(self) -> None:
        """Take note that the lock is gone, with its session or behind its back."""
        ...

    def detach(self) -> None:
        """Keep the lock, and its session, when the block ends that it was taken for."""
        ...

    def attend(self) -> AbstractAsyncContextManager[None]:
        """See to a detached lock's session for the length of a block."""
        ...


class LockSource(Protocol):
    """Where locks can be held."""

    @property
    def release_timeout(self) -> float:
        """Seconds an unlock may take."""
        ...

    @property
    def now(self) -> Callable[[], float]:
        """Returns the event-loop time."""
        ...

    @property
    def create_scope(self) -> Callable[[], anyio.CancelScope]:
        """Returns a new cancel scope."""
        ...

    @property
    def ask(self) -> Callable[[LockRequest], Awaitable[Grip | None]] | None:
        """As `take`, where nothing has to be done at the block's end; None where it has.

        What it returns has to be awaited at once, but for what needs no awaiting.
        """
        ...

    def take(self, request: LockRequest) -> AbstractAsyncContextManager[Grip | None]:
        """Take a lock for the length of a block, which is to unlock it or detach it.

        Yields:
            The grip on it; None if it is not free and the request is only a try.

        Raises:
            LockTimeout: if it could not be had in time.
        """
        ...
