"""A server session for the library's own use: full duplex, shared by any number of tasks.

Commands of any number of tasks travel on one `Wire`, each in a transaction of its
own, while notifications come in and the end of the session is seen at once. A
caller that is cancelled leaves: its command's answer is reaped and dropped, and
nothing can get out of step.
"""

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# The factory below wires the class it makes; nothing else in this module is private to it.

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg
from psycopg import generators

from pgstructured._util import NoPublicConstructor, create, open_background
from pgstructured.errors import ConnectionLostError, NotPrimaryError
from pgstructured.observe import emit

from ._connecting import connect_first
from ._conninfo import Conninfo, clean_application_name, parse_conninfo, resolve_conninfo
from ._lifecycle import ConnectionState
from ._settling import request_cancel
from ._wire import Wire

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from ._commands import Command, Prepared, SessionParam, SessionResult
    from ._wire import NoticeHandler, NotificationHandler

    SessionSettings = Mapping[str, str] | Callable[[int], Mapping[str, str]]


_READ_ONLY: Final = "25006"
_SET: Final = (
    "SELECT CASE WHEN pg_catalog.pg_backend_pid() = $1::int"
    " THEN pg_catalog.set_config($2, $3, false) END"
)
"""Makes a setting, but not through a pooler: it would stay there for others."""
_SET_ANYWHERE: Final = "SELECT pg_catalog.set_config($1, $2, false)"


@final
class Session(metaclass=NoPublicConstructor):
    """One server session; see the module's text. Made by `open_session`."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._backend_pid = wire.pgconn.backend_pid
        self._server_version = wire.pgconn.server_version
        self._behind_pooler = False
        self._is_standby = False
        self._heartbeat_rtt: float | None = None
        self.now: Callable[[], float] = wire.now
        """Returns the event-loop time, cheaper than `anyio.current_time` does."""
        self.checkpoint_if_cancelled: Callable[[], Awaitable[None]] = wire.checkpoint_if_cancelled
        """As `anyio.lowlevel.checkpoint_if_cancelled`, cheaper."""
        self._is_kept = False
        self._prepared: set[bytes] = set()
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
        wire = self._wire
        if statement.name not in self._prepared:
            wire.send_prepare(*statement)
            self._prepared.add(statement.name)
        return wire.send_prepared(statement.name, params)

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
        self._is_kept = True

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
                all the same.

        Cancellation:
            Shielded: takes up to ``close_timeout`` even in a cancelled scope.
        """
        if self.state is ConnectionState.OPEN:
            self._wire.begin_closing()
            try:
                if self._wire.commands:
                    with anyio.move_on_after(close_timeout, shield=True):
                        await self._settle_commands()
            finally:
                self._wire.end(ConnectionState.CLOSED)
        await anyio.lowlevel.checkpoint()

    async def _settle_commands(self) -> None:
        """End what runs on the server: a closed socket alone would not."""
        pause = 0.05
        while self._wire.commands and self.state is ConnectionState.CLOSING:
            try:
                await request_cancel(self._wire.pgconn)
            except psycopg.Error as exc:
                self._wire.fail(exc)
                return
            # A request that overtakes its statement is lost, so it is repeated.
            with anyio.move_on_after(pause):
                await self._wire.settled.wait()
            pause = min(pause * 2, 1.0)

    async def _beat(
        self, interval: float, patience: Callable[[], float], ask: Callable[[], str]
    ) -> None:
        """Ask for a sign of life when there was none for ``interval`` seconds."""
        wire = self._wire
        while wire.state is ConnectionState.OPEN:
            silent = wire.now() - wire.last_received_at
            if silent < interval:
                await anyio.sleep(interval - silent)
            elif any(command.may_block for command in wire.commands):
                await anyio.sleep(interval)
            else:
                await self._beat_once(patience, ask)

    async def _beat_once(self, patience: Callable[[], float], ask: Callable[[], str]) -> None:
        wire = self._wire
        began = perf_counter()  # finer than some event loops' clocks
        try:
            command = wire.send([(ask(), ())])
        except ConnectionLostError:
            return  # found by sending, and told to everybody who has to do with the session
        while wire.state is ConnectionState.OPEN:
            # Whatever arrives is life: the answer may be queued behind a flood.
            limit = patience()
            left = max(command.sent_at, wire.last_received_at) + limit - wire.now()
            with anyio.move_on_after(max(left, 0.0)):
                await command.wait()
                self._heartbeat_rtt = perf_counter() - began
                emit("driver.heartbeat", backend_pid=self._backend_pid, took=self._heartbeat_rtt)
                return
            if not wire.read_now() and left <= 0:
                wire.fail(
                    psycopg.errors.ConnectionTimeout(
                        f"the server fell silent: no answer within {limit:g} s"
                    )
                )


