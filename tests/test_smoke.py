"""One walk through everything, by the public interface alone.

Runs where not every extra is installed, and from the wheel: nothing but pytest and the
package is needed. ``PGSTRUCTURED_SMOKE=trio`` forbids asyncio to run, and
``PGSTRUCTURED_SMOKE=asyncio`` expects trio not to be there.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os

import anyio
import psycopg
import pytest

from pgstructured import (
    Notification,
    connect,
    open_connection,
    open_notify_bus,
    pg_lock,
    pg_try_lock,
)
from pgstructured.errors import ConnectionLostError, LockLost
from pgstructured.notify import notify

ONLY = os.environ.get("PGSTRUCTURED_SMOKE")
BACKENDS = {
    "asyncio": ("asyncio", {"debug": True}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
INSTALLED = [
    name
    for name in BACKENDS
    if importlib.util.find_spec(name) and not (ONLY == "trio" and name != "trio")
]


@pytest.fixture(scope="module", params=INSTALLED)
def anyio_backend(request):
    return BACKENDS[request.param]


@pytest.fixture(autouse=True)
def no_asyncio_on_trio(anyio_backend, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("an asyncio event loop was made")

    if anyio_backend[0] == "trio":
        monkeypatch.setattr(asyncio.BaseEventLoop, "__init__", refuse)
        monkeypatch.setattr(asyncio, "new_event_loop", refuse)


def test_what_is_installed_is_what_was_asked_for():
    assert INSTALLED
    assert set(INSTALLED) <= ({ONLY} if ONLY else set(BACKENDS))


async def test_a_connection_speaks_and_dies_with_a_reason(pg_dsn):
    async with open_connection(pg_dsn) as connection:
        pid = connection.info.backend_pid
        async with await connect(pg_dsn) as other:
            await other.execute("select pg_terminate_backend(%s)", [pid])
        with anyio.fail_after(5):
            await connection.wait_closed()
        with pytest.raises(ConnectionLostError) as caught:
            await connection.execute("select 1")
    assert isinstance(caught.value.__cause__, psycopg.errors.AdminShutdown)


async def test_a_cancelled_statement_leaves_a_usable_connection(pg_dsn):
    async with open_connection(pg_dsn) as connection:
        with anyio.move_on_after(0.05):
            await connection.execute("select pg_sleep(60)")
        cursor = await connection.execute("select 42")
        assert await cursor.fetchone() == (42,)


async def test_a_lock_is_held_by_one_and_lost_out_loud(pg_dsn):
    async def cut(pid):
        async with await connect(pg_dsn) as connection:
            await connection.execute("select pg_terminate_backend(%s)", [pid])

    async def try_in_vain():
        async with pg_try_lock(pg_dsn, "smoke") as second:
            assert second is None

    with pytest.raises(LockLost) as caught:
        async with pg_lock(pg_dsn, "smoke") as lock:
            async with anyio.create_task_group() as tasks:  # for a task that holds nothing yet
                tasks.start_soon(try_in_vain)
            await cut(lock.backend_pid)
            with anyio.fail_after(5):
                await anyio.sleep_forever()
    assert caught.value.reason == "terminated"


async def test_a_notification_arrives(pg_dsn):
    async with (
        open_notify_bus(pg_dsn) as bus,
        bus.subscribe("smoke") as subscription,
        open_connection(pg_dsn) as connection,
    ):
        await notify(connection, "smoke", "hello")
        with anyio.fail_after(5):
            notification = await subscription.receive()
    assert isinstance(notification, Notification)
    assert (notification.payload, notification.generation) == ("hello", 1)
