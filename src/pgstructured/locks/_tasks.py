"""Which keys each task holds: what it would wait for in vain.

Every conninfo lock is a session of its own, and so Postgres would let a task wait for
a lock that the task itself holds on another one, for ever: that is no deadlock to the
server. It is known here. The identity of a key is the run of the server, the database
and the numbers (see `_statements`): the same lock by whatever address it was reached.

A task that asks for what it holds is refused only after the server has: what the
server grants (shared over shared; again on the same session) is granted. Shared over
shared is not granted where another session waits for the lock exclusively, who in turn
waits for this task.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from pgstructured.driver import current_task_id

if TYPE_CHECKING:
    from collections.abc import Generator

    from ._keys import LockKey


class KnowingSource(Protocol):
    """A source that knows by itself which task holds what."""

    def sessions_of(self, task_id: int, identity: str, key: LockKey) -> list[int]:
        """Return the sessions on which a task holds a key."""
        ...


_holdings: Final[dict[tuple[int, str, LockKey], list[int]]] = {}
"""By task, lock table and key: the sessions on which the task holds it."""
_sources: Final[dict[int, KnowingSource]] = {}
"""Those that have to be asked, by their `id`."""


@contextmanager
def asked(source: KnowingSource) -> Generator[None]:
    """Ask ``source`` too, for the length of a block."""
    _sources[id(source)] = source
    try:
        yield
    finally:
        del _sources[id(source)]


def add_holding(task_id: int, identity: str, key: LockKey, backend_pid: int) -> None:
    """Take note that a task holds ``key``, until `remove_holding`."""
    _holdings.setdefault((task_id, identity, key), []).append(backend_pid)


def remove_holding(task_id: int, identity: str, key: LockKey, backend_pid: int) -> None:
    """Take note that it holds it no more."""
    entry = (task_id, identity, key)
    pids = _holdings[entry]
    pids.remove(backend_pid)
    if not pids:
        del _holdings[entry]


def holds_elsewhere(identity: str, key: LockKey, backend_pid: int) -> bool:
    """Tell whether the current task holds ``key`` on another session than this one."""
    task_id = current_task_id()
    pids = list(_holdings.get((task_id, identity, key), ()))
    for source in tuple(_sources.values()):  # other threads have event loops, too
        pids += source.sessions_of(task_id, identity, key)
    return any(pid != backend_pid for pid in pids)
