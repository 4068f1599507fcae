"""A server session for the library's own use: full duplex, shared by any number of tasks.

Any task may send; only the reader reads. So a command travels while others
are in flight (libpq's pipeline mode, one implicit transaction each), a
notification is seen while a command runs, and the end of the session is seen
at once, because somebody is always waiting for the socket. A caller that is
cancelled leaves: its command's answer is reaped and dropped, and nothing can get
out of step.

========  ==================================================  ===================
state     what ends it                                        commands in flight
========  ==================================================  ===================
OPEN      `Session.aclose`, leaving `open_session`            -
OPEN      end of stream, protocol error, silent heartbeat     -
CLOSED    -                                                   ClosedResourceError
FAILED    -                                                   ConnectionLostError
========  ==================================================  ===================

Manual: "Pipeline Mode" and "Asynchronous Notification" of libpq, "Message Flow"
of the frontend/backend protocol.
"""

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# The factory below wires the class it makes; nothing else in this module is private to it.

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager, suppress
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg
from psycopg import generators
from psycopg.pq import ConnStatus, ExecStatus

from pgstructured._util import NoPublicConstructor, create, open_background
from pgstructured.errors import ConnectionLostError
from pgstructured.observe import emit

from ._commands import Command, SessionParam, SessionResult, encode_params
from ._connecting import connect_first
from ._conninfo import Conninfo, clean_application_name, parse_conninfo, resolve_conninfo
from ._lifecycle import ConnectionState, last_words
from ._settling import request_cancel
from ._waiting import READ, create_waiter, poll_now

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from psycopg.pq import PGnotify
    from psycopg.pq.abc import PGconn, PGresult

    NotificationHandler = Callable[[list[PGnotify]], None]
    NoticeHandler = Callable[[psycopg.errors.Diagnostic], None]
    SessionSettings = Mapping[str, str] | Callable[[int], Mapping[str, str]]

# Plain integers: libpq's numbers are compared on every result.
_PIPELINE_SYNC: Final = int(ExecStatus.PIPELINE_SYNC)
_FATAL_ERROR: Final = int(ExecStatus.FATAL_ERROR)
_BAD: Final = int(ConnStatus.BAD)


