"""The fence table: tokens that only grow, and transactions that a newer one keeps out."""

from __future__ import annotations

import itertools
import os
import threading
from contextlib import AsyncExitStack

import anyio
import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader

from pgstructured.driver import connect, open_connection, open_session
from pgstructured.errors import FenceTableMissingError, LockError, LockLost
from pgstructured.locks import LockKey, open_locks
from pgstructured.locks._fencing import FenceGrant, FenceTable
from pgstructured.locks._statements import try_statement, unlock_statement, wait_statement
from pgstructured.testing import Cluster, assert_cancellable

KEY = LockKey.named("nightly")
SOON = 20  # seconds that nothing here takes on any machine
EDGES = [
    *(LockKey.bigint(n) for n in (0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32), 2**31)),
    *(LockKey.pair(a, b) for a in (0, -1, 2**31 - 1, -(2**31)) for b in (0, 1, -1, -(2**31))),
]


@pytest.fixture
async def session(pg_dsn):
    async with open_session(pg_dsn, application_name="holder") as opened:
        yield opened


@pytest.fixture
async def other(pg_dsn):
    async with open_session(pg_dsn) as opened:
        yield opened


@pytest.fixture
async def fence(session):
    table = FenceTable()
    await table.create(session)
    return table


async def release(fence, session, key, token, *, prepared=True):
    if not prepared:
        return (await session.execute(fence.unlock_statement(key, token))).scalar()
    assert fence.is_prepared(session)
    command = fence.send_unlock(session, key, token)
    await command.wait()
    return command.result().scalar()


async def row_of(session, key=KEY, table="pgstructured_fence"):
    """The row of a key as a dict of texts."""
    space = 1 if key.as_bigint is not None else 2
    first, second = key.as_pair or (0, 0)
    number = key.as_bigint if space == 1 else first * 2**32 + second % 2**32
    result = await session.execute(
        f"SELECT token, name, holder, granted_at, released_at, previous_ended_cleanly"
        f" FROM {table} WHERE key_space = $1 AND key = $2",
        [space, number],
    )
    (row,) = result.rows
    names = ("token", "name", "holder", "granted_at", "released_at", "previous_ended_cleanly")
    return dict(zip(names, row, strict=True))


# ---------------------------------------------------------------- the table


async def test_creating_it_twice(session, fence):
    await fence.bump(session, KEY)
    await fence.create(session)
    assert await fence.bump(session, KEY) == FenceGrant(2, False)


async def test_many_may_create_it_at_once(pg_dsn):
    async with AsyncExitStack() as stack:
        opening = [open_session(pg_dsn) for _ in range(8)]
        sessions = [await stack.enter_async_context(session) for session in opening]
        for number in range(10):
            async with anyio.create_task_group() as tasks:
                for session in sessions:
                    tasks.start_soon(FenceTable(f"many{number}").create, session)


async def test_it_is_told_what_is_in_its_place(session):
    await session.execute("CREATE TYPE pgstructured_fence AS ENUM ()")
    with pytest.raises(psycopg.errors.DuplicateObject):
        await FenceTable().create(session)


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
async def test_it_waits_for_another_one_that_creates_it(pg_dsn, session, ends):
    with psycopg.connect(pg_dsn, autocommit=True) as conn:
        conn.execute("BEGIN; CREATE TABLE pgstructured_fence (LIKE pg_am)")
        done = anyio.Event()

        async def create() -> None:
            await FenceTable().create(session)
            done.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(create)
            await anyio.sleep(0.1)
            assert not done.is_set()
            conn.execute(ends.encode())
    exists = await session.execute("SELECT 'pgstructured_fence'::regclass")
    assert exists.rows


