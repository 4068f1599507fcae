"""The life of a connection: its states, and what the server said last.

=========  ========================================  ==========================
state      meaning                                   next
=========  ========================================  ==========================
OPEN       usable, or busy with an operation         CLOSING, CLOSED, FAILED
CLOSING    being closed by us; no new operations     CLOSED
CLOSED     closed by us, the socket is gone          -
FAILED     ended by the world, or given up because   -
           its outcome can't be known; the socket
           is gone
=========  ========================================  ==========================
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final, final

from psycopg import errors
from psycopg.pq import DiagnosticField

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

_LAST_WORDS: Final = (b"FATAL", b"PANIC")


@final
class ConnectionState(StrEnum):
    """Where a connection is in its life; CLOSED and FAILED are final."""

    OPEN = "open"
    """Usable."""
    CLOSING = "closing"
    """Being closed by this program; new operations are refused."""
    CLOSED = "closed"
    """Closed by this program."""
    FAILED = "failed"
    """Ended by the world, or given up because its outcome can't be known."""


def last_words(result: PGresult, encoding: str) -> errors.Error | None:
    """Return the error by which the server ends the session, if ``result`` is one.

    A server that ends an idle session says why in a message that libpq takes for a
    notice; one that crashes says it as a warning.
    """
    state = (result.error_field(DiagnosticField.SQLSTATE) or b"").decode()
    severity = result.error_field(DiagnosticField.SEVERITY_NONLOCALIZED)
    if severity not in _LAST_WORDS and not state.startswith("57P"):
        return None
    kind = type(errors.error_from_result(result, encoding))
    # The result lives no longer than the callback that got it: keep its fields.
    fields: dict[int, bytes | None] = {
        field: result.error_field(field) for field in DiagnosticField
    }
    primary = fields[DiagnosticField.MESSAGE_PRIMARY] or b""
    return kind(primary.decode(encoding, "replace"), info=fields, encoding=encoding)


def find_last_words(error: BaseException | None) -> errors.Error | None:
    """Return the error in the chain of ``error`` by which the server ended the session, if any."""
    while error is not None:
        if isinstance(error, errors.Error):
            severity = error.diag.severity_nonlocalized
            if severity is not None and severity.encode() in _LAST_WORDS:
                return error
        error = error.__cause__ or error.__context__
    return None
