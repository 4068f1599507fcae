"""Who has what: the pool's books. Nothing here waits, so nothing here can be interrupted.

Each connection that there is or is being made has a *slot*, and there are ``max_size`` of
them. After each call this holds:

* somebody waits without a slot only if every slot is taken;
* somebody waits at all only if no connection is idle.

So a newcomer that finds an idle connection or a free slot overtakes nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from ._waiters import Grant, Waiters

if TYPE_CHECKING:
    from collections.abc import Callable

    import anyio

    from ._members import Member


@final
class Ledger:
    """The books of one pool.

    Args:
        min_size: Connections to keep open.
        max_size: Connections that there may be.
    """

    __slots__ = (
        "borrowed",
        "freed",
        "generation",
        "idle",
        "max_size",
        "min_size",
        "on_free",
        "size",
        "waiters",
    )

    def __init__(self, min_size: int, max_size: int) -> None:
        self.on_free: Callable[[], None] = _nobody
        """Called whenever a slot was given back."""
        self.min_size: int = min_size
        self.max_size: int = max_size
        self.size: int = 0
        """Slots that are taken."""
        self.idle: list[Member] = []
        """A stack: the one that was given back last is given out first."""
        self.borrowed: set[Member] = set()
        self.waiters: Waiters = Waiters()
        self.generation: int = 0
        self.freed: anyio.Event | None = None
        """Set when the next slot is free."""

    def take_slot(self) -> bool:
        """Take a slot if one is free."""
        if self.size >= self.max_size:
            return False
        self.size += 1
        return True

    def free_slot(self) -> None:
        """Give a slot back, to the first who waits for one."""
        self.size -= 1
        if self.freed is not None:
            self.freed.set()
            self.freed = None
        self.grant_slots()
        self.on_free()

    def grant_slots(self) -> None:
        """Give slots that are free to those who wait."""
        while self.size < self.max_size and (waiter := self.waiters.pop_without_slot()) is not None:
            self.size += 1
            waiter.give(Grant.SLOT)


def _nobody() -> None:
    """Stand in until there is a keeper."""
