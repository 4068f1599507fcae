"""The SQL of an event log.

Four tables. ``events`` has them; its ``oldest`` is the oldest transaction that was running when
the event was appended. ``state`` has one row. ``cursors`` has those that consumers store.
``trimmed`` tells which transactions lost events to `TRIM`: exactly those that some reader who has
seen all the others may not have seen, and no more.

Those can't be many. Let ``oldest`` be greatest, of all removed events, at event ``y``, and ``x``
be a removed event of a transaction before that. When ``y`` was appended that transaction had
ended. So whoever has not seen ``x`` has not seen ``y``, and it is enough to remember ``y``.
"""

# ruff: noqa: S608, ISC004
# What is put together are the constants below; tables' names come quoted. A statement of several
# lines in a tuple is one statement.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing import LiteralString

# ---------------------------------------------------------------- creating

CREATE_EVENTS: Final[LiteralString] = (
    "CREATE TABLE IF NOT EXISTS {events} ("
    "id int8 GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
    " xid xid8 NOT NULL DEFAULT pg_catalog.pg_current_xact_id(),"
    " oldest xid8 NOT NULL"
    " DEFAULT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot()),"
    " appended_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),"
    " topic text NOT NULL, payload jsonb, body bytea,"
    " CHECK ((payload IS NULL) <> (body IS NULL)))"
)
PARTITIONED: Final[LiteralString] = " PARTITION BY RANGE (id)"
CREATE: Final[tuple[LiteralString, ...]] = (
    "CREATE INDEX IF NOT EXISTS {index} ON {events} (xid, id)",
    "CREATE TABLE IF NOT EXISTS {state} ("
    "is_only bool PRIMARY KEY DEFAULT true CHECK (is_only),"
    " epoch int8 NOT NULL, trims int8 NOT NULL DEFAULT 0, trimmed_id int8 NOT NULL DEFAULT 0,"
    " oldest xid8 NOT NULL DEFAULT '0')",
    "CREATE TABLE IF NOT EXISTS {trimmed} ("
    "xid xid8 PRIMARY KEY, last_id int8 NOT NULL, trim int8 NOT NULL)",
    "CREATE TABLE IF NOT EXISTS {cursors} ("
    "name text PRIMARY KEY, position text NOT NULL, saved_at timestamptz NOT NULL,"
    " epoch int8 NOT NULL, base int8 NOT NULL,"
    " seen pg_snapshot NOT NULL, seen_id int8 NOT NULL,"
    " page pg_snapshot NOT NULL, page_id int8 NOT NULL)",
    "INSERT INTO {state} (epoch) VALUES (%(epoch)s) ON CONFLICT DO NOTHING",
)
EXISTS: Final[LiteralString] = (
    "SELECT pg_catalog.count(*) = 4 FROM pg_catalog.unnest(%s::text[]) AS name"
    # to_regclass alone, where no table is locked, may not know of what others have committed.
    " JOIN pg_catalog.pg_class AS c ON c.oid = pg_catalog.to_regclass(name)"
)
LOCK: Final[LiteralString] = "SELECT pg_catalog.pg_advisory_xact_lock(%s)"
FROM_ELSEWHERE: Final[LiteralString] = (
    "SELECT NOT EXISTS (SELECT FROM {state})"
    " OR EXISTS (SELECT FROM {events} WHERE xid >= pg_catalog.pg_snapshot_xmax(now)"
    " AND xid IS DISTINCT FROM pg_catalog.pg_current_xact_id_if_assigned())"
    " OR EXISTS (SELECT FROM {trimmed} WHERE xid >= pg_catalog.pg_snapshot_xmax(now))"
    " FROM pg_catalog.pg_current_snapshot() AS now"
)
"""Whether it can't be read as it is: there are transactions that have not begun yet, another
server's or this one's before it was set back; or it has no state."""
ADOPT: Final[tuple[LiteralString, ...]] = (
    "LOCK TABLE {state}, {events} IN ACCESS EXCLUSIVE MODE",  # as trimming does: the state first
    # Ended before any transaction that a snapshot can still doubt.
    "UPDATE {events} SET xid = '3', oldest = '3'",
    "DELETE FROM {trimmed}",
    "INSERT INTO {state} (epoch) VALUES (%(epoch)s)"
    " ON CONFLICT (is_only) DO UPDATE SET epoch = excluded.epoch, oldest = excluded.oldest",
)