@asynccontextmanager
async def open_session(
    conninfo: Conninfo = "",
    *,
    application_name: str | None = None,
    connect_timeout: float = 10.0,
    heartbeat: float | None = None,
    heartbeat_timeout: float | Callable[[], float] = 5.0,
    heartbeat_statement: Callable[[], str] | None = None,
    close_timeout: float = 1.0,
    settings: SessionSettings | None = None,
    is_session_pooled: bool = False,
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
        heartbeat_timeout: Seconds it has for that, or a function that returns them, asked now
            and then; then the session has failed.
        heartbeat_statement: Returns what to ask with: something that gives nothing, as the
            empty statement, the default, or a comment for others to read.
        close_timeout: Seconds that leaving may take on top, to end what still runs.
        settings: Server settings to make first, as ``{"statement_timeout": "0"}``, or a
            function that returns them for the server's version (150004). Not made behind a
            pooler, whose other clients would have them too.
        is_session_pooled: A pooler in between gives each of its clients a backend to itself
            and cleans that afterwards, so settings are made there too.
        on_notifications: Called with the notifications of each read, in order; sync, must
            not raise.
        on_notice: Called with each notice's diagnostics, valid during the call only.
        params: More connection parameters, over the conninfo's.

    Yields:
        The open session.

    Raises:
        psycopg.OperationalError: if connecting fails; `psycopg.errors.ConnectionTimeout` if
            it takes too long.
        NotPrimaryError: if ``target_session_attrs`` asks for a primary and no host is one.
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
    try:
        pgconn = await connect_first(parsed, generators.connect, total_timeout=connect_timeout)
    except psycopg.OperationalError as exc:
        if exc.sqlstate == _READ_ONLY:
            raise NotPrimaryError(f"no host is a primary: {exc}") from exc
        raise
    wire = Wire(pgconn, on_notifications=on_notifications, on_notice=on_notice)
    session = create(Session, wire)
    async with open_background() as tasks:
        try:
            tasks.start_soon(wire.run_until_ended, wire.read)
            tasks.start_soon(wire.run_until_ended, wire.write)
            made = settings(session.server_version) if callable(settings) else settings
            await _prepare(session, made or {}, deadline, anywhere=is_session_pooled)
            emit(
                "driver.connected",
                backend_pid=session.backend_pid,
                took=anyio.current_time() - began,
            )
            if heartbeat is not None:
                ask = heartbeat_statement or str
                limit = heartbeat_timeout
                patience = limit if callable(limit) else lambda: limit
                beat = partial(session._beat, heartbeat, patience, ask)
                tasks.start_soon(wire.run_until_ended, beat)
            yield session
        finally:
            if session._is_kept:
                wire.stop_background()
            else:
                with anyio.CancelScope(shield=True):  # bounded by aclose itself
                    await session.aclose(close_timeout=close_timeout)


async def _prepare(
    session: Session, settings: Mapping[str, str], deadline: float, *, anywhere: bool
) -> None:
    """Make the settings and learn what kind of server this is, in one round trip."""
    statements: list[tuple[str, Sequence[SessionParam]]] = [
        (_SET_ANYWHERE, (name, value)) if anywhere else (_SET, (session.backend_pid, name, value))
        for name, value in settings.items()
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