async def test_who_may_not_create_it_may_use_it(pg_dsn, pg_cluster, session, fence):
    pg_cluster.execute(
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'fencer')"
        " THEN CREATE ROLE fencer LOGIN; END IF; END $$"
    )
    await session.execute("REVOKE CREATE ON SCHEMA public FROM public")
    async with open_session(pg_dsn, user="fencer") as plain:
        await fence.create(plain)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await FenceTable("elsewhere").create(plain)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await fence.bump(plain, KEY)
        grant = "GRANT SELECT, INSERT, UPDATE ON pgstructured_fence TO fencer"
        await session.execute(grant)
        assert await fence.bump(plain, KEY) == FenceGrant(1, None)
        assert (await fence.take(plain, KEY)).grant == FenceGrant(2, False)
        assert await release(fence, plain, KEY, 2) == "true"
        async with open_connection(pg_dsn, user="fencer") as conn, conn.transaction():
            await fence.guard(conn, KEY, 2)


@pytest.mark.parametrize(
    "name",
    ["Fence", 'we"ird', "with space", "'; DROP TABLE x", "{0} {table} %s $1", "é" * 31, "select"],
)
async def test_any_table_name(session, name):
    await session.execute('CREATE SCHEMA "My Schema"')
    for table in (FenceTable(name), FenceTable(f"My Schema.{name}")):
        await table.create(session)
        assert await table.bump(session, KEY) == FenceGrant(1, None)
        assert (await table.take(session, KEY)).grant == FenceGrant(2, False)
        assert await release(table, session, KEY, 2) == "true"
        assert (await row_of(session, table=table.quoted_name))["released_at"] is not None


@pytest.mark.parametrize(
    "name", ["", ".", "a.", ".b", "a.b.c", "x" * 64, "é" * 32, "a\0b", "a.b\0", "\ud800"]
)
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match=r"'table' or 'schema\.table'"):
        FenceTable(name)


async def test_without_a_table(pg_dsn, session):
    fence = FenceTable("nowhere.fence")
    hint = r"\"nowhere\".\"fence\".*Locks.create_fence_table\(\).*`pgstructured lock --create`"
    for call in (fence.prepare(session), fence.take(session, KEY), fence.bump(session, KEY)):
        with pytest.raises(FenceTableMissingError, match=hint) as caught:
            await call
        assert isinstance(caught.value.__cause__, psycopg.errors.UndefinedTable)
    async with open_connection(pg_dsn) as conn, conn.transaction(force_rollback=True):
        with pytest.raises(FenceTableMissingError, match=hint):
            await fence.guard(conn, KEY, 1)


async def test_a_table_that_went(session, other, fence):
    await fence.prepare(session)
    granted = await fence.take(session, KEY)
    await other.execute("DROP TABLE pgstructured_fence")
    with pytest.raises(psycopg.errors.UndefinedTable):
        await release(fence, session, KEY, 1)
    assert granted == (True, None)
    # The lock is still held, so that it can be released without a mark.
    assert (await session.execute(unlock_statement(KEY, shared=False))).scalar() == "true"
    for call in (fence.take(session, KEY), fence.bump(session, KEY)):
        with pytest.raises(FenceTableMissingError):
            await call
    assert (await session.execute(unlock_statement(KEY, shared=False))).scalar() == "false"
    await fence.create(other)
    assert await fence.bump(session, KEY) == FenceGrant(1, None)


# ---------------------------------------------------------------- tokens


async def test_a_row_for_people(session, other, fence):
    assert await fence.bump(other, KEY) == FenceGrant(1, None)
    assert await fence.bump(session, KEY) == FenceGrant(2, False)
    row = await row_of(session)
    assert row["token"] == "2"
    assert row["name"] == "nightly"
    assert row["holder"].startswith(f"holder (process {os.getpid()} on ")
    assert row["granted_at"] is not None
    assert row["released_at"] is None
    assert row["previous_ended_cleanly"] == "f"
    await fence.bump(session, LockKey.bigint(5))
    assert (await row_of(session, LockKey.bigint(5)))["name"] is None


async def test_a_clean_end_is_seen(session, other, fence):
    await session.execute(try_statement(KEY, shared=False))
    assert await fence.bump(other, KEY) == FenceGrant(1, None)
    assert await release(fence, session, KEY, 1, prepared=False) == "true"
    assert (await row_of(session))["released_at"] is not None
    assert await fence.bump(other, KEY) == FenceGrant(2, True)


