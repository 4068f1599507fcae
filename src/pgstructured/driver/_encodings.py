"""The encoding of a session's database, in Python's words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
from psycopg._encodings import pg2pyenc

if TYPE_CHECKING:
    from ._session import Session


def foreign_codec(session: Session) -> str | None:
    """Return Python's codec for a database whose encoding is another than UTF-8.

    Returns:
        Its name; ``utf-8`` for a database without an encoding (SQL_ASCII), which takes any
        bytes; ``ascii`` where Python has no codec (EUC_TW); None for UTF-8 itself.
    """
    pgconn = session._wire.pgconn  # noqa: SLF001 - one room # pyright: ignore[reportPrivateUsage]
    name = pgconn.parameter_status(b"server_encoding")
    if name in (None, b"UTF8"):
        return None
    if name == b"SQL_ASCII":
        return "utf-8"
    try:
        return pg2pyenc(name)
    except psycopg.NotSupportedError:
        return "ascii"
