"""What every handle of a lock knows of it."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from pgstructured._util import NoPublicConstructor
from pgstructured.observe import emit

if TYPE_CHECKING:
    from pgstructured.errors import LockLost

    from ._grip import Grip
    from ._keys import LockKey
    from ._loss import Loss


class State(Enum):
    """What a lock is; see `_held`."""

    HELD = auto()
    RELEASED = auto()
    DETACHED = auto()
    LOST = auto()


class LockHandle(metaclass=NoPublicConstructor):
    """A lock on the server, and what has become of it."""

    __slots__ = (
        "__weakref__",
        "_acquired_at",
        "_grip",
        "_held_for",
        "_key",
        "_loss",
        "_release_timeout",
        "_shared",
    )

    def __init__(
        self,
        grip: Grip,
        key: LockKey,
        shared: bool,  # noqa: FBT001 - made for every lock, and so cheapest
        acquired_at: float,
        release_timeout: float,
    ) -> None:
        self._grip = grip
        self._key = key
        self._shared = shared
        self._acquired_at = acquired_at
        self._release_timeout = release_timeout
        self._loss: Loss | None = None
        self._held_for = 0.0

    @property
    def key(self) -> LockKey:
        """The key, as Postgres sees it."""
        return self._key

    @property
    def shared(self) -> bool:
        """Whether others may hold it too, shared."""
        return self._shared

    @property
    def fencing_token(self) -> int | None:
        """A number that grows with every fenced grant of the key; None without ``fenced``."""
        grant = self._grip.fencing
        return None if grant is None else grant.token

    @property
    def backend_pid(self) -> int:
        """Process id of the server session that holds it."""
        return self._grip.backend_pid

    def _take_note(self, loss: Loss) -> None:
        """It is lost, and that is told."""
        self._loss = loss
        self._held_for = self._grip.now() - self._acquired_at
        emit(
            "lock.lost",
            key=self._key,
            reason=loss.reason,
            sqlstate=loss.sqlstate,
            held_for=self._held_for,
        )

    def _error(self, loss: Loss) -> LockLost:
        """Return a new error each time: several tasks may raise it, each with its own cause."""
        return loss.error(
            self._key, held_for=self._held_for, last_confirmed=self._grip.last_confirmed
        )