# ---------------------------------------------------------------- appending

APPEND: Final[LiteralString] = "INSERT INTO {events} (topic, payload) VALUES (%s, %s) RETURNING id"
APPEND_BYTES: Final[LiteralString] = (
    "INSERT INTO {events} (topic, body) VALUES (%s, %s) RETURNING id"
)
NOTIFYING: Final[LiteralString] = ", pg_catalog.pg_notify(%s, '')"
"""Comes after an append, for the followers."""
APPEND_MANY: Final[LiteralString] = (
    "WITH appended AS ("
    "INSERT INTO {events} (topic, payload, body)"
    " SELECT topic, payload, body FROM ROWS FROM (pg_catalog.unnest(%s::text[]),"
    " pg_catalog.unnest(%s::jsonb[]), pg_catalog.unnest(%s::bytea[]))"
    " WITH ORDINALITY AS item (topic, payload, body, number) ORDER BY number RETURNING id)"
    " SELECT pg_catalog.array_agg(id ORDER BY id)"
)
APPENDED: Final[LiteralString] = " FROM appended"

# ---------------------------------------------------------------- reading

_OWN: Final[LiteralString] = "pg_catalog.pg_current_xact_id_if_assigned()"
_NOW: Final[LiteralString] = "pg_catalog.pg_current_snapshot()"
_VISIBLE: Final[LiteralString] = "pg_catalog.pg_visible_in_snapshot"
# A partition that is dropped is gone for everybody, also for transactions that can't see that.
_TORN: Final[LiteralString] = (
    "(pg_catalog.current_setting('transaction_isolation') IN ('repeatable read', 'serializable')"
    " AND EXISTS (SELECT FROM pg_catalog.pg_inherits AS i"
    " WHERE i.inhparent = {named}::pg_catalog.regclass"
    " AND pg_catalog.pg_relation_filenode(i.inhrelid) IS NULL))"
)
META: Final[LiteralString] = (
    "SELECT NULL::int8 AS id, pg_catalog.concat_ws('|', s.epoch, s.trims,"
    " pg_catalog.pg_is_in_recovery()::int4,"
    " pg_catalog.current_setting('transaction_isolation'),"
    f" {_NOW}, coalesce({_OWN}::text, ''),"
    # Events of its own, which it may go on appending, a transaction has not seen.
    " greatest(s.trimmed_id,"
    f" (SELECT id FROM {{events}} WHERE xid IS DISTINCT FROM {_OWN} ORDER BY id DESC LIMIT 1)),"
    # One look at the end of each index.
    f" (coalesce((SELECT xid >= pg_catalog.pg_snapshot_xmax({_NOW}) FROM {{events}}"
    f" WHERE xid IS DISTINCT FROM {_OWN} ORDER BY xid DESC LIMIT 1), false)"
    f" OR coalesce((SELECT xid >= pg_catalog.pg_snapshot_xmax({_NOW}) FROM {{trimmed}}"
    " ORDER BY xid DESC LIMIT 1), false))::int4,"
    f" {_TORN}::int4,"
    " ({expired})::int4"
    ") AS topic, NULL::jsonb AS payload, NULL::bytea AS body, NULL::timestamptz AS appended_at"
    " FROM {state} AS s"
)
"""What is to be known about the log at that instant, as a first row."""
NEVER: Final[LiteralString] = "false"
TRIMMED_SINCE: Final[LiteralString] = "s.trims > %(base)s"
AND: Final[LiteralString] = " AND "
EXPIRED_BASE: Final[LiteralString] = "EXISTS (SELECT FROM {trimmed} AS t WHERE t.trim > %(base)s)"
EXPIRED: Final[LiteralString] = (
    # Which of them the snapshot does not show, by looks at the index: while some transaction
    # stayed open all that ended meanwhile are remembered, and most readers have seen them.
    "(coalesce((SELECT t.xid FROM {trimmed} AS t ORDER BY t.xid DESC LIMIT 1)"
    " >= %(xmax)s::xid8, false)"
    " OR EXISTS (SELECT FROM {trimmed} AS t WHERE t.xid = ANY (%(running)s::xid8[]))"
    " OR (s.trimmed_id > %(seen_id)s"
    " AND EXISTS (SELECT FROM {trimmed} AS t WHERE t.last_id > %(seen_id)s)))"
)
EXPIRED_PAGE: Final[LiteralString] = (
    "EXISTS (SELECT FROM {trimmed} AS t WHERE t.trim > %(base)s"
    f" AND NOT ({_VISIBLE}(t.xid, %(seen)s::pg_snapshot) AND t.last_id <= %(seen_id)s)"
    f" AND NOT ({_VISIBLE}(t.xid, %(window)s::pg_snapshot) AND t.last_id <= %(after)s))"
)
_COLUMNS: Final[LiteralString] = "id, topic, payload, body, appended_at"
UNION: Final[LiteralString] = " UNION ALL "
NEW: Final[LiteralString] = (
    f"(SELECT {_COLUMNS} FROM {{events}} WHERE id > %(start)s{{where}} ORDER BY id LIMIT %(limit)s)"
)
"""Those that are beyond every id that has been seen: most."""
LATE: Final[LiteralString] = (
    f"(SELECT * FROM (SELECT {_COLUMNS} FROM {{events}}"
    " WHERE xid = ANY (%(running)s::xid8[]) AND id > %(after)s AND id <= %(seen_id)s{where}"
    f" UNION ALL SELECT {_COLUMNS} FROM {{events}}"
    # The upper bound excludes nothing. With both the planner takes it for few, and so for the
    # index on xid, also where it knows nothing about the table yet.
    f" WHERE xid >= %(xmax)s::xid8 AND xid < pg_catalog.pg_snapshot_xmax({_NOW})"
    " AND id > %(after)s AND id <= %(seen_id)s{where}) AS late"
    # By an expression: the index on id would lead through all that has been seen.
    " ORDER BY id + 0 LIMIT %(limit)s)"
)
"""Those with smaller ids whose transactions have ended since."""
OTHERS: Final[LiteralString] = f" AND xid IS DISTINCT FROM {_OWN}"
IN_WINDOW: Final[LiteralString] = (
    f" AND {_VISIBLE}(xid, %(window)s::pg_snapshot) AND id <= %(window_id)s"
)
OF_TOPICS: Final[LiteralString] = " AND topic = ANY (%(topics)s::text[])"

