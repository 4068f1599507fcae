"""A connection of a pool, with what the pool has to remember of it."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    from pgstructured.driver import Connection, PooledConnection

    from ._options import PoolOptions

_JITTER: Final = 0.1
"""The part of a time limit that is left to chance, so that not all are over at once."""


@final
class Member:
    """One connection, and the times that count for it, in event-loop seconds."""

    __slots__ = (
        "borrowed_at",
        "conn",
        "expires_at",
        "fresh_until",
        "generation",
        "holder",
        "idle_limit",
        "idle_since",
        "is_left",
        "is_pinned",
        "kept",
        "session",
        "used_at",
    )

    def __init__(
        self, session: PooledConnection, options: PoolOptions, *, generation: int, now: float
    ) -> None:
        self.session: Final = session
        self.conn: Final[Connection[Any]] = session.conn
        self.generation: Final = generation
        """It is of the pool's present generation, or was made before the last `drain`."""
        self.expires_at: Final = now + _shortened(options.max_lifetime)
        self.idle_limit: Final = _shortened(options.max_idle)
        self.idle_since: float = now
        self.used_at: float = 0.0
        """When it was used last, by `time.perf_counter`."""
        self.fresh_until: float = now
        """Until then it is given out without another look at its times."""
        self.borrowed_at: float = now
        self.holder: object | None = None
        """The task that must not acquire another one meanwhile."""
        self.is_pinned: bool = False
        """Whether that task gets this one if it acquires again."""
        self.kept: int = 0
        """How many loans outlive the block that it was borrowed for; see `Loan`."""
        self.is_left: bool = False
        """Whether that block has ended."""

    def is_past_rest(self, now: float) -> bool:
        """Tell whether it has been idle for as long as it may."""
        return now - self.idle_since >= self.idle_limit


def _shortened(limit: float | None) -> float:
    if limit is None:
        return math.inf
    return limit * (1 - _JITTER * random.random())  # noqa: S311 - jitter, not a secret
