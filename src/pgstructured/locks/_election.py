"""`Election`: one leader among candidates, who hears when its time is over."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg

from pgstructured._util import NoPublicConstructor, create
from pgstructured.errors import NotPrimaryError

from ._held import HeldLock, check_ttl
from ._opening import never_none, new_request, open_held
from ._sessions import can_retry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from ._bell import Ring
    from ._candidacies import Candidacies
    from ._grip import Grip, LockRequest
    from ._keys import LockKey

_LONGEST: Final = 40
_POLL: Final = 1.0
"""Seconds after which is looked again: who dies in office tells nobody."""


@final
class Leadership(HeldLock):
    """The time in office of an election's leader; made by `Election.campaign`."""

    __slots__ = ("_asked", "_candidate")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._candidate = ""
        self._asked = anyio.Event()

    @property
    def candidate(self) -> str:
        """Who leads."""
        return self._candidate

    async def wait_resign_requested(self) -> None:
        """Wait until somebody has asked the leader to resign, see `Election.request_resign`.

        It is up to the leader what to do: to end its block is to resign. Once asked, this
        returns at once.

        Raises:
            LockLost: if it is lost, before it was asked or after.
            LockNotHeldError: if it is released or detached.

        Cancellation:
            A checkpoint; nothing changes.
        """
        self.assert_held()
        await self._asked.wait()
        self.assert_held()

    def _end(self) -> None:
        super()._end()
        self._asked.set()


@final
class Election(metaclass=NoPublicConstructor):
    """One leader at a time, among candidates of any number of processes.

    Made by `Locks.election`. The leader holds the lock of the election's key, on a session
    of its own whose ``application_name`` is the candidate's name; the others stand in the
    server's queue for it, first come first served.
    """

    def __init__(self, candidacies: Candidacies, key: LockKey, candidate: str) -> None:
        self._candidacies = candidacies
        self._key = key
        self._candidate = candidate

    def __repr__(self) -> str:
        return f"<Election {self._key} candidate={self._candidate!r}>"

    @property
    def key(self) -> LockKey:
        """The key, as Postgres sees it."""
        return self._key

    @property
    def candidate(self) -> str:
        """Who this is."""
        return self._candidate

    def campaign(
        self,
        *,
        acquire_timeout: float | None = None,
        ttl: float | None = None,
        fenced: bool = False,
    ) -> AbstractAsyncContextManager[Leadership]:
        """Run a block as the leader, waiting to be elected first.

        The block is cancelled when the leadership is lost, as with any lock. To end it is to
        resign: who has waited longest is then elected within about a millisecond.

        Args:
            acquire_timeout: Seconds to wait for it; None for as long as it takes, 0 for one try.
            ttl: Seconds after which it is lost, unless `HeldLock.refresh` is called in time.
            fenced: Give it a `HeldLock.fencing_token`.

        Returns:
            A context manager that gives the leadership.

        Raises:
            LockTimeout: if another leads, and went on to.
            LockLost: if it was lost; the body's own error, if any, is ``__cause__``.
            LockAlreadyHeldError: if this task leads already, or holds the key.
            PgStructuredError: as `Locks.lock` in everything else.
            psycopg.Error: what the server says; without ``acquire_timeout`` also why
                connecting failed.
            anyio.ClosedResourceError: if the `Locks` is closed.

        Cancellation:
            As `Locks.lock`: a cancelled entry leaves no candidate.
        """
        request = new_request(self._key, acquire_timeout=acquire_timeout, fenced=fenced)
        check_ttl(ttl)
        return self._open(request, ttl)

    @asynccontextmanager
    async def _open(self, request: LockRequest, ttl: float | None) -> AsyncGenerator[Leadership]:
        source = _Stand(self._candidacies, self._candidate)
        async with never_none(open_held(source, request, Leadership, ttl=ttl)) as leadership:
            leadership._candidate = self._candidate  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
            leadership._asked = source.asked  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
            yield leadership

    async def leader(self) -> str | None:
        """Return the name of the candidate that leads; None if nobody does.

        Raises:
            psycopg.Error: what the server says, or why connecting failed.
            anyio.ClosedResourceError: if the `Locks` is closed.

        Cancellation:
            A checkpoint; nothing is left behind.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        return await self._candidacies.fetch_leader(self._key)

    async def request_resign(self) -> None:
        """Ask the leader, whoever it is, to resign; see `Leadership.wait_resign_requested`.

        It reaches the leader of this moment within about a millisecond, and only asks. If
        nobody leads, it reaches nobody.

        Raises:
            psycopg.Error: what the server says, or why connecting failed.
            anyio.ClosedResourceError: if the `Locks` is closed.

        Cancellation:
            A checkpoint; a cancelled call has asked or not.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        await self._candidacies.ask_to_resign(self._key)

    @asynccontextmanager
    async def observe(self) -> AsyncGenerator[anyio.abc.ObjectReceiveStream[str | None]]:
        """Watch who leads, for the length of a block.

        The stream's first item is who leads when it is asked for, as of `leader`; each
        further one is who leads when that is another than the item before. Of several
        changes between two items only the last is told: nothing piles up.

        Elections are told at once, and after about 10 milliseconds a resignation that nobody
        follows. The end of a leader that died is seen within a second of the server's noticing,
        at once if somebody follows it. While the server can't be reached no news comes, and none
        is lost but what came and went.

        Yields:
            The stream. It ends with the `Locks`. Receiving raises ``psycopg.Error`` for what
            does not heal.

        Raises:
            anyio.ClosedResourceError: if the `Locks` is closed.

        Cancellation:
            Entering and leaving are no checkpoints. A cancelled receive loses nothing.
        """
        with self._candidacies.hearing(self._key) as ring:
            stream = create(_LeaderStream, self._candidacies, self._key, ring)
            try:
                yield stream
            finally:
                stream.close()


