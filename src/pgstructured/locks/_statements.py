"""The SQL of advisory locks; the numbers of a key are safe to write out.

Every name is qualified: a lock must not depend on anybody's ``search_path``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pgstructured.driver import Gatherable, Prepared

from ._names import MARKER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._keys import LockKey


_IDENTITY: Final = (
    "(pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()) * 1000000)::bigint"
    " || '/' || pg_catalog.current_database()"
)
"""What names the one lock table that a key is in: this run of the server, this database."""


IDENTITY_STATEMENT: Final = f"SELECT {_IDENTITY}, pg_catalog.pg_backend_pid()"
"""Gives the lock table, and the session that was asked."""
CHANNEL: Final = "pgstructured_lock"
"""Where those who wait without standing in the server's queue are told what has happened."""


class Answer(NamedTuple):
    """What a `try_statement` gives, in its one row."""

    verdict: str | None
    """``granted``, ``refused``, or why it was not even tried: ``standby``, ``pooled``."""
    identity: str | None
    """The lock table that was asked."""
    backend_pid: str | None
    """The session that asked."""


def try_statement(key: LockKey, *, shared: bool, announced_pid: int | None = None) -> str:
    """Return the statement that takes the lock if it is free, and an `Answer`.

    Args:
        key: What to lock.
        shared: Whether shared.
        announced_pid: The session that is expected to answer, None for any: another one
            means a pooler in between, and nothing is tried.
    """
    pooled = ""
    if announced_pid is not None:
        pooled = f" WHEN pg_catalog.pg_backend_pid() <> {announced_pid} THEN 'pooled'"
    call = f"pg_catalog.pg_try_advisory_lock{_suffix(shared)}({_arguments(key)})"
    return (
        f"SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN 'standby'{pooled}"
        f" WHEN {call} THEN 'granted' ELSE 'refused' END, {_IDENTITY},"
        " pg_catalog.pg_backend_pid()::text"
    )


def wait_statement(key: LockKey, *, shared: bool) -> str:
    """Return the statement that waits for the lock."""
    return f"SELECT pg_catalog.pg_advisory_lock{_suffix(shared)}({_arguments(key)})"


def unlock_statement(key: LockKey, *, shared: bool) -> str:
    """Return the statement that releases the lock once; ``t`` or ``f`` for "was not held"."""
    return f"SELECT pg_catalog.pg_advisory_unlock{_suffix(shared)}({_arguments(key)})::text"


def first_free_statement(keys: Sequence[LockKey], *, gate: LockKey | None) -> str:
    """Return the statement that takes the first lock that is free: its index, or null.

    Args:
        keys: What to try, in this order.
        gate: A key that nobody may hold, or stand in line for; else nothing is tried.
    """
    closed = ""
    if gate is not None:
        # Shared, and for this statement only: those who pass don't keep each other out.
        call = f"pg_catalog.pg_try_advisory_xact_lock_shared({_arguments(gate)})"
        closed = f" WHEN NOT {call} THEN NULL"
    # A CASE stops at the first that is true.
    branches = "".join(
        f" WHEN pg_catalog.pg_try_advisory_lock({_arguments(key)}) THEN {index}"
        for index, key in enumerate(keys)
    )
    return f"SELECT CASE{closed}{branches} END"


def ring_statement(key: LockKey, what: str) -> str:
    """Return the statement that tells whoever listens that something has happened."""
    return f"SELECT {_ring(key, what)}"


def ring_payload(key: LockKey, what: str) -> str:
    """Return what is sent on `CHANNEL` when something has happened to ``key``."""
    return f"{what} {' '.join(str(part) for part in key.pg_locks_ids)}"


def resign_channel(key: LockKey) -> str:
    """Return the channel on which the leader of an election is asked to resign."""
    return f"pgstructured_resign_{'_'.join(str(part) for part in key.pg_locks_ids)}"


def held_condition(key: LockKey, *, shared: bool) -> str:
    """Return the FROM and WHERE that give one row if this session holds the lock, else none."""
    return (
        f" FROM pg_catalog.pg_locks AS l WHERE {_is_granted(key, shared=shared)}"
        " AND l.pid = pg_catalog.pg_backend_pid()"
    )


def xact_statement(key: LockKey, *, shared: bool, is_try: bool) -> str:
    """Return the statement that takes the lock until the end of the transaction.

    It gives ``standby``, or for a try ``true`` or ``false``.
    """
    attempt = "try_" if is_try else ""
    call = f"pg_catalog.pg_{attempt}advisory_xact_lock{_suffix(shared)}({_arguments(key)})"
    return f"SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN 'standby' ELSE {call}::text END"


def _is_granted(key: LockKey, *, shared: bool) -> str:
    classid, objid, objsubid = key.pg_locks_ids
    return _GRANTED.format(
        classid=classid, objid=objid, objsubid=objsubid, mode=_mode(shared=shared)
    )


def _mode(*, shared: bool) -> str:
    return "'ShareLock'" if shared else "'ExclusiveLock'"


def _ring(key: LockKey, what: str) -> str:
    return f"pg_catalog.pg_notify('{CHANNEL}', '{ring_payload(key, what)}')::text"


def _suffix(shared: bool) -> str:  # noqa: FBT001 - private
    return "_shared" if shared else ""


def _arguments(key: LockKey) -> str:
    # Quoted: a bare -9223372036854775808 is the negative of a number out of range.
    if key.as_pair is not None:
        first, second = key.as_pair
        return f"'{first}'::int4, '{second}'::int4"
    return f"'{key.as_bigint}'::int8"


def leader_params(key: LockKey) -> tuple[bytes, ...]:
    """Return the parameters of `LEADER`, and the first of those of `RESIGN`."""
    return tuple(b"%d" % part for part in key.pg_locks_ids)


