"""The figures of a lock session, and the server settings that make them true.

The lease: the client gives a lock up ``lost_after`` seconds after the last sign of
life it has had from the server; the server frees it no earlier than
``server_timeout`` seconds after the last it has had from the client. Each hears of
the other at most a network's latency late, so with ``lost_after < server_timeout``
the body is cancelled before anybody else can hold its lock.

TCP keepalive alone would not do: it stands still while data is unacknowledged.
``tcp_user_timeout`` bounds both cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, final, get_args

from pgstructured._util import Backoff

Pooler: TypeAlias = Literal["auto", "none", "session", "transaction"]
"""As for `pgstructured.driver.connect`."""

_MARGIN: Final = 1.0
"""Seconds on top of ``server_timeout``: kernels have been seen to fire a fifth early."""
_FIRST_12: Final = 120000
_FIRST_14: Final = 140000
_FIRST_17: Final = 170000


_SECONDS: Final = (
    "heartbeat",
    "lost_after",
    "server_timeout",
    "release_timeout",
    "connect_timeout",
    "idle_session_ttl",
)
_COUNTS: Final = ("max_locks_per_session", "max_waiting_sessions")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LockOptions:
    """How lock sessions live.

    Raises:
        ValueError: if a figure is out of range, or unless
            ``heartbeat < lost_after < server_timeout``.
    """

    heartbeat: float = 5.0
    """Seconds of silence after which the server is asked for a sign of life."""
    lost_after: float = 15.0
    """Seconds without a confirmed sign of life after which a held lock is lost."""
    server_timeout: float = 30.0
    """Seconds for which the server keeps the lock of a client that has vanished."""
    release_timeout: float = 2.0
    """Seconds an unlock, or the end of an acquire that was given up, may take."""
    connect_timeout: float = 10.0
    """Seconds for connecting, attempts that fail and heal included."""
    backoff: Backoff = field(default_factory=lambda: Backoff(maximum=1.0))
    """How long to wait between attempts to connect."""
    max_locks_per_session: int = 64
    """Locks that one session may hold: its end is the end of them all."""
    max_waiting_sessions: int = 8
    """Sessions that may stand in the server's queues."""
    idle_session_ttl: float = 30.0
    """Seconds after which a session that holds nothing is given back."""
    application_name: str = "pgstructured/locks"
    """What the server shows of a session whose conninfo names none."""
    is_name_fixed: bool = False
    """Whether it does so whatever the conninfo says."""
    pooler: Pooler = "auto"
    """What is known about a pooler in between."""
    fence_table: str = "pgstructured_fence"
    """Where fencing tokens are kept."""

    def __post_init__(self) -> None:
        for name in _SECONDS:
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number of seconds, not {value!r}")
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
        given: Any = self.backoff
        if not isinstance(given, Backoff):
            raise ValueError(  # noqa: TRY004 - as every bad option
                f"backoff must be a Backoff, not {given!r}"
            )
        if self.pooler not in get_args(Pooler):
            raise ValueError(f"pooler must be one of {get_args(Pooler)}, not {self.pooler!r}")
        if not self.heartbeat < self.lost_after:
            raise ValueError(
                f"heartbeat ({self.heartbeat}) must be below lost_after ({self.lost_after})"
            )
        if not self.lost_after < self.server_timeout:
            raise ValueError(
                f"lost_after ({self.lost_after}) must be below"
                f" server_timeout ({self.server_timeout})"
            )

    def server_settings(self, server_version: int) -> dict[str, str]:
        """Return the settings of a lock session on a server of this version (150004)."""
        idle, interval, count = self._keepalives()
        settings = {
            "statement_timeout": "0",
            "lock_timeout": "0",
            "tcp_keepalives_idle": str(idle),
            "tcp_keepalives_interval": str(interval),
            "tcp_keepalives_count": str(count),
        }
        if server_version >= _FIRST_12:
            settings["tcp_user_timeout"] = f"{(self.server_timeout + _MARGIN) * 1000:.0f}"
        if server_version >= _FIRST_14:
            settings["idle_session_timeout"] = "0"
            # So that a waiter whose client has died leaves the queue.
            settings["client_connection_check_interval"] = "2s"
        if server_version >= _FIRST_17:
            settings["transaction_timeout"] = "0"
        return settings

    def client_params(self) -> dict[str, str]:
        """Return the connection parameters that let a waiting client notice a silent network.

        A held lock does not need them, it has its heartbeat.
        """
        idle, interval, count = self._keepalives()
        return {
            "keepalives": "1",
            "keepalives_idle": str(idle),
            "keepalives_interval": str(interval),
            "keepalives_count": str(count),
            "tcp_user_timeout": f"{self.server_timeout * 1000:.0f}",
        }

    def _keepalives(self) -> tuple[int, int, int]:
        """Return TCP's idle time, interval and count, which together last ``server_timeout``."""
        lasting = self.server_timeout + _MARGIN
        idle = max(1, int(lasting // 3))
        interval = max(1, int(lasting // 6))
        return idle, interval, max(1, math.ceil((lasting - idle) / interval))