async def test_take_and_release(session, other, fence):
    assert await fence.take(session, KEY) == (True, None)  # its first time: nothing to count up
    assert await fence.bump(other, KEY) == FenceGrant(1, None)
    assert await fence.take(other, KEY) == (False, None)
    assert (await row_of(session))["token"] == "1"
    assert await release(fence, session, KEY, 1) == "true"
    assert await fence.take(other, KEY) == (True, FenceGrant(2, True))
    assert await release(fence, other, KEY, 2, prepared=False) == "true"
    assert await release(fence, other, KEY, 2) == "false"
    assert (await session.execute(unlock_statement(KEY, shared=False))).scalar() == "false"
    assert await fence.take(other, KEY) == (True, FenceGrant(3, True))
    await other.aclose()
    await session.execute(wait_statement(KEY, shared=False), may_block=True)
    granted = await fence.take(session, KEY)
    assert granted.grant == FenceGrant(4, False)
    assert await release(fence, session, KEY, 4) == "true"
    assert await release(fence, session, KEY, 4) == "true"  # it was taken twice
    assert await release(fence, session, KEY, 4) == "false"


async def test_only_its_own_token_is_marked(session, other, fence):
    await fence.bump(other, KEY)
    await fence.bump(other, KEY)
    assert await release(fence, session, KEY, 1, prepared=False) == "false"
    assert (await row_of(session))["released_at"] is None


async def test_keys_of_every_kind(session, other, fence):
    for number, key in enumerate(EDGES, 1):
        for _ in range(number):
            await fence.bump(other, key)
    for number, key in enumerate(EDGES, 1):
        assert await fence.take(session, key) == (True, FenceGrant(number + 1, False))
        assert (await row_of(session, key))["token"] == str(number + 1)
        # It is the very lock that everybody else takes under this key.
        assert (await other.execute(try_statement(key, shared=False))).scalar() == "refused"
        assert await release(fence, session, key, number + 1) == "true"
        assert (await other.execute(try_statement(key, shared=False))).scalar() == "granted"
        assert (await fence.bump(session, key)).previous_ended_cleanly
        assert await release(fence, other, key, number + 2, prepared=False) == "true"


NASTY = ["'; DROP TABLE x; --", "\\", "\\'", "'", "a\nb", "$1 %s {key}", "é漢😀", "x" * 1000]


@pytest.mark.parametrize("strings", ["on", "off"])
async def test_hostile_names(pg_dsn, fence, strings):
    options = f"-c standard_conforming_strings={strings} -c backslash_quote=off"
    async with open_session(pg_dsn, options=options) as session:
        for number, name in enumerate([*NASTY, "nul\0 \ud800"]):
            key = LockKey(as_bigint=number, name=name)
            shown = "nul\\0 \\ud800" if "\0" in name else name[:200]
            for _ in range(2):
                await fence.bump(session, key)
                assert (await row_of(session, key))["name"] == shown
            assert (await session.execute(fence.bump_statement(key))).rows[0][0] == "3"
            kept = shown.encode("ascii", "backslashreplace").decode()
            assert (await row_of(session, key))["name"] == kept


async def test_a_database_that_can_not_write_the_name(pg_cluster):
    pg_cluster.execute(
        "CREATE DATABASE latin ENCODING latin1 LOCALE 'C' TEMPLATE template0",
    )
    try:
        async with open_session(pg_cluster.dsn("latin")) as session:
            fence = FenceTable()
            await fence.create(session)
            key = LockKey.named("é漢")
            await fence.bump(session, key)
            await session.execute(fence.bump_statement(key))
            assert (await row_of(session, key))["name"] == "\\xe9\\u6f22"
    finally:
        pg_cluster.drop_database("latin")


