"""The SQL of partitions; see `_partitions` and `_partition_dropping`.

A partition is looked at through the whole table, by its ids, and so by the server's pruning.
"""

# ruff: noqa: S608
# What is put together are the constants below; tables' names come quoted.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing import LiteralString

# ---------------------------------------------------------------- looking

IS_BARE: Final[LiteralString] = (
    "SELECT n.nspname FROM pg_catalog.pg_class AS c"
    " JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE c.oid = pg_catalog.to_regclass({named}) AND c.relkind = 'p'"
    " AND NOT EXISTS (SELECT FROM pg_catalog.pg_inherits AS i WHERE i.inhparent = c.oid)"
)
"""The schema of a table that is to have partitions, and has none yet."""
LOOK: Final[LiteralString] = (
    "SELECT n.nspname, c.relname, pg_catalog.pg_get_expr(c.relpartbound, c.oid),"
    # The greatest id that may have been given out.
    " greatest((SELECT id FROM {events} ORDER BY id DESC LIMIT 1),"
    " pg_catalog.pg_sequence_last_value("
    "pg_catalog.pg_get_serial_sequence({named}, 'id')::pg_catalog.regclass), 0),"
    " pg_catalog.current_setting('transaction_isolation')"
    " FROM pg_catalog.pg_inherits AS i"
    " JOIN pg_catalog.pg_class AS c ON c.oid = i.inhrelid"
    " JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE i.inhparent = pg_catalog.to_regclass({named})"
)
SIZE: Final[LiteralString] = (
    "SELECT coalesce(pg_catalog.pg_relation_size(pg_catalog.to_regclass(%s)), 0)"
)

# ---------------------------------------------------------------- the lock

LIMIT_LOCK: Final[LiteralString] = (
    "SELECT pg_catalog.current_setting('lock_timeout'),"
    " pg_catalog.set_config('lock_timeout', %s, true)"
)
SET_LIMIT: Final[LiteralString] = "SELECT pg_catalog.set_config('lock_timeout', %s, true)"
LOCK_EVENTS: Final[LiteralString] = "LOCK TABLE ONLY {events} IN ACCESS EXCLUSIVE MODE"

# ---------------------------------------------------------------- dropping

_VISIBLE: Final[LiteralString] = "pg_catalog.pg_visible_in_snapshot"
_OLD: Final[LiteralString] = (
    " < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => %(older_than)s)"
)
_IN: Final[LiteralString] = "FROM {events} AS e WHERE e.id >= %(first)s AND e.id < %(end)s"
GOES: Final[LiteralString] = (
    "WITH last AS (SELECT"
    f" (SELECT e.id {_IN} ORDER BY e.id DESC LIMIT 1) AS id,"
    f" (SELECT e.appended_at {_IN} ORDER BY e.id DESC LIMIT 1) AS appended_at,"
    f" (SELECT e.xid {_IN} ORDER BY e.xid DESC LIMIT 1) AS xid)"
    " SELECT pg_catalog.pg_snapshot_xmin(now)::text, last.id IS NULL OR ("
    f"last.appended_at{_OLD}"
    " AND last.xid < coalesce(%(ended)s::xid8, pg_catalog.pg_snapshot_xmin(now))"
    " AND NOT (%(respects)s AND EXISTS (SELECT FROM {cursors} AS c, {state} AS s"
    " WHERE c.epoch = s.epoch"
    # Whoever has seen all of these need not be asked about each event.
    " AND (last.id > c.seen_id OR last.xid >= pg_catalog.pg_snapshot_xmin(c.seen))"
    f" AND EXISTS (SELECT {_IN}"
    f" AND NOT ({_VISIBLE}(e.xid, c.seen) AND e.id <= c.seen_id)"
    f" AND NOT ({_VISIBLE}(e.xid, c.page) AND e.id <= c.page_id)))))"
    " FROM pg_catalog.pg_current_snapshot() AS now, last"
)
"""Whether a partition may go, as far as a look at the ends of its indexes tells."""
SUM_UP: Final[LiteralString] = (
    "SELECT pg_catalog.count(*), pg_catalog.max(e.id),"
    f" coalesce(pg_catalog.max(e.appended_at){_OLD}, true),"
    " greatest((SELECT s.oldest FROM {state} AS s),"
    f" (SELECT e.oldest {_IN} ORDER BY e.oldest DESC LIMIT 1))::text {_IN}"
)
"""What is to be known about all of its events."""
TO_NOTE: Final[LiteralString] = (
    f"SELECT e.xid::text, pg_catalog.max(e.id) {_IN} AND e.xid >= %(oldest)s::xid8 GROUP BY e.xid"
)
"""The transactions to be remembered, when it goes."""
NOTE: Final[LiteralString] = (
    "WITH changed AS (UPDATE {state} AS s SET trims = s.trims + 1,"
    " trimmed_id = greatest(s.trimmed_id, %(last_id)s), oldest = %(oldest)s::xid8"
    " RETURNING s.trims, s.oldest),"
    " noted AS (INSERT INTO {trimmed} AS t (xid, last_id, trim)"
    " SELECT n.xid, n.last_id, s.trims FROM changed AS s, ROWS FROM"
    " (pg_catalog.unnest(%(xids)s::xid8[]), pg_catalog.unnest(%(last_ids)s::int8[]))"
    " AS n (xid, last_id)"
    " ON CONFLICT (xid) DO UPDATE SET trim = excluded.trim,"
    " last_id = greatest(t.last_id, excluded.last_id))"
    " DELETE FROM {trimmed} AS t USING changed AS s WHERE t.xid < s.oldest"
)
"""As `_statements.TRIM` does; see there."""
IS_QUIET: Final[LiteralString] = (
    f"SELECT coalesce((SELECT e.appended_at{_OLD}"
    " FROM {events} AS e ORDER BY e.id DESC LIMIT 1), false)"
)
"""Whether the newest event is old."""
