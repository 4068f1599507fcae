"""No wait without a bound, and none that nobody ends."""

from __future__ import annotations

from typing import Any

import anyio
import psycopg
import pytest

from pgstructured.driver import ConnectionState
from pgstructured.errors import PoolClosedError, PoolTimeoutError
from pgstructured.pool import open_pool


async def test_a_check_is_bounded_by_the_acquire(pg_dsn, fault_proxy, kit):
    """A silent server: the question is part of what ``acquire_timeout`` is for."""
    async with open_pool(
        fault_proxy.dsn(pg_dsn), check_after_idle=0, min_size=3, acquire_timeout=1.5
    ) as pool:
        await pool.wait_ready()
        fault_proxy.freeze()
        with anyio.fail_after(5), pytest.raises(PoolTimeoutError):
            async with pool.acquire():
                raise AssertionError("entered")
        assert pool.statistics().acquire_timeouts == 1
        fault_proxy.thaw()
        await kit.eventually(lambda: kit.held(pool)[1:] == (0, 0))


async def test_what_has_rested_longer_than_a_silent_one_is_not_asked(
    pg_dsn, fault_proxy, kit, monkeypatch
):
    """A firewall that has forgotten them all costs an acquire one question, not one for each."""
    monkeypatch.setattr("pgstructured.pool._lender._CHECK_TIMEOUT", 0.2)
    async with open_pool(fault_proxy.dsn(pg_dsn), check_after_idle=0, min_size=4) as pool:
        await pool.wait_ready()
        before = [member.conn for member in pool._lender.ledger.idle]
        fault_proxy.freeze()
        async with anyio.create_task_group() as tasks:

            async def acquire():
                async with pool.acquire() as conn:
                    assert await kit.fetch(conn, "SELECT 1") == 1

            tasks.start_soon(acquire)
            await kit.eventually(lambda: pool.statistics().closed_broken == 4)
            fault_proxy.thaw()
        states = [conn.state for conn in before]
        assert states == [*[ConnectionState.CLOSED] * 3, ConnectionState.FAILED]


async def test_getting_ready_while_one_is_asked(pg_dsn, fault_proxy, kit):
    """Who waits for connections sees the one that another task was asking."""
    async with open_pool(
        fault_proxy.dsn(pg_dsn), check_after_idle=0, min_size=1, max_size=1
    ) as pool:
        await pool.wait_ready()
        fault_proxy.freeze("down")
        async with anyio.create_task_group() as tasks:

            async def borrow():
                async with pool.acquire():
                    pass

            tasks.start_soon(borrow)
            await kit.eventually(lambda: pool.statistics().idle == 0)
            with anyio.fail_after(kit.soon):
                async with anyio.create_task_group() as others:
                    others.start_soon(pool.wait_ready)
                    others.start_soon(pool.wait_ready)
                    await anyio.wait_all_tasks_blocked()
                    fault_proxy.thaw()


async def test_getting_ready_while_one_is_closed(pg_dsn, fault_proxy, kit):
    """A connection that is on its way out makes room, and who waits for one is told."""
    async with open_pool(fault_proxy.dsn(pg_dsn), max_size=1) as pool:
        async with anyio.create_task_group() as tasks:

            async def borrow():
                async with pool.acquire() as conn:
                    tasks.start_soon(keep_using, conn)
                    await kit.eventually(lambda: conn.info.transaction_status.name == "ACTIVE")
                    fault_proxy.freeze()

            async def keep_using(conn):
                with pytest.raises(psycopg.Error):
                    await conn.execute("SELECT pg_sleep(60)")

            tasks.start_soon(borrow)
            await kit.eventually(
                lambda: kit.held(pool)[:2] == (1, 0) and pool.statistics().acquired
            )
            fault_proxy.thaw()
            with anyio.fail_after(kit.soon):
                await pool.wait_ready()


