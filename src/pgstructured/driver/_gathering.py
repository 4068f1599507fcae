"""What many tasks send at once, as one command.

Where a read has answered many tasks, each of them sends its next command before the next
read. Alone, such a command is a message, a transaction and an answer: most of what it
costs. Those that do the same with other values go as one that takes arrays, whose rows are
their answers. They succeed or fail together, so it is for statements that hardly ever fail,
and then for a reason that is nobody's own: a lock table without room for all of them.

Nothing waits for company: what is gathered goes out when the tasks that were answered
have run, or before anything else that is sent meanwhile.
Measured, 100 tasks that take and release locks: twice as many of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Final, final

import anyio

from pgstructured.errors import ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._commands import Command, Prepared

_ORDER: Final = attrgetter("order")


@final
@dataclass(frozen=True, slots=True, eq=False)  # found by what it is: asked on every round trip
class Gatherable:
    """A prepared statement that has a form for many."""

    order: int
    """What goes before what, where several are gathered: lower numbers first."""
    alone: Prepared
    """For one task: takes its values, and gives one row."""
    together: Prepared
    """For many: takes an array of each value, and gives a row for each, in their order."""


@final
class Gathering:
    """The commands that are being gathered on one session.

    Args:
        send: Sends one prepared statement, on behalf of several commands.
        refusal: Returns a new error for what can't be sent.
    """

    __slots__ = ("_refusal", "_send", "gathered", "is_on")

    def __init__(
        self,
        send: Callable[[Prepared, Sequence[bytes], list[Command]], Command],
        refusal: Callable[[], Exception],
    ) -> None:
        self._send = send
        self._refusal = refusal
        self.gathered: dict[Gatherable, list[tuple[Sequence[bytes], Command]]] = {}
        """What is still to be sent, by what it runs: the values, and what is told the answer."""
        self.is_on: bool = False
        """Whether what can be gathered is to be: nobody will wait for it for long."""

    def add(self, statement: Gatherable, params: Sequence[bytes], command: Command) -> None:
        """Gather a command.

        Args:
            statement: What it runs.
            params: The values, each a number in the protocol's text format.
            command: What its answer goes to.
        """
        if statement in self.gathered:
            self.gathered[statement].append((params, command))
        else:
            self.gathered[statement] = [(params, command)]

    def begin(self) -> None:
        """Gather from now on."""
        self.is_on = True

    def end(self) -> None:
        """Gather no more, and send what was."""
        self.is_on = False
        if self.gathered:
            self.flush()

    def flush(self) -> None:
        """Send what was gathered; where the session has ended, its senders are told."""
        gathered, self.gathered = self.gathered, {}
        for statement in sorted(gathered, key=_ORDER):
            senders = gathered[statement]
            parts = [command for _, command in senders]
            try:
                self._send_all(statement, [params for params, _ in senders], parts)
            except (ConnectionLostError, anyio.ClosedResourceError):
                for part in parts:
                    part.end(self._refusal())

    def _send_all(
        self, statement: Gatherable, values: list[Sequence[bytes]], parts: list[Command]
    ) -> None:
        if len(values) == 1:
            self._send(statement.alone, values[0], parts)
            return
        columns = zip(*values, strict=True)
        self._send(statement.together, [b"{%s}" % b",".join(c) for c in columns], parts)