async def test_the_statement_for_other_connections(pg_dsn, fence):
    for key in (KEY, LockKey.pair(-1, 2)):
        async with open_connection(pg_dsn) as conn:
            cursor = await conn.execute(fence.bump_statement(key).encode())
            assert (await cursor.fetchall())[0][:2] == (1, None)
            cursor = await conn.execute(fence.bump_statement(key).encode())
            assert (await cursor.fetchall())[0][:2] == (2, False)


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_hand_over(pg_dsn, isolation):
    """The next holder sees the clean end of the one before, however fast it is.

    Whatever the role's isolation level is.
    """
    options = f"-c default_transaction_isolation={isolation.replace(' ', chr(92) + ' ')}"
    fence = FenceTable()
    async with (
        open_session(pg_dsn, options=options) as first,
        open_session(pg_dsn, options=options) as second,
        open_session(pg_dsn, options=options) as third,
    ):
        await fence.create(third)
        holder, waiter = first, second
        await fence.prepare(first)
        await fence.prepare(second)
        await holder.execute(wait_statement(KEY, shared=False))
        assert await fence.bump(third, KEY) == FenceGrant(1, None)
        for token in range(1, 100):
            wait = waiter.send([(wait_statement(KEY, shared=False), ())], may_block=True)
            released = fence.send_unlock(holder, KEY, token)
            with anyio.fail_after(10):
                await wait.wait()
                assert await fence.bump(third, KEY) == FenceGrant(token + 1, True)
                await released.wait()
            assert released.results()[0].scalar() == "true"
            holder, waiter = waiter, holder
        assert await release(fence, holder, KEY, 100) == "true"


async def test_many_contend(pg_dsn, fence):
    tokens: list[int] = []
    ends: set[bool | None] = set()

    async def contend(number: int) -> None:
        async with open_session(pg_dsn) as own, open_session(pg_dsn) as bumper:
            for _ in range(40):
                granted, grant = await fence.take(own, KEY)
                if not granted and number % 2:
                    await own.execute(wait_statement(KEY, shared=False), may_block=True)
                    granted = True
                if granted:
                    grant = grant or await fence.bump(bumper, KEY)
                    tokens.append(grant.token)
                    ends.add(grant.previous_ended_cleanly)
                    assert await release(fence, own, KEY, grant.token) == "true"

    async with anyio.create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(contend, number)
    assert tokens == list(range(1, len(tokens) + 1))
    assert len(tokens) >= 80
    assert ends == {None, True}


