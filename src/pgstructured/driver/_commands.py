"""One command on a `Session`: what goes out, and the promise of what comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, final

from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from psycopg.pq.abc import PGresult

    from ._waiting import Signal

SessionParam: TypeAlias = str | int | float | bool | bytes | None
"""What a session's statement takes as a parameter; its type is the server's to infer."""

_FAILED: Final = (int(ExecStatus.FATAL_ERROR), int(ExecStatus.BAD_RESPONSE))


@final
class SessionResult(NamedTuple):  # a tuple: made on every round trip, and cheapest
    """What one statement gave."""

    rows: list[tuple[str | None, ...]]
    """Its rows, every value as the server's text; empty for a statement without rows."""
    status: str
    """Its command tag, as ``SELECT 1`` or ``LISTEN``; empty for the empty statement."""

    def scalar(self) -> str | None:
        """Return the first column of the first row.

        Raises:
            IndexError: if there is none.
        """
        return self.rows[0][0]


class Command:
    """Statements that were sent together and succeed or fail together."""

    __slots__ = ("_error", "_results", "_signal", "may_block", "sent_at", "wait")

    def __init__(self, signal: Signal, sent_at: float, may_block: bool) -> None:  # noqa: FBT001 - made on every round trip
        self._signal = signal
        self.wait: Callable[[], Awaitable[None]] = signal.wait
        """Waits, in one task, until the server has answered; a cancelled wait leaves the
        command running, and its answer is dropped."""
        self.sent_at: float = sent_at
        self.may_block: bool = may_block
        self._results: list[PGresult] = []
        self._error: BaseException | None = None

    def add(self, result: PGresult) -> None:
        """Take one result of the server's."""
        self._results.append(result)

    def finish(self, error: BaseException | None = None) -> None:
        """Wake the waiter: all results are in, or ``error`` is why they never will be."""
        self._error = error
        self._signal.set()

    def results(self, encoding: str) -> list[SessionResult]:
        """Return what each statement gave.

        Raises:
            psycopg.Error: the server's error for the first statement that failed.
            BaseException: what `finish` was given.
        """
        if self._error is not None:
            raise self._error
        for result in self._results:
            if result.status in _FAILED:
                raise error_from_result(result, encoding=encoding)
        return [_read(result, encoding) for result in self._results]


def encode_statement(statement: str) -> bytes:
    """Return ``statement`` as it travels.

    Raises:
        ValueError: if it has a NUL, where libpq would cut it off without a word.
    """
    encoded = statement.encode()
    if b"\0" in encoded:
        raise ValueError("a statement can't contain a NUL character")
    return encoded


def encode_param(value: SessionParam) -> bytes | None:
    """Return ``value`` in the text format of the protocol.

    Raises:
        ValueError: if it has a NUL, which Postgres' text can't hold.
    """
    if value is None:
        return None
    if isinstance(value, bool):
        return b"t" if value else b"f"
    encoded = value if isinstance(value, bytes) else str(value).encode()
    if b"\0" in encoded:
        raise ValueError("a parameter can't contain a NUL character")
    return encoded


def encode_params(params: Sequence[SessionParam]) -> list[bytes | None] | None:
    """Return ``params`` in the text format of the protocol, or None if there are none."""
    return [encode_param(value) for value in params] if params else None


def _read(result: PGresult, encoding: str) -> SessionResult:
    get_value = result.get_value
    columns = range(result.nfields)
    # An SQL_ASCII database may send anything; surrogates keep it and never raise.
    rows = [
        tuple(
            [
                None
                if (value := get_value(row, column)) is None
                else value.decode(encoding, "surrogateescape")
                for column in columns
            ]
        )
        for row in range(result.ntuples)
    ]
    return SessionResult(rows, (result.command_status or b"").decode())
