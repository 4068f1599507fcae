"""What a pool has and has done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatistics:
    """What a pool has now, and has done since it was opened; see `Pool.statistics`."""

    size: int
    """Connections that there are or are being made, idle and borrowed; at most ``max_size``."""
    idle: int
    """Connections that nobody has."""
    in_use: int
    """Connections that tasks have."""
    tasks_waiting: int
    """Tasks that wait for one."""
    min_size: int
    """Connections that are kept open."""
    max_size: int
    """Connections that there may be."""
    opened: int
    """Connections that were made."""
    closed_expired: int
    """Connections that were closed for their age, for resting too long, or by `Pool.drain`."""
    closed_broken: int
    """Connections that were found dead, or could not be made as they were."""
    connect_errors: int
    """Attempts to connect that failed."""
    acquired: int
    """Acquires that got a connection."""
    acquire_timeouts: int
    """Acquires that got none in time."""
    acquire_cancelled: int
    """Acquires that were cancelled while they waited or connected."""
    acquire_wait_seconds: float
    """Seconds that acquires have taken, all together."""
    use_seconds: float
    """Seconds for which connections were borrowed, all together; of those given back."""


@final
class Counters:
    """The figures of `PoolStatistics` that only grow."""

    __slots__ = (
        "acquire_cancelled",
        "acquire_timeouts",
        "acquire_wait_seconds",
        "acquired",
        "closed_broken",
        "closed_expired",
        "connect_errors",
        "opened",
        "use_seconds",
    )

    def __init__(self) -> None:
        self.opened: int = 0
        self.closed_expired: int = 0
        self.closed_broken: int = 0
        self.connect_errors: int = 0
        self.acquired: int = 0
        self.acquire_timeouts: int = 0
        self.acquire_cancelled: int = 0
        self.acquire_wait_seconds: float = 0.0
        self.use_seconds: float = 0.0
