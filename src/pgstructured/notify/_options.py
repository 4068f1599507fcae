"""The options of a bus, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from pgstructured.errors import ConninfoError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgstructured._util import Backoff
    from pgstructured.driver import Conninfo

InitialConnect: TypeAlias = Literal["fail", "retry", "background"]
"""What a bus does about its first connect; see `open_notify_bus`."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BusOptions:
    """The options of `open_notify_bus`, for use in here."""

    conninfo: Conninfo = field(repr=False)  # it may hold a password
    channels: frozenset[str]
    initial_connect: InitialConnect
    connect_timeout: float
    backoff: Backoff
    max_outage: float | None
    heartbeat: float | None
    heartbeat_timeout: float
    verify_delivery: bool
    unlisten_linger: float
    application_name: str

    def __post_init__(self) -> None:
        check_choice("initial_connect", self.initial_connect, ("fail", "retry", "background"))
        for name in ("connect_timeout", "heartbeat", "heartbeat_timeout", "max_outage"):
            seconds: float | None = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} must be more than 0 seconds, not {seconds}")
        if not 0 <= self.unlisten_linger < math.inf:
            raise ValueError(
                f"unlisten_linger must be 0 or more seconds, not {self.unlisten_linger}"
            )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def find_target(conninfo: str) -> dict[str, Any]:
    """Return the parameters to add, so that of several hosts the primary is found.

    Raises:
        ConninfoError: if libpq can't parse ``conninfo``.
    """
    try:
        params = conninfo_to_dict(conninfo)
    except ProgrammingError:
        # Not its message, which may quote a piece of a password.
        raise ConninfoError("malformed connection string; see libpq-connect's conninfo") from None
    hosts = str(params.get("host") or params.get("hostaddr") or "")
    if "," not in hosts or "target_session_attrs" in params:
        return {}
    return {"target_session_attrs": "primary"}
