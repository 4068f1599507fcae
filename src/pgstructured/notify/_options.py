"""The options of a bus, checked once."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

from pgstructured._util import Backoff
from pgstructured.driver import parse_conninfo

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    name: str | None

    def __post_init__(self) -> None:
        check_choice("initial_connect", self.initial_connect, ("fail", "retry", "background"))
        for name in ("connect_timeout", "heartbeat_timeout"):
            check_seconds(name, getattr(self, name))
        for name in ("heartbeat", "max_outage"):
            if getattr(self, name) is not None:
                check_seconds(name, getattr(self, name))
        linger: Any = self.unlisten_linger
        if not isinstance(linger, (int, float)) or not 0 <= linger < math.inf:
            raise ValueError(f"unlisten_linger must be 0 or more seconds, not {linger!r}")
        shown: Any = self.name
        if shown is not None and not isinstance(shown, str):
            raise TypeError(f"name must be text, not {shown!r}")
        backoff: Any = self.backoff
        if not isinstance(backoff, Backoff):
            raise TypeError(f"backoff must be a Backoff, not {backoff!r}")

    @property
    def application_name(self) -> str:
        """What the server shows, unless the conninfo names an application."""
        return "/".join(filter(None, ("pgstructured/notify", self.name)))


def check_seconds(name: str, value: object) -> None:
    """Refuse what is no positive number of seconds."""
    if not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name} must be more than 0 seconds, not {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def find_target(conninfo: str) -> dict[str, Any]:
    """Return the parameters to add, so that of several hosts the primary is found.

    Raises:
        ConninfoError: if libpq can't parse ``conninfo``.
    """
    params = parse_conninfo(conninfo)
    hosts = str(params.get("host") or params.get("hostaddr") or os.environ.get("PGHOST", ""))
    chooses = "target_session_attrs" in params or "PGTARGETSESSIONATTRS" in os.environ
    if "," not in hosts or chooses:
        return {}
    return {"target_session_attrs": "primary"}
