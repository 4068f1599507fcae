"""One lock session of `Locks`: how full it is, and what is sent on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import anyio

from pgstructured.driver import ConnectionState

from ._names import note
from ._statements import IDENTITY_STATEMENT
from ._watch import Watch

if TYPE_CHECKING:
    from pgstructured.driver import Command, Session

    from ._keys import LockKey
    from ._options import LockOptions


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
        self.slots = 0
        """How many locks are held on it, or being taken or released."""
        self.is_whole = False
        """Whether one task has it for itself."""
        self.is_doomed = False
        """Whether it takes no new locks, and ends with the last one it holds."""
        self.is_closing = False
        """Whether its owner is about to close it, and its locks are lost with it."""
        self.idle_since: float = anyio.current_time()
        self.watch = Watch(self.overdue_at)
        self._lost_after = options.lost_after
        self._noted: dict[LockKey, None] = {}
        self._note: str | None = ""
        # Asked in passing: its answer is there before that of anything asked later.
        self._identity = session.send([(IDENTITY_STATEMENT, ())])

    @property
    def is_open(self) -> bool:
        """Whether something can be asked on it."""
        return self.session.state is ConnectionState.OPEN and not self.is_doomed

    @property
    def is_unused(self) -> bool:
        """Whether nothing holds or wants anything of it."""
        return self.slots == 0 and not self.is_whole

    @property
    def identity(self) -> str:
        """The lock table that its locks are in; known once something was answered."""
        return str(self._identity.result().rows[0][0])

    @property
    def backend_pid(self) -> int:
        """Process id of the server session; known once something was answered."""
        return int(self._identity.result().rows[0][1] or 0)

    def begin_closing(self) -> None:
        """Tell its locks that it will be closed as soon as their bodies have ended."""
        self.is_doomed = self.is_closing = True
        self.watch.look()

    def overdue_at(self) -> float:
        """Return the event-loop time at which its silence is the loss of what it holds."""
        return self.session.last_confirmed + self._lost_after

    def send(self, statement: str, *, may_block: bool = False) -> Command:
        """Send one statement, with the names of what is held here for others to read.

        Raises:
            ConnectionLostError: if the session has failed.
            anyio.ClosedResourceError: if it is closed.
        """
        return self.session.send([(statement + self.note(), ())], may_block=may_block)

    def add_name(self, key: LockKey) -> None:
        """From now on the session is shown to have to do with ``key``."""
        self._noted[key] = None
        self._note = None

    def remove_name(self, key: LockKey) -> None:
        """From now on no more."""
        self._noted.pop(key, None)
        self._note = None

    def note(self) -> str:
        """Return the comment that tells the names; newest first, for it may be cut."""
        if self._note is None:
            self._note = note(reversed(self._noted)) if self._noted else ""
        return self._note
