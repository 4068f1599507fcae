"""`RWLock`: many readers or one writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from pgstructured._util import NoPublicConstructor

from ._held import HeldLock, check_ttl
from ._opening import never_none, new_request, open_held

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from ._grip import LockRequest, LockSource
    from ._keys import LockKey


@final
class RWLock(metaclass=NoPublicConstructor):
    """A lock that many may hold to read, or one to write; made by `Locks.rwlock`.

    It is the lock of its key: who takes that by `Locks.lock`, shared or not, is one of its
    readers or its writer. A reader that comes after a waiting writer waits for it, so
    neither starves.

    A reader can't become a writer: two that wanted to would wait for each other. To write,
    leave the block of `read`, and enter that of `write`.
    """

    def __init__(self, source: LockSource, key: LockKey) -> None:
        self._source = source
        self._key = key

    def __repr__(self) -> str:
        return f"<RWLock {self._key}>"

    @property
    def key(self) -> LockKey:
        """The key, as Postgres sees it."""
        return self._key

    def read(
        self, *, acquire_timeout: float | None = None, ttl: float | None = None
    ) -> AbstractAsyncContextManager[HeldLock]:
        """Run a block beside other readers, and no writer.

        Args:
            acquire_timeout: Seconds to wait for it; None for as long as it takes, 0 for one try.
            ttl: Seconds after which it is lost, unless `HeldLock.refresh` is called in time.

        Raises:
            LockAlreadyHeldError: if this task writes. Reading twice counts.
            PgStructuredError: as `Locks.lock`.
            psycopg.Error: what the server says.

        Cancellation:
            As `Locks.lock`.
        """
        return self._open(new_request(self._key, shared=True, acquire_timeout=acquire_timeout), ttl)

    def write(
        self,
        *,
        acquire_timeout: float | None = None,
        ttl: float | None = None,
        fenced: bool = False,
    ) -> AbstractAsyncContextManager[HeldLock]:
        """Run a block alone.

        Args:
            acquire_timeout: As for `read`.
            ttl: As for `read`.
            fenced: Give it a `HeldLock.fencing_token`.

        Raises:
            LockAlreadyHeldError: if this task reads, or writes already.
            PgStructuredError: as `Locks.lock`.
            psycopg.Error: what the server says.

        Cancellation:
            As `Locks.lock`.
        """
        return self._open(
            new_request(self._key, acquire_timeout=acquire_timeout, fenced=fenced), ttl
        )

    def _open(
        self, request: LockRequest, ttl: float | None
    ) -> AbstractAsyncContextManager[HeldLock]:
        check_ttl(ttl)
        return never_none(open_held(self._source, request, HeldLock, ttl=ttl))
