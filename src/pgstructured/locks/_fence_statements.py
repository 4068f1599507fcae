"""The SQL of the fence table.

One row for each key that was ever locked fenced; it is never deleted, for its token must
only grow. Who writes it when:

========  ==========================================  ===================================
step      what it does to the row                     if a guarded transaction is open
========  ==========================================  ===================================
take      locks the key if it is free, and bumps      skips the row: the lock without a
                                                      token, which a bump then gives
bump      ``token + 1``, durably                      waits for its end
guard     ``FOR SHARE``, if it has the token          goes with it
release   marks the clean end, unlocks the key        unlocks without a mark
========  ==========================================  ===================================

The release marks before it unlocks and commits after it. Whoever has the key then finds
the row locked for that moment: a bump waits for it, a take skips it. So they see the mark.

Each text has places for values, which are ``$1`` … in a prepared statement and else
literals; being prepared saves most of its price. The prepared release also tells those who
wait outside of the server's queue, as that of an unfenced lock does.
"""

# ruff: noqa: S608
# The values are numbers, literals and a table's name that are quoted below.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ._statements import wake_expression

if TYPE_CHECKING:
    from ._keys import LockKey

_PARTS: Final = 2
_IDENTIFIER_BYTES: Final = 63
_DURABLY: Final = (
    "pg_catalog.set_config('synchronous_commit',"
    " CASE pg_catalog.current_setting('synchronous_commit')"
    " WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)"
)
"""For this transaction, whatever the role or the database have made of it. A token that a
crash takes back would be given twice."""
_NOT_DURABLY: Final = "pg_catalog.set_config('synchronous_commit', 'off', true)"
"""A lost mark only says that the end was not a clean one: as it was, the server crashed."""
BRIEFLY: Final = "SELECT pg_catalog.set_config('lock_timeout', '100ms', true)"
"""For this transaction: long enough for the commit of a release, which may still have the row."""
_NEXT: Final = (
    "token = f.token + 1, name = {name}, holder = pg_catalog.current_setting('application_name')"
    " || {holder}, granted_at = pg_catalog.clock_timestamp(), released_at = NULL,"
    " previous_ended_cleanly = f.released_at IS NOT NULL"
)
_GRANT: Final = f"RETURNING f.token, f.previous_ended_cleanly, {_DURABLY}"
_ROW: Final = "f.key_space = {space} AND f.key = {key}"
_CALL: Final = (
    "CASE WHEN {space} = 1 THEN pg_catalog.pg_%(function)s({key})"
    " ELSE pg_catalog.pg_%(function)s(({key} >> 32)::int4, (({key} << 32) >> 32)::int4) END"
)

CREATE: Final = (
    "CREATE TABLE {table} (key_space int2 NOT NULL, key int8 NOT NULL, token int8 NOT NULL,"
    " name text, holder text NOT NULL, granted_at timestamptz NOT NULL, released_at timestamptz,"
    " previous_ended_cleanly bool, PRIMARY KEY (key_space, key))"
    # Room for the row's next versions beside it: no index is ever touched again.
    " WITH (fillfactor = 50)"
)
TAKE: Final = (
    f"WITH tried AS MATERIALIZED (SELECT {_CALL % {'function': 'try_advisory_lock'}} AS granted),"
    " free AS (SELECT f.key FROM tried CROSS JOIN {table} AS f"
    f" WHERE tried.granted AND {_ROW}"
    # A session that holds locks must not wait, and so not for a standby's confirmation.
    " AND pg_catalog.current_setting('synchronous_standby_names') = ''"
    " FOR NO KEY UPDATE OF f SKIP LOCKED),"
    " bumped AS (UPDATE {table} AS f SET "
    f"{_NEXT} FROM free WHERE {_ROW} AND f.key = free.key {_GRANT})"
    " SELECT tried.granted::text, bumped.token, bumped.previous_ended_cleanly"
    " FROM tried LEFT JOIN bumped ON true"
)
BUMP: Final = f"UPDATE {{table}} AS f SET {_NEXT} WHERE {_ROW} {_GRANT}"
BEGIN: Final = (
    "INSERT INTO {table} AS f (key_space, key, token, name, holder, granted_at)"
    " VALUES ({space}, {key}, 1, {name}, pg_catalog.current_setting('application_name')"
    " || {holder}, pg_catalog.clock_timestamp())"
    f" ON CONFLICT (key_space, key) DO UPDATE SET {_NEXT} {_GRANT}"
)
"""As BUMP, for a key that may have no row yet; it costs more."""
RELEASE: Final = (
    "WITH free AS (SELECT f.key FROM {table} AS f"
    f" WHERE {_ROW} AND f.token = {{token}} FOR NO KEY UPDATE SKIP LOCKED),"
    " marked AS (UPDATE {table} AS f SET released_at = pg_catalog.clock_timestamp()"
    f" FROM free WHERE {_ROW} AND f.token = {{token}} AND f.key = free.key"
    f" RETURNING {_NOT_DURABLY})"
    # Counted first: else the key would be unlocked before it is marked.
    f" SELECT ({_CALL % {'function': 'advisory_unlock'}})::text{{wake}}"
    " FROM (SELECT pg_catalog.count(*) FROM marked) AS marked"
)
AND_WAKE: Final = f", {wake_expression('{key} >> 32', '{key}', '{space}::text')}"
"""As `{wake}` of RELEASE; numbered as in ``pg_locks``, so are the spaces."""
GUARD: Final = f"SELECT 1 FROM {{table}} AS f WHERE {_ROW} AND f.token = {{token}} FOR SHARE"
NEWER: Final = f"SELECT 1 FROM {{table}} AS f WHERE {_ROW} AND f.token > {{token}}"


def row_of(key: LockKey) -> dict[str, str]:
    """Return the literals that find the row of ``key``."""
    space, number = numbers_of(key)
    return {"space": f"{space.decode()}::int2", "key": f"'{number.decode()}'::int8"}


def numbers_of(key: LockKey) -> tuple[bytes, bytes]:
    """Return the parameters that find the row of ``key``."""
    if key.as_pair is not None:
        first, second = key.as_pair
        return b"2", b"%d" % (first << 32 | second & 0xFFFF_FFFF)
    return b"1", b"%d" % (key.as_bigint or 0)


def storable(text: str) -> str:
    """Return what Postgres' text can hold of any text; a NUL and half a surrogate pair shown."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def quote_literal(text: str) -> str:
    """Return a literal of what is `storable`, which no setting can read in another way."""
    return "E'" + storable(text).replace("\\", "\\\\").replace("'", "''") + "'"


def quote_table(name: object) -> str:
    """Return ``table`` or ``schema.table`` as SQL writes it.

    Raises:
        ValueError: if it can't be a table's name.
    """
    parts = name.split(".") if isinstance(name, str) else []
    if not 0 < len(parts) <= _PARTS or not all(_is_identifier(part) for part in parts):
        raise ValueError(
            f"fence_table is {name!r}, but a fence table is named 'table' or 'schema.table',"
            " each of 1 to 63 bytes"
        )
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts)


def _is_identifier(part: str) -> bool:
    try:
        return 0 < len(part.encode()) <= _IDENTIFIER_BYTES and "\0" not in part
    except UnicodeEncodeError:
        return False
