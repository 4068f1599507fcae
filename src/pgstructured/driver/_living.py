# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# A subclass of psycopg's connection has to know psycopg's private names; only this room may.
"""What a connection is: its life, its failure, its socket.

The first of the three layers of `Connection`; see `_lifecycle` for its states.
"""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast
from weakref import ReferenceType, ref

import anyio
import psycopg
from psycopg import pq
from psycopg._connection_base import BaseConnection
from psycopg.rows import Row, tuple_row

from pgstructured.errors import ConnectionLostError
from pgstructured.observe import emit

from ._closing import close_politely
from ._commits import AfterCommit
from ._lifecycle import ConnectionState, find_last_words, last_words
from ._locking import OperationLock
from ._waiting import create_waiter

if TYPE_CHECKING:
    from psycopg import errors
    from psycopg.pq.abc import PGconn, PGresult
    from psycopg.rows import AsyncRowFactory

    from ._waiting import SocketWaiter

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_BAD: Final = pq.ConnStatus.BAD
_OK: Final = pq.ConnStatus.OK
_TUPLE_ROW: Final = cast("Any", tuple_row)
_OUT_OF_STEP: Final = re.compile(r"received \d+ results from command ")
"""What psycopg says where a pooler's farewell to a killed session came before the answer."""


class LivingConnection(psycopg.AsyncConnection[Row]):
    """A psycopg connection that knows its state and why it failed, and closes politely."""

    def __init__(
        self,
        pgconn: PGconn,
        row_factory: AsyncRowFactory[Row] = _TUPLE_ROW,
    ) -> None:
        super().__init__(pgconn, row_factory)
        itself = cast("ReferenceType[LivingConnection[Any]]", ref(self))
        self._lock = OperationLock(pgconn, partial(_make_idle, itself))
        self.lock: Any = self._lock  # psycopg uses it as `async with` only
        pgconn.notice_handler = partial(_hear_notice, itself)
        self._state = ConnectionState.OPEN
        self._failure: BaseException | None = None
        self._last_words: errors.Error | None = None
        self._waiter: SocketWaiter | None = None  # None: no new operations
        self._registered: SocketWaiter | None = None
        self._gone: anyio.Event | None = None
        self._after_commit = AfterCommit()
        self._behind_pooler = False
        self._cancel_timeout = 5.0
        self._close_timeout = 1.0
        self._cleaned_up_for = 0.0  # seconds of cancel_timeout that the cancellation has cost
        self._is_ending = False  # psycopg is cleaning up after a COPY or stream
        self._has_told = False  # an operation has raised what it FAILED with
        self._backend_pid = pgconn.backend_pid

    @property
    def state(self) -> ConnectionState:
        """Where the connection is in its life."""
        if self._state is ConnectionState.OPEN and self.pgconn.status == _BAD:
            self._fail(psycopg.OperationalError("the connection ended"))
        return self._state

    @property
    def failure(self) -> BaseException | None:
        """Why the connection has FAILED: the server's own error where it said one."""
        return self._failure if self.state is ConnectionState.FAILED else None

    @property
    def resources_released(self) -> bool:
        """Whether the socket is closed."""
        return self.state in {ConnectionState.CLOSED, ConnectionState.FAILED}

    @property
    def behind_pooler(self) -> bool:
        """Whether a connection pooler stands between, measured or declared; see `connect`."""
        return self._behind_pooler

    async def wait_closed(self) -> None:
        """Wait until the connection is closed or has failed, and its socket is gone.

        Only `open_connection` watches an idle connection; without it a lost one fails at
        its next operation.

        Cancellation:
            A checkpoint. Nothing is left behind.
        """
        if self.resources_released:
            await anyio.lowlevel.checkpoint()
            return
        if self._gone is None:
            self._gone = anyio.Event()
        await self._gone.wait()

    async def aclose(self) -> None:
        """Close the connection; a statement that is running is cancelled first.

        Harmless if it is closed or has failed already.

        Cancellation:
            Shielded, and bounded by the ``close_timeout`` (1 second unless `open_connection`
            was told otherwise). Not a checkpoint if there is nothing to wait for.
        """
        if self.state is ConnectionState.CLOSING:
            await self.wait_closed()
        if self._state is not ConnectionState.OPEN:
            return
        self._state = ConnectionState.CLOSING
        self._closed = True
        self._waiter = None
        try:
            if self.pgconn.transaction_status == _ACTIVE:
                if self._registered is None:
                    self._registered = create_waiter(self.pgconn.socket)
                await close_politely(
                    self.pgconn, self._registered, self._lock, limit=self._close_timeout
                )
        finally:
            self._state = ConnectionState.CLOSED
            self._let_go()

    async def close(self) -> None:
        """Close the connection; the same as `aclose`.

        Cancellation:
            As `aclose`.
        """
        await self.aclose()

    def __del__(self, __warn: Any = warnings.warn) -> None:  # noqa: PYI063 - psycopg's own parameter
        if (registered := getattr(self, "_registered", None)) is not None:
            with suppress(Exception):  # at exit, or on another thread than the loop's
                registered.close()
        super().__del__(__warn)

    # ------------------------------------------------------------------ inside

    async def _make_idle(self) -> None:
        """Settle what an operation has left in flight when it let go of the lock."""

    def _attach(self) -> SocketWaiter:
        """Register the socket with the event loop, or refuse the operation."""
        if self.state is not ConnectionState.OPEN:
            raise self._refusal()
        waiter = self._waiter = self._registered = create_waiter(self.pgconn.socket)
        self._lock.checkpoint_if_cancelled = waiter.checkpoint_if_cancelled
        return waiter

    def _check_connection_ok(self) -> None:
        if self.pgconn.status != _OK:
            raise self._refusal()

    def _refusal(self) -> psycopg.OperationalError:
        """Return what an operation on a connection that is not open raises."""
        if self.state is not ConnectionState.FAILED:
            return psycopg.OperationalError("the connection is closed")
        self._has_told = True
        reason = str(self._failure).strip().split("\n", 1)[0]
        refusal = ConnectionLostError(f"the connection is closed: it was lost ({reason})")
        refusal.__cause__ = self._failure
        return refusal

    def _take_note(self, exc: Exception) -> None:
        """See what an operation's error says about the connection; may raise a better one."""
        is_out_of_step = type(exc) is psycopg.InternalError and _OUT_OF_STEP.match(str(exc))
        if self._state is ConnectionState.OPEN:
            if self.pgconn.status == _BAD or is_out_of_step or find_last_words(exc) is not None:
                self._fail(exc)
                self._has_told = True
        elif self._state is not ConnectionState.FAILED or isinstance(
            exc, anyio.ClosedResourceError
        ):
            raise self._refusal() from exc
        if is_out_of_step:
            raise self._refusal() from exc

    def _tell_loss(self) -> None:
        """Raise if the connection has FAILED and no operation has said so yet.

        For the end of a block that was to commit: its body may have had nothing to do.
        """
        if self.state is ConnectionState.FAILED and not self._has_told:
            raise self._refusal()

    def _fail(self, cause: BaseException) -> None:
        if self._state is not ConnectionState.OPEN:
            return
        self._state = ConnectionState.FAILED
        self._failure = self._last_words or find_last_words(cause) or cause
        self._let_go()
        emit("driver.failed", backend_pid=self._backend_pid, error=self._failure)

    def _discard(self) -> None:
        """Close at once, without a word; for a connection that nobody has seen yet."""
        self._state = ConnectionState.CLOSED
        self._closed = True
        self._let_go()

    def _let_go(self) -> None:
        """Close the socket, waking whoever waits for it; the order matters."""
        self._waiter = None
        if self._registered is not None:
            self._registered.close()
            self._registered = None
        self.pgconn.finish()
        self._after_commit.drop()
        if self._gone is not None:
            self._gone.set()


async def _make_idle(connection: ReferenceType[LivingConnection[Any]]) -> None:
    """Settle what an operation has left in flight when it let go of the lock."""
    itself = cast("LivingConnection[Any]", connection())  # it runs the operation that ends
    await itself._make_idle()


def _hear_notice(connection: ReferenceType[LivingConnection[Any]], result: PGresult) -> None:
    itself = connection()
    if itself is not None and (words := last_words(result, itself.pgconn._encoding)) is not None:
        itself._last_words = words
    BaseConnection._notice_handler(cast("Any", connection), result)