async def test_getting_ready_where_nothing_rests(pg_dsn, kit):
    async with open_pool(pg_dsn, max_idle=0) as pool:
        with anyio.fail_after(kit.soon):
            await pool.wait_ready()
        assert pool.statistics().opened == 1
        assert pool.statistics().size == 0


async def test_an_outage_that_nobody_has_looked_at_since_is_none(pg_dsn, fault_proxy, kit):
    """One failed attempt, beside a connection that lives: the pool sees for itself."""
    async with open_pool(fault_proxy.dsn(pg_dsn), reconnect_timeout=60) as pool:

        async def hold(*, task_status):
            async with pool.acquire() as conn:
                task_status.started(conn)
                await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            await tasks.start(hold)
            fault_proxy.refuse()
            await kit.fail_to_connect(pool)
            fault_proxy.accept()
            await kit.eventually(lambda: pool._lender.opener.failing_since is None)
            assert pool.statistics().in_use == 1
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize("hook", ["on_connect", "on_acquire"])
async def test_a_hook_that_hangs_is_part_of_the_acquire(pg_dsn, kit, hook):
    async def hang(_):
        await anyio.sleep_forever()

    options: dict[str, Any] = {hook: hang}
    async with open_pool(pg_dsn, acquire_timeout=2, **options) as pool:
        with (
            anyio.fail_after(kit.soon),
            pytest.raises(PoolTimeoutError, match=f"{hook} has not ended"),
        ):
            async with pool.acquire():
                raise AssertionError("entered")
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().acquire_timeouts == 1


async def test_an_attempt_is_bounded_with_its_hook(pg_dsn, kit):
    """Also where nobody waits for it: what hangs is tried again."""
    calls = []

    async def hang_at_first(_):
        calls.append(1)
        if len(calls) == 1:
            await anyio.sleep_forever()

    async with open_pool(pg_dsn, min_size=1, connect_timeout=2, on_connect=hang_at_first) as pool:
        with anyio.fail_after(kit.soon):
            await pool.wait_ready()
        assert pool.statistics().connect_errors >= 1


async def test_a_pool_that_closes_under_on_acquire(pg_dsn, kit):
    told = []

    async def hang(conn):
        await conn.execute("SELECT pg_sleep(60)")

    async def use(pool):
        with pytest.raises(PoolClosedError):
            async with pool.acquire():
                raise AssertionError("entered")
        told.append(1)

    with anyio.fail_after(kit.soon):
        async with anyio.create_task_group() as tasks:
            async with open_pool(pg_dsn, close_timeout=0.1, on_acquire=hang) as pool:
                tasks.start_soon(use, pool)
                await kit.eventually(lambda: pool.statistics().in_use == 1)
    assert told


async def test_closing_while_something_is_cleaned_up(pg_dsn, fault_proxy, kit):
    """On a silent server: leaving takes what it may, not what the clean-up may."""
    left = []

    async def use(pool):
        async with pool.acquire() as conn:
            await conn.execute("BEGIN")
            fault_proxy.freeze()
        left.append(1)

    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(20):
            async with open_pool(
                fault_proxy.dsn(pg_dsn), close_timeout=0.1, cancel_timeout=60
            ) as pool:
                tasks.start_soon(use, pool)
                await kit.eventually(lambda: pool.statistics().in_use == 1)
        fault_proxy.thaw()
        with anyio.move_on_after(5):
            await kit.eventually(lambda: left)
        tasks.cancel_scope.cancel()
    assert kit.held(pool) == (0, 0, 0)


async def test_entered_by_a_task_that_ends(pg_dsn, kit):
    """As `asyncio.wait_for` does before 3.12: another task may have its number one day."""
    async with open_pool(pg_dsn) as pool:
        loan = pool.acquire()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(loan.__aenter__)
        for _ in range(50):

            async def borrow():
                async with pool.acquire():
                    pass

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(borrow)
        await loan.__aexit__(None, None, None)
        assert kit.held(pool) == (0, 0, 0)
