"""Locks on sessions of their own, one for each.

The session ends with its lock, so wherever there is doubt whether the server has
granted one (an acquire that was cancelled, timed out or failed; an unlock without an
answer) the end of the session settles it. A refusal is no proof: cancelled and
timed-out waits have been seen to say so and hold the lock all the same.
"""

from __future__ import annotations

import math
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import anyio
import psycopg

from pgstructured._util import contained, open_background
from pgstructured.driver import ConnectionState
from pgstructured.observe import emit

from ._fencing import FenceGrant, FenceTable, TokenWithheldError
from ._loss import Loss, diagnose
from ._names import note
from ._refusals import already_held, not_in_time, refuse, translated
from ._retrying import Retries
from ._sessions import fetch_grant, open_lock_session
from ._statements import Answer, try_statement, unlock_statement, wait_statement
from ._tasks import holds_elsewhere
from ._watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from pgstructured.driver import Conninfo, NotificationHandler, Session

    from ._grip import LockRequest
    from ._options import LockOptions

    Statements = Sequence[tuple[str, Sequence[str]]]


@final
class SessionGrip:
    """A lock on a `Session` of its own."""

    connection: None = None
    is_known_to_task = False
    is_unlocked = False  # nobody looks any more
    patience: float = 1.0
    now = staticmethod(anyio.current_time)

    def __init__(
        self,
        session: Session,
        request: LockRequest,
        *,
        identity: str,
        backend_pid: int,
        fencing: FenceGrant | None,
        options: LockOptions,
        see_off: Callable[[Session], None] | None = None,
    ) -> None:
        self._session = session
        self._request = request
        self._options = options
        self._see_off = see_off
        self.is_detached = False
        self.left = anyio.Event()
        """Set at the end of the block that it was taken for."""
        self._is_closing = False
        self.identity = identity
        self.backend_pid = backend_pid
        self.fencing = fencing
        self.fence = FenceTable(options.fence_table)
        self.watch = Watch(lambda: self.overdue_at)

    @property
    def last_confirmed(self) -> float:
        return self._session.last_confirmed

    @property
    def overdue_at(self) -> float:
        if self.is_detached:
            return math.inf  # nobody asks for signs of life
        return self._session.last_confirmed + self._options.lost_after

    async def wait_closed(self) -> None:
        """Wait until the session has ended."""
        await self._session.wait_closed()

    @property
    def has_ended(self) -> bool:
        if self.is_detached:
            self._session.poll()
        return self._is_closing or self._session.state is not ConnectionState.OPEN

    def begin_closing(self) -> None:
        """Tell its lock that it is lost; the session ends as soon as the lock's block has."""
        self._is_closing = True
        self.watch.look()

    async def aclose(self) -> None:
        """End the session now, whoever still counts on it."""
        self._is_closing = True
        await self._session.aclose(close_timeout=0)

    def diagnose(self) -> Loss:
        is_overdue = anyio.current_time() >= self.overdue_at
        return diagnose(self._session.failure, is_overdue=is_overdue)

    async def confirm(self) -> bool:
        await self._session.ping()
        return True  # nobody else can unlock on this session

    async def unlock(self) -> bool:
        request = self._request
        if self.fencing is None:
            statement = unlock_statement(request.key, shared=request.shared)
        else:
            statement = self.fence.unlock_statement(request.key, self.fencing.token)
        session = self._session
        unlocking = session.send([(statement, ())])
        await unlocking.wait()
        was_held = unlocking.scalar() == b"true"  # refused, it is still held, and to be given up
        # Nothing else is on it, and a lock released early may have a long block.
        if self._see_off is not None and not self._is_closing:
            session.keep()
            self._see_off(session)
        else:
            # It does not wait for the server; and what has been answered in time stays so.
            with anyio.CancelScope(shield=True):
                await session.aclose(close_timeout=0)
        return was_held

    async def abandon(self) -> None:
        await self._session.aclose(close_timeout=0)

    def forget(self) -> None:
        """Nothing is left to do: the session has ended."""

    def detach(self) -> None:
        self.is_detached = True
        self._session.keep()

    @asynccontextmanager
    async def attend(self) -> AsyncGenerator[None]:
        async with open_background() as tasks:
            tasks.start_soon(contained, self._run_session)
            tasks.start_soon(self._look_at_end)
            yield

    async def _run_session(self) -> None:
        await self.left.wait()  # until then it runs by itself
        await self._session.run()

    async def _look_at_end(self) -> None:
        await self._session.wait_closed()
        self.watch.look()


