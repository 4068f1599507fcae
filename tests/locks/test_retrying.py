"""Sessions that can't be had: tried again for as long as the caller said, or refused for good."""

from __future__ import annotations

import anyio
import psycopg
import pytest

from pgstructured import Backoff
from pgstructured.errors import LockCapacityError
from pgstructured.locks import open_locks, pg_lock
from pgstructured.testing import Cluster

from .conftest import wait_until

SOON = 20  # seconds that nothing here takes on any machine


async def test_no_wait_between_attempts_outlasts_the_time_there_is(pg_dsn, fault_proxy):
    """A long one would have been the end of the acquire, long before its time was over."""
    patient = Backoff(initial=3600, maximum=3600)
    async with open_locks(fault_proxy.dsn(pg_dsn), backoff=patient) as locks:
        fault_proxy.refuse()
        fault_proxy.reset()
        async with anyio.create_task_group() as tasks:

            async def come_back() -> None:
                await anyio.sleep(0.3)
                fault_proxy.accept()

            tasks.start_soon(come_back)
            async with locks.lock(1, acquire_timeout=4) as lock:
                lock.assert_held()


async def test_no_room_in_the_lock_table_for_a_session():
    settings = {"max_connections": "10", "max_locks_per_transaction": "10"}
    with Cluster(settings=settings) as cluster:
        dsn = cluster.dsn()
        with psycopg.connect(dsn, autocommit=True) as full:
            with pytest.raises(psycopg.errors.OutOfMemory):
                for key in range(10**6):
                    full.execute("SELECT pg_advisory_lock(%s)", [key])
            for block in (
                open_locks(dsn),
                pg_lock(dsn, -1),
                pg_lock(dsn, -1, acquire_timeout=SOON),
                pg_lock(dsn, -1, acquire_timeout=0),
            ):
                with pytest.raises(LockCapacityError, match="max_locks_per_trans") as caught:
                    async with block:
                        raise AssertionError("full")
                assert isinstance(caught.value.__cause__, psycopg.OperationalError)
            full.execute("SELECT pg_advisory_unlock_all()")
        async with pg_lock(dsn, -1, acquire_timeout=SOON):
            pass


async def test_no_room_for_who_watches_an_election():
    """Room may come, so that is waited for, as for a primary during a failover."""
    settings = {"max_connections": "10", "max_locks_per_transaction": "10"}
    with Cluster(settings=settings) as cluster:
        with psycopg.connect(cluster.dsn(), autocommit=True) as full:
            async with open_locks(cluster.dsn()) as locks:
                election = locks.election(-1, candidate="a")
                async with election.observe() as leaders:
                    assert await leaders.receive() is None
                    lanes = locks._fleet.lanes
                    await wait_until(lambda: len(lanes) == 2)  # one of them to hear of news
                    with pytest.raises(psycopg.errors.OutOfMemory):
                        for key in range(10**6):
                            full.execute("SELECT pg_advisory_lock(%s)", [key])
                    for lane in tuple(lanes):
                        full.execute("SELECT pg_terminate_backend(%s)", [lane.backend_pid])
                        await lane.session.wait_closed()
                    with pytest.raises(psycopg.OperationalError, match="shared memory"):
                        await election.leader()
                    with anyio.move_on_after(1.5) as scope:
                        await leaders.receive()
                    assert scope.cancelled_caught
                    full.execute("SELECT pg_advisory_unlock_all()")
                    with anyio.fail_after(SOON):
                        async with election.campaign():
                            assert await leaders.receive() == "a"
