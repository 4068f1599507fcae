"""Who holds what, and who waits for it: ``pg_locks`` with names.

Every advisory lock of the session's database is seen, whoever made it; but the
library's own marker.

Manual: "pg_locks", "pg_stat_activity", "System Information Functions and Operators".
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, final

import anyio

from ._derivations import signed
from ._keys import LockKey
from ._names import INTRO, MARKER, read_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pgstructured.driver import Session

_FIRST_14: Final = 140000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LOCKS: Final = "FROM pg_catalog.pg_locks AS l"
_ENDING: Final = 5.0
_POLL: Final = 0.01


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LockHolder:
    """A session that holds an advisory lock, or waits for one.

    What the role may not see of other roles' sessions is None; ``pg_read_all_stats`` lets it.
    """

    key: LockKey
    """The lock, with a name where one is known."""
    backend_pid: int | None
    """Process id of the session; None for a prepared transaction, which has none."""
    shared: bool
    """Whether it is held, or waited for, shared."""
    granted: bool
    """Whether it is held; else it is waited for."""
    application_name: str | None
    """What the session calls itself."""
    user: str | None
    """The session's role."""
    client_address: str | None
    """Its client's IP address; None also through a Unix socket."""
    waiting_since: datetime | None
    """When it began to wait, by the server's clock in UTC; None for a holder, for a moment at
    the beginning, and before Postgres 14."""
    blocked_by: tuple[int, ...]
    """Process ids of the sessions that a waiter waits for, holders and those before it in the
    queue; 0 stands for a prepared transaction."""


async def fetch_holders(
    session: Session, key: LockKey | None = None, *, known: Iterable[LockKey] = ()
) -> list[LockHolder]:
    """Return who holds ``key``, or any advisory lock of the database.

    Args:
        session: Where to look.
        key: The lock; None for all.
        known: Keys whose names the caller knows.

    Raises:
        psycopg.Error: what the server says.

    Cancellation:
        A checkpoint; nothing is left behind.
    """
    return await _look(session, key, known, granted=True)


async def fetch_waiters(
    session: Session, key: LockKey | None = None, *, known: Iterable[LockKey] = ()
) -> list[LockHolder]:
    """Return who waits for ``key``, or for any advisory lock, longest first.

    As `fetch_holders` in everything else.

    Cancellation:
        As `fetch_holders`.
    """
    return await _look(session, key, known, granted=False)


async def is_locked(session: Session, key: LockKey) -> bool:
    """Tell whether anybody holds ``key``, shared or not.

    Raises:
        psycopg.Error: what the server says.

    Cancellation:
        A checkpoint; nothing is left behind.
    """
    statement = f"SELECT EXISTS (SELECT {_LOCKS} WHERE {_is_shown(key)} AND l.granted)"
    return (await session.execute(statement)).scalar() == "t"


async def terminate_holders(session: Session, key: LockKey) -> int:
    """End the sessions that hold ``key``, with everything that they hold and do.

    Waiters stay, and may have the lock by the time this returns. A prepared transaction
    can't be ended so.

    Args:
        session: One that doesn't hold the lock itself.
        key: The lock.

    Returns:
        How many sessions have ended. One that has not after 5 seconds (a process that is
        stopped, a disk that hangs) doesn't count; it has been told to.

    Raises:
        psycopg.errors.InsufficientPrivilege: if the role may not end one of them
            (``pg_signal_backend``); others may have been ended.
        psycopg.Error: what else the server says.

    Cancellation:
        A checkpoint. A cancelled call has ended the sessions, or none.
    """
    holding = f"{_LOCKS} WHERE {_is_shown(key)} AND l.granted"
    told = await session.execute(
        "SELECT pid, pg_catalog.pg_terminate_backend(pid)"  # noqa: S608 - numbers only
        f" FROM (SELECT DISTINCT l.pid {holding} AND l.pid IS NOT NULL) AS holders"
    )
    pids = ",".join(str(pid) for pid, is_told in told.rows if is_told == "t")
    statement = f"SELECT DISTINCT l.pid {holding} AND l.pid = ANY ($1::int4[])"
    count = left = len(pids.split(",")) if pids else 0
    with anyio.move_on_after(_ENDING):
        while left:
            left = len((await session.execute(statement, [f"{{{pids}}}"])).rows)
            if left:
                await anyio.sleep(_POLL)
    return count - left


