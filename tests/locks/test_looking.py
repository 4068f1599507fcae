"""Who holds a lock, and who waits for it."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import anyio
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgstructured.driver import ConnectionState, open_session
from pgstructured.locks import LockKey, _looking
from pgstructured.locks._looking import (
    LockHolder,
    fetch_holders,
    fetch_waiters,
    is_locked,
    terminate_holders,
)
from pgstructured.locks._names import INTRO, MARKER, note
from pgstructured.locks._statements import try_statement, wait_statement
from pgstructured.testing import assert_cancellable

KEY = LockKey.named("nightly")
EDGES = [
    *(LockKey.bigint(n) for n in (0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32), 2**31, -5)),
    *(LockKey.pair(a, b) for a in (0, -1, 2**31 - 1, -(2**31)) for b in (1, -1, -(2**31))),
]


@pytest.fixture
async def looker(pg_dsn):
    async with open_session(pg_dsn, application_name="looker") as session:
        yield session


@asynccontextmanager
async def holding(dsn, *keys, shared=False, name="holder"):
    async with open_session(dsn, application_name=name) as session:
        for key in keys:
            verdict: str | None = None
            with anyio.fail_after(20):  # until the holder before has ended
                while verdict != "granted":
                    statement = try_statement(key, shared=shared) + note(keys)
                    verdict = (await session.execute(statement)).scalar()
        yield session


@asynccontextmanager
async def waiting_for(dsn, key, *, name="waiter", shared=False):
    """A session that waits; the lock is taken, or the session ended, by the end of the block."""
    async with open_session(dsn, application_name=name) as session:
        session.send([(wait_statement(key, shared=shared) + note([key]), ())], may_block=True)
        statement = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = $1"
        async with open_session(dsn) as other:
            with anyio.fail_after(10):
                while True:
                    found = await other.execute(statement, [session.backend_pid])
                    if found.scalar() == "1":
                        break
                    await anyio.sleep(0.01)
        yield session


async def test_nobody(looker):
    assert await fetch_holders(looker) == await fetch_waiters(looker) == []
    assert await fetch_holders(looker, KEY) == await fetch_waiters(looker, KEY) == []
    assert not await is_locked(looker, KEY)
    assert await terminate_holders(looker, KEY) == 0


async def test_a_holder(pg_dsn, looker):
    async with holding(pg_dsn, KEY) as holder:
        expected = LockHolder(
            key=KEY,
            backend_pid=holder.backend_pid,
            shared=False,
            granted=True,
            application_name="holder",
            user="postgres",
            client_address="127.0.0.1",
            waiting_since=None,
            blocked_by=(),
        )
        assert await fetch_holders(looker) == await fetch_holders(looker, KEY) == [expected]
        assert (await fetch_holders(looker))[0].key.name == "nightly"
        assert (await fetch_holders(looker))[0].key.scheme == "unknown"
        assert (await fetch_holders(looker, KEY))[0].key is KEY
        assert await fetch_holders(looker, LockKey.bigint(1)) == []
        assert await fetch_waiters(looker) == []
        assert await is_locked(looker, KEY)
        assert not await is_locked(looker, LockKey.bigint(1))


async def test_waiters_in_their_order(pg_dsn, looker):
    before = datetime.now(UTC)
    async with (
        holding(pg_dsn, KEY) as holder,
        waiting_for(pg_dsn, KEY, shared=True, name="first") as first,
        waiting_for(pg_dsn, KEY, name="second") as second,
    ):
        waiters = await fetch_waiters(looker, KEY)
        assert await fetch_waiters(looker) == waiters
        assert [x.application_name for x in waiters] == ["first", "second"]
        assert [x.shared for x in waiters] == [True, False]
        assert [x.key.name for x in await fetch_waiters(looker)] == ["nightly", "nightly"]
        assert not any(x.granted for x in waiters)
        assert waiters[0].blocked_by == (holder.backend_pid,)
        assert waiters[1].blocked_by == tuple(sorted((holder.backend_pid, first.backend_pid)))
        assert waiters[1].backend_pid == second.backend_pid
        since = [x.waiting_since for x in waiters if x.waiting_since is not None]
        # One machine, one clock; but not one moment.
        assert before - timedelta(seconds=1) <= since[0] <= since[1] <= datetime.now(UTC)
        assert [x.application_name for x in await fetch_holders(looker)] == ["holder"]


async def test_shared_holders(pg_dsn, looker):
    async with holding(pg_dsn, KEY, shared=True), holding(pg_dsn, KEY, shared=True):
        assert [x.shared for x in await fetch_holders(looker, KEY)] == [True, True]
        assert await is_locked(looker, KEY)


@pytest.mark.parametrize("key", EDGES, ids=str)
async def test_numbers_of_every_kind(pg_dsn, looker, key):
    async with holding(pg_dsn, *EDGES):
        assert {x.key for x in await fetch_holders(looker)} == set(EDGES)
        (found,) = await fetch_holders(looker, key)
        assert found.key == key
        assert found.key.name is None


async def test_locks_of_others(pg_dsn, looker):
    """Who has never heard of this library holds locks too."""
    with psycopg.connect(pg_dsn, application_name="") as conn:
        conn.execute("SELECT pg_advisory_xact_lock(-7), pg_advisory_xact_lock_shared(1, -2)")
        found = {x.key: x for x in await fetch_holders(looker)}
        assert set(found) == {LockKey.bigint(-7), LockKey.pair(1, -2)}
        assert found[LockKey.pair(1, -2)].shared
        assert {x.application_name for x in found.values()} == {""}
        assert {x.key.name for x in found.values()} == {None}


async def test_names_that_the_caller_knows(pg_dsn, looker):
    ours = LockKey.pals("nightly", "app")
    async with holding(pg_dsn, LockKey(as_bigint=ours.as_bigint), LockKey.bigint(5)):
        found = await fetch_holders(looker, known=[ours, KEY])
        assert {(x.key, x.key.name, x.key.scheme) for x in found} == {
            (ours, "nightly", "pals"),
            (LockKey.bigint(5), None, "number"),
        }
        assert (await fetch_holders(looker, ours))[0].key is ours
    # What the session itself says comes first.
    async with holding(pg_dsn, LockKey(as_bigint=ours.as_bigint, name="theirs")):
        assert (await fetch_holders(looker, ours))[0].key.name == "theirs"


async def test_the_marker_is_not_shown(pg_dsn, looker):
    async with holding(pg_dsn, MARKER, KEY), waiting_for(pg_dsn, MARKER):
        assert [x.key for x in await fetch_holders(looker)] == [KEY]
        assert await fetch_waiters(looker) == []
        assert await fetch_holders(looker, MARKER) == []
        assert not await is_locked(looker, MARKER)
        assert await terminate_holders(looker, MARKER) == 0


async def test_this_database_only(pg_dsn, pg_cluster, looker):
    other = pg_cluster.create_database()
    try:
        async with holding(other, KEY):
            assert await fetch_holders(looker) == []
            assert not await is_locked(looker, KEY)
            assert await terminate_holders(looker, KEY) == 0
    finally:
        pg_cluster.drop_database(other)


@pytest.fixture
def plain_role(pg_dsn, pg_cluster):
    """A conninfo of a role that may do nothing special."""
    pg_cluster.execute(
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'plain_role')"
        " THEN CREATE ROLE plain_role LOGIN; END IF; END $$"
    )
    return make_conninfo(pg_dsn, user="plain_role")


async def test_without_pg_read_all_stats(pg_dsn, plain_role):
    async with (
        holding(pg_dsn, KEY) as holder,
        waiting_for(pg_dsn, KEY) as waiter,
        open_session(plain_role) as plain,
    ):
        (found,) = await fetch_holders(plain)
        assert (found.key, found.key.name) == (KEY, None)  # it may not see the statement
        assert found.backend_pid == holder.backend_pid
        assert (found.application_name, found.user) == ("holder", "postgres")
        assert found.client_address is None
        (found,) = await fetch_waiters(plain, KEY)
        assert found.key.name == "nightly"  # known to the caller
        assert found.backend_pid == waiter.backend_pid
        assert found.blocked_by == (holder.backend_pid,)
        assert found.waiting_since is not None
        assert await is_locked(plain, KEY)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await terminate_holders(plain, KEY)
        assert plain.state is ConnectionState.OPEN
        assert holder.state is ConnectionState.OPEN


async def test_of_its_own_sessions_a_plain_role_sees_everything(plain_role):
    async with holding(plain_role, KEY) as holder, open_session(plain_role) as plain:
        (found,) = await fetch_holders(plain)
        assert (found.key.name, found.client_address) == ("nightly", "127.0.0.1")
        assert await terminate_holders(plain, KEY) == 1
        await holder.wait_closed()


@pytest.mark.parametrize(
    "text",
    ["'; DROP TABLE x; --", "{", '"', "\\", "a\tb", ' -- pgstructured {"5": "evil"}', "%s $1"],
)
async def test_hostile_names(pg_dsn, looker, text):
    with psycopg.connect(pg_dsn, application_name="x") as conn:
        conn.execute("SELECT set_config('application_name', %s, false)", [text])
        statement = "SELECT pg_advisory_xact_lock(5), ' -- pgstructured {', $$" + text + "$$"
        conn.execute(statement.encode())
        (found,) = await fetch_holders(looker)
        assert found.application_name in (
            text,
            text.replace("\t", "?"),
            text.replace("\t", "\\x09"),
        )
        assert found.key == LockKey.bigint(5)
        assert found.key.name in (None, "evil")  # names prove nothing


async def test_a_session_names_only_its_own_locks(pg_dsn, looker):
    async with holding(pg_dsn, LockKey.bigint(1)), holding(pg_dsn, LockKey.bigint(2)) as other:
        await other.execute("" + note([LockKey(as_bigint=1, name="not mine")]))
        assert {x.key.name for x in await fetch_holders(looker)} == {None}


async def test_no_more_of_a_statement_than_its_note_is_fetched(pg_dsn, looker):
    statement = _looking._statement(None, looker.server_version, granted=True)
    async with holding(pg_dsn, KEY) as holder:
        await holder.execute("SELECT 'secret'" + note([KEY]))
        (row,) = (await looker.execute(statement, [INTRO])).rows
        assert row[-1] == note([KEY])
        await holder.execute("SELECT 'secret'")
        (row,) = (await looker.execute(statement, [INTRO])).rows
        assert row[-1] is None


async def test_before_postgres_14(pg_dsn, looker):
    async with holding(pg_dsn, KEY), waiting_for(pg_dsn, KEY):
        statement = _looking._statement(KEY, 130000, granted=False)
        assert "waitstart" not in statement
        (row,) = (await looker.execute(statement, [INTRO])).rows
        waiter = _looking._read(row, {})
        assert (waiter.key.name, waiter.granted, waiter.waiting_since) == ("nightly", False, None)


@pytest.mark.pg_leaks_ok  # it is a leak, until the database is dropped
async def test_a_prepared_transaction(pg_dsn, looker):
    with psycopg.connect(pg_dsn) as conn:
        conn.execute("SELECT pg_advisory_xact_lock(5)")
        conn.execute(f"PREPARE TRANSACTION '{conn.info.dbname}'")
    key = LockKey.bigint(5)
    (found,) = await fetch_holders(looker)
    assert (found.key, found.backend_pid, found.user) == (key, None, None)
    async with waiting_for(pg_dsn, key):
        (waiter,) = await fetch_waiters(looker)
        assert waiter.blocked_by == (0,)
    assert await terminate_holders(looker, key) == 0
    assert await is_locked(looker, key)


async def test_terminate_ends_holders_and_no_waiter(pg_dsn, looker):
    async with (
        holding(pg_dsn, KEY, LockKey.bigint(1), shared=True) as first,
        holding(pg_dsn, KEY, shared=True) as second,
        holding(pg_dsn, LockKey.bigint(2)) as other,
        waiting_for(pg_dsn, KEY) as waiter,
    ):
        assert await terminate_holders(looker, KEY) == 2
        assert not await is_locked(looker, LockKey.bigint(1))  # really gone, and at once
        with anyio.fail_after(20):
            await first.wait_closed()
            await second.wait_closed()
        assert first.failure.sqlstate == second.failure.sqlstate == "57P01"
        await waiter.ping()  # it has the lock
        assert [x.backend_pid for x in await fetch_holders(looker, KEY)] == [waiter.backend_pid]
        assert other.state is ConnectionState.OPEN


async def test_one_that_holds_it_twice_is_one(pg_dsn, looker):
    async with holding(pg_dsn, KEY) as holder:
        await holder.execute(try_statement(KEY, shared=True))
        assert len(await fetch_holders(looker, KEY)) == 2
        assert await terminate_holders(looker, KEY) == 1
        await holder.wait_closed()


async def test_terminate_says_if_one_does_not_end(pg_dsn, pg_cluster, looker, monkeypatch):
    monkeypatch.setattr(_looking, "_ENDING", 1.5)
    async with holding(pg_dsn, KEY, shared=True) as frozen, holding(pg_dsn, KEY, shared=True):
        pg_cluster.freeze(frozen.backend_pid)
        try:
            began = time.monotonic()
            assert await terminate_holders(looker, KEY) == 1
            assert time.monotonic() - began >= 1.5
            assert await is_locked(looker, KEY)
        finally:
            pg_cluster.thaw(frozen.backend_pid)
        with anyio.fail_after(20):
            await frozen.wait_closed()


async def test_it_can_be_cancelled(looker):
    await assert_cancellable(lambda: fetch_holders(looker))
    await assert_cancellable(lambda: fetch_waiters(looker))
    await assert_cancellable(lambda: is_locked(looker, KEY))
    await assert_cancellable(lambda: terminate_holders(looker, KEY))
    assert await fetch_holders(looker) == []
