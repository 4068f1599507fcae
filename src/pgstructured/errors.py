"""Every exception of this library.

What the server says passes through untouched as `psycopg.errors`, with its
SQLSTATE. What is raised here says who is to blame: ``...Lost`` and
``...Unavailable`` are the world's doing, `ValueError` subclasses are the
caller's. Where a generic handler should catch one of these, it also inherits
from the class that handler names (`TimeoutError`, `psycopg.OperationalError`,
`anyio.BrokenResourceError`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import anyio
import psycopg

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "AmbiguousTableError",
    "BusUnavailableError",
    "ChannelNameError",
    "ConnectionLostError",
    "ConninfoError",
    "CursorExpiredError",
    "DecodeError",
    "DeliveryError",
    "FenceTableMissingError",
    "FilterError",
    "GapError",
    "InvalidIdentifierError",
    "ListenRejectedError",
    "LockAlreadyHeldError",
    "LockCapacityError",
    "LockDeadlockError",
    "LockError",
    "LockKeyError",
    "LockLost",
    "LockNotHeldError",
    "LockTimeout",
    "LossReason",
    "NotPrimaryError",
    "NotifyError",
    "PayloadTooLargeError",
    "PgStructuredError",
    "PoolClosedError",
    "PoolError",
    "PoolNestedAcquireError",
    "PoolTimeoutError",
    "PoolUnavailableError",
    "SessionRequiredError",
    "StoreError",
    "SubscriptionOverflowError",
    "TableNotFoundError",
    "TooManyWaitingError",
    "UndeliveredError",
    "UnexpectedRowsError",
)

LossReason = Literal[
    "terminated",
    "crashed",
    "disconnected",
    "idle_timeout",
    "unconfirmed",
    "expired",
    "closed",
    "not_primary",
    "fenced",
]
"""Why a lock was lost; see `LockLost.reason`."""


class PgStructuredError(Exception):
    """Base class of this library's exceptions; never raised itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Facts are given by keyword, which copying and pickling know nothing of: they come
        # with the state.
        _, args, *state = cast("tuple[Any, ...]", super().__reduce__())
        return (_make_again, (type(self), args), *state)


def _make_again(kind: type[PgStructuredError], args: tuple[Any, ...]) -> PgStructuredError:
    return kind.__new__(kind, *args)


# ---------------------------------------------------------------- connections


class ConnectionLostError(PgStructuredError, psycopg.OperationalError):
    """The connection had failed before this operation, or failed under it.

    The first cause is ``__cause__``; its SQLSTATE is not this operation's, which is 08003.
    """

    sqlstate: str | None = "08003"


class SessionRequiredError(PgStructuredError, psycopg.NotSupportedError):
    """A feature of sessions was asked for through a transaction pooler."""


class NotPrimaryError(PgStructuredError, psycopg.OperationalError):
    """The server is a standby, or was demoted."""


class ConninfoError(PgStructuredError, ValueError):
    """A connection string can't be understood; the message never shows it."""


class UnexpectedRowsError(PgStructuredError, psycopg.DataError):
    """A statement that was to return no rows returned some."""


# ---------------------------------------------------------------- pool


class PoolError(PgStructuredError):
    """Base class of what a pool raises."""


class PoolTimeoutError(PoolError, TimeoutError):
    """No connection could be had within ``acquire_timeout``."""


class PoolClosedError(PoolError):
    """The pool is closed or closing."""


class TooManyWaitingError(PoolError):
    """As many tasks as ``max_waiting`` allows wait for a connection already."""


class PoolNestedAcquireError(PoolError, RuntimeError):
    """The task holds a connection of this pool already; waiting for another could be for ever."""


class PoolUnavailableError(PoolError):
    """The server could not be reached for ``reconnect_timeout`` seconds."""


# ---------------------------------------------------------------- locks


class LockError(PgStructuredError):
    """Base class of what locks raise."""


class LockTimeout(LockError, TimeoutError):  # noqa: N818 - the field's settled noun
    """The lock could not be had within ``acquire_timeout``."""


