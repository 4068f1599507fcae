# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# A subclass of psycopg's connection has to know psycopg's private names; only this room may.
"""`Connection`: a psycopg `AsyncConnection` whose waiting and cancelling are AnyIO's.

psycopg's cursors, COPY and streams do all their waiting through `Connection.wait`
and take turns through `Connection.lock`. So two rules make every one of them
cancellable, psycopg's own classes and their subclasses alike:

* an operation that is interrupted in `wait` settles there (see `_settling`);
* whoever leaves the lock leaves an idle connection (see `_locking`).
"""

from __future__ import annotations

import logging
import warnings
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast
from weakref import ReferenceType, ref

import anyio
import psycopg
from psycopg import errors, pq
from psycopg._connection_base import BaseConnection
from psycopg._conninfo_utils import gssapi_requested
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_to_dict, timeout_from_conninfo
from psycopg.rows import Row, tuple_row

from pgstructured.errors import ConnectionLostError
from pgstructured.observe import emit

from ._closing import close_politely
from ._commits import AfterCommit
from ._connecting import connect_first
from ._cursors import shielded_factory
from ._driving import Work, abandon, drive, drive_within
from ._lifecycle import ConnectionState, find_last_words, last_words, unread_last_words
from ._locking import OperationLock
from ._pipelines import AsyncPipeline
from ._settling import request_cancel, settle
from ._transactions import AsyncTransaction
from ._waiting import create_waiter

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from types import TracebackType
    from typing import Self

    from psycopg._tpc import Xid
    from psycopg.abc import AdaptContext, ConnParam, PQGen, RV
    from psycopg.pq.abc import PGconn, PGresult
    from psycopg.rows import AsyncRowFactory

    from ._waiting import SocketWaiter

logger = logging.getLogger("psycopg")

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_IDLE: Final = pq.TransactionStatus.IDLE
_INERROR: Final = pq.TransactionStatus.INERROR
_BAD: Final = pq.ConnStatus.BAD
_OK: Final = pq.ConnStatus.OK
_BINARY: Final = pq.Format.BINARY

_UNKNOWN: Final = "whether the transaction was committed is unknown"


