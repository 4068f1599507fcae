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
from dataclasses import dataclass, field, fields
from typing import Final, final

from pgstructured._util import Backoff

_MARGIN: Final = 1.0
"""Seconds on top of ``server_timeout``: kernels have been seen to fire a fifth early."""
_FIRST_12: Final = 120000
_FIRST_14: Final = 140000
_FIRST_17: Final = 170000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LockOptions:
    """How lock sessions live.

    Raises:
        ValueError: if a figure is not a positive finite number, or unless
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

    def __post_init__(self) -> None:
        for figure in fields(self):
            value = getattr(self, figure.name)
            if not isinstance(value, Backoff) and not 0 < value < math.inf:
                raise ValueError(f"{figure.name} must be a positive number, not {value!r}")
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
