# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# psycopg's generators and their wait timeout are private names; this room may know them.
"""Running psycopg's generators over a `SocketWaiter`.

psycopg writes each operation as a generator that yields what it waits for and
is sent what the socket is ready for. What matters beyond that:

* Its C generators convert what they are sent to an integer, so an interrupted
  one is resumed with 0 ("nothing is ready, say again"), never with None.
* An interrupted one is never thrown into: it keeps the books of prepared
  statements and of the pipeline's queues, and must come to its own end.
"""

from __future__ import annotations

from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint
from psycopg import errors, generators, pq

from ._waiting import poll_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn

    from ._waiting import SocketWaiter

R = TypeVar("R")

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_COPY_IN: Final = pq.ExecStatus.COPY_IN
_COPY_OUT: Final = pq.ExecStatus.COPY_OUT
_READY_NONE: Final = 0
_WAIT_READ: Final = 1

_TURN: Final = 0.001
"""Seconds that operations which needn't wait may take before the event loop gets its turn."""

_FINEST: Final = 0.001
"""Seconds; no timer of an event loop is finer."""

_last_turn = 0.0


async def drive(
    waiter: SocketWaiter,
    gen: PQGen[R],
    ready: int | None = None,
    take_turn: Callable[[], Awaitable[None]] = cancel_shielded_checkpoint,
) -> R:
    """Run ``gen`` to its end.

    Args:
        waiter: Waits for the connection's socket.
        gen: A generator of psycopg's.
        ready: None to start ``gen``, 0 to resume it where it was interrupted.
        take_turn: Lets other tasks run, where ``gen`` has ended without a wait. By default
            shielded: what has been done must not look as if it had been cancelled.

    Returns:
        What ``gen`` returns.

    Cancellation:
        A checkpoint where there is something to wait for. A cancelled call leaves ``gen`` to
        be resumed.
    """
    global _last_turn  # noqa: PLW0603 - turns belong to the thread's event loop, not to a waiter
    try:
        # The types know psycopg's Ready, libpq's wrapper only integers.
        interest: Any = gen.send(ready)  # type: ignore[arg-type]
    except StopIteration as stop:
        if (now := perf_counter()) - _last_turn > _TURN:
            _last_turn = now
            await take_turn()
        result: R = stop.value
        return result
    wait = waiter.wait
    send: Any = gen.send
    try:
        while True:
            interest = send(await wait(interest))
    except StopIteration as stop:
        result = stop.value
        return result  # noqa: RET504 - typed


async def drive_within(waiter: SocketWaiter, gen: PQGen[R], limit: float) -> R:
    """Run ``gen`` to its end within ``limit`` seconds; what is ready now is always taken.

    Raises:
        psycopg.errors._WaitTimeout: if it has not ended in time; it is left as it is.

    Cancellation:
        As `drive`.
    """
    try:
        interest: Any = gen.send(None)  # type: ignore[arg-type]
        if ready := poll_now(waiter.fd, interest):
            gen.send(ready)
        # What another session has just sent needs a moment on the server to get here, and
        # callers with no time to wait, as psycopg's own tests, count on it.
        with anyio.move_on_after(max(limit, _FINEST)):
            return await drive(waiter, gen, _READY_NONE)
    except StopIteration as stop:
        await anyio.lowlevel.cancel_shielded_checkpoint()
        result: R = stop.value
        return result
    raise errors._WaitTimeout("wait timeout expired")


def discard_results(pgconn: PGconn) -> PQGen[None]:
    """Read and drop what the server still has to say, until no command is in flight.

    Ends a COPY in either direction. For pipelines there is `discard_pipeline`.
    """
    while pgconn.transaction_status == _ACTIVE:
        result = yield from generators.fetch(pgconn)
        if result is None:
            continue
        if result.status == _COPY_IN:
            pgconn.put_copy_end(b"cancelled")
            yield from generators.send(pgconn)
        elif result.status == _COPY_OUT:
            yield from _discard_copy(pgconn)


def discard_pipeline(pgconn: PGconn) -> PQGen[None]:
    """Read and drop what the server has to say to what is in a pipeline.

    A Flush makes it say that. A Sync would too, but might commit the half of an executemany().
    """
    pgconn.send_flush_request()
    yield from generators.send(pgconn)
    yield from discard_results(pgconn)


def _discard_copy(pgconn: PGconn) -> PQGen[None]:
    while (size := pgconn.get_copy_data(1)[0]) >= 0:
        if size == 0:
            while not (yield _WAIT_READ):  # type: ignore[misc]
                pass
            pgconn.consume_input()


class Work(Generic[R]):
    """One generator that may be interrupted, and how far it has come."""

    __slots__ = ("_gen", "_started", "error", "is_done", "value")

    def __init__(self, gen: PQGen[R], *, started: bool = False) -> None:
        self._gen = gen
        self._started = started
        self.is_done = False
        """Whether the generator has come to its end."""
        self.value: R | None = None
        """What it returned."""
        self.error: Exception | None = None
        """What it raised instead."""

    @property
    def succeeded(self) -> bool:
        """Whether the generator has come to its end without an error."""
        return self.is_done and self.error is None

    async def advance(self, waiter: SocketWaiter) -> None:
        """Run the generator from where it is to its end; errors of its own are kept."""
        if self.is_done:
            return
        ready = _READY_NONE if self._started else None
        self._started = True
        try:
            self.value = await drive(waiter, self._gen, ready)
        except (anyio.ClosedResourceError, anyio.BusyResourceError):
            raise
        except Exception as exc:  # noqa: BLE001 - the caller decides, from `error`
            self.error = exc
        self.is_done = True

    def abandon(self) -> None:
        """Close a generator that will not be resumed; only once its connection is finished."""
        abandon(self._gen)


def abandon(gen: PQGen[Any]) -> None:
    """Close ``gen`` of a finished connection, whatever it says to that."""
    with suppress(Exception):  # its clean-up has no connection to work on any more
        gen.close()