async def test_a_token_that_can_not_be_committed(pg_dsn, pg_cluster):
    """It was given all the same, and again to the next one."""
    async with open_locks(pg_dsn) as locks, await connect(pg_dsn) as conn:
        await locks.create_fence_table()
        async with locks.lock(KEY, fenced=True) as lock:
            assert lock.fencing_token == 1
        await conn.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE 'refused' USING ERRCODE = '54000'; END $$"
        )
        await conn.execute(
            "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON pgstructured_fence"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        for timeout in (None, 0, SOON):
            with pytest.raises(psycopg.errors.ProgramLimitExceeded):
                async with locks.lock(KEY, fenced=True, acquire_timeout=timeout):
                    raise AssertionError("it has no token")
            assert pg_cluster.advisory_locks(pg_dsn) == []
        await conn.execute("DROP TRIGGER refuse ON pgstructured_fence")
        async with locks.lock(KEY, fenced=True) as lock:
            assert lock.fencing_token == 2


async def test_through_crashes(pg_cluster_private: Cluster):
    """What was given is never given again, whenever the server crashes."""
    dsn = pg_cluster_private.dsn(options="-c synchronous_commit=off")
    fence = FenceTable()
    given = [0]
    for crash in range(4):
        async with open_session(dsn) as session, open_session(dsn) as other:
            await fence.create(session)
            granted = await fence.take(session, KEY)
            grant = granted.grant or await fence.bump(other, KEY)
            assert granted.is_granted
            assert grant.token > given[-1]
            # Nobody has lived to release it.
            assert grant.previous_ended_cleanly is (False if crash else None)
            given.append(grant.token)
            stopper = threading.Timer(0.02, pg_cluster_private.stop, ["immediate"])
            stopper.start()
            try:
                while True:
                    given.append((await fence.bump(other, KEY)).token)
            except psycopg.OperationalError:
                pass
            finally:
                stopper.join()
        pg_cluster_private.start()
    assert all(before < after for before, after in itertools.pairwise(given))


async def test_through_a_crash_after_a_clean_end(pg_cluster_private: Cluster):
    fence = FenceTable()
    for _ in range(2):
        async with open_session(pg_cluster_private.dsn()) as session:
            await fence.create(session)
            grant = (await fence.take(session, KEY)).grant or await fence.bump(session, KEY)
            await release(fence, session, KEY, grant.token)
            # It is not waited for, but written with what comes.
            await session.execute("SELECT pg_logical_emit_message(true, '', '')")
        pg_cluster_private.restart("immediate")
    assert grant == FenceGrant(2, True)


async def test_durable_whatever_the_role_says():
    """A bump waits for a synchronous standby, a release and a session with locks never does."""
    settings = {"synchronous_standby_names": "nobody"}
    with Cluster(settings=settings) as cluster:
        off = cluster.dsn(options="-c synchronous_commit=off")
        apply = cluster.dsn(options="-c synchronous_commit=remote_apply")
        fence = FenceTable()
        async with open_session(off) as session, open_session(apply) as strict:
            await fence.create(session)
            await session.execute(
                "INSERT INTO pgstructured_fence VALUES (1, $1, 5, 'x', 'y', now(), now())",
                [KEY.as_bigint],
            )
            assert await fence.take(strict, KEY) == (True, None)
            assert await fence.take(session, KEY) == (False, None)
            for bumper in (session, strict):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(fence.bump, bumper, KEY)
                    with anyio.fail_after(10):
                        while True:
                            (event,) = cluster.execute(
                                "SELECT wait_event FROM pg_stat_activity WHERE pid = %s",
                                [bumper.backend_pid],
                            )
                            if event == ("SyncRep",):
                                break
                            await anyio.sleep(0.01)
                    await bumper.cancel()  # it stops to wait, and says so in a warning
            assert (await row_of(session))["token"] == "7"
            await session.execute("SELECT set_config('synchronous_commit', 'on', false)")
            assert (await session.execute(try_statement(KEY, shared=False))).scalar() == "refused"
            with anyio.fail_after(5):
                assert await release(fence, strict, KEY, 7) == "true"
            assert (await row_of(session))["released_at"] is not None


# ---------------------------------------------------------------- the guard


async def test_a_guarded_transaction(pg_dsn, session, fence):
    token = (await fence.bump(session, KEY)).token
    async with open_connection(pg_dsn) as conn, conn.transaction():
        await fence.guard(conn, KEY, token)
        await fence.guard(conn, KEY, token)


async def test_a_stale_token(pg_dsn, session, fence):
    stale = (await fence.bump(session, KEY)).token
    await fence.bump(session, KEY)
    async with open_connection(pg_dsn) as conn:
        with pytest.raises(LockLost, match="a newer token exists") as caught:
            async with conn.transaction():
                await fence.guard(conn, KEY, stale, held_for=5, last_confirmed=7)
        assert (caught.value.reason, caught.value.certain) == ("fenced", True)
        assert (caught.value.held_for, caught.value.last_confirmed) == (5, 7)
        assert "after 5 s" in str(caught.value)


async def test_the_next_token_waits_for_guarded_transactions(pg_dsn, session, other, fence):
    assert await fence.bump(session, KEY) == FenceGrant(1, None)
    done = anyio.Event()

    async def bump() -> None:
        assert await fence.bump(other, KEY) == FenceGrant(2, False)
        done.set()

    async with anyio.create_task_group() as tasks, open_connection(pg_dsn) as conn:
        async with conn.transaction():
            await fence.guard(conn, KEY, 1)
            # Nothing that a session with locks does waits meanwhile.
            assert await fence.take(session, KEY) == (True, None)
            assert await release(fence, session, KEY, 1) == "true"
            tasks.start_soon(bump)
            await anyio.sleep(0.1)
            assert not done.is_set()
            async with open_connection(pg_dsn) as second:
                # It has come first, so it may go on; what comes now is in time too.
                async with second.transaction():
                    await fence.guard(second, KEY, 1)
        with anyio.fail_after(5):
            await done.wait()
    async with open_connection(pg_dsn) as conn, conn.transaction(force_rollback=True):
        with pytest.raises(LockLost):
            await fence.guard(conn, KEY, 1)


async def test_a_guard_that_waits_for_a_bump_is_stale(pg_dsn, session, fence):
    await fence.bump(session, KEY)
    with psycopg.connect(pg_dsn) as bumping:
        bumping.execute(fence.bump_statement(KEY).encode())
        async with open_connection(pg_dsn) as conn, anyio.create_task_group() as tasks:

            async def guard() -> None:
                with pytest.raises(LockLost):
                    async with conn.transaction():
                        await fence.guard(conn, KEY, 1)

            tasks.start_soon(guard)
            await anyio.sleep(0.1)
            bumping.commit()


async def test_without_a_transaction(pg_dsn, session, fence):
    await fence.bump(session, KEY)
    async with open_connection(pg_dsn) as conn:
        with pytest.raises(LockError, match="needs a transaction"):
            await fence.guard(conn, KEY, 1)

        async def busy() -> None:
            await conn.execute("SELECT pg_sleep(0.1)")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(busy)
            await anyio.sleep(0.02)
            with pytest.raises(LockError, match="needs a transaction"):
                await fence.guard(conn, KEY, 1)
    conn = await connect(pg_dsn, autocommit=False)
    await fence.guard(conn, KEY, 1)
    assert conn.info.transaction_status.name == "INTRANS"
    await conn.aclose()


async def test_in_a_failed_transaction(pg_dsn, fence):
    async with open_connection(pg_dsn) as conn, conn.transaction(force_rollback=True):
        with pytest.raises(psycopg.errors.DivisionByZero):
            await conn.execute("SELECT 1/0")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            await fence.guard(conn, KEY, 1)


async def test_on_whatever_connection(pg_dsn, session, fence):
    """With the user's row factory, cursors and adapters."""
    await fence.bump(session, KEY)
    async with open_connection(pg_dsn, row_factory=dict_row) as conn, conn.transaction():
        conn.adapters.register_loader("int4", TextLoader)
        conn.cursor_factory = psycopg.AsyncRawCursor
        await fence.guard(conn, KEY, 1)


async def test_a_transaction_that_is_older_than_the_token(pg_dsn, session, fence):
    await fence.bump(session, KEY)
    async with open_connection(pg_dsn) as conn:
        await conn.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
        async with conn.transaction(force_rollback=True):
            await conn.execute("SELECT 1")
            await fence.bump(session, KEY)
            with pytest.raises(LockError, match="can't see token 2 of the lock") as caught:
                await fence.guard(conn, KEY, 2)
            assert not isinstance(caught.value, LockLost)
        async with conn.transaction(force_rollback=True):
            await conn.execute("SELECT 1")
            await fence.bump(session, KEY)
            with pytest.raises(psycopg.errors.SerializationFailure):
                await fence.guard(conn, KEY, 2)
        async with conn.transaction():
            with pytest.raises(LockLost):
                await fence.guard(conn, KEY, 2)
            await fence.guard(conn, KEY, 3)


async def test_where_nobody_knows_the_key(pg_dsn, fence):
    async with open_connection(pg_dsn) as conn, conn.transaction():
        with pytest.raises(LockError, match="in the same database"):
            await fence.guard(conn, KEY, 1)


async def test_it_can_be_cancelled(pg_dsn, session, fence):
    await assert_cancellable(lambda: fence.create(session))
    await assert_cancellable(lambda: fence.prepare(session))
    await assert_cancellable(lambda: fence.take(session, KEY))
    await fence.prepare(session)
    await assert_cancellable(lambda: fence.take(session, KEY))
    await assert_cancellable(lambda: fence.bump(session, KEY))
    assert await fence.bump(session, KEY) == FenceGrant(1, None)
    async with open_connection(pg_dsn) as conn, conn.transaction(force_rollback=True):
        await assert_cancellable(lambda: fence.guard(conn, KEY, 1))
