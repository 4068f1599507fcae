"""A lock that outlives the block it was taken in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn, final

import anyio

from pgstructured.errors import LockLost, LockNotHeldError
from pgstructured.observe import emit

from ._handle import LockHandle
from ._loss import Loss
from ._releasing import abandon, unlock

if TYPE_CHECKING:
    from ._grip import Grip
    from ._keys import LockKey


@final
class DetachedLock(LockHandle):
    """A lock that is held until `release`, or its session ends; made by `HeldLock.detach`.

    From `Locks` it ends with them. From a conninfo its session goes with it, and nothing
    runs on that in the background: its end is noticed when somebody asks or waits, and a
    silent server not at all. On a `Connection` it ends with that.
    """

    __slots__ = ("_ended", "_is_released")

    def __init__(
        self,
        grip: Grip,
        key: LockKey,
        shared: bool,  # noqa: FBT001 - as `LockHandle`
        acquired_at: float,
        release_timeout: float,
    ) -> None:
        super().__init__(grip, key, shared, acquired_at, release_timeout)
        self._is_released = False
        self._ended = anyio.Event()
        grip.watch.add(self._look, math.inf)

    def __repr__(self) -> str:
        state = "lost" if self._loss else "released" if self._is_released else "held"
        return f"<DetachedLock {self._key} {state}>"

    @property
    def is_lost(self) -> bool:
        """Whether it has been lost. A released lock has not."""
        self._look()
        return self._loss is not None

    async def wait_lost(self) -> LockLost:
        """Wait until it is lost.

        Returns:
            What has happened.

        Raises:
            LockNotHeldError: if it is released instead.

        Cancellation:
            A checkpoint; nothing changes.
        """
        self._look()
        async with self._grip.attend():
            await self._ended.wait()
        if self._loss is None:
            self._refuse()
        return self._error(self._loss)

    async def release(self) -> None:
        """Release the lock.

        Returns as `HeldLock.release`.

        Raises:
            LockLost: if it has been lost.
            LockNotHeldError: if it has been released already.

        Cancellation:
            Shielded, at most ``release_timeout``; a pending cancellation is then delivered.
        """
        self._look()
        if self._is_released or self._loss is not None:
            self._refuse()
        self._is_released = True
        held_for = anyio.current_time() - self._acquired_at
        try:
            with anyio.CancelScope(shield=True):  # bounded by release_timeout, inside
                async with self._grip.attend():
                    was_held, failure = await unlock(self._grip, self._release_timeout)
                    if failure is not None and self._grip.has_ended:
                        self._lose(self._grip.diagnose())
                    elif failure is not None:
                        await abandon(self._grip, self._key, failure)
                    elif was_held:
                        emit("lock.released", key=self._key, held_for=held_for)
                    else:
                        self._lose(Loss(reason="closed"))
        finally:
            self._end()
        if self._loss is not None:
            self._refuse()
        await anyio.lowlevel.checkpoint()

    def _look(self) -> None:
        """Take note of a loss that has happened and nobody has noticed yet."""
        if self._is_released or self._loss is not None:
            return
        if self._grip.has_ended:
            self._lose(self._grip.diagnose())
        elif anyio.current_time() >= self._grip.overdue_at:
            self._lose(Loss(reason="unconfirmed"))

    def _lose(self, loss: Loss) -> None:
        self._take_note(loss)
        self._grip.forget()
        self._end()

    def _end(self) -> None:
        self._grip.watch.discard(self._look)
        self._ended.set()

    def _refuse(self) -> NoReturn:
        if self._loss is not None:
            raise self._error(self._loss)
        raise LockNotHeldError(f"the lock {self._key} has been released already")
