"""The line of those who want a connection: first come, first served.

One line for two kinds. Most wait with nothing in their hands, for a connection or for a
*slot*: the right to make one. Some have a slot, whose attempt to connect has failed, and wait
until the next one; a connection that comes back meanwhile is theirs, in their turn.

There is one timer for all of them (see `_keeping`), not one for each.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from enum import Enum
from operator import attrgetter
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from pgstructured.driver import Parking

    from ._members import Member


@final
class Grant(Enum):
    """What a waiter gets that gets no connection."""

    SLOT = "slot"
    """The right to make one."""
    TIMEOUT = "timeout"
    """Nothing: its time is over."""
    CLOSED = "closed"
    """Nothing: the pool closes."""


@final
class Waiter:
    """One task in line."""

    __slots__ = ("deadline", "grant", "has_slot", "parking", "ticket")

    def __init__(self, ticket: int, deadline: float, parking: Parking, *, has_slot: bool) -> None:
        self.ticket: int = ticket
        self.deadline: float = deadline
        self.has_slot: bool = has_slot
        self.parking: Parking = parking
        """Where its task waits until ``grant`` is set."""
        self.grant: Member | Grant | None = None

    def give(self, grant: Member | Grant) -> None:
        """End its waiting."""
        self.grant = grant
        self.parking.wake()


_BY_TICKET: Final = attrgetter("ticket")


@final
class Waiters:
    """The line, in the order of tickets."""

    __slots__ = ("line",)

    def __init__(self) -> None:
        self.line: list[Waiter] = []
        """For a look; in the order of tickets."""

    def __len__(self) -> int:
        return len(self.line)

    def join(self, waiter: Waiter) -> None:
        """Stand in line, where its ticket says."""
        line = self.line
        if line and line[-1].ticket > waiter.ticket:
            insort(line, waiter, key=_BY_TICKET)
        else:
            line.append(waiter)

    def leave(self, waiter: Waiter) -> None:
        """Leave the line, with nothing."""
        del self.line[bisect_left(self.line, waiter.ticket, key=_BY_TICKET)]

    def pop_without_slot(self) -> Waiter | None:
        """Take the first one out of the line that has no slot."""
        for index, waiter in enumerate(self.line):
            if not waiter.has_slot:
                return self.line.pop(index)
        return None

    def give_all(self, grant: Grant) -> None:
        """End everybody's waiting."""
        line, self.line = self.line, []
        for waiter in line:
            waiter.give(grant)

    def time_out(self, now: float) -> None:
        """End the waiting of those whose time is over."""
        late = [waiter for waiter in self.line if waiter.deadline <= now]
        for waiter in late:
            self.leave(waiter)
            waiter.give(Grant.TIMEOUT)

    def next_deadline(self) -> float:
        """Return when the next one's time is over; infinity for never."""
        return min((waiter.deadline for waiter in self.line), default=math.inf)
