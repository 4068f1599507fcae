"""Cancellation at every await: nothing is lost, nothing thrown away needlessly."""

from __future__ import annotations

import random
from typing import Any

import anyio
import psycopg
import pytest

from pgstructured.errors import PoolClosedError
from pgstructured.pool import open_pool
from pgstructured.pool._waiters import Grant
from pgstructured.testing import assert_cancellable


async def test_a_pending_cancellation_is_noticed(way, kit):
    async with open_pool(way.dsn, **way.options) as pool:

        async def acquire():
            async with pool.acquire():
                raise AssertionError("entered")

        async def pin():
            async with pool.pin(), pool.acquire():
                raise AssertionError("entered")

        for use in (acquire, pin):
            await assert_cancellable(use)
            assert kit.held(pool) == (0, 0, 0)
            async with pool.acquire():
                pass
            await assert_cancellable(use)
            assert kit.held(pool) == (0, 0, 0)
        async with pool.pin():
            await assert_cancellable(acquire)
        assert pool.statistics().opened == 1


@pytest.mark.parametrize("use", ["acquire", "pin", "transaction", "traces", "check", "full"])
async def test_cancelled_at_every_await(way, kit, use):
    """Of borrowing, of the body, of giving back: what there is afterwards is as before."""
    options = {**way.options, "check_after_idle": 0 if use == "check" else None}

    async def borrow(pool):
        style = use if use in {"pin", "transaction"} else "acquire"
        async with getattr(pool, style)() as conn:
            await conn.execute("SELECT 1")
            if use == "traces":
                await conn.execute("BEGIN")
                await conn.execute("LISTEN something")

    async def hold(pool, *, task_status):
        async with pool.acquire() as conn:
            task_status.started()
            await conn.execute("SELECT pg_sleep(0.01)")

    number = 0
    is_over = False
    while not is_over:
        assert number < 100
        async with open_pool(way.dsn, max_size=1, **options) as pool:
            with anyio.fail_after(kit.soon):
                async with anyio.create_task_group() as tasks:
                    if use in {"full", "check"}:
                        await tasks.start(hold, pool)
                    if use == "check":
                        await kit.eventually(lambda p=pool: p.statistics().idle == 1)
                    with anyio.CancelScope() as scope:
                        await kit.cancel_at(borrow(pool), scope, number)
            is_over = not scope.cancel_called
            assert kit.held(pool) == (0, 0, 0)
            async with pool.acquire() as conn:
                assert conn.info.transaction_status.name == "IDLE"
                assert await kit.fetch(conn, "SELECT 1") == 1
            # Cancelled while it connected, or the connection is as good as before.
            told = pool.statistics()
            assert told.closed_broken == 0
            assert told.opened == told.size == 1
        number += 1
    assert number > 1


async def test_a_cancelled_wait_gives_up_its_place(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=1) as pool:
        order = []

        async def wait(index, scope):
            with scope:
                async with pool.acquire():
                    order.append(index)

        scopes = [anyio.CancelScope() for _ in range(3)]
        async with anyio.create_task_group() as tasks, pool.acquire():
            for index, scope in enumerate(scopes):
                tasks.start_soon(wait, index, scope)
                await kit.eventually(lambda n=index: pool.statistics().tasks_waiting == n + 1)
            scopes[1].cancel()
            await kit.eventually(lambda: pool.statistics().tasks_waiting == 2)
        assert order == [0, 2]
        assert pool.statistics().acquire_cancelled == 1


def two_in_line(pool, scope):
    """Return the order in which two tasks acquire, and what they run; the first in ``scope``."""
    order: list[str] = []

    async def first():
        with scope:
            async with pool.acquire():
                order.append("first")

    async def second():
        async with pool.acquire():
            order.append("second")

    return order, first, second


async def test_what_a_cancelled_task_is_given_goes_to_the_next(pg_dsn, kit):
    """Given in the very step of its cancellation."""
    async with open_pool(pg_dsn, max_size=1) as pool:
        scope = anyio.CancelScope()
        order, first, second = two_in_line(pool, scope)

        async with anyio.create_task_group() as tasks:
            async with pool.acquire():
                tasks.start_soon(first)
                await kit.eventually(lambda: pool.statistics().tasks_waiting == 1)
                tasks.start_soon(second)
                await kit.eventually(lambda: pool.statistics().tasks_waiting == 2)
                scope.cancel()
            # Given back with nothing awaited since: the first is in line still.
            assert pool.statistics().tasks_waiting == 1
        assert order == ["second"]
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().opened == 1