@final
class Session(metaclass=NoPublicConstructor):
    """One server session; see the module's text. Made by `open_session`."""

    def __init__(
        self,
        pgconn: PGconn,
        *,
        on_notifications: NotificationHandler | None,
        on_notice: NoticeHandler | None,
    ) -> None:
        self._pgconn = pgconn
        self._waiter = create_waiter(pgconn.socket)
        self._commands: deque[Command] = deque()
        self._on_notifications = on_notifications
        self._on_notice = on_notice
        self._state = ConnectionState.OPEN
        self._failure: psycopg.Error | None = None
        self._last_words: psycopg.Error | None = None
        self._ended = anyio.Event()
        self._unsent = anyio.Event()
        self._settled = anyio.Event()
        self._is_writing = False
        self._background: list[anyio.CancelScope] = []
        self._backend_pid = pgconn.backend_pid
        self._server_version = pgconn.server_version
        self._behind_pooler = False
        self._is_standby = False
        self._heartbeat_rtt: float | None = None
        self._now = self._waiter.now
        self._create_signal = self._waiter.create_signal
        self._checkpoint_if_cancelled = self._waiter.checkpoint_if_cancelled
        self._last_received_at = self._last_confirmed = self._now()
        pgconn.notice_handler = self._note
        pgconn.enter_pipeline_mode()

    def __repr__(self) -> str:
        return f"<Session backend_pid={self._backend_pid} {self._state}>"

    @property
    def state(self) -> ConnectionState:
        """OPEN, CLOSED or FAILED."""
        return self._state

    @property
    def failure(self) -> psycopg.Error | None:
        """Why the session FAILED: the server's own error where it said one."""
        return self._failure

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
        return self._last_received_at

    @property
    def last_confirmed(self) -> float:
        """Event-loop time at which the last command that was answered had been sent."""
        return self._last_confirmed

    @property
    def heartbeat_rtt(self) -> float | None:
        """Seconds that the last heartbeat took; None before the first."""
        return self._heartbeat_rtt

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
        await self._checkpoint_if_cancelled()
        command = self.send([(statement, params)], may_block=may_block)
        await command.wait()
        return command.results("utf-8")[0]

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
        await self._checkpoint_if_cancelled()
        command = self.send(statements, may_block=may_block)
        await command.wait()
        return command.results("utf-8")

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
        """
        if self._state is not ConnectionState.OPEN:
            self._check_open()
        pgconn = self._pgconn
        command = Command(self._create_signal(), self._now(), may_block)
        try:
            for statement, params in statements:
                pgconn.send_query_params(statement.encode(), encode_params(params))
            self._commands.append(command)
            pgconn.pipeline_sync()
            unsent = pgconn.flush()
        except psycopg.OperationalError as exc:
            self._fail(exc)
            self._check_open()
            raise
        if unsent:
            self._unsent.set()
            # Where the socket took no more, libpq has read from it to make room: what it
            # read will not make the socket readable again.
            self._dispatch()
        return command

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
        if self._state is ConnectionState.OPEN and self._commands:
            await request_cancel(self._pgconn)
        else:
            await anyio.lowlevel.checkpoint()

    # ------------------------------------------------------------ end

    async def wait_closed(self) -> None:
        """Wait until the session has ended, for whatever reason; never raises for it.

        Cancellation:
            A checkpoint; nothing changes.
        """
        await self._ended.wait()

    async def aclose(self, *, close_timeout: float = 1.0) -> None:
        """Close the session; what still runs on the server is cancelled first.

        Idempotent, and without effect on a failed session.

        Args:
            close_timeout: Seconds that the cancel request may take; then the socket is closed
                all the same.

        Cancellation:
            Shielded: takes up to ``close_timeout`` even in a cancelled scope.
        """
        if self._state is ConnectionState.OPEN:
            self._state = ConnectionState.CLOSING
            try:
                if self._commands:
                    with anyio.move_on_after(close_timeout, shield=True):
                        await self._settle_commands()
            finally:
                self._end(ConnectionState.CLOSED)
        await anyio.lowlevel.checkpoint()

    async def _settle_commands(self) -> None:
        """End what runs on the server: a closed socket alone would not."""
        pause = 0.05
        while self._commands and self._state is ConnectionState.CLOSING:
            try:
                await request_cancel(self._pgconn)
            except psycopg.Error as exc:
                self._fail(exc)
                return
            # A request that overtakes its statement is lost, so it is repeated.
            with anyio.move_on_after(pause):
                await self._settled.wait()
            pause = min(pause * 2, 1.0)

    def _check_open(self) -> None:
        if self._state is ConnectionState.OPEN:
            return
        if self._state is ConnectionState.FAILED:
            raise self._lost()
        raise anyio.ClosedResourceError

    def _lost(self) -> ConnectionLostError:
        error = ConnectionLostError(f"the session was lost: {self._failure}")
        error.__cause__ = self._failure
        return error

    def _fail(self, error: psycopg.Error) -> None:
        """End the session because the world did."""
        if self._state in (ConnectionState.OPEN, ConnectionState.CLOSING):
            self._failure = self._last_words or error
            emit("driver.failed", backend_pid=self._backend_pid, error=self._failure)
            self._end(ConnectionState.FAILED)

    def _end(self, state: ConnectionState) -> None:
        if self._state in (ConnectionState.CLOSED, ConnectionState.FAILED):
            return
        self._state = state
        # Before the descriptor is closed: its number may be another connection's right after.
        self._waiter.close()
        if self._is_writing:
            anyio.notify_closing(self._waiter.fd)
        self._pgconn.finish()
        commands, self._commands = self._commands, deque()
        for command in commands:
            command.finish(
                self._lost() if state is ConnectionState.FAILED else anyio.ClosedResourceError()
            )
        self._ended.set()
        for scope in self._background:
            scope.cancel()

    # ------------------------------------------------------------ background

    async def _until_ended(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run background work until the session ends, and not until its owner is cancelled.

        An owner that is cancelled may still have to unlock, and to settle what runs.
        """
        with anyio.CancelScope(shield=True) as scope:
            if self._state is ConnectionState.OPEN:
                self._background.append(scope)
                await work()

    async def _read(self) -> None:
        """Read until the session ends."""
        with suppress(anyio.ClosedResourceError):  # ended, by `_end`
            await self._waiter.serve(self._on_readable)

    def _on_readable(self) -> None:
        self._last_received_at = self._now()
        try:
            self._pgconn.consume_input()
            self._dispatch()
        except psycopg.OperationalError as exc:
            self._fail(exc)

    async def _write(self) -> None:
        """Send what the socket did not take at once."""
        while True:
            await self._unsent.wait()
            self._unsent = anyio.Event()
            try:
                while self._pgconn.flush():
                    self._is_writing = True
                    await anyio.wait_writable(self._waiter.fd)
                    self._is_writing = False
                    self._dispatch()
            except psycopg.OperationalError as exc:
                self._fail(exc)
                return
            except anyio.ClosedResourceError:
                return  # ended meanwhile, by `_end`

    async def _beat(self, interval: float, patience: float) -> None:
        """Ask for a sign of life when there was none for ``interval`` seconds."""
        while self._state is ConnectionState.OPEN:
            silent = anyio.current_time() - self._last_received_at
            if silent < interval:
                await anyio.sleep(interval - silent)
            elif any(command.may_block for command in self._commands):
                await anyio.sleep(interval)
            else:
                await self._beat_once(patience)

    async def _beat_once(self, patience: float) -> None:
        command = self.send([("", ())])
        while self._state is ConnectionState.OPEN:
            # Whatever arrives is life: the answer may be queued behind a flood.
            left = self._silence_ends_at(command, patience) - self._now()
            with anyio.move_on_after(max(left, 0.0)):
                await command.wait()
                self._heartbeat_rtt = self._now() - command.sent_at
                return
            if poll_now(self._waiter.fd, READ):
                # The event loop was late, not the server: its answer is here, unread.
                self._on_readable()
            elif left <= 0:
                self._fail(
                    psycopg.errors.ConnectionTimeout(
                        f"the server fell silent: no answer within {patience:g} s"
                    )
                )

    def _silence_ends_at(self, command: Command, patience: float) -> float:
        return max(command.sent_at, self._last_received_at) + patience

    def _dispatch(self) -> None:
        """Hand out everything that libpq holds: notifications and results, in their order."""
        pgconn, commands = self._pgconn, self._commands
        notifies = pgconn.notifies
        answered: list[Command] = []
        while True:
            if (notification := notifies()) is not None:
                batch = [notification]
                while (notification := notifies()) is not None:
                    batch.append(notification)
                if self._on_notifications is not None:
                    self._on_notifications(batch)
            if not commands or pgconn.is_busy():
                break
            # libpq parses up to one result and no further, so notifications behind it
            # come to light only after it has been taken: look again.
            if not self._reap(commands, answered):
                self._fail(psycopg.OperationalError(pgconn.get_error_message()))
                break
        # Last of all: a task that is woken may run at once, and use the session again.
        for command in answered:
            command.finish()
        if not commands and self._state is ConnectionState.CLOSING:
            self._settled.set()

    def _reap(self, commands: deque[Command], answered: list[Command]) -> bool:
        """Take the results that are there; return whether the connection is still good."""
        get_result, is_busy = self._pgconn.get_result, self._pgconn.is_busy
        while True:
            result = get_result()
            if result is None:  # between two statements, or for ever after the end
                if self._pgconn.status == _BAD:
                    return False
            elif result.status == _PIPELINE_SYNC:
                command = commands.popleft()
                self._last_confirmed = command.sent_at
                answered.append(command)
                if not commands:
                    return True
            else:
                if result.status == _FATAL_ERROR:
                    self._last_words = last_words(result, "utf-8") or self._last_words
                commands[0].add(result)
            if is_busy():
                return True

    def _note(self, notice: PGresult) -> None:
        """Take a notice, which an idle session's last words are too."""
        self._last_words = last_words(notice, "utf-8") or self._last_words
        if self._on_notice is not None:
            self._on_notice(psycopg.errors.Diagnostic(notice, "utf-8"))