# ---------------------------------------------------------------- trimming

LOCK_STATE: Final[LiteralString] = "SELECT FROM {state} FOR UPDATE"
_UNSEEN: Final[LiteralString] = (
    "EXISTS (SELECT FROM {cursors} AS c, {state} AS s WHERE c.epoch = s.epoch"
    f" AND NOT ({_VISIBLE}(e.xid, c.seen) AND e.id <= c.seen_id)"
    f" AND NOT ({_VISIBLE}(e.xid, c.page) AND e.id <= c.page_id))"
)
TRIM: Final[LiteralString] = (
    "WITH looked_at AS (SELECT e.id, e.xid,"
    f" e.xid < pg_catalog.pg_snapshot_xmin({_NOW})"
    " AND e.appended_at < pg_catalog.clock_timestamp()"
    " - pg_catalog.make_interval(secs => %(older_than)s)"
    f" AND NOT (%(respects)s AND {_UNSEEN}) AS may_go"
    " FROM {events} AS e ORDER BY e.xid, e.id LIMIT %(limit)s),"
    # From the front only: what is removed is always what was before something.
    " chosen AS (SELECT id FROM (SELECT id,"
    " pg_catalog.bool_and(may_go) OVER (ORDER BY xid, id) AS goes FROM looked_at) AS l WHERE goes),"
    " gone AS (DELETE FROM {events} AS e USING chosen AS c WHERE e.id = c.id"
    " RETURNING e.id, e.xid, e.oldest),"
    " changed AS (UPDATE {state} AS s SET trims = s.trims + 1,"
    " trimmed_id = greatest(s.trimmed_id, (SELECT pg_catalog.max(id) FROM gone)),"
    " oldest = greatest(s.oldest, (SELECT oldest FROM gone ORDER BY oldest DESC LIMIT 1))"
    " WHERE EXISTS (SELECT FROM gone) RETURNING s.trims, s.oldest),"
    " noted AS (INSERT INTO {trimmed} AS t (xid, last_id, trim)"
    " SELECT g.xid, pg_catalog.max(g.id), s.trims FROM gone AS g, changed AS s"
    " WHERE g.xid >= s.oldest GROUP BY g.xid, s.trims"
    " ON CONFLICT (xid) DO UPDATE SET trim = excluded.trim,"
    " last_id = greatest(t.last_id, excluded.last_id)),"
    " forgotten AS (DELETE FROM {trimmed} AS t USING changed AS s WHERE t.xid < s.oldest)"
    " SELECT pg_catalog.count(*) FROM gone"
)
EXPIRED_CURSORS: Final[LiteralString] = (
    "SELECT c.name FROM {cursors} AS c, {state} AS s WHERE c.epoch = s.epoch"
    " AND EXISTS (SELECT FROM {trimmed} AS t WHERE t.trim > c.base"
    f" AND NOT ({_VISIBLE}(t.xid, c.seen) AND t.last_id <= c.seen_id)"
    f" AND NOT ({_VISIBLE}(t.xid, c.page) AND t.last_id <= c.page_id)) ORDER BY c.name"
)