@final
class DedicatedSource:
    """Takes each lock on a session of its own.

    Args:
        conninfo: Where to connect.
        options: How the sessions live.
        preface: What to run on each session before it asks for the lock.
        on_backend: Called with the process id of each session before it may wait.
        greeting: What to run on the session once the lock has been granted.
        see_off: Called with the session after the unlock, to see to its end; without it, the
            session ends at once.
        on_notifications: Called with the notifications of each read of a session.
    """

    def __init__(
        self,
        conninfo: Conninfo,
        options: LockOptions,
        *,
        preface: str | None = None,
        on_backend: Callable[[int], None] | None = None,
        greeting: Statements = (),
        see_off: Callable[[Session], None] | None = None,
        on_notifications: NotificationHandler | None = None,
    ) -> None:
        self.conninfo: Final = conninfo
        self.options: Final = options
        self.preface: Final = preface
        self.on_backend: Final = on_backend
        self.greeting: Final = greeting
        self.see_off: Final = see_off
        self.on_notifications: Final = on_notifications

    now = staticmethod(anyio.current_time)
    create_scope = anyio.CancelScope
    ask = None

    @property
    def release_timeout(self) -> float:
        """Seconds an unlock may take."""
        return self.options.release_timeout

    @asynccontextmanager
    async def take(self, request: LockRequest) -> AsyncGenerator[SessionGrip | None]:
        """Take a lock for the length of a block; see `LockSource.take`."""
        grip: SessionGrip | None = None
        try:
            async with AsyncExitStack() as session_stack:
                grip = await _Acquire(self, request).run(session_stack)
                if grip is None:
                    yield None
                    return
                async with grip.watch.running(grip.wait_closed):
                    yield grip
        finally:
            if grip is not None:
                grip.left.set()


class _Acquire:
    """One acquire: sessions that come and go until one of them is granted the lock."""

    def __init__(self, source: DedicatedSource, request: LockRequest) -> None:
        self._source = source
        self._conninfo = source.conninfo
        self._options = source.options
        self._request = request
        self._retries = Retries(source.options, request)
        self._is_granted = False

    def _patience(self) -> float:
        return self._options.server_timeout if self._is_granted else self._options.lost_after

    async def run(self, session_stack: AsyncExitStack) -> SessionGrip | None:
        """Return the grip, with its session's end on the stack; None after a refused try."""
        while True:
            try:
                async with AsyncExitStack() as attempt:
                    session = await attempt.enter_async_context(
                        open_lock_session(
                            self._conninfo,
                            self._options,
                            connect_by=self._retries.connect_by,
                            patience=self._patience,
                            heartbeat_statement=lambda: note((self._request.key,)),
                            on_notifications=self._source.on_notifications,
                        )
                    )
                    grip = await self._take_on(session)
                    if grip is not None:
                        self._is_granted = True
                        session_stack.push_async_exit(attempt.pop_all())
                    return grip
            except psycopg.OperationalError as exc:
                error = exc
            await self._retries.back_off(error)

    async def _take_on(self, session: Session) -> SessionGrip | None:
        request = self._request
        key, shared = request.key, request.shared
        with anyio.CancelScope(deadline=self._retries.deadline), translated(key):
            if self._source.preface is not None:
                session.send([(self._source.preface, ())])  # done before the lock is granted
            statement = try_statement(key, shared=shared) + note((key,))
            answer = Answer(*(await session.execute(statement)).rows[0])
            identity, backend_pid = str(answer.identity), int(answer.backend_pid or 0)
            if self._source.on_backend is not None:
                self._source.on_backend(backend_pid)
            if answer.verdict != "granted":
                if holds_elsewhere(identity, key, backend_pid):
                    raise already_held(key)
                if not request.may_wait:
                    refuse(request)
                    return None
                emit("lock.contended", key=key, shared=shared)
                await self._wait_on(session)
            else:
                self._greet(session)
            fencing: FenceGrant | None = None
            if request.fenced:
                try:
                    fencing = await fetch_grant(
                        self._conninfo, self._options, request, connect_by=self._retries.connect_by
                    )
                except TokenWithheldError:
                    refuse(request)
                    return None
            return SessionGrip(
                session,
                request,
                identity=identity,
                backend_pid=backend_pid,
                fencing=fencing,
                options=self._options,
                see_off=self._source.see_off,
            )
        raise not_in_time(request)

    def _greet(self, session: Session) -> None:
        """Tell others; to wait for that would only keep the holder from its work."""
        if self._source.greeting:
            session.send(self._source.greeting)

    async def _wait_on(self, session: Session) -> None:
        """Stand in the server's queue."""
        try:
            key, shared = self._request.key, self._request.shared
            await session.execute(wait_statement(key, shared=shared) + note((key,)), may_block=True)
            # The lease runs from a round trip after the grant, not from before the wait.
            proof = session.send([("", ())])
            self._greet(session)
            await proof.wait()
            proof.result()
        finally:
            # It was connected until now: what follows, another session or a token's, has the
            # whole time for connecting.
            self._retries.begin()