@asynccontextmanager
async def open_session(
    conninfo: Conninfo = "",
    *,
    application_name: str | None = None,
    connect_timeout: float = 10.0,
    heartbeat: float | None = None,
    heartbeat_timeout: float = 5.0,
    close_timeout: float = 1.0,
    settings: SessionSettings | None = None,
    on_notifications: NotificationHandler | None = None,
    on_notice: NoticeHandler | None = None,
    **params: Any,
) -> AsyncGenerator[Session]:
    """Hold one server session for the length of a block.

    The block is not cancelled when the session fails; `Session.wait_closed` tells.

    Args:
        conninfo: Where to connect, see `Conninfo`.
        application_name: Shown in ``pg_stat_activity``, unless the conninfo names one.
        connect_timeout: Seconds for connecting, all hosts together, and for ``settings``.
        heartbeat: Seconds of silence after which the server is asked for a sign of life;
            None for never.
        heartbeat_timeout: Seconds it has for that; then the session has failed.
        close_timeout: Seconds that leaving may take on top, to end what still runs.
        settings: Server settings to make first, as ``{"statement_timeout": "0"}``, or a
            function that returns them for the server's version (150004).
        on_notifications: Called with the notifications of each read, in order; sync, must
            not raise.
        on_notice: Called with each notice's diagnostics, valid during the call only.
        params: More connection parameters, over the conninfo's.

    Yields:
        The open session.

    Raises:
        psycopg.OperationalError: if connecting fails; `psycopg.errors.ConnectionTimeout` if
            it takes too long.
        ConninfoError: if the conninfo can't be understood.

    Cancellation:
        Entering is a checkpoint; a cancelled entry leaves no session behind. Leaving is
        shielded for at most ``close_timeout``.
    """
    began = anyio.current_time()
    deadline = began + connect_timeout
    parsed = parse_conninfo(await resolve_conninfo(conninfo), **params)
    parsed.setdefault(
        "application_name", clean_application_name(application_name or "pgstructured")
    )
    parsed["client_encoding"] = "utf8"
    pgconn = await connect_first(parsed, generators.connect, total_timeout=connect_timeout)
    session = create(Session, pgconn, on_notifications=on_notifications, on_notice=on_notice)
    async with open_background() as tasks:
        try:
            tasks.start_soon(session._until_ended, session._read)
            tasks.start_soon(session._until_ended, session._write)
            made = settings(session.server_version) if callable(settings) else settings
            await _prepare(session, made or {}, deadline)
            emit(
                "driver.connected",
                backend_pid=session.backend_pid,
                took=anyio.current_time() - began,
            )
            if heartbeat is not None:
                beat = partial(session._beat, heartbeat, heartbeat_timeout)
                tasks.start_soon(session._until_ended, beat)
            yield session
        finally:
            with anyio.CancelScope(shield=True):  # bounded by aclose itself
                await session.aclose(close_timeout=close_timeout)


async def _prepare(session: Session, settings: Mapping[str, str], deadline: float) -> None:
    """Make the settings and learn what kind of server this is, in one round trip."""
    statements: list[tuple[str, Sequence[SessionParam]]] = [
        ("SELECT set_config($1, $2, false)", (name, value)) for name, value in settings.items()
    ]
    statements.append(("SELECT pg_backend_pid(), pg_is_in_recovery()", ()))
    results: list[SessionResult] = []
    with anyio.move_on_after(deadline - anyio.current_time()):
        results = await session.execute_batch(statements)
    if not results:
        raise psycopg.errors.ConnectionTimeout("connection timeout expired")
    pid, in_recovery = results[-1].rows[0]
    session._behind_pooler = pid != str(session.backend_pid)
    session._is_standby = in_recovery == "t"