async def test_a_slot_that_a_cancelled_task_is_given_goes_to_the_next(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=1) as pool:
        scope = anyio.CancelScope()
        order, first, second = two_in_line(pool, scope)

        async with anyio.create_task_group() as tasks:
            async with pool.acquire() as conn:
                tasks.start_soon(first)
                await kit.eventually(lambda: pool.statistics().tasks_waiting == 1)
                tasks.start_soon(second)
                await kit.eventually(lambda: pool.statistics().tasks_waiting == 2)
                await conn.aclose()
                (waiter, _) = pool._lender.ledger.waiters.line
                scope.cancel()
            assert waiter.grant is Grant.SLOT
        assert order == ["second"]
        assert kit.held(pool) == (0, 0, 0)


async def test_a_cancelled_connect_is_aborted(pg_dsn, fault_proxy, kit):
    async with open_pool(fault_proxy.dsn(pg_dsn), max_size=1) as pool:
        fault_proxy.freeze()
        with anyio.move_on_after(0.1) as scope:
            async with pool.acquire():
                raise AssertionError("entered")
        assert scope.cancelled_caught
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().size == 0
        fault_proxy.thaw()
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, "SELECT 1") == 1


async def test_cancelled_while_it_waits_to_connect_again(pg_dsn, fault_proxy, kit):
    async with open_pool(fault_proxy.dsn(pg_dsn), max_size=1) as pool:
        fault_proxy.refuse()
        await kit.fail_to_connect(pool)
        assert pool.statistics().connect_errors >= 1
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().size == 0


async def test_a_cancelled_check(pg_dsn, fault_proxy, kit, monkeypatch):
    monkeypatch.setattr("pgstructured.driver._pooling._CHECK_SETTLES", 2.4)
    async with open_pool(fault_proxy.dsn(pg_dsn), check_after_idle=0) as pool:
        await pool.wait_ready()
        fault_proxy.delay(0.5)
        with anyio.move_on_after(0.05) as scope:
            async with pool.acquire():
                raise AssertionError("entered")
        assert scope.cancelled_caught
        fault_proxy.delay(0)
        assert pool.statistics().idle == 1
        assert kit.held(pool) == (0, 0, 0)


async def test_a_cancelled_body(way, kit):
    """Its connection is as usable as before; its transaction is over."""
    async with open_pool(way.dsn, max_size=1, **way.options) as pool:
        async with pool.acquire() as conn:
            await conn.execute("CREATE TABLE t (i int)")
        for style in ("acquire", "transaction", "pin"):
            with anyio.move_on_after(0.1) as scope:
                async with getattr(pool, style)() as conn:
                    await conn.execute("INSERT INTO t VALUES (1)")
                    await conn.execute("BEGIN" if style == "acquire" else "SELECT 1")
                    await conn.execute("SELECT pg_sleep(60)")
            assert scope.cancelled_caught
            assert kit.held(pool) == (0, 0, 0)
        told = pool.statistics()
        assert (told.opened, told.closed_broken) == (1, 0)


async def test_a_reset_is_shielded(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=1) as pool:
        with anyio.CancelScope() as scope:
            async with pool.acquire() as conn:
                await conn.execute("LISTEN x")
                await conn.execute("BEGIN")
                scope.cancel()
        async with pool.acquire() as again:
            assert again is conn
            assert await kit.fetch(again, "SELECT count(*) FROM pg_listening_channels()") == 0


async def test_a_reset_is_bounded(pg_dsn, fault_proxy, kit):
    """A server that says nothing keeps nobody: the connection is closed."""
    async with open_pool(fault_proxy.dsn(pg_dsn), max_size=1, cancel_timeout=0.2) as pool:
        with anyio.fail_after(kit.soon):
            async with pool.acquire() as conn:
                await conn.execute("BEGIN")
                fault_proxy.freeze()
        assert conn.closed
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().closed_broken == 1
        fault_proxy.thaw()


async def test_a_cancelled_hook(pg_dsn, kit):
    hanging = anyio.Event()

    async def hook(conn):
        if not hanging.is_set():
            hanging.set()
            await conn.execute("SELECT pg_sleep(60)")

    for which in ("on_connect", "on_acquire"):
        hanging = anyio.Event()
        options: dict[str, Any] = {which: hook}
        async with open_pool(pg_dsn, max_size=1, **options) as pool:
            async with anyio.create_task_group() as tasks:

                async def acquire(pool=pool):
                    async with pool.acquire():
                        raise AssertionError("entered")

                tasks.start_soon(acquire)
                await hanging.wait()
                tasks.cancel_scope.cancel()
            assert kit.held(pool) == (0, 0, 0)
            async with pool.acquire() as conn:
                assert await kit.fetch(conn, "SELECT 1") == 1
            assert pool.statistics().opened == 1


