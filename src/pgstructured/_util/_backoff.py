"""Backoff arithmetic: exponential growth with full jitter."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait between attempts that fail.

    Attempt ``n`` (from 0) waits a uniformly random time between 0 and
    ``min(maximum, initial * factor ** n)`` seconds: "full jitter", which spreads
    a thousand clients over the whole interval where plain exponential backoff
    lets them come back together.

    Raises:
        ValueError: if a figure is not a finite number in its range.
    """

    initial: float = 0.1
    """Upper bound of the first wait, in seconds; more than 0."""
    maximum: float = 30.0
    """Upper bound of every wait, in seconds; at least ``initial``."""
    factor: float = 2.0
    """Growth of the bound per failed attempt; at least 1."""
    reset_after: float = 10.0
    """Seconds a session must have been healthy before the count starts anew."""

    def __post_init__(self) -> None:
        figures = (self.initial, self.maximum, self.factor, self.reset_after)
        if not all(math.isfinite(figure) for figure in figures):
            raise ValueError("backoff takes finite numbers only")
        if self.initial <= 0:
            raise ValueError(f"backoff initial must be more than 0, not {self.initial}")
        if self.maximum < self.initial:
            raise ValueError(
                f"backoff maximum ({self.maximum}) must not be below initial ({self.initial})"
            )
        if self.factor < 1:
            raise ValueError(f"backoff factor must be at least 1, not {self.factor}")
        if self.reset_after < 0:
            raise ValueError(f"backoff reset_after must not be negative, not {self.reset_after}")

    def bound(self, attempt: int) -> float:
        """Return the longest wait after failed attempt number ``attempt`` (from 0), in seconds."""
        try:
            return min(self.maximum, self.initial * self.factor**attempt)
        except OverflowError:
            return self.maximum

    def delay(self, attempt: int) -> float:
        """Return a random wait after failed attempt number ``attempt`` (from 0), in seconds."""
        return random.uniform(0.0, self.bound(attempt))  # noqa: S311 - jitter, not a secret