# ---------------------------------------------------------------- reading pg_locks


async def _look(
    session: Session, key: LockKey | None, known: Iterable[LockKey], *, granted: bool
) -> list[LockHolder]:
    statement = _statement(key, session.server_version, granted=granted)
    found = await session.execute(statement, [INTRO])
    by_numbers = {known_key: known_key for known_key in known}
    if key is not None:
        by_numbers[key] = key
    return [_read(row, by_numbers) for row in found.rows]


def _statement(key: LockKey | None, server_version: int, *, granted: bool) -> str:
    """Return the statement that looks; ``$1`` is what a note begins with.

    Of other people's statements no more than a note leaves the server.
    """
    since = "l.waitstart" if server_version >= _FIRST_14 else "NULL::timestamptz"
    return (
        "SELECT l.classid, l.objid, l.objsubid, l.pid, l.mode = 'ShareLock', l.granted,"
        " a.application_name, a.usename, pg_catalog.host(a.client_addr),"
        f" (pg_catalog.date_part('epoch', {since}) * 1000000)::int8,"
        # Not for holders: it stops the whole lock table for a moment.
        " CASE WHEN NOT l.granted THEN"
        " pg_catalog.array_to_string(pg_catalog.pg_blocking_pids(l.pid), ',') END,"
        " CASE WHEN pg_catalog.strpos(a.query, $1) > 0 THEN"
        " pg_catalog.substr(a.query, pg_catalog.strpos(a.query, $1)) END"
        f" {_LOCKS} LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid"
        f" WHERE {_is_shown(key)} AND {'' if granted else 'NOT '}l.granted"
        f" ORDER BY {since}, l.objsubid, l.classid, l.objid, l.pid"
    )


def _is_shown(key: LockKey | None) -> str:
    """Return the condition for ``key``, or for all of this database; never for the marker."""
    which = "" if key is None else f" AND {_is(key)}"
    return (
        "l.locktype = 'advisory' AND l.database ="  # noqa: S608 - numbers only
        " (SELECT oid FROM pg_catalog.pg_database"
        f" WHERE datname = pg_catalog.current_database()) AND NOT {_is(MARKER)}{which}"
    )


def _is(key: LockKey) -> str:
    classid, objid, objsubid = key.pg_locks_ids
    return f"(l.classid = '{classid}' AND l.objid = '{objid}' AND l.objsubid = {objsubid})"


def _read(row: tuple[str | None, ...], known: dict[LockKey, LockKey]) -> LockHolder:
    classid, objid, objsubid, pid, shared, granted, application, user, address, *rest = row
    since, blocked_by, note = rest
    key = _key_of(int(classid or 0), int(objid or 0), int(objsubid or 0))
    name = read_names(note or "").get(key)
    ours = known.get(key, key)
    if name is not None and name != ours.name:
        key = LockKey(as_bigint=key.as_bigint, as_pair=key.as_pair, name=name, scheme="unknown")
    else:
        key = ours
    return LockHolder(
        key=key,
        backend_pid=None if pid is None else int(pid),
        shared=shared == "t",
        granted=granted == "t",
        application_name=application,
        user=user,
        client_address=address,
        # Counted, not converted: a float of seconds would lose some.
        waiting_since=None if since is None else _EPOCH + timedelta(microseconds=int(since)),
        blocked_by=tuple(
            sorted({int(blocker) for blocker in (blocked_by or "").split(",") if blocker})
        ),
    )


def _key_of(classid: int, objid: int, objsubid: int) -> LockKey:
    """Return the key that ``pg_locks`` shows so; the inverse of `LockKey.pg_locks_ids`."""
    if objsubid == 1:
        return LockKey.bigint(signed(classid << 32 | objid, 64))
    return LockKey.pair(signed(classid, 32), signed(objid, 32))
