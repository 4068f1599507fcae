"""What a pool was told, checked."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final, get_args

from pgstructured._util import Backoff
from pgstructured.driver import Connection, Pooler

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgstructured.driver import Conninfo

ConnectionHook: TypeAlias = Callable[[Connection[Any]], Awaitable[object]]
"""An async function that is given a connection of the pool."""

_SECONDS: Final = (
    "acquire_timeout",
    "max_lifetime",
    "reconnect_timeout",
    "connect_timeout",
    "cancel_timeout",
)
_SECONDS_OR_ZERO: Final = ("max_idle", "check_after_idle", "close_timeout")
_MAY_BE_NONE: Final = (
    "acquire_timeout",
    "max_lifetime",
    "max_idle",
    "check_after_idle",
    "reconnect_timeout",
    "connect_timeout",
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How a pool lives.

    Raises:
        ValueError: if a figure is out of its range.
    """

    conninfo: Conninfo
    """Where to connect."""
    name: str
    """What events and errors call it."""
    acquire_timeout: float | None
    """Seconds that an acquire may take; None for as long as it takes."""
    max_waiting: int | None
    """Tasks that may wait for a connection; None for any number."""
    max_lifetime: float | None
    """Seconds after which a connection is replaced."""
    max_idle: float | None
    """Seconds that a connection may be idle, while there are more than ``min_size``."""
    check_after_idle: float | None
    """Seconds of rest after which the server is asked before a connection is given out."""
    on_connect: ConnectionHook | None
    """Given each new connection."""
    on_acquire: ConnectionHook | None
    """Given a connection before its borrower."""
    on_release: ConnectionHook | None
    """Given a connection after its borrower."""
    reconnect_timeout: float | None
    """Seconds without a server after which the pool gives up."""
    close_timeout: float
    """Seconds that borrowers have to give back theirs when the pool closes."""
    pooler: Pooler
    """What stands between us and the server."""
    direct_conninfo: Conninfo | None
    """Leads past the pooler."""
    connect_timeout: float | None
    """Seconds that one attempt to connect may take."""
    cancel_timeout: float
    """Seconds that a cancelled operation, or a reset, may take to settle."""
    connect_options: Mapping[str, Any]
    """What else `pgstructured.driver.connect` is told."""
    backoff: Backoff = field(default_factory=lambda: Backoff(maximum=5.0))
    """How long to wait between attempts to connect."""

    def __post_init__(self) -> None:
        for name in (*_SECONDS, *_SECONDS_OR_ZERO):
            _check_seconds(name, getattr(self, name))
        waiting: object = self.max_waiting
        if waiting is not None and not _is_count(waiting):
            raise ValueError(f"max_waiting must be None or a whole number from 0, not {waiting!r}")
        if self.pooler not in get_args(Pooler):
            choices = ", ".join(map(repr, get_args(Pooler)))
            raise ValueError(f"pooler must be one of {choices}, not {self.pooler!r}")


def check_sizes(min_size: object, max_size: object) -> None:
    """Refuse what are no sizes of a pool.

    Raises:
        ValueError: unless both are whole numbers, and ``0 <= min_size <= max_size >= 1``.
    """
    for name, value, least in (("min_size", min_size, 0), ("max_size", max_size, 1)):
        if not _is_count(value, least):
            raise ValueError(f"{name} must be a whole number from {least}, not {value!r}")
    if min_size > max_size:  # type: ignore[operator]  # both are numbers by now
        raise ValueError(f"min_size ({min_size}) must not be above max_size ({max_size})")


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_seconds(name: str, value: object) -> None:
    if value is None and name in _MAY_BE_NONE:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 < value < math.inf:  # type: ignore[operator]  # it is a number
        return
    if is_number and value == 0 and name in _SECONDS_OR_ZERO:
        return
    least = "at least 0" if name in _SECONDS_OR_ZERO else "above 0"
    none = ", or None" if name in _MAY_BE_NONE else ""
    raise ValueError(f"{name} must be a finite number of seconds, {least}{none}; not {value!r}")
