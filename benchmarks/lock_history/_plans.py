"""What a task of a worker does next, drawn by lot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

HOWS = {
    "exclusive": 5,
    "fenced": 8,
    "shared": 3,
    "try": 2,
    "try shared": 1,
    "try fenced": 1,
    "timeout": 3,
    "timeout fenced": 2,
    "cancelled": 3,
    "ttl": 2,
    "refreshed ttl": 2,
    "early release": 2,
    "many": 2,
    "many fenced": 2,
}
"""Ways to take a lock, and how often."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One operation, drawn by lot."""

    how: str
    keys: tuple[str, ...]
    on_conninfo: bool
    hold: float
    acquire_timeout: float | None
    cancel_after: float | None
    ttl: float | None

    @property
    def shared(self) -> bool:
        return "shared" in self.how

    @property
    def fenced(self) -> bool:
        return "fenced" in self.how


def draw(lots: random.Random, keys: list[str]) -> Plan:
    """Return what to do next."""
    (how,) = lots.choices(list(HOWS), list(HOWS.values()))
    count = lots.randint(2, 3) if how.startswith("many") else 1
    hold = lots.choice((0.0, 0.0, lots.uniform(0, 0.05), lots.uniform(0, 0.2)))
    return Plan(
        how=how,
        keys=tuple(lots.sample(keys, count)),
        on_conninfo=count == 1 and lots.random() < 0.25,
        hold=hold,
        acquire_timeout=lots.uniform(0.005, 0.5) if how.startswith("timeout") else None,
        cancel_after=lots.uniform(0.0, 0.2) if how == "cancelled" else None,
        ttl=lots.uniform(0.02, 0.2) if how.endswith("ttl") else None,
    )
