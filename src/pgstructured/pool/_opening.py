"""Making one connection for a pool, and knowing whether that succeeds these days."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import anyio
import psycopg
from psycopg.errors import ConnectionTimeout

from pgstructured.driver import PooledConnection, connect
from pgstructured.errors import ConninfoError
from pgstructured.observe import emit
from pgstructured.supervise import heals

from ._members import Member

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgstructured.driver import Conninfo

    from ._options import ConnectionHook, PoolOptions
    from ._statistics import Counters

_SHORTEST = 0.001
"""Seconds; what an attempt is given at least."""


@final
class AttemptFailed(Exception):  # noqa: N818 - an outcome, turned into an error by its catcher
    """One attempt to connect has failed."""

    def __init__(self, error: Exception, *, may_heal: bool) -> None:
        super().__init__(str(error))
        self.error = error
        """Why."""
        self.may_heal = may_heal
        """Whether another attempt may fare better."""


class _AskingFailed(Exception):  # noqa: N818 - as above
    """The conninfo callable has raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@final
class Opener:
    """Makes connections, and keeps book of how it goes.

    Args:
        options: The pool's.
        counters: The pool's.
        now: Returns the event-loop time.
    """

    def __init__(self, options: PoolOptions, counters: Counters, now: Callable[[], float]) -> None:
        self._options = options
        self._counters = counters
        self._now = now
        self._conninfo = _marked(options.conninfo)
        self._changed = anyio.Event()
        self.failing_since: float | None = None
        """Event-loop time at which the first of a row of attempts failed; None if the last
        one succeeded."""
        self.last_error: Exception | None = None
        """Why the last attempt failed, if it did."""

    async def open(self, deadline: float, *, generation: int) -> Member:
        """Make one connection, in one attempt over all hosts.

        Args:
            deadline: Event-loop time at which to give up, if ``connect_timeout`` isn't over
                before.
            generation: The pool's.

        Raises:
            AttemptFailed: if there is none.
            Exception: what ``on_connect`` raises.

        Cancellation:
            A checkpoint. A cancelled call leaves no connection behind.
        """
        options = self._options
        started = self._now()
        limit = max(deadline - started, _SHORTEST)
        if options.connect_timeout is not None:
            limit = min(limit, options.connect_timeout)
        try:
            conn = await connect(
                self._conninfo,
                connect_timeout=None if math.isinf(limit) else limit,
                cancel_timeout=options.cancel_timeout,
                pooler=options.pooler,
                **options.connect_options,
            )
        except _AskingFailed as exc:
            raise self._failed(exc.error, may_heal=True) from None
        except (psycopg.Error, OSError, ConninfoError) as exc:
            raise self._failed(exc, may_heal=heals(exc)) from None
        session = PooledConnection(conn)
        took = self._now() - started
        await self._introduce(session, started + limit)
        self._counters.opened += 1
        self._succeeded()
        pid = conn.pgconn.backend_pid
        emit("pool.connected", pool=options.name, backend_pid=pid, took=took)
        return Member(session, options, generation=generation, now=self._now())

    async def wait_change(self) -> None:
        """Wait until ``failing_since`` begins to be set, or ceases to.

        Cancellation:
            A checkpoint.
        """
        await self._changed.wait()

    def take_note(self, error: Exception) -> None:
        """Note that there is no connection, for a reason that came after connecting."""
        self._failed(error, may_heal=False)

    async def _introduce(self, session: PooledConnection, deadline: float) -> None:
        if self._options.on_connect is None:
            return
        with anyio.move_on_after(deadline - self._now()):
            try:
                await introduce(session, self._options.on_connect)
            except psycopg.Error as exc:
                if session.conn.failure is None:
                    raise
                raise self._failed(exc, may_heal=True) from None
            if session.conn.closed:
                refusal = psycopg.OperationalError("on_connect has closed the connection")
                raise self._failed(refusal, may_heal=True)
            return
        late = ConnectionTimeout("on_connect has not ended in time")
        raise self._failed(late, may_heal=True)

    def _succeeded(self) -> None:
        self.last_error = None
        if self.failing_since is not None:
            outage = self._now() - self.failing_since
            emit("pool.recovered", pool=self._options.name, outage=outage)
            self.failing_since = None
            self._tell()

    def _failed(self, error: Exception, *, may_heal: bool) -> AttemptFailed:
        self._counters.connect_errors += 1
        self.last_error = error
        emit("pool.connect_failed", pool=self._options.name, error=error)
        if self.failing_since is None:
            self.failing_since = self._now()
            self._tell()
        return AttemptFailed(error, may_heal=may_heal)

    def _tell(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()


async def introduce(session: PooledConnection, on_connect: ConnectionHook) -> None:
    """Run ``on_connect``; what it leaves is what the connection is to be.

    Raises:
        Exception: what it raises. The connection is then closed.

    Cancellation:
        As ``on_connect``. The connection is then closed.
    """
    try:
        await on_connect(session.conn)
        session.keep_as_is()
    except BaseException:
        session.discard()
        raise


def _marked(conninfo: Conninfo) -> Conninfo:
    """Return ``conninfo`` so that its own errors can be told from those of connecting."""
    if isinstance(conninfo, str):
        return conninfo
    ask: Any = conninfo

    async def marked() -> str:
        try:
            answer: str = await ask()
        except Exception as exc:
            raise _AskingFailed(exc) from exc
        return answer

    return marked
