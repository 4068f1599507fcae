# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# A subclass of psycopg's pipeline has to know psycopg's private names.
"""Pipelines whose books are right also after a cancellation, or the end of the session.

psycopg's own exchange of commands and results drops the results that it has read
when it then meets the end of the stream, and one of them is the server's last words.
Ours hands them on first.

And it takes a Sync to have one result. In autocommit it commits, so what is found only then,
as a deferred constraint that does not hold, is said before it. Ours knows a Sync from a
command, and waits for its own result.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, cast

import psycopg
from psycopg import generators, pq

from ._driving import Work
from ._lifecycle import ConnectionState
from ._waiting import READ, WRITE

if TYPE_CHECKING:
    from functools import partial
    from types import TracebackType
    from typing import Self

    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

    from ._connection import Connection

logger = logging.getLogger("psycopg")


_BAD: Final = pq.ConnStatus.BAD
_SYNC: Final = pq.ExecStatus.PIPELINE_SYNC
_ERROR: Final = pq.ExecStatus.FATAL_ERROR
_FAIL: Final = b"SELECT 'the rest of an executemany() was not sent'::pg_catalog.int4"
"""Fails by itself: no cancel request has to reach it."""
_AT_SYNC: Final[Any] = ("Sync",)
"""Stands for a Sync in the queue of what has to be answered."""
_COPY: Final = (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)


class AsyncPipeline(psycopg.AsyncPipeline):
    """See `psycopg.AsyncPipeline`, whose place it takes, also by its name."""

    __module__ = "psycopg"

    level: int

    is_synced = False
    """Whether everything sent up to the last end of a block was done, without an error."""

    _is_stopped = False

    @property
    def _connection(self) -> Connection[Any]:
        return cast("Connection[Any]", self._conn)

    async def __aenter__(self) -> Self:
        level = self.level
        async with self._lock:
            try:
                await self._conn.wait(self._enter_gen())
            except BaseException as exc:
                # Settled, it came to its end and counted; but the block is not entered.
                if self.level > level:
                    self._exit(exc)
                raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            await self._leave(exc_val)  # noqa: ASYNC102 - bounded by cancel_timeout inside
        except Exception as exc:  # noqa: BLE001 - the body's own error is what counts
            if exc_val is None:
                raise exc.with_traceback(None) from exc.__cause__
            logger.warning("error ignored terminating %r: %s", self, exc)
        finally:
            self._exit(exc_val)

    def _exit(self, exc: BaseException | None) -> None:
        if self._connection.state is not ConnectionState.OPEN:
            self.level -= 1
            return
        try:
            super()._exit(exc)
        finally:
            if self.level == 0 and self.pgconn.pipeline_status:
                # Such as after a COPY in it; psycopg would leave it in between for ever.
                self._connection._fail(psycopg.OperationalError("the pipeline could not be left"))

    async def _leave(self, exc: BaseException | None) -> None:
        """Send the Sync and read everything up to it, whatever happens meanwhile."""
        conn = self._connection
        holds_lock = self._lock is not conn.lock
        self.is_synced = False
        interruption = None if holds_lock else await conn._take_to_clean_up(exc)
        work = Work(self._exit_gen())
        try:
            if interruption is not None or not (exc is None or isinstance(exc, Exception)):
                await conn._settle(work, may_cancel=True)
            else:
                await conn._finish(work)
        finally:
            self.is_synced = work.succeeded
            if not holds_lock:
                await conn._lock.release()  # noqa: ASYNC102 - bounded by cancel_timeout inside
        if interruption is not None:
            raise interruption

    def _communicate_gen(self) -> PQGen[None]:
        """Send what is queued, and enter the results that have come in the books."""
        batches: list[list[PGresult]] = []
        failure: psycopg.Error | None = None
        try:
            yield from self._exchange(batches)
        except psycopg.OperationalError as exc:
            failure = exc
        error: psycopg.Error | None = None
        for batch in batches:
            try:
                self._enter(batch)
            except psycopg.Error as exc:
                error = error or exc
        if (worst := error or failure) is not None:
            raise worst

    def _fetch_gen(self, *, flush: bool) -> PQGen[None]:
        """Read the results that are due, and enter them in the books."""
        pgconn = self.pgconn
        if not self.result_queue or pgconn.status == _BAD:
            return
        if flush:
            pgconn.send_flush_request()
            yield from generators.send(pgconn)
        error: psycopg.Error | None = None
        while self.result_queue:
            try:
                batch = yield from generators.fetch_many(pgconn)
                if not batch:  # pragma: no cover - what follows a COPY was never sent
                    break
                self._enter(batch)
            except psycopg.Error as exc:
                error = error or exc
                if pgconn.status == _BAD:
                    break
        if error is not None:
            raise error

    def _enter(self, batch: list[PGresult]) -> None:
        """Enter the results of one command, or of a Sync, in the books."""
        queued = self.result_queue.popleft()
        if queued is _AT_SYNC:
            queued = None
            if batch[0].status == _ERROR:
                self.result_queue.appendleft(_AT_SYNC)  # its own result is still to come
        self._process_results(queued, batch)

    def _enqueue_sync(self) -> None:
        self.command_queue.append(self.pgconn.pipeline_sync)
        self.result_queue.append(_AT_SYNC)

    def stop_feeding(self) -> None:
        """Let an executemany() end that is interrupted; whose pipeline it is, ends with it.

        It would go on to its last row: a cancel request does nothing to a server that waits
        for the next one. So the rest is dropped, and a statement is sent that fails, for
        without an error the rows that were sent would be committed.
        """
        self._is_stopped = self._lock is not self._connection.lock

    def feed_again(self) -> None:
        """Undo `stop_feeding`: what is sent from now on is the end of the block."""
        self._is_stopped = False

    def _give_up(self) -> None:
        # psycopg takes a statement for prepared as soon as it is queued.
        unsent = [self.command_queue.popleft() for _ in range(len(self.command_queue))]
        unprepared = {
            command.args[0]
            for command in cast("list[partial[None]]", unsent)
            if command.func.__name__ == "send_prepare"
        }
        prepared = self._connection._prepared
        prepared._names = OrderedDict(
            (key, name) for key, name in prepared._names.items() if name not in unprepared
        )
        for _ in unsent:
            self.result_queue.pop()
        self.pgconn.send_query_params(_FAIL, None)
        self.result_queue.append(None)
        self.feed_again()
        raise psycopg.errors.QueryCanceled("the rest was not sent")

    def _exchange(self, batches: list[list[PGresult]]) -> PQGen[None]:
        pgconn = self.pgconn
        commands = self.command_queue
        while True:
            ready: Any = 0
            while not ready:
                if self._is_stopped:
                    self._give_up()
                ready = yield READ | WRITE  # type: ignore[misc]
            if ready & READ:
                pgconn.consume_input()
                self._collect(batches)
            if ready & WRITE:
                pgconn.flush()
                if not commands:
                    return
                commands.popleft()()

    def _collect(self, batches: list[list[PGresult]]) -> None:
        """Take every command's results that are complete, and notifications with them."""
        pgconn = self.pgconn
        while (notification := pgconn.notifies()) is not None:
            cast("Any", pgconn.notify_handler)(notification)
        batch: list[PGresult] = []
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                if not batch:
                    return
                batches.append(batch)
                batch = []
            elif result.status == _SYNC:
                batches.append([result])
            elif result.status in _COPY:
                raise psycopg.NotSupportedError("COPY cannot be used in pipeline mode")
            else:
                batch.append(result)
