"""What a test has left behind."""

from __future__ import annotations

import functools
import gc
import threading
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from ._databases import Databases

_SERVER_GRACE = 10.0
_TASK_GRACE = 5.0
_POLL_INTERVAL = 0.01
_LEFT_ON_SERVER = """
select concat('session ', pid, ' (', application_name, '): ', state, ', ', query)
  from pg_stat_activity
  where datname = %(name)s and backend_type = 'client backend' and pid <> pg_backend_pid()
union all
select concat('advisory lock ', l.classid, ', ', l.objid, ' of session ', l.pid)
  from pg_locks l join pg_database d on d.oid = l.database
  where l.locktype = 'advisory' and d.datname = %(name)s
union all
select concat('prepared transaction ', gid) from pg_prepared_xacts where database = %(name)s
"""


def server_leaks(databases: Databases, database: str, *, grace: float = _SERVER_GRACE) -> list[str]:
    """Return sessions, advisory locks and prepared transactions that are left in a database.

    Args:
        databases: those of the server.
        database: its name.
        grace: seconds to wait for them to go; sessions end a moment after their clients.
    """
    deadline = time.monotonic() + grace
    while True:
        rows = databases.execute(_LEFT_ON_SERVER, {"name": database})
        if not rows or time.monotonic() >= deadline:
            return [str(text) for (text,) in rows]
        time.sleep(_POLL_INTERVAL)


def thread_leaks() -> list[str]:
    """Return this library's threads that run."""
    names = (thread.name for thread in threading.enumerate())
    return [f"thread {name}" for name in names if name.startswith("pgstructured")]


@contextmanager
def younger_garbage_only() -> Generator[None]:
    """Let the garbage collector look only at what is made in the block.

    To look at a whole test run's objects after each test costs more than most tests do.
    """
    if gc.get_freeze_count():  # somebody's own idea, and not to be undone
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def resource_leaks() -> list[str]:
    """Return what was never closed, as the garbage collector finds it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        gc.collect()
    found: list[str] = []
    for warning in caught:
        if issubclass(warning.category, ResourceWarning):
            found.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return found


def fail_on_left_tasks(test: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap an async test so that it fails where a task outlives it.

    Tasks that were there before are not the test's.
    """

    @functools.wraps(test)
    async def checked(**arguments: Any) -> Any:
        before = {task.id for task in anyio.get_running_tasks()}
        result = await test(**arguments)
        deadline = time.monotonic() + _TASK_GRACE
        while left := [task for task in anyio.get_running_tasks() if task.id not in before]:
            if time.monotonic() >= deadline:
                raise AssertionError(f"tasks left by the test: {left}")
            await anyio.lowlevel.checkpoint()
            time.sleep(0.001)  # noqa: ASYNC251 - the loop's time may be virtual and stand still
        return result

    return checked