async def test_cancelled_again_and_again(way, kit):
    """Many tasks, cancelled at moments left to chance: every connection is accounted for.

    So many acquires ended well, so many were cancelled; the connections that were made at the
    beginning are those at the end, and no answer went to the wrong query.
    """
    chance = random.Random(5)
    async with open_pool(way.dsn, max_size=4, min_size=4, **way.options) as pool:
        await pool.wait_ready()
        ended = cancelled = 0

        async def work():
            nonlocal ended, cancelled
            for round_ in range(25):
                with anyio.move_on_after(chance.uniform(0, 0.02)) as scope:
                    style = chance.choice(("acquire", "transaction", "pin"))
                    async with getattr(pool, style)() as conn:
                        cursor = await conn.execute(
                            "SELECT %s, pg_sleep(%s)", (round_, chance.uniform(0, 0.01))
                        )
                        assert (await cursor.fetchone())[0] == round_
                    ended += 1
                cancelled += scope.cancelled_caught

        async with anyio.create_task_group() as tasks:
            for _ in range(24):
                tasks.start_soon(work)
        assert ended + cancelled >= 24 * 25
        assert cancelled
        assert kit.held(pool) == (0, 0, 0)
        told = pool.statistics()
        assert (told.opened, told.idle, told.closed_broken) == (4, 4, 0)
        # Whoever has got one was in its body; whoever has got none is counted as cancelled.
        assert told.acquired <= 24 * 25
        await kit.borrow_at_once(pool, 4)
        assert pool.statistics().opened == 4


async def test_cancelled_while_connecting_again_and_again(pg_dsn, pg_cluster, kit):
    chance = random.Random(7)
    async with open_pool(pg_dsn, max_size=3, max_idle=0) as pool:

        async def work():
            for _ in range(15):
                with anyio.move_on_after(chance.uniform(0, 0.03)):
                    async with pool.acquire() as conn:
                        await conn.execute("SELECT 1")

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(work)
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().size == 0
        await kit.eventually(lambda: not pg_cluster.sessions(pg_dsn))


async def test_cancelled_natively(pg_dsn, kit, anyio_backend_name):
    """By asyncio's own cancellation, edge-triggered, as programs without AnyIO use it."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than that of scopes")
    import asyncio

    chance = random.Random(9)
    async with open_pool(pg_dsn, max_size=4, min_size=4) as pool:
        await pool.wait_ready()

        async def use():
            async with pool.acquire() as conn:
                await conn.execute("SELECT pg_sleep(%s)", (chance.uniform(0, 0.01),))

        for _ in range(20):
            tasks = [asyncio.create_task(use()) for _ in range(16)]
            await asyncio.sleep(chance.uniform(0, 0.02))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().closed_broken == 0
        assert pool.statistics().opened == 4


@pytest.mark.parametrize("times", [1, 2])
async def test_cancelled_natively_while_it_is_used_and_left(
    pg_dsn, cancel_at, anyio_backend_name, times
):
    """None is forgotten, also where the pool itself ends an attempt to connect."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than that of scopes")
    import asyncio

    class Itself:
        cancelled = 0

        def cancel(self):
            task = asyncio.current_task()
            self.cancelled += task is not None and task.cancel()

    async def use(number, itself):
        async def run():
            async with open_pool(pg_dsn, min_size=1) as pool:
                await pool.wait_ready()

        running = run()
        for further in range(times):
            running = cancel_at(running, itself, number + further)
        await running

    for number in range(100):
        itself = Itself()
        task = asyncio.ensure_future(use(number, itself))
        with anyio.fail_after(20):
            await asyncio.wait([task])
        assert task.cancelling() == itself.cancelled
        if not itself.cancelled:
            break
        assert task.cancelled()
    assert task.exception() is None
    assert number >= 3


async def test_closed_while_tasks_wait_and_connect(pg_dsn, fault_proxy, kit):
    """Who waits, connects, or is about to connect again is told."""
    outcomes: list[Any] = []

    async def use(pool):
        try:
            async with pool.acquire():
                outcomes.append("entered")
                await anyio.sleep_forever()
        except PoolClosedError:
            outcomes.append("closed")
        except psycopg.OperationalError as exc:
            outcomes.append(exc)

    with anyio.fail_after(kit.soon):
        async with anyio.create_task_group() as tasks:
            async with open_pool(fault_proxy.dsn(pg_dsn), max_size=2, close_timeout=0.1) as pool:
                tasks.start_soon(use, pool)
                await kit.eventually(lambda: outcomes == ["entered"])
                fault_proxy.freeze()
                tasks.start_soon(use, pool)
                tasks.start_soon(use, pool)
                await kit.eventually(lambda: pool.statistics().tasks_waiting == 1)
            assert pool.statistics().idle == 0
            await kit.eventually(lambda: outcomes[1:] == ["closed", "closed"])
            fault_proxy.thaw()
            fault_proxy.refuse()
            async with open_pool(fault_proxy.dsn(pg_dsn), close_timeout=0.1) as other:
                tasks.start_soon(use, other)
                await kit.eventually(lambda: other.statistics().tasks_waiting == 1)
            await kit.eventually(lambda: len(outcomes) == 4)
            tasks.cancel_scope.cancel()
    assert outcomes[3] == "closed"
    assert kit.held(pool) == kit.held(other) == (0, 0, 0)
