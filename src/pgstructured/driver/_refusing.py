"""Which SQLSTATE a server refused a connection with.

libpq keeps it to itself: all that a failed connection has is a text. What the text says
in English, as servers do unless ``lc_messages`` was changed, is recognised here. In
another language the SQLSTATE stays unknown, and a refusal looks like one that may heal.

Sources: Postgres' ``auth.c``, ``hba.c``, ``postinit.c``, ``postmaster.c``; libpq's
``fe-connect.c``; PgBouncer's ``client.c``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import psycopg

_TEXTS: Final = tuple(
    (re.compile(pattern), sqlstate)
    for pattern, sqlstate in (
        (r"password authentication failed|no password supplied", "28P01"),
        (r"authentication failed for user|no such user", "28000"),
        (r"role \".*\" (does not exist|is not permitted to log in)", "28000"),
        (r"no pg_hba\.conf entry for|pg_hba\.conf rejects connection", "28000"),
        (r"database \".*\" does not exist|no such database", "3D000"),
        (r"permission denied for database", "42501"),
        (r"out of shared memory", "53200"),
        (r"too many (clients|connections)|connection slots are reserved", "53300"),
        (r"database system is (starting up|shutting down|in recovery mode)", "57P03"),
        (r"database system is not (yet )?accepting connections", "57P03"),
        (r"session is read-only|server is in hot standby mode", "25006"),
    )
)


def name_refusal(error: psycopg.Error) -> None:
    """Set ``error.sqlstate``, where the server's reason to refuse a connection is recognised."""
    if error.sqlstate is None:
        last_words = str(error).rpartition(" failed: ")[2]
        for pattern, sqlstate in _TEXTS:
            if pattern.search(last_words):
                error.sqlstate = sqlstate
                return