class Connection(psycopg.AsyncConnection[Row]):
    """A psycopg connection for asyncio, uvloop and trio, whose every await can be cancelled.

    Made by `connect`, `open_connection`, or, with psycopg's own options and defaults,
    by `Connection.connect`. All that psycopg's manual says of `psycopg.AsyncConnection`
    holds; besides:

    * After a cancelled operation the connection is as usable as before (a transaction may
      be in error, and is rolled back by its block) or FAILED, within the ``cancel_timeout``
      given to `connect`, and no statement is left running on the server.
    * Two tasks that use it take turns, first come, first served.
    * Once it has FAILED, operations raise `pgstructured.errors.ConnectionLostError`.
    """

    def __init__(
        self,
        pgconn: PGconn,
        row_factory: AsyncRowFactory[Row] = cast("AsyncRowFactory[Row]", tuple_row),  # noqa: B008 - psycopg's own default
    ) -> None:
        super().__init__(pgconn, row_factory)
        itself = ref(self)
        self._lock = OperationLock(pgconn, partial(_make_idle, itself))
        self.lock = cast("Any", self._lock)  # psycopg uses it as `async with` only
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
        self._cleaned_up_for = 0.0  # seconds of cancel_timeout used since an operation ended well
        self._is_ending = False  # psycopg is cleaning up after a COPY or stream
        self._backend_pid = pgconn.backend_pid

    @classmethod
    async def connect(
        cls,
        conninfo: str = "",
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: AdaptContext | None = None,
        row_factory: AsyncRowFactory[Row] | None = None,
        cursor_factory: type[psycopg.AsyncCursor[Row]] | None = None,
        **kwargs: ConnParam,
    ) -> Self:
        """Connect as `psycopg.AsyncConnection.connect` does, with its options and defaults.

        The time for each address is libpq's ``connect_timeout``; nothing is found out about
        poolers. Prefer `pgstructured.driver.connect`.

        Raises:
            psycopg.OperationalError: if no host accepts the connection.
            psycopg.ProgrammingError: if the conninfo is malformed.

        Cancellation:
            A checkpoint. A cancelled call closes the socket it was connecting.
        """
        params = await cls._get_connection_params(conninfo, **kwargs)
        started = anyio.current_time()
        conn = await connect_first(
            params, cls._connect_gen, attempt_timeout=timeout_from_conninfo(params)
        )
        conn._autocommit = bool(autocommit)
        conn.prepare_threshold = prepare_threshold
        if row_factory is not None:
            conn.row_factory = row_factory
        if cursor_factory is not None:
            conn.cursor_factory = cursor_factory
        if context is not None:
            conn._adapters = AdaptersMap(context.adapters)
        emit("driver.connected", backend_pid=conn._backend_pid, took=anyio.current_time() - started)
        return conn

    # ------------------------------------------------------------------ life

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
                    self.pgconn, self._registered, self._lock, timeout=self._close_timeout
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

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Commit, or roll back if the body raised, then close.

        Cancellation:
            If one is pending nothing is committed. The rollback and the closing are shielded
            and bounded.
        """
        if self.closed:
            return
        try:
            if exc_val is None:
                await self.commit()
            elif isinstance(exc_val, Exception):
                await self._roll_back_quietly()
            # Interrupted: closing the session rolls back as well.
        finally:
            await self.aclose()

    def __del__(self, __warn: Any = warnings.warn) -> None:  # noqa: PYI063 - psycopg's own parameter
        if (registered := getattr(self, "_registered", None)) is not None:
            try:
                registered.close()
            except Exception:  # noqa: BLE001, S110 - at exit, or on another thread than the loop's
                pass
        super().__del__(__warn)

    # ------------------------------------------------------------------ operations

    async def wait(self, gen: PQGen[RV], interval: float = 0.0, timeout: float | None = None) -> RV:  # noqa: ASYNC109, ARG002 - psycopg's signature
        """Run a generator that operates on the connection, as psycopg's `!wait` does.

        Args:
            gen: The generator; it mustn't change sockets.
            interval: Taken for compatibility; there is no polling.
            timeout: Seconds until it is left as it is, with psycopg's internal wait timeout.

        Cancellation:
            A checkpoint where there is something to wait for. A cancelled call settles:
            the server is asked to cancel, its results are dropped, and what can't be ended
            within ``cancel_timeout`` is ended by closing the socket.
        """
        waiter = self._waiter
        if waiter is None:
            waiter = self._attach()
        if self._is_ending:
            return await self._wait_to_end(gen)
        try:
            if timeout is None:
                result = await drive(waiter, gen)
            else:
                result = await drive_within(waiter, gen, timeout)
        except Exception as exc:
            self._take_note(exc)
            raise
        except GeneratorExit:
            # The coroutine is being closed, so nothing can be awaited any more.
            if self.pgconn.transaction_status == _ACTIVE:
                self._fail(psycopg.OperationalError("an operation was abandoned half-way"))
                abandon(gen)
            raise
        except BaseException:
            if self.pgconn.transaction_status == _ACTIVE or self.pgconn.pipeline_status:
                await self._settle(Work(gen, started=True), may_cancel=True, to_idle=False)
            raise
        if self._cleaned_up_for:
            self._cleaned_up_for = 0.0
        return result

    async def commit(self) -> None:
        """Commit the transaction that is open, if one is.

        Raises:
            ConnectionLostError: if it was cancelled and COMMIT was not answered in time:
                the connection is FAILED, and whether the transaction was committed is unknown.

        Cancellation:
            A checkpoint before COMMIT is sent; the transaction is then left as it was. Later
            on COMMIT is waited for, ``cancel_timeout`` at most, before the cancellation goes on.
        """
        async with self._lock:
            committing = self.pgconn.transaction_status != _INERROR
            work = Work(self._commit_gen())
            try:
                await self._finish(work, remark=_UNKNOWN)
            except BaseException:
                if work.succeeded and committing:
                    self._after_commit.run_while_raising()
                elif self.pgconn.transaction_status == _IDLE and not self._num_transactions:
                    self._after_commit.drop()
                raise
        if committing:
            self._after_commit.run()
        else:
            self._after_commit.drop()

    async def rollback(self) -> None:
        """Roll the transaction back that is open, if one is.

        Cancellation:
            A checkpoint before ROLLBACK is sent. Later on it is waited for,
            ``cancel_timeout`` at most, before the cancellation goes on.
        """
        async with self._lock:
            work = Work(self._rollback_gen())
            try:
                await self._finish(work)
            finally:
                if work.succeeded:
                    self._after_commit.drop()

    def after_commit(self, callback: Callable[[], object]) -> None:
        """Run ``callback`` once the outermost transaction has committed.

        That is the end of the outermost `transaction` block, or `commit`; SQL's own
        COMMIT, sent as a statement, is not noticed. It is dropped if the transaction, or the
        nested block it was given in, is rolled back. In autocommit and outside of a
        transaction it is run at once.

        Args:
            callback: Must not block. What it raises comes out of the commit, which stands.
        """
        if self.state is not ConnectionState.OPEN:
            raise self._refusal()
        in_transaction = self._num_transactions > 0 or self.pgconn.transaction_status not in {
            _IDLE,
            _ACTIVE,
        }
        if self._autocommit and not in_transaction:
            callback()
        else:
            self._after_commit.add(callback)

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - psycopg's signature
        """Ask the server to cancel what the connection does now, as psycopg's does.

        Args:
            timeout: Seconds until `psycopg.errors.CancellationTimeout`; 0 for no limit.

        Cancellation:
            A checkpoint. A cancelled call may or may not have reached the server.
        """
        if not self._should_cancel():
            return
        with anyio.move_on_after(timeout or None):
            await request_cancel(self.pgconn)
            return
        raise errors.CancellationTimeout("cancellation timeout expired")

    async def _try_cancel(self, *, timeout: float = 5.0) -> None:  # noqa: ARG002, ASYNC109 - psycopg's signature
        # psycopg is about to cancel and drain a COPY or a stream, in steps that neither a
        # shield nor a bound protects: from here to the end of it, `wait` settles.
        self._is_ending = self.pgconn.transaction_status == _ACTIVE

    if not TYPE_CHECKING:  # the overloads are psycopg's

        def cursor(
            self, name="", *, binary=False, row_factory=None, scrollable=None, withhold=False
        ):
            """Return a new cursor, as psycopg's connections do."""
            if not name:
                return super().cursor(binary=binary, row_factory=row_factory)
            self._check_connection_ok()
            cursor = shielded_factory(self.server_cursor_factory)(
                self,
                name=name,
                row_factory=row_factory or self.row_factory,
                scrollable=scrollable,
                withhold=withhold,
            )
            if binary:
                cursor.format = _BINARY
            return cursor

    @asynccontextmanager
    async def transaction(
        self,
        savepoint_name: str | None = None,
        force_rollback: bool = False,  # noqa: FBT001, FBT002 - psycopg's signature
    ) -> AsyncGenerator[AsyncTransaction]:
        """Run a block in a transaction, or in a savepoint if one is open.

        Args:
            savepoint_name: Name of the savepoint; one is made up otherwise.
            force_rollback: Roll back also if the body ends well.

        Raises:
            ConnectionLostError: if it was cancelled while COMMIT was in flight and COMMIT was
                not answered in time; whether the transaction was committed is unknown.

        Cancellation:
            A cancelled body is rolled back, shielded, and bounded together with the cancelled
            operation by ``cancel_timeout``. A cancellation that is pending when the body has
            ended rolls back; one that comes while COMMIT is in flight waits for its answer,
            within the same bound.
        """
        block = AsyncTransaction(self, savepoint_name, force_rollback)
        mark = self._after_commit.mark()
        try:
            if self._pipeline:
                async with self.pipeline(), block, self.pipeline():
                    yield block
            else:
                async with block:
                    yield block
        except BaseException:
            if block.is_committed and not self._pipeline:
                if block.is_outermost:
                    self._after_commit.run_while_raising()
            else:
                self._after_commit.drop(mark)
            raise
        if not block.is_committed:
            self._after_commit.drop(mark)
        elif block.is_outermost:
            self._after_commit.run()

    @asynccontextmanager
    async def pipeline(self) -> AsyncGenerator[AsyncPipeline]:
        """Run a block in pipeline mode, as psycopg's does.

        Cancellation:
            Leaving the block settles what is in flight, shielded and bounded by
            ``cancel_timeout``.
        """
        async with self._lock:
            self._check_connection_ok()
            pipeline = cast("AsyncPipeline | None", self._pipeline)
            if pipeline is None:
                pipeline = self._pipeline = AsyncPipeline(self)
        try:
            async with pipeline:
                yield pipeline
        finally:
            if pipeline.level == 0:
                self._pipeline = None

    @asynccontextmanager
    async def _pipeline_nolock(self) -> AsyncIterator[AsyncPipeline]:
        # For psycopg's executemany(), which holds the lock.
        pipeline = self._pipeline = AsyncPipeline(self, _no_lock=True)
        try:
            async with pipeline:
                yield pipeline
        finally:
            self._pipeline = None

    # ------------------------------------------------------------------ two-phase commit

    async def tpc_begin(self, xid: Xid | str) -> None:
        """Begin a two-phase transaction.

        Cancellation:
            A checkpoint. A cancelled call leaves no transaction open.
        """
        async with self._lock:
            had_one = self._tpc is not None
            try:
                await self.wait(self._tpc_begin_gen(xid))
            except BaseException:
                if self._tpc is not None and not had_one and self.pgconn.status == _OK:
                    await self._settle(
                        Work(self._tpc_finish_gen("ROLLBACK", None)), may_cancel=False
                    )
                raise

    async def tpc_prepare(self) -> None:
        """Prepare the two-phase transaction.

        Cancellation:
            A checkpoint before it is sent; later on waited for, ``cancel_timeout`` at most.
        """
        try:
            async with self._lock:
                await self._finish(
                    Work(self._tpc_prepare_gen()),
                    remark="whether the transaction was prepared is unknown",
                )
        except errors.ObjectNotInPrerequisiteState as exc:
            raise psycopg.NotSupportedError(str(exc)) from None

    async def tpc_commit(self, xid: Xid | str | None = None) -> None:
        """Commit a two-phase transaction, prepared or not.

        Cancellation:
            A checkpoint before it is sent; later on waited for, ``cancel_timeout`` at most.
        """
        async with self._lock:
            work = Work(self._tpc_finish_gen("COMMIT", xid))
            try:
                await self._finish(work, remark=_UNKNOWN)
            except BaseException:
                if work.succeeded:
                    self._after_commit.run_while_raising()
                raise
        self._after_commit.run()

    async def tpc_rollback(self, xid: Xid | str | None = None) -> None:
        """Roll a two-phase transaction back, prepared or not.

        Cancellation:
            A checkpoint before it is sent; later on waited for, ``cancel_timeout`` at most.
        """
        async with self._lock:
            work = Work(self._tpc_finish_gen("ROLLBACK", xid))
            try:
                await self._finish(work)
            finally:
                if work.succeeded:
                    self._after_commit.drop()

    # ------------------------------------------------------------------ inside

    def _attach(self) -> SocketWaiter:
        """Register the socket with the event loop, or refuse the operation."""
        if self.state is not ConnectionState.OPEN:
            raise self._refusal()
        waiter = self._waiter = self._registered = create_waiter(self.pgconn.socket)
        self._lock.checkpoint_if_cancelled = waiter.checkpoint_if_cancelled
        return waiter

    def _check_connection_ok(self) -> None:
        if self.pgconn.status == _OK:
            return
        if self.pgconn.status == _BAD:
            raise self._refusal()
        super()._check_connection_ok()

    def _refusal(self) -> psycopg.OperationalError:
        """Return what an operation on a connection that is not open raises."""
        if self.state is not ConnectionState.FAILED:
            return psycopg.OperationalError("the connection is closed")
        reason = str(self._failure).strip().split("\n", 1)[0]
        refusal = ConnectionLostError(f"the connection is closed: it was lost ({reason})")
        refusal.__cause__ = self._failure
        return refusal

    def _take_note(self, exc: Exception) -> None:
        """See what an operation's error says about the connection; may raise a better one."""
        if self._state is ConnectionState.OPEN:
            if self.pgconn.status == _BAD or find_last_words(exc) is not None:
                self._fail(exc)
        elif isinstance(exc, (psycopg.Error, anyio.ClosedResourceError)):
            raise self._refusal() from exc

    def _fail(self, cause: BaseException) -> None:
        if self._state is not ConnectionState.OPEN:
            return
        self._state = ConnectionState.FAILED
        self._failure = (
            self._last_words
            or find_last_words(cause)
            or unread_last_words(self.pgconn)
            or cause
        )
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

    async def _settle(
        self,
        work: Work[Any] | None,
        *,
        may_cancel: bool,
        to_idle: bool = True,
        remark: str = "",
    ) -> bool:
        """Settle within the budget that is left, or let the connection fail.

        Returns:
            Whether it is usable.
        """
        if self._registered is None:
            if self.state is not ConnectionState.OPEN:
                return False
            self._attach()
        waiter = cast("SocketWaiter", self._registered)
        started = anyio.current_time()
        budget = max(self._cancel_timeout - self._cleaned_up_for, 0.0)
        try:
            settlement = await settle(
                self.pgconn,
                waiter,
                work,
                may_cancel=may_cancel,
                to_idle=to_idle,
                budget=budget,
            )
        except BaseException as exc:
            self._fail(psycopg.OperationalError(f"interrupted while cleaning up: {exc!r}"))
            raise
        self._cleaned_up_for += anyio.current_time() - started
        self._is_ending = False
        if settlement.fault is not None:
            message = f"{settlement.fault}; {remark}" if remark else settlement.fault
            self._fail(settlement.error or psycopg.OperationalError(message))
            if work is not None:
                work.abandon()
        if settlement.interruption is not None and settlement.fault is None:
            raise settlement.interruption
        return settlement.fault is None

    async def _wait_to_end(self, gen: PQGen[RV]) -> RV:
        work = Work(gen)
        if not await self._settle(work, may_cancel=True):
            raise self._refusal()
        return _outcome(work)

    async def _finish(self, work: Work[RV], *, remark: str = "") -> RV:
        """Run what must not be cancelled once it is begun; the lock is held.

        Cancellation:
            Waited for until ``cancel_timeout`` has passed, then the connection has failed.
        """
        waiter = self._waiter
        if waiter is None:
            waiter = self._attach()
        try:
            await work.advance(waiter)
        except Exception as exc:
            self._take_note(exc)
            raise
        except GeneratorExit:
            self._fail(psycopg.OperationalError(f"abandoned half-way; {remark}"))
            work.abandon()
            raise
        except BaseException as exc:
            may_cancel = bool(self.pgconn.pipeline_status)
            if not await self._settle(work, may_cancel=may_cancel, remark=remark) and remark:
                raise self._refusal() from exc
            raise
        if work.error is not None:
            self._take_note(work.error)
            if remark and self._state is ConnectionState.FAILED:
                work.error.add_note(remark)
        else:
            self._cleaned_up_for = 0.0
        return _outcome(work)

    async def _clean_up(self, work: Work[RV]) -> RV:
        """Run a ROLLBACK or the like, shielded and bounded; the lock is held.

        Raises:
            ConnectionLostError: if it was not answered in time.
        """
        if not await self._settle(work, may_cancel=False) and not work.is_done:
            raise self._refusal()
        return _outcome(work)

    async def _take_to_clean_up(self, exc: BaseException | None) -> BaseException | None:
        """Take the lock although a cancellation may be pending.

        Args:
            exc: What the block ends with.

        Returns:
            A cancellation that came meanwhile, to be raised after cleaning up.
        """
        if self._lock.try_acquire():
            return None
        interruption: BaseException | None = None
        if exc is None or isinstance(exc, Exception):
            try:
                await self._lock.acquire()
            except anyio.get_cancelled_exc_class() as cancelled:
                interruption = cancelled
            else:
                return None
        started = anyio.current_time()
        is_taken = False
        try:
            with anyio.move_on_after(self._cancel_timeout - self._cleaned_up_for, shield=True):
                await self._lock.acquire()
                is_taken = True
        finally:
            self._cleaned_up_for += anyio.current_time() - started
            if not is_taken:
                self._fail(
                    psycopg.OperationalError(
                        "another task's operation stood in the way of cleaning up"
                    )
                )
        if not is_taken:
            raise interruption or self._refusal()
        return interruption

    async def _roll_back_quietly(self) -> None:
        try:
            interruption = await self._take_to_clean_up(None)
            try:
                await self._clean_up(Work(self._rollback_gen()))
            finally:
                await self._lock.release()
        except Exception as exc:  # noqa: BLE001 - the body's own error is what counts
            logger.warning("error ignored in rollback on %s: %s", self, exc)
        else:
            if interruption is not None:
                raise interruption


def _outcome(work: Work[RV]) -> RV:
    if work.error is not None:
        raise work.error
    return cast("RV", work.value)


async def _make_idle(connection: ReferenceType[Connection[Any]]) -> None:
    """Settle what an operation has left in flight when it let go of the lock."""
    itself = connection()
    if itself is not None:
        await itself._settle(None, may_cancel=True)


def _hear_notice(connection: ReferenceType[Connection[Any]], result: PGresult) -> None:
    itself = connection()
    if itself is not None and (words := last_words(result, itself.pgconn._encoding)) is not None:
        itself._last_words = words
    BaseConnection._notice_handler(cast("Any", connection), result)
