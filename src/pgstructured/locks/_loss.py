"""Why a lock was lost: from what is known to a `LockLost`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import psycopg
import psycopg.errors

from pgstructured.errors import LockLost

if TYPE_CHECKING:
    from pgstructured.errors import LossReason

    from ._keys import LockKey

_REASONS: Final[dict[str, LossReason]] = {
    "57P01": "terminated",  # by an administrator, or a server that shuts down
    "57P02": "crashed",
    "57P05": "idle_timeout",
    "25P03": "idle_timeout",  # in a transaction
}
_TEXTS: Final[dict[LossReason, str]] = {
    "terminated": "the server ended its session",
    "crashed": "the server crashed",
    "disconnected": "its session was disconnected",
    "idle_timeout": "the server ended its session for being idle; change its timeout",
    "unconfirmed": "the server gave no sign of life",
    "expired": "its ttl has run out; refresh it in time",
    "closed": "its session was closed, or it was unlocked behind its back",
    "not_primary": "the server is no primary any more",
    "fenced": "a newer token exists",
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What is known about the end of a held lock."""

    reason: LossReason
    sqlstate: str | None = None
    words: str | None = None
    """What the server or the network said."""

    def error(self, key: LockKey, *, held_for: float, last_confirmed: float) -> LockLost:
        """Return a new error that tells of this loss."""
        said = f" ({self.words})" if self.words else ""
        return LockLost(
            f"the lock {key} was lost after {held_for:.3g} s: {_TEXTS[self.reason]}{said}",
            reason=self.reason,
            sqlstate=self.sqlstate,
            held_for=held_for,
            last_confirmed=last_confirmed,
        )


def diagnose(failure: BaseException | None, *, is_overdue: bool) -> Loss:
    """Return the loss of a lock whose session has ended.

    Args:
        failure: Why it ended; None where this program closed it.
        is_overdue: Whether the last sign of life was too long ago. An end of which the server
            said nothing is then no news of it: what gave up is our end of a silent network.
            So it is where a heartbeat has given up.
    """
    if failure is None:
        return Loss(reason="closed")
    sqlstate = failure.sqlstate if isinstance(failure, psycopg.Error) else None
    words = str(failure).strip().split("\n", 1)[0]
    if sqlstate is None and (is_overdue or isinstance(failure, psycopg.errors.ConnectionTimeout)):
        return Loss(reason="unconfirmed", words=words)
    reason = _REASONS.get(sqlstate or "", "disconnected")
    return Loss(reason=reason, sqlstate=sqlstate, words=words)
