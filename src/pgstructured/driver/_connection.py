# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# A subclass of psycopg's connection has to know psycopg's private names; only this room may.
"""`Connection`: a psycopg `AsyncConnection` whose waiting and cancelling are AnyIO's.

Its layers: `_living` (state, failure, closing), `_operating` (waiting, cancelling,
settling), `_bulk` (streams and COPY), and here what psycopg's manual calls by name.
"""

from __future__ import annotations

import inspect
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
import psycopg
from psycopg import errors, pq
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import timeout_from_conninfo
from psycopg.rows import Row

from pgstructured.observe import emit

from ._bulk import BulkConnection
from ._connecting import connect_first
from ._cursors import shielded_factory
from ._driving import Work
from ._lifecycle import ConnectionState
from ._pipelines import AsyncPipeline
from ._transactions import AsyncTransaction

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from types import TracebackType
    from typing import Self

    from psycopg._tpc import Xid
    from psycopg.abc import AdaptContext, ConnParam
    from psycopg.rows import AsyncRowFactory

logger = logging.getLogger("psycopg")

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_IDLE: Final = pq.TransactionStatus.IDLE
_INERROR: Final = pq.TransactionStatus.INERROR
_OK: Final = pq.ConnStatus.OK
_BINARY: Final = pq.Format.BINARY

_UNKNOWN: Final = "whether the transaction was committed is unknown"


class Connection(BulkConnection[Row]):
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

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Commit, or roll back if the body raised, then close.

        Raises:
            ConnectionLostError: if the connection has failed, which no operation has said yet,
                and there may have been something to commit.

        Cancellation:
            If one is pending nothing is committed. The rollback and the closing are shielded
            and bounded.
        """
        if self.closed:
            if exc_val is None and not self._autocommit:
                self._tell_loss()
            return
        try:
            if exc_val is None:
                await self.commit()  # noqa: ASYNC102 - the operation itself, not clean-up
            elif isinstance(exc_val, Exception):
                await self._roll_back_quietly()  # noqa: ASYNC102 - bounded by cancel_timeout inside
            # Interrupted: closing the session rolls back as well.
        finally:
            await self.aclose()  # shielded and bounded inside, by close_timeout

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
            if self.pgconn.transaction_status == _IDLE:
                self._after_commit.begin()
            committing = self.pgconn.transaction_status != _INERROR
            work = Work(self._commit_gen())
            try:
                await self._finish(work, remark=_UNKNOWN)
            except BaseException:
                if work.succeeded and committing:
                    self._after_commit.run_while_raising(is_outermost=True)
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
        COMMIT, sent as a statement, is not noticed, and runs nothing. It is dropped if the
        transaction, or the nested block it was given in, is rolled back. In autocommit and
        outside of a transaction it is run at once.

        Args:
            callback: Must not block. What it raises comes out of the commit, which stands.

        Raises:
            TypeError: if it is no function, or an async one.
        """
        given: Any = callback
        if not callable(given) or inspect.iscoroutinefunction(given):
            raise TypeError(f"callback must be a function, and no async one, not {given!r}")
        if self.state is not ConnectionState.OPEN:
            raise self._refusal()
        in_transaction = self._num_transactions > 0 or self.pgconn.transaction_status not in {
            _IDLE,
            _ACTIVE,
        }
        if self._autocommit and not in_transaction:
            callback()
        else:
            self._after_commit.add(callback, has_begun=in_transaction)

    if not TYPE_CHECKING:  # the overloads are psycopg's

        def cursor(
            self,
            name: str = "",
            *,
            binary: bool = False,
            row_factory: Any = None,
            scrollable: bool | None = None,
            withhold: bool = False,
        ) -> Any:
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
                not answered in time; whether the transaction was committed is unknown. Also if
                the connection has failed under the body and no operation in it has said so:
                nothing was committed.

        Cancellation:
            A cancelled body is rolled back, shielded, and bounded together with the cancelled
            operation by ``cancel_timeout``. A cancellation that is pending when the body has
            ended rolls back; one that comes while COMMIT is in flight waits for its answer,
            within the same bound.
        """
        block = AsyncTransaction(self, savepoint_name, force_rollback)
        pipeline = cast("AsyncPipeline | None", self._pipeline)
        if not self._num_transactions and self.pgconn.transaction_status == _IDLE:
            self._after_commit.begin()
        mark = self._after_commit.mark()
        try:
            if pipeline is not None:
                async with self.pipeline(), block, self.pipeline():
                    yield block
            else:
                async with block:
                    yield block
        except BaseException:
            # A cancellation may come through although COMMIT was answered.
            if block.is_committed and (pipeline is None or pipeline.is_synced):
                self._after_commit.run_while_raising(is_outermost=block.is_outermost)
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
            pipeline = cast("AsyncPipeline | None", self._pipeline) or AsyncPipeline(self)
            self._pipeline = pipeline
        try:
            async with pipeline:
                yield pipeline
        finally:
            if pipeline.level == 0:
                self._pipeline = None

    @asynccontextmanager
    async def _pipeline_nolock(self) -> AsyncGenerator[AsyncPipeline]:
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
                    await self._settle(  # noqa: ASYNC102 - bounded by cancel_timeout inside
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
                    self._after_commit.run_while_raising(is_outermost=True)
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

    def _get_tx_start_command(self) -> bytes:
        """Return what begins a transaction, which it does now; psycopg's own."""
        if not self._num_transactions:  # `transaction` has taken note of its own
            self._after_commit.begin()
        return super()._get_tx_start_command()

    async def _roll_back_quietly(self) -> None:
        try:
            async with self._lock:
                await self._clean_up(Work(self._rollback_gen()))
        except Exception as exc:  # noqa: BLE001 - the body's own error is what counts
            logger.warning("error ignored in rollback on %s: %s", self, exc)