class LockLost(LockError):  # noqa: N818 - the field's settled noun
    """A held lock was lost; the body it protected has been cancelled."""

    def __init__(
        self,
        message: str,
        *,
        reason: LossReason,
        sqlstate: str | None = None,
        held_for: float = 0.0,
        last_confirmed: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.reason: LossReason = reason
        """What happened: ``terminated`` (57P01), ``crashed`` (57P02), ``idle_timeout``
        (57P05, 25P03), ``disconnected`` (the stream ended without a word), ``unconfirmed``
        (no sign of life for too long), ``expired`` (its ttl), ``closed`` (by us),
        ``not_primary``, ``fenced`` (a newer token exists)."""
        self.sqlstate: str | None = sqlstate
        """SQLSTATE of the server's last word, where it said one."""
        self.held_for: float = held_for
        """Seconds from the grant to the loss."""
        self.last_confirmed: float = last_confirmed
        """Event-loop time (`anyio.current_time`) of the last proof that the lock was held."""

    @property
    def certain(self) -> bool:
        """Whether the lock is known to be gone; false only where the server fell silent."""
        return self.reason != "unconfirmed"


class LockNotHeldError(LockError):
    """The lock has been released already."""


class LockAlreadyHeldError(LockError, RuntimeError):
    """The task holds this key already; waiting for it would be waiting for itself."""


class LockDeadlockError(LockError):
    """The server broke a deadlock by refusing this acquire (40P01)."""


class LockCapacityError(LockError):
    """The server's lock table is full (53200)."""


class LockKeyError(LockError, ValueError):
    """A lock key is empty or out of range."""


class FenceTableMissingError(LockError):
    """Fencing was asked for and its table does not exist."""


# ---------------------------------------------------------------- notifications


class NotifyError(PgStructuredError):
    """Base class of what the notification bus raises."""


class ChannelNameError(NotifyError, ValueError):
    """A channel name is empty, longer than 63 bytes, or has a NUL in it."""


class PayloadTooLargeError(NotifyError, ValueError):
    """A payload is longer than 7999 bytes."""

    def __init__(self, message: str, *, size: int, limit: int) -> None:
        super().__init__(message)
        self.size: int = size
        """Bytes the payload has."""
        self.limit: int = limit
        """Bytes it may have."""


class SubscriptionOverflowError(NotifyError):
    """A subscription with ``overflow="close"`` lost its first notification."""


class GapError(NotifyError):
    """A gap in a subscription with ``gaps="raise"``; the stream goes on after it."""

    def __init__(self, message: str, *, gap: Any) -> None:
        super().__init__(message)
        self.gap: Any = gap
        """The `pgstructured.notify.Gap`."""


class DecodeError(NotifyError):
    """A payload could not be decoded."""

    def __init__(self, message: str, *, notification: Any) -> None:
        super().__init__(message)
        self.notification: Any = notification
        """The `pgstructured.notify.Notification` with the payload as it came."""


class DeliveryError(NotifyError):
    """The bus's own probe did not come back: something between swallows LISTEN."""


class ListenRejectedError(NotifyError):
    """The server refused LISTEN for one channel; its cause says why."""

    def __init__(self, message: str, *, channel: str, sqlstate: str | None) -> None:
        super().__init__(message)
        self.channel: str = channel
        """Name of the channel."""
        self.sqlstate: str | None = sqlstate
        """The server's code for why, if it gave one."""


class BusUnavailableError(NotifyError, anyio.BrokenResourceError):
    """The bus is gone: it could not reconnect within ``max_outage``."""


class UndeliveredError(NotifyError):
    """A publisher's scope ended before everything could be sent."""

    def __init__(self, message: str, *, count: int) -> None:
        super().__init__(message)
        self.count: int = count
        """How many notifications were not confirmed by the server."""


# ---------------------------------------------------------------- event log and store


class CursorExpiredError(PgStructuredError):
    """A cursor points before what the event log still keeps."""


class StoreError(PgStructuredError):
    """Base class of what a table store raises."""


class FilterError(StoreError, ValueError):
    """A filter can't be understood."""

    def __init__(self, message: str, *, position: int | None = None) -> None:
        super().__init__(message)
        self.position: int | None = position
        """Index of the first offending character, where there is one."""


class InvalidIdentifierError(StoreError, ValueError):
    """A name is no usable SQL identifier."""


class TableNotFoundError(StoreError, LookupError):
    """No such table."""


class AmbiguousTableError(StoreError):
    """Several schemas have a table of this name."""

    def __init__(self, message: str, *, schemas: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.schemas: tuple[str, ...] = tuple(schemas)
        """The schemas that have one."""