@final
class _Stand:
    """One candidate's `LockSource`."""

    def __init__(self, candidacies: Candidacies, candidate: str) -> None:
        self._candidacies = candidacies
        self._candidate = candidate
        self.asked = anyio.Event()

    now = staticmethod(anyio.current_time)
    create_scope = anyio.CancelScope
    ask = None

    @property
    def release_timeout(self) -> float:
        return self._candidacies.release_timeout

    def take(self, request: LockRequest) -> AbstractAsyncContextManager[Grip | None]:
        return self._candidacies.stand(self._candidate, self.asked, request)


@final
class _LeaderStream(anyio.abc.ObjectReceiveStream[str | None], metaclass=NoPublicConstructor):
    """Who leads: looks whenever there may be news, while somebody wants to know."""

    def __init__(self, candidacies: Candidacies, key: LockKey, ring: Ring) -> None:
        self._candidacies = candidacies
        self._key = key
        self._ring = ring
        self._last: tuple[str | None] | None = None
        self._is_closed = False
        self._guard = anyio.ResourceGuard("receiving from")

    async def receive(self) -> str | None:
        with self._guard:
            await anyio.lowlevel.checkpoint_if_cancelled()
            while True:
                self._check_open()
                found = await self._look()
                self._check_open()
                if found is not None and found != self._last:
                    self._last = found
                    return found[0]
                with anyio.move_on_after(_POLL):
                    await self._ring.wait()

    async def _look(self) -> tuple[str | None] | None:
        """Return who leads; what was known before if that can't be found out for now."""
        try:
            return (await self._candidacies.fetch_leader(self._key),)
        except anyio.ClosedResourceError:
            return self._last
        except psycopg.OperationalError as exc:
            # During a failover there may be no primary for a while.
            if not (isinstance(exc, NotPrimaryError) or can_retry(exc)):
                raise
            return self._last

    def _check_open(self) -> None:
        if self._is_closed:
            raise anyio.ClosedResourceError
        if self._candidacies.is_closed:
            raise anyio.EndOfStream

    def close(self) -> None:
        """As `aclose`, without a checkpoint."""
        self._is_closed = True
        self._ring.ring()

    async def aclose(self) -> None:
        self.close()
        await anyio.lowlevel.checkpoint()


def check_candidate(candidate: object) -> str:
    """Return a candidate's name.

    Raises:
        ValueError: if the server could not show it as it is.
    """
    name = candidate if isinstance(candidate, str) else ""
    if not (1 <= len(name) <= _LONGEST and name.isascii() and name.isprintable()):
        raise ValueError(
            f"candidate must be 1 to {_LONGEST} printable ASCII characters, not {candidate!r}"
        )
    return name
