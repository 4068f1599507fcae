"""How a bus is: its state, and its figures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import final


@final
class BusState(StrEnum):
    """Where a bus is in its life."""

    CONNECTING = "connecting"
    """It has not been live yet."""
    LIVE = "live"
    """It has a session, and every LISTEN is confirmed."""
    DOWN = "down"
    """It has lost its session and is getting another."""
    CLOSED = "closed"
    """Its scope was left, or it could not come back."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BusStatistics:
    """What a bus has done so far."""

    received: int
    """Notifications that came from the server."""
    dispatched: int
    """Notifications that were for a subscriber, counted for each."""
    dropped: int
    """Of these, how many were lost because a subscriber's buffer was full."""
    reconnects: int
    """How many times it has come back."""
    attempts: int
    """How many times it has tried to connect."""
    subscribers: int
    """How many subscriptions there are."""
    channels: int
    """How many channels it listens to, or is about to."""
    last_error: BaseException | None
    """Why the last session, or attempt at one, ended."""
    last_received_at: float | None
    """Event-loop time of the server's last sign of life; None before the first."""
    heartbeat_rtt: float | None
    """Seconds that the last heartbeat took; None before the first."""
