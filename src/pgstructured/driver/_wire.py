"""Both directions of one server session's socket, in libpq's pipeline mode.

Any task may `Wire.send`; only the reader reads, and hands out results in the order
of their commands, notifications and notices as they come, and the end of the
session at once, because it is always waiting for the socket.

========  =====================================  ====================  ==============
state     what ends it                           commands in flight    next
========  =====================================  ====================  ==============
OPEN      `Wire.begin_closing`                   go on                 CLOSING
OPEN      end of stream, protocol error,         ConnectionLostError   FAILED
          `Wire.fail`
CLOSING   `Wire.end`                             ClosedResourceError   CLOSED
CLOSING   as OPEN                                ConnectionLostError   FAILED
========  =====================================  ====================  ==============

Manual: "Pipeline Mode" and "Asynchronous Notification" of libpq, "Message Flow"
of the frontend/backend protocol.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import anyio
import psycopg
from psycopg.pq import ConnStatus, ExecStatus

from pgstructured.errors import ConnectionLostError
from pgstructured.observe import emit

from ._commands import Command, SessionParam, encode_params, encode_statement
from ._gathering import Gathering
from ._lifecycle import ConnectionState, last_words
from ._waiting import READ, create_waiter, poll_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from psycopg.pq import PGnotify
    from psycopg.pq.abc import PGconn, PGresult

    from ._commands import Prepared
    from ._gathering import Gatherable
    from ._waiting import Signal

    NoticeHandler = Callable[[psycopg.errors.Diagnostic], None]
    _Message = tuple[bytes, list[bytes | None] | None]

SessionNotification: TypeAlias = "PGnotify"
"""A notification as libpq gives it."""
NotificationHandler: TypeAlias = "Callable[[list[SessionNotification]], None]"

# Plain integers: libpq's numbers are compared on every result.
_PIPELINE_SYNC: Final = int(ExecStatus.PIPELINE_SYNC)
_TUPLES_OK: Final = int(ExecStatus.TUPLES_OK)
_COPY: Final = (int(ExecStatus.COPY_OUT), int(ExecStatus.COPY_IN), int(ExecStatus.COPY_BOTH))
_BAD: Final = int(ConnStatus.BAD)


class Wire:
    """The connection of one session; see the module's text.

    Args:
        pgconn: A connection that is open, nonblocking and idle; owned from now on.
        on_notifications: Called with the notifications of each read.
        on_notice: Called with the diagnostics of each notice, valid during the call.
    """

    def __init__(
        self,
        pgconn: PGconn,
        *,
        on_notifications: NotificationHandler | None,
        on_notice: NoticeHandler | None,
    ) -> None:
        self.pgconn = pgconn
        self.backend_pid: Final = pgconn.backend_pid  # libpq forgets it once the connection is bad
        self.state: ConnectionState = ConnectionState.OPEN
        self.failure: psycopg.Error | None = None
        """Why the state is FAILED: the server's own error where it said one."""
        self.commands: deque[Command] = deque()
        """What has been sent and not been answered, in order."""
        self.ended: anyio.Event = anyio.Event()
        """Set once the socket is gone."""
        self.settled: anyio.Event = anyio.Event()
        """Set when the last command is answered while CLOSING."""
        self._waiter = create_waiter(pgconn.socket)
        self.now: Final = self._waiter.now
        self.checkpoint_if_cancelled: Final = self._waiter.checkpoint_if_cancelled
        self.last_received_at: float = self.now()
        self.last_confirmed: float = self.last_received_at
        self.heartbeat_rtt: float | None = None
        self.is_kept: bool = False
        """Whether it stays open at the end of the block it was opened for."""
        self._create_signal = self._waiter.create_signal
        self._on_notifications = on_notifications
        self._on_notice = on_notice
        self._last_words: psycopg.Error | None = None
        self._gathering: Final = Gathering(self.send_prepared, self._refusal)
        self._prepared: set[bytes] = set()
        self._preparing: dict[bytes, Command] = {}
        self._unsent = anyio.Event()
        self._is_writing = False
        self._background: list[anyio.CancelScope] = []
        pgconn.notice_handler = self._note
        pgconn.enter_pipeline_mode()

    # ------------------------------------------------------------ sending

    def send(
        self, statements: Sequence[tuple[str, Sequence[SessionParam]]], *, may_block: bool = False
    ) -> Command:
        """Send statements that succeed or fail together, and return at once.

        Raises:
            ConnectionLostError: if the session has failed.
            anyio.ClosedResourceError: if it is closed.
            ValueError: if something can't be sent; then nothing was.
        """
        if self.state is not ConnectionState.OPEN:
            raise self._refusal()
        # All of it is encoded before any of it is queued: half a command can't be taken back.
        messages = [
            (encode_statement(statement), encode_params(params)) for statement, params in statements
        ]
        return self._push(messages, may_block)

    def send_one(self, statement: str, params: Sequence[SessionParam], may_block: bool) -> Command:  # noqa: FBT001 - the hottest call
        """Send one statement; as `send` in everything else."""
        if self.state is not ConnectionState.OPEN:
            raise self._refusal()
        message = (encode_statement(statement), encode_params(params) if params else None)
        return self._push((message,), may_block)

    def send_prepared(
        self,
        statement: Prepared,
        params: Sequence[bytes | None],
        parts: list[Command] | None = None,
    ) -> Command:
        """Send one statement, prepared where it is new; as `send` in everything else."""
        name = statement.name
        if name not in self._prepared:
            self._prepare(statement)
        return self._send(self.pgconn.send_query_prepared, (name, params), parts=parts)

    def _prepare(self, statement: Prepared) -> None:
        """Prepare a statement, unless it is on its way; anew, if a cancel request has hit it."""
        preparing = self._preparing.get(statement.name)
        if preparing is None or preparing.has_failed:
            self._preparing[statement.name] = self._send(self.pgconn.send_prepare, statement)
        elif preparing.answers:
            self._prepared.add(statement.name)
            del self._preparing[statement.name]

    def send_named(
        self, name: bytes, params: Sequence[bytes | None], *, may_block: bool = False
    ) -> Command:
        """Send one statement that was prepared by SQL; as `send` in everything else."""
        return self._send(self.pgconn.send_query_prepared, (name, params), may_block)

    def gather(self, statement: Gatherable, params: Sequence[bytes]) -> Command:
        """Send one prepared statement with those of others; as `send` in everything else."""
        gathering = self._gathering
        if not gathering.is_on:  # nor is anything gathered then
            return self.send_prepared(statement.alone, params)
        if self.state is not ConnectionState.OPEN:
            raise self._refusal()
        command = Command(self._create_signal(), self.now(), False)  # noqa: FBT003 - by position is cheapest
        gathering.add(statement, params, command)
        return command

    def _send(
        self,
        send: Callable[..., None],
        arguments: tuple[Any, ...],
        may_block: bool = False,  # noqa: FBT001, FBT002 - private, and hot
        parts: list[Command] | None = None,
    ) -> Command:
        if self._gathering.gathered:  # it comes first
            self._gathering.flush()
        if self.state is not ConnectionState.OPEN:
            raise self._refusal()
        command = Command(self._create_signal(), self.now(), may_block)
        command.parts = parts  # before it is sent: it may be answered in the middle of that
        try:
            send(*arguments)
            self._end_command(command)
        except psycopg.OperationalError as exc:  # pragma: no cover - libpq mostly defers it
            self.fail(exc)
            raise self._refusal() from self.failure
        return command

    def _push(self, messages: Sequence[_Message], may_block: bool) -> Command:  # noqa: FBT001
        if self._gathering.gathered:  # it comes first
            self._gathering.flush()
        pgconn = self.pgconn
        command = Command(self._create_signal(), self.now(), may_block)
        try:
            for statement, params in messages:
                pgconn.send_query_params(statement, params)
            self._end_command(command)
        except psycopg.OperationalError as exc:  # pragma: no cover - libpq mostly defers it
            self.fail(exc)
            raise self._refusal() from self.failure
        return command

    def _end_command(self, command: Command) -> None:
        self.commands.append(command)
        self.pgconn.pipeline_sync()
        if self.pgconn.flush():
            self._unsent.set()

    def _refusal(self) -> Exception:
        if self.state is not ConnectionState.FAILED:
            return anyio.ClosedResourceError()
        error = ConnectionLostError(f"the session was lost: {self.failure}")
        error.__cause__ = self.failure
        return error

    # ------------------------------------------------------------ the end

    def begin_closing(self) -> None:
        """Refuse new commands."""
        self._gathering.flush()
        if self.state is ConnectionState.OPEN:  # else it has failed by that
            self.state = ConnectionState.CLOSING

    def fail(self, error: psycopg.Error) -> None:
        """End the session because the world did; the server's last words come before ``error``."""
        if self.state in (ConnectionState.OPEN, ConnectionState.CLOSING):
            self.failure = self._last_words or error
            emit("driver.failed", backend_pid=self.backend_pid, error=self.failure)
            self.end(ConnectionState.FAILED)

    def end(self, state: ConnectionState) -> None:
        """Let go of the socket, and of everybody who waits; idempotent."""
        if self.state in (ConnectionState.CLOSED, ConnectionState.FAILED):
            return
        self.state = state
        # Before the descriptor is closed: its number may be another connection's right after.
        self._waiter.close()
        if self._is_writing:
            anyio.notify_closing(self._waiter.fd)
        self.pgconn.finish()
        commands, self.commands = self.commands, deque()
        for command in commands:
            for part in command.parts or (command,):
                part.end(self._refusal())
        self._gathering.flush()  # which is refused, and told
        self.ended.set()
        self.stop_background()

    # ------------------------------------------------------------ background

    async def run_until_ended(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run background work until the session ends, and not until its owner is cancelled.

        An owner that is cancelled may still have to unlock, and to settle what runs. Where
        asyncio itself has cancelled this task, as `asyncio.run` does with all there are, nobody
        would read the answers: that ends the session.
        """
        try:
            with anyio.CancelScope(shield=True) as scope:
                if self.state is ConnectionState.OPEN:
                    self._background.append(scope)
                    await work()
        except anyio.get_cancelled_exc_class():  # noqa: ASYNC103 - asyncio's, and the task ends
            # That tells the owner; the cancellation would end its block in silence.
            self.fail(psycopg.OperationalError("its background task was cancelled"))

    def stop_background(self) -> None:
        """End the work that `run_until_ended` runs."""
        for scope in self._background:
            scope.cancel()

    async def read(self) -> None:
        """Read until the session ends."""
        with suppress(anyio.ClosedResourceError):  # ended, by `end`
            await self._waiter.serve(self._on_readable)

    def read_now(self) -> bool:
        """Read what has come and return whether there was anything.

        For whoever judges by the clock: after a blocked event loop the answer may be there,
        unread.
        """
        if not poll_now(self._waiter.fd, READ):
            return False
        self._on_readable()
        return True

    async def write(self) -> None:
        """Send what the socket did not take at once, until the session ends."""
        while True:
            await self._unsent.wait()
            self._unsent = anyio.Event()
            try:
                # Where the socket took no more, libpq has read from it to make room: what it
                # read will not make the socket readable again. Not where it was sent from: a
                # task that is woken may send, too, and what it sends would come in between.
                self._dispatch()
                while self.pgconn.flush():
                    self._is_writing = True
                    await anyio.wait_writable(self._waiter.fd)
                    self._is_writing = False
                    self._dispatch()
            except psycopg.OperationalError as exc:  # pragma: no cover - libpq mostly defers it
                self.fail(exc)
                return
            except anyio.ClosedResourceError:
                return  # ended, by `end`

    def _on_readable(self) -> None:
        try:
            self.pgconn.consume_input()
            self.last_received_at = self.now()  # an end of stream is no sign of life
            self._dispatch()
        except psycopg.OperationalError as exc:
            # Where it could not send, libpq has read, maybe all there was: what the server
            # has said stands before what it says of the socket.
            with suppress(psycopg.OperationalError):
                self._dispatch()
            self.fail(exc)

    def _dispatch(self) -> None:
        """Hand out everything that libpq holds: notifications and results, in their order."""
        pgconn, commands = self.pgconn, self.commands
        notifies = pgconn.notifies
        answered: list[Signal] = []
        while True:
            if (notification := notifies()) is not None:
                batch = [notification, *iter(notifies, None)]
                if self._on_notifications is not None:
                    self._on_notifications(batch)
            if not commands or pgconn.is_busy():
                break
            # libpq parses up to one result and no further, so notifications behind it
            # come to light only after it has been taken: look again.
            if not self._reap(commands, answered):
                self.fail(psycopg.OperationalError(pgconn.get_error_message()))
                break
        # Last of all: a task that is woken may run at once, and use the session again.
        if len(answered) == 1:
            answered[0].set()
        elif answered:
            self._waiter.set_all(answered, self._gathering)
        if not commands and self.state is ConnectionState.CLOSING:
            self.settled.set()

    def _reap(self, commands: deque[Command], answered: list[Signal]) -> bool:
        """Take the results that are there; return whether the connection is still good."""
        get_result, is_busy = self.pgconn.get_result, self.pgconn.is_busy
        while True:
            result = get_result()
            if result is None:  # between two statements, or for ever after the end
                if self.pgconn.status == _BAD:
                    return False
            elif result.status == _PIPELINE_SYNC:
                command = commands.popleft()
                self.last_confirmed = command.sent_at
                if command.parts is None:
                    answered.append(command.signal)
                else:
                    answered += command.hand_out(command.parts)
                if not commands:
                    return True
            else:
                if result.status > _TUPLES_OK:
                    if result.status in _COPY:  # libpq would give it again for ever
                        self.fail(psycopg.NotSupportedError("a session can't run COPY"))
                        return False
                    self._last_words = last_words(result, "utf-8") or self._last_words
                commands[0].answers.append(result)
            if is_busy():
                return True

    def _note(self, notice: PGresult) -> None:
        """Take a notice, which an idle session's last words are too."""
        self._last_words = last_words(notice, "utf-8") or self._last_words
        if self._on_notice is not None:
            self._on_notice(psycopg.errors.Diagnostic(notice, "utf-8"))
