"""`Semaphore`: a limited number of holders."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, final

import anyio

from pgstructured._util import NoPublicConstructor
from pgstructured.observe import emit

from ._held import HeldLock
from ._life import begin
from ._opening import hold, new_request
from ._telling import tell_end

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager
    from typing import Any

    from ._grip import LockRequest
    from ._keys import LockKey
    from ._slots import Slots


@final
class HeldSlot(HeldLock):
    """One of the places of a `Semaphore`, held; made by `Semaphore.acquire`.

    Its ``key`` is the slot's own: what ``pg_locks`` shows.
    """

    __slots__ = ("_slot",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slot = 0

    @property
    def slot(self) -> int:
        """Its number, from 0 to the limit less 1; of all that are held no two are the same."""
        return self._slot


@final
class Semaphore(metaclass=NoPublicConstructor):
    """A lock that a limited number may hold; made by `Locks.semaphore`.

    Whoever waits is served first come first served, as with a lock, across processes too,
    and nobody overtakes those who wait. A place whose holder dies is free as soon as the
    server has noticed, and taken by whoever waits within a second of that.

    Every process has to say the same limit: whoever says a higher one takes places that
    the others don't count.

    It has nothing to do with the lock of its key: its places are locks of their own, with
    keys that are derived from it.
    """

    def __init__(self, slots: Slots, key: LockKey, limit: int) -> None:
        self._slots = slots
        self._key = key
        self._limit = limit

    def __repr__(self) -> str:
        return f"<Semaphore {self._key} limit={self._limit}>"

    @property
    def key(self) -> LockKey:
        """The key that it was made with."""
        return self._key

    @property
    def limit(self) -> int:
        """How many may hold it."""
        return self._limit

    def acquire(
        self, acquire_timeout: float | None = None
    ) -> AbstractAsyncContextManager[HeldSlot]:
        """Run a block as one of the holders, waiting for a place first.

        A task may hold several places. Tasks that each hold some and want more can wait for
        each other for ever; a task that holds all of them is refused.

        Args:
            acquire_timeout: Seconds to wait for it; None for as long as it takes, 0 for one try.

        Returns:
            A context manager that gives the place.

        Raises:
            LockTimeout: if none could be had in time.
            LockLost: if it was lost; the body's own error, if any, is ``__cause__``.
            LockAlreadyHeldError: if this task holds all of them.
            PgStructuredError: as `Locks.lock` in everything else.
            ValueError: if the time is out of range.
            psycopg.Error: what the server says.
            anyio.ClosedResourceError: if the `Locks` is closed.

        Cancellation:
            Entering is a checkpoint. A cancelled or failed entry leaves no place taken, and
            takes at most ``release_timeout`` for that. Leaving is as for `Locks.lock`.
        """
        return self._open(new_request(self._key, acquire_timeout=acquire_timeout))

    @asynccontextmanager
    async def _open(self, request: LockRequest) -> AsyncGenerator[HeldSlot]:
        began = anyio.current_time()
        emit("lock.acquire_started", key=self._key, shared=False)
        try:
            number, key, grip = await self._slots.take(self._limit, request)
        except BaseException as exc:
            tell_end(request, began, exc)
            raise
        body_scope = anyio.CancelScope()
        held = begin(
            HeldSlot,
            grip,
            body_scope,
            request._replace(key=key),
            None,
            began,
            self._slots.release_timeout,
        )
        held._slot = number  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        async with hold((held,), body_scope):
            yield held
