"""One command on a `Session`: what goes out, and the promise of what comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, final

from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

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


@final
class Prepared(NamedTuple):
    """A statement to be prepared on each session that runs it."""

    name: bytes
    """What the session calls it; equal names are equal statements."""
    text: bytes
    """The statement, with ``$1`` … for its parameters."""


class Command:
    """Statements that were sent together and succeed or fail together."""

    __slots__ = ("answers", "error", "may_block", "parts", "row", "sent_at", "signal")

    def __init__(self, signal: Signal, sent_at: float, may_block: bool) -> None:  # noqa: FBT001 - made on every round trip
        self.signal: Signal = signal
        """Set once there are all answers, or `error`."""
        self.sent_at: float = sent_at
        self.may_block: bool = may_block
        self.answers: list[PGresult] = []
        """What the server has said so far, a result for each statement."""
        self.error: Exception | None = None
        """Why the rest of the answers never will come."""
        self.parts: list[Command] | None = None
        """The commands that it was gathered from; None if it is one of its own."""
        self.row: int = 0
        """Which row of the answer is its own."""

    def hand_out(self, parts: list[Command]) -> list[Signal]:
        """Give each of its parts its answer; return whom to tell."""
        for row, part in enumerate(parts):
            part.answers, part.row = self.answers, row
        return [part.signal for part in parts]

    def end(self, error: Exception) -> None:
        """Tell who waits for it that the rest of the answers never will come."""
        self.error = error
        self.signal.set()

    async def wait(self) -> None:
        """Wait, in one task, until the server has answered.

        Cancellation:
            A checkpoint, unless it has answered. A cancelled wait leaves the command
            running, and its answer is dropped.
        """
        await self.signal

    def result(self) -> SessionResult:
        """Return what the first statement gave.

        Raises:
            psycopg.Error: the server's error for it; or for what came after it, which leaves
                nothing of it, and may be the commit.
            Exception: what the command was ended with.
        """
        if self.error is not None:
            raise self.error
        for answer in self.answers:
            if answer.status in _FAILED:
                raise error_from_result(answer)
        return _read(self.answers[0])

    def scalar(self) -> bytes | None:
        """Return the first column of the first row, as it has come; cheaper than `result`.

        Raises:
            As `result`.
        """
        if self.error is not None:
            raise self.error
        answer = self.answers[0]
        if answer.status in _FAILED:
            raise error_from_result(answer)
        return answer.get_value(self.row, 0)

    @property
    def has_failed(self) -> bool:
        """Whether the server has refused its first statement."""
        return bool(self.answers) and self.answers[0].status in _FAILED

    @property
    def says_true(self) -> bool:
        """Whether the first column of the first row is ``true``, and nothing has failed."""
        return (
            self.error is None
            and self.answers[0].status not in _FAILED
            and self.answers[0].get_value(self.row, 0) == b"true"
        )

    @property
    def is_committed(self) -> bool:
        """Whether its last answer is no error: what is found at the commit comes after all else."""
        return self.answers[-1].status not in _FAILED

    def results(self) -> list[SessionResult]:
        """Return what each statement gave.

        Raises:
            psycopg.Error: the server's error for the first statement that failed.
            Exception: what the command was ended with.
        """
        if self.error is not None:
            raise self.error
        for answer in self.answers:
            if answer.status in _FAILED:
                raise error_from_result(answer)
        return [_read(answer) for answer in self.answers]


def encode_statement(statement: str) -> bytes:
    """Return ``statement`` as it travels.

    Raises:
        ValueError: if it has a NUL, where libpq would cut it off without a word.
    """
    if "\0" in statement:
        raise ValueError("a statement can't contain a NUL character")
    return statement.encode()


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


def _read(answer: PGresult) -> SessionResult:
    get_value, columns = answer.get_value, range(answer.nfields)
    rows: list[tuple[str | None, ...]] = []
    for row in range(answer.ntuples):
        values: list[str | None] = []
        for column in columns:
            value = get_value(row, column)
            # An SQL_ASCII database may send anything; surrogates keep it and never raise.
            values.append(None if value is None else value.decode("utf-8", "surrogateescape"))
        rows.append(tuple(values))
    return SessionResult(rows, (answer.command_status or b"").decode())