# ---------------------------------------------------------------- stored cursors

_SAVE: Final[LiteralString] = (
    "INSERT INTO {cursors} (name, position, saved_at, epoch, base, seen, seen_id, page, page_id)"
    " SELECT %(name)s, coalesce(%(position)s, s.epoch || '.b' || s.trims),"
    " pg_catalog.clock_timestamp(), coalesce(%(epoch)s, s.epoch), coalesce(%(base)s, s.trims),"
    " %(seen)s::pg_snapshot, %(seen_id)s, %(page)s::pg_snapshot, %(page_id)s FROM {state} AS s"
)
"""At the very beginning it is anchored: what is trimmed from now on it has missed."""
_TAKING_TURNS: Final[LiteralString] = " FOR SHARE OF s"
"""With trimming: one that is under way is waited for, and counted by the anchor; the next one
waits until the transaction has ended, and then sees the cursor."""
_MOVE: Final[LiteralString] = (
    " ON CONFLICT (name) DO UPDATE SET position = excluded.position,"
    " saved_at = excluded.saved_at, epoch = excluded.epoch, base = excluded.base,"
    " seen = excluded.seen, seen_id = excluded.seen_id, page = excluded.page,"
    " page_id = excluded.page_id"
)
SAVE: Final[LiteralString] = _SAVE + _MOVE
SAVE_BEGINNING: Final[LiteralString] = _SAVE + _TAKING_TURNS + _MOVE
BEGIN: Final[LiteralString] = f"{_SAVE}{_TAKING_TURNS} ON CONFLICT (name) DO NOTHING"
LOAD: Final[LiteralString] = "SELECT position FROM {cursors} WHERE name = %s"
LOAD_FOR_UPDATE: Final[LiteralString] = LOAD + " FOR UPDATE"
FORGET: Final[LiteralString] = "DELETE FROM {cursors} WHERE name = %s"
LIST: Final[LiteralString] = "SELECT name, position, saved_at FROM {cursors} ORDER BY name"
