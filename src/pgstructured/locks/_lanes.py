"""One lock session of `Locks`: how full it is, and what is sent on it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final, final

from pgstructured.driver import ConnectionState
from pgstructured.errors import ConnectionLostError

from ._names import note
from ._statements import IDENTITY_STATEMENT
from ._watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgstructured.driver import Session

    from ._keys import LockKey
    from ._options import LockOptions


_MOST_NAMES: Final = 100
_NAMES_AFTER: Final = 0.002
"""Seconds after which new names are shown; together, and not on the way of a lock."""


@final
class Lane:
    """A session that holds locks, or waits for one, or is idle.

    ==========  ==================================================  =================
    use         what runs on it                                     may block
    ==========  ==================================================  =================
    slots       tries and unlocks of many tasks, pipelined, and     never
                what they hold
    whole       one task's statement                                yes
    ==========  ==================================================  =================
    """

    def __init__(self, session: Session, options: LockOptions) -> None:
        self.session: Final = session
        self.pulse: Final = session.pulse
        self.slots: int = 0
        """How many locks are held on it, or being taken or released."""
        self.given_up: int = 0
        """How many of them nobody waits for any more; they end with an answer, or the session."""
        self.is_whole: bool = False
        """Whether one task has it for itself."""
        self.is_doomed: bool = False
        """Whether it takes no new locks, and ends with the last one it holds."""
        self.is_closing: bool = False
        """Whether its owner is about to close it, and its locks are lost with it."""
        self.now: Callable[[], float] = session.now
        self.idle_since: float = self.now()
        self.watch: Watch = Watch(self.overdue_at, self._send_note)
        self._lost_after = options.lost_after
        self._server_timeout = options.server_timeout
        self.noted: dict[LockKey, None] = {}
        """The keys whose names are shown, or soon will be."""
        self.identity: str = ""
        """The lock table that its locks are in."""
        self.backend_pid: int = 0
        """Process id of the server session."""

    @property
    def is_open(self) -> bool:
        """Whether something can be asked on it."""
        return self.pulse.state is ConnectionState.OPEN and not self.is_doomed

    @property
    def is_unused(self) -> bool:
        """Whether nothing holds or wants anything of it."""
        return self.slots == 0 and not self.is_whole

    @property
    def is_given_up(self) -> bool:
        """Whether nobody waits for anything on it any more, so that it can be closed."""
        return self.slots <= self.given_up and not self.is_whole

    @property
    def patience(self) -> float:
        """Seconds of silence after a heartbeat that end the session."""
        return self._server_timeout if self.slots else self._lost_after

    async def identify(self) -> None:
        """Ask who it is; before anything is held on it, which else could not be let go.

        Raises:
            psycopg.Error: what the server says, as after a request to cancel.
        """
        answer = await self.session.execute(IDENTITY_STATEMENT)
        identity, backend_pid = answer.rows[0]
        self.identity, self.backend_pid = str(identity), int(backend_pid or 0)

    def begin_closing(self) -> None:
        """Tell its locks that it will be closed as soon as their bodies have ended."""
        self.is_doomed = self.is_closing = True
        self.watch.look()

    def overdue_at(self) -> float:
        """Return the event-loop time at which its silence is the loss of what it holds."""
        return self.pulse.last_confirmed + self._lost_after

    def note(self) -> str:
        """Return the comment that tells the names of what it holds; newest first."""
        return note(reversed(self.noted))

    def add_name(self, key: LockKey) -> None:
        """Show soon, for others to read, that this session has to do with ``key``.

        Names stay shown for a while after their lock: what is held says the server. So a key
        that is taken again and again costs nothing here.
        """
        if key.name is None or key in self.noted:
            return
        self.noted[key] = None
        if len(self.noted) > _MOST_NAMES:
            del self.noted[next(iter(self.noted))]
        self.remind_of_names()

    def remind_of_names(self) -> None:
        """Show the names again soon: something else has been sent since."""
        if self.noted:
            self.watch.remind(self.now() + _NAMES_AFTER)

    def _send_note(self) -> None:
        if self.is_open and not self.is_whole:
            with suppress(ConnectionLostError):  # found by sending, and told by the session
                self.session.send([(self.note(), ())])
