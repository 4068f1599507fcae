"""A server session for the library's own use: full duplex, shared by any number of tasks.

Commands of any number of tasks travel on one `Wire`, each in a transaction of its
own, while notifications come in and the end of the session is seen at once. A
caller that is cancelled leaves: its command's answer is reaped and dropped, and
nothing can get out of step.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol, final

import anyio

from pgstructured._util import NoPublicConstructor

from ._lifecycle import ConnectionState
from ._settling import request_cancel
from ._wire_closing import close

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import psycopg

    from ._commands import Command, Prepared, SessionParam, SessionResult
    from ._gathering import Gatherable
    from ._wire import Wire


class Pulse(Protocol):
    """What tells whether a session lives."""

    @property
    def state(self) -> ConnectionState:
        """See `Session.state`."""
        ...

    @property
    def last_confirmed(self) -> float:
        """See `Session.last_confirmed`."""
        ...

    @property
    def last_received_at(self) -> float:
        """See `Session.last_received_at`."""
        ...


@final
class Session(metaclass=NoPublicConstructor):
    """One server session; see the module's text. Made by `open_session`."""

    def __init__(self, wire: Wire, *, behind_pooler: bool, is_standby: bool) -> None:
        self._wire = wire
        self._backend_pid = wire.backend_pid
        self._server_version = wire.pgconn.server_version
        self._behind_pooler = behind_pooler
        self._is_standby = is_standby
        self.pulse: Pulse = wire
        """What is asked of the session most often, by a shorter way."""
        self.kept: Final[dict[object, object]] = {}
        """What its users keep with it, each by a key of their own."""
        self.now: Callable[[], float] = wire.now
        """Returns the event-loop time, cheaper than `anyio.current_time` does."""
        self.checkpoint_if_cancelled: Callable[[], Awaitable[None]] = wire.checkpoint_if_cancelled
        """As `anyio.lowlevel.checkpoint_if_cancelled`, cheaper."""
        self.gather: Callable[[Gatherable, Sequence[bytes]], Command] = wire.gather
        """As `send_prepared`, as one command with what other tasks send at the same time: what to
        run, and the values, each a number in the protocol's text format."""
        self._running = anyio.Lock()

    def __repr__(self) -> str:
        return f"<Session backend_pid={self._backend_pid} {self.state}>"

    @property
    def state(self) -> ConnectionState:
        """OPEN, CLOSED or FAILED."""
        return self._wire.state

    @property
    def failure(self) -> psycopg.Error | None:
        """Why the session FAILED: the server's own error where it said one."""
        return self._wire.failure

    @property
    def backend_pid(self) -> int:
        """Process id of the server session, as the server announced it."""
        return self._backend_pid

    @property
    def server_version(self) -> int:
        """Version of the server as a number: 150004 for 15.4."""
        return self._server_version

    @property
    def behind_pooler(self) -> bool:
        """Whether ``pg_backend_pid()`` was another than the announced one when connecting."""
        return self._behind_pooler

    @property
    def is_standby(self) -> bool:
        """Whether the server was in recovery when connecting."""
        return self._is_standby

    @property
    def last_received_at(self) -> float:
        """Event-loop time of the last byte from the server."""
        return self._wire.last_received_at

    @property
    def last_confirmed(self) -> float:
        """Event-loop time at which the last command that was answered had been sent."""
        return self._wire.last_confirmed

    @property
    def heartbeat_rtt(self) -> float | None:
        """Seconds that the last heartbeat took; None before the first."""
        return self._wire.heartbeat_rtt

    # ------------------------------------------------------------ commands

    async def execute(
        self,
        statement: str,
        params: Sequence[SessionParam] = (),
        *,
        may_block: bool = False,
    ) -> SessionResult:
        """Run one statement, in a transaction of its own.

        Args:
            statement: SQL with ``$1``, ``$2`` … as placeholders.
            params: Their values; the server infers the types.
            may_block: The statement may wait for other sessions for any length of time;
                no heartbeat is expected to be answered meanwhile.

        Returns:
            What it gave.

        Raises:
            psycopg.Error: what the server says.
            ConnectionLostError: if the session has failed, or fails meanwhile.
            anyio.ClosedResourceError: if it is closed, or gets closed meanwhile.

        Cancellation:
            A checkpoint. A call that is cancelled before it has sent does nothing; later the
            statement runs on and its answer is dropped. `cancel` ends it on the server.
        """
        wire = self._wire
        await wire.checkpoint_if_cancelled()
        command = wire.send_one(statement, params, may_block)
        await command.signal
        return command.result()

    async def execute_batch(
        self,
        statements: Sequence[tuple[str, Sequence[SessionParam]]],
        *,
        may_block: bool = False,
    ) -> list[SessionResult]:
        """Run statements in one round trip and one transaction: all or nothing.

        As `execute` in everything else.

        Returns:
            What each statement gave.

        Cancellation:
            As `execute`.
        """
        await self._wire.checkpoint_if_cancelled()
        command = self._wire.send(statements, may_block=may_block)
        await command.signal
        return command.results()

    def send(
        self,
        statements: Sequence[tuple[str, Sequence[SessionParam]]],
        *,
        may_block: bool = False,
    ) -> Command:
        """Send statements and return at once; `execute_batch` without the waiting.

        For clean-up: what is sent from a cancelled task is on its way all the same.

        Raises:
            ConnectionLostError: if the session has failed.
            anyio.ClosedResourceError: if it is closed.
            ValueError: if something can't be sent; then nothing was.
        """
        return self._wire.send(statements, may_block=may_block)

    def send_prepared(self, statement: Prepared, params: Sequence[bytes]) -> Command:
        """Send one prepared statement and return at once; it is prepared where it is new.

        Args:
            statement: What to run.
            params: The values, in the protocol's text format; no NUL.

        Raises:
            ConnectionLostError: if the session has failed.
            anyio.ClosedResourceError: if it is closed.
        """
        return self._wire.send_prepared(statement, params)

    def send_named(
        self, name: bytes, params: Sequence[bytes | None], *, may_block: bool = False
    ) -> Command:
        """As `send_prepared`, for a statement that was prepared here by SQL's ``PREPARE``."""
        return self._wire.send_named(name, params, may_block=may_block)

    async def ping(self) -> float:
        """Make a round trip with an empty statement.

        Returns:
            How long it took, in seconds.

        Raises:
            ConnectionLostError: if the session has failed, or fails meanwhile.

        Cancellation:
            As `execute`.
        """
        began = perf_counter()  # finer than some event loops' clocks
        await self.execute("")
        return perf_counter() - began

    async def cancel(self) -> None:
        """Ask the server to cancel what this session runs; does nothing if it runs nothing.

        Returns when the server has taken note of the request, which is before the
        statement ends and no promise that it does.

        Raises:
            psycopg.OperationalError: if the request could not be delivered.

        Cancellation:
            A checkpoint. A cancelled call may or may not have delivered the request.
        """
        if self.state is ConnectionState.OPEN and self._wire.commands:
            await request_cancel(self._wire.pgconn)
        else:
            await anyio.lowlevel.checkpoint()

    # ------------------------------------------------------------ keeping it

    def keep(self) -> None:
        """Leave the session open at the end of its block, with nothing running on it.

        From then on somebody has to `run` it for anything to happen, and to `aclose` it.
        """
        self._wire.is_kept = True

    async def run(self) -> None:
        """Run what is needed in the background of a kept session, until it has ended.

        Any number of tasks may; one of them does.

        Cancellation:
            A checkpoint; the session stays as it is.
        """
        async with self._running, anyio.create_task_group() as tasks:
            if self.state is ConnectionState.OPEN:
                tasks.start_soon(self._wire.read)
                tasks.start_soon(self._wire.write)
                await self._wire.ended.wait()
            tasks.cancel_scope.cancel()

    def poll(self) -> None:
        """Take note of what has come, while nothing runs in the background."""
        # An end may take several reads: the server's last words come before it.
        while self.state is ConnectionState.OPEN and self._wire.read_now():
            pass

    # ------------------------------------------------------------ end

    async def wait_closed(self) -> None:
        """Wait until the session has ended, for whatever reason; never raises for it.

        Cancellation:
            A checkpoint; nothing changes.
        """
        await self._wire.ended.wait()

    async def aclose(self, *, close_timeout: float = 1.0) -> None:
        """Close the session; what still runs on the server is cancelled first.

        Idempotent, and without effect on a failed session.

        Args:
            close_timeout: Seconds that the cancel request may take; then the socket is closed
                all the same. With 0 nothing is cancelled: the server runs what it was sent.

        Cancellation:
            Shielded: takes up to ``close_timeout`` even in a cancelled scope.
        """
        await close(self._wire, close_timeout)