def params_of(key: LockKey) -> tuple[bytes, ...]:
    """Return the parameters of a prepared statement."""
    if key.as_pair is not None:
        return (b"%d" % key.as_pair[0], b"%d" % key.as_pair[1])
    return (b"%d" % (key.as_bigint or 0),)


_GRANTED: Final = (
    "l.locktype = 'advisory' AND l.granted"
    " AND l.classid = {classid} AND l.objid = {objid} AND l.objsubid = {objsubid}"
    " AND l.mode = {mode} AND l.database = (SELECT oid FROM pg_catalog.pg_database"
    " WHERE datname = pg_catalog.current_database())"
)
_LEADS: Final = _GRANTED.format(
    classid="$1::oid", objid="$2::oid", objsubid="$3::int2", mode=_mode(shared=False)
)
LEADER: Final = Prepared(
    b"pgstructured_leader",
    # Of two views: to plan it takes the server as long as to run it.
    "SELECT a.application_name FROM pg_catalog.pg_locks AS l"  # noqa: S608 - parameters only
    f" LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid WHERE {_LEADS}".encode(),
)
"""Gives the name of the session that holds a key, if any does; takes `leader_params`."""
RESIGN: Final = Prepared(
    b"pgstructured_resign",
    "SELECT pg_catalog.pg_notify($4, l.pid::text) FROM pg_catalog.pg_locks AS l"  # noqa: S608 - ditto
    f" WHERE {_LEADS}".encode(),
)
"""Asks whoever holds a key, by its session, to resign: takes `resign_channel`, too."""
MARKER_STATEMENT: Final = f"SELECT pg_catalog.pg_try_advisory_lock({_arguments(MARKER)})::text"
"""Takes `MARKER` if nobody has it; ``true`` or ``false``."""
_NOBODY: Final = f"pg_catalog.pg_try_advisory_xact_lock_shared({_arguments(MARKER)})"
"""Whether nobody waits outside of the server's queue; see `wake_expression`."""


def wake_expression(high: str, low: str, space: str) -> str:
    """Return the expression that tells those who wait outside of the server's queue.

    They hold `MARKER`; while nobody does, nothing is sent, for a NOTIFY makes every commit with
    one wait for the others.

    Args:
        high: SQL of the key's upper half, of which 32 bits count.
        low: That of the lower half.
        space: That of the third of `LockKey.pg_locks_ids`, as text.
    """
    ids = " || ' ' || ".join(f"(({part}) & 4294967295)::text" for part in (high, low))
    ring = f"'released ' || {ids} || ' ' || {space}"
    return f"CASE WHEN NOT {_NOBODY} THEN pg_catalog.pg_notify('{CHANNEL}', {ring})::text END"


def _prepare(
    name: str, text: str, *, is_pair: bool, shared: bool = False, is_many: bool = False
) -> Prepared:
    """Return a statement whose text has places for the function's suffix and arguments.

    One for many has places for arrays, too, and gives a row for each of their items.
    """
    kind = "int4" if is_pair else "int8"
    numbers = range(1, 3 if is_pair else 2)
    arguments = [f"{'k.n' if is_many else '$'}{number}::{kind}" for number in numbers]
    arrays = [f"pg_catalog.unnest(${number}::{kind}[])" for number in numbers]
    columns = [f"n{number}" for number in numbers]
    if is_pair:
        wake = wake_expression(f"{arguments[0]}::int8", f"{arguments[-1]}::int8", "'2'")
    else:
        wake = wake_expression(f"{arguments[0]} >> 32", arguments[0], "'1'")
    return Prepared(
        f"pgstructured_{name}{2 if is_pair else 1}{_suffix(shared)}".encode(),
        text.format(
            suffix=_suffix(shared),
            arguments=", ".join(arguments),
            arrays=", ".join(arrays),
            columns=", ".join(columns),
            wake=wake,
        ).encode(),
    )


def _prepare_all(
    name: str, alone: str, together: str, *, order: int
) -> dict[tuple[bool, bool], Gatherable]:
    return {
        (is_pair, shared): Gatherable(
            order,
            _prepare(name, alone, is_pair=is_pair, shared=shared),
            _prepare(f"{name}_many", together, is_pair=is_pair, shared=shared, is_many=True),
        )
        for is_pair in (False, True)
        for shared in (False, True)
    }


_TRY: Final = "SELECT pg_catalog.pg_try_advisory_lock{suffix}({arguments})::text"
_UNLOCK: Final = "SELECT pg_catalog.pg_advisory_unlock{suffix}({arguments})::text"
_OF_MANY: Final = " FROM ROWS FROM ({arrays}) AS k ({columns})"
TRY: Final = _prepare_all("try", _TRY, _TRY + _OF_MANY, order=2)
"""By whether the key is a pair, and shared: takes the lock if it is free; ``true`` or ``false``."""
UNLOCK: Final = _prepare_all(
    "unlock",
    f"{_UNLOCK}, {{wake}}",
    # All of them first: to look who waits fails where the lock table is full.
    "SELECT k.was_held, {wake} FROM ROWS FROM ({arrays},"  # noqa: S608 - no values in it
    f" pg_catalog.unnest(ARRAY({_UNLOCK}{_OF_MANY}))) AS k ({{columns}}, was_held)",
    order=1,
)
"""By the same: releases it once; ``true``, or ``false`` for "was not held". Tells as `WAKE`."""
WAKE: Final = {
    is_pair: _prepare("wake", "SELECT {wake}", is_pair=is_pair) for is_pair in (False, True)
}
"""By whether the key is a pair: tells those who wait outside of the server's queue."""
