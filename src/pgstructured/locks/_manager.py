"""`open_locks` and `Locks`: many locks on few sessions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias, final
from weakref import WeakValueDictionary

import psycopg

from pgstructured._util import Backoff, NoPublicConstructor, create, open_background
from pgstructured.pool import Pool, session_conninfo, session_pooler

from ._bell import Bell
from ._candidacies import Candidacies
from ._election import Election, check_candidate
from ._fencing import DEFAULT_TABLE
from ._fleet import Fleet
from ._grip import LockRequest
from ._held import HeldLock
from ._keys import LockKey, as_lock_key
from ._looking import fetch_holders, fetch_waiters, is_locked, terminate_holders
from ._managed import ManagedSource
from ._opening import never_none, new_request, open_held, open_held_many
from ._options import LockOptions
from ._refusals import session_required
from ._retrying import Retries
from ._rwlock import RWLock
from ._semaphore import Semaphore
from ._slots import Slots
from ._tasks import asked
from ._waits import settle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable
    from contextlib import AbstractAsyncContextManager

    from pgstructured.driver import Conninfo, Pooler, Session

    from ._keys import LockKeyLike
    from ._looking import LockHolder

_CACHED_KEYS = 4096
_ANY_KEY = LockKey.bigint(0)


KeyScheme: TypeAlias = Callable[..., LockKey]
"""Makes a key from a name: ``key_scheme(name)``, or with a ``namespace=``."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LocksStatistics:
    """What a `Locks` has and has done, see `Locks.statistics`."""

    sessions: int
    """Server sessions that are open now."""
    waiting_sessions: int
    """How many of them stand in a queue of the server."""
    held: int
    """Locks that are held on the server now; shared by tasks of this process, one."""
    tasks_waiting: int
    """Tasks that want a lock and don't have it yet."""
    acquired: int
    """Grants, ever."""
    contended: int
    """Acquires, ever, for which the server had to be waited for."""
    released: int
    """Locks and shares of locks that were let go, ever."""
    sessions_opened: int
    """Sessions that were opened, ever."""
    sessions_lost: int
    """Sessions, ever, that have failed."""


@final
class Locks(metaclass=NoPublicConstructor):
    """Locks of one process in one database; made by `open_locks`."""

    def __init__(
        self,
        fleet: Fleet,
        source: ManagedSource,
        make_named: Callable[[str], LockKey],
        options: LockOptions,
        *,
        bell: Bell,
        candidacies: Candidacies,
    ) -> None:
        self._bell = bell
        self._candidacies = candidacies
        self._slots: WeakValueDictionary[LockKey, Slots] = WeakValueDictionary()
        self._fleet = fleet
        self._source = source
        self._options = options
        self._make_named = lru_cache(maxsize=_CACHED_KEYS)(make_named)

    def __repr__(self) -> str:
        return f"<Locks {len(self._fleet.lanes)} sessions, {self._source.held} held>"

    def key(self, key: LockKeyLike) -> LockKey:
        """Return the key that ``key`` stands for here, by this object's scheme and namespace.

        Raises:
            LockKeyError: if it is empty or out of range.
        """
        if type(key) is str and key:  # the way of most
            return self._make_named(key)
        return as_lock_key(key, self._make_named)

    # ------------------------------------------------------------ taking

    def lock(
        self,
        key: LockKeyLike,
        *,
        shared: bool = False,
        acquire_timeout: float | None = None,
        ttl: float | None = None,
        fenced: bool = False,
    ) -> AbstractAsyncContextManager[HeldLock]:
        """Run a block under a lock, waiting for it first; see `pg_lock`.

        Its session is shared with other locks. Any number of tasks that wait for one key
        cost one session, and are served first come first served.

        Args:
            key: What to lock.
            shared: Let others hold it too, shared.
            acquire_timeout: Seconds to wait for it; None for as long as it takes, 0 for one try.
            ttl: Seconds after which it is lost, unless `HeldLock.refresh` is called in time.
            fenced: Give it a `HeldLock.fencing_token`.

        Raises:
            PgStructuredError: as `pg_lock`.
            FenceTableMissingError: if ``fenced`` and there is no table.
            psycopg.Error: what the server says.
            anyio.ClosedResourceError: if this object is closed.

        Cancellation:
            As `pg_lock`.
        """
        request = new_request(
            self.key(key), shared=shared, acquire_timeout=acquire_timeout, fenced=fenced
        )
        return never_none(open_held(self._source, request, HeldLock, ttl=ttl))

    def try_lock(
        self,
        key: LockKeyLike,
        *,
        shared: bool = False,
        ttl: float | None = None,
        fenced: bool = False,
    ) -> AbstractAsyncContextManager[HeldLock | None]:
        """Run a block under a lock if it is free, else with None; see `pg_try_lock`.

        Args:
            key: What to lock.
            shared: Let others hold it too, shared.
            ttl: As for `lock`.
            fenced: As for `lock`.

        Raises:
            PgStructuredError: as `lock`, but no `LockTimeout`.
            psycopg.Error: what the server says.

        Cancellation:
            As `pg_lock`.
        """
        request = new_request(self.key(key), shared=shared, is_try=True, fenced=fenced)
        return open_held(self._source, request, HeldLock, ttl=ttl)

    def lock_many(
        self,
        keys: Iterable[LockKeyLike],
        *,
        shared: bool = False,
        acquire_timeout: float | None = None,
        fenced: bool = False,
    ) -> AbstractAsyncContextManager[tuple[HeldLock, ...]]:
        """Run a block under several locks, all or none.

        They are taken in one order, the same for everybody, so that those who take theirs by
        this method don't wait for each other in a circle. Equal keys are one lock.

        Args:
            keys: What to lock.
            shared: Let others hold them too, shared.
            acquire_timeout: Seconds for all of them together; None for as long as it takes,
                0 for one try.
            fenced: Give each a `HeldLock.fencing_token`.

        Returns:
            A context manager that gives the locks, in the order of the keys.

        Raises:
            PgStructuredError: as `lock`; then none is held.

        Cancellation:
            As `pg_lock`.
        """
        if isinstance(keys, str):
            raise TypeError(f"keys must be several, as in [{keys!r}], not a str")
        request = partial(
            new_request, shared=shared, acquire_timeout=acquire_timeout, fenced=fenced
        )
        request(_ANY_KEY)  # what is wrong with the figures is said for no keys, too
        wanted = tuple(dict.fromkeys(self.key(key) for key in keys))
        requests = {key: request(key) for key in sorted(wanted, key=_order)}
        return self._open_many(wanted, requests, acquire_timeout)

    @asynccontextmanager
    async def _open_many(
        self,
        wanted: tuple[LockKey, ...],
        requests: dict[LockKey, LockRequest],
        acquire_timeout: float | None,
    ) -> AsyncGenerator[tuple[HeldLock, ...]]:
        async with open_held_many(
            self._source, tuple(requests.values()), acquire_timeout=acquire_timeout
        ) as locks:
            by_key = {lock.key: lock for lock in locks}
            yield tuple(by_key[key] for key in wanted)

    # ------------------------------------------------------------ recipes

    def rwlock(self, key: LockKeyLike) -> RWLock:
        """Return the lock of ``key`` as one that many may read under, or one may write.

        Raises:
            LockKeyError: if the key is empty or out of range.
        """
        return create(RWLock, self._source, self.key(key))

    def semaphore(self, key: LockKeyLike, limit: int) -> Semaphore:
        """Return a lock that so many may hold.

        Args:
            key: What it is called; locking the same key by `lock` is something else.
            limit: How many may hold it. Every process has to say the same.

        Raises:
            LockKeyError: if the key is empty or out of range.
            ValueError: if ``limit`` is no integer of at least 1.
        """
        _check_limit(limit)
        found = self.key(key)
        slots = self._slots.get(found)
        if slots is None:
            slots = Slots(found, self._source, self._fleet, self._bell, self._options)
            self._slots[found] = slots
        return create(Semaphore, slots, found, limit)

    def election(self, key: LockKeyLike, *, candidate: str) -> Election:
        """Return an election, to stand in it or to watch it.

        Args:
            key: What it is called; the leader holds its lock.
            candidate: Who stands here: 1 to 40 printable ASCII characters, which the server
                shows as the ``application_name`` of the candidate's session.

        Raises:
            LockKeyError: if the key is empty or out of range.
            ValueError: if the candidate's name is empty, too long or not printable.
        """
        name = check_candidate(candidate)
        return create(Election, self._candidacies, self.key(key), name)

    # ------------------------------------------------------------ looking

    async def holders(self, key: LockKeyLike | None = None) -> list[LockHolder]:
        """Return who holds ``key``, or any advisory lock of this database.

        Raises:
            psycopg.Error: what the server says, or why connecting failed.
            anyio.ClosedResourceError: if this object is closed.

        Cancellation:
            A checkpoint; nothing is left behind.
        """
        async with self._reserve_whole() as session:
            return await fetch_holders(session, self._find_key(key), known=self._known())

    async def waiters(self, key: LockKeyLike | None = None) -> list[LockHolder]:
        """Return who stands in the server's queue for ``key``, or for any; as `holders`.

        Cancellation:
            As `holders`.
        """
        async with self._reserve_whole() as session:
            return await fetch_waiters(session, self._find_key(key), known=self._known())

    async def is_locked(self, key: LockKeyLike) -> bool:
        """Return whether anybody holds ``key``; as `holders`.

        Cancellation:
            As `holders`.
        """
        async with self._reserve_whole() as session:
            return await is_locked(session, self.key(key))

    async def force_release(self, key: LockKeyLike) -> int:
        """End the sessions that hold ``key``, and every lock on them.

        Needs the role for it: the holders' own, ``pg_signal_backend``, or a superuser.

        Returns:
            How many sessions were ended.

        Raises:
            psycopg.errors.InsufficientPrivilege: if the role may not.
            psycopg.Error: what the server says.

        Cancellation:
            A checkpoint; what was asked to end may end all the same.
        """
        async with self._reserve_whole() as session:
            return await terminate_holders(session, self.key(key))

    async def ping(self) -> None:
        """Make sure, by a round trip, that the server can be reached.

        Raises:
            psycopg.Error: why not.
            anyio.ClosedResourceError: if this object is closed.

        Cancellation:
            A checkpoint; nothing is left behind.
        """
        async with self._reserve_whole() as session:
            await session.ping()

    async def create_fence_table(self) -> None:
        """Create the table of fencing tokens, if it does not exist.

        Raises:
            psycopg.Error: what the server says.

        Cancellation:
            A checkpoint; the table then exists or not.
        """
        async with self._reserve_whole() as session:
            await self._source.fence.create(session)

    def statistics(self) -> LocksStatistics:
        """Return what this object has and has done."""
        return LocksStatistics(
            sessions=len(self._fleet.lanes),
            waiting_sessions=self._fleet.waiting,
            held=self._source.held,
            tasks_waiting=self._source.tasks_waiting
            + sum(slots.waiting for slots in self._slots.values()),
            acquired=self._source.acquired,
            contended=self._source.contended,
            released=self._source.released,
            sessions_opened=self._fleet.opened,
            sessions_lost=self._fleet.lost,
        )

    # ------------------------------------------------------------ below

    def _find_key(self, key: LockKeyLike | None) -> LockKey | None:
        return None if key is None else self.key(key)

    def _known(self) -> list[LockKey]:
        """Return the keys whose names this process knows for certain."""
        return self._source.keys

    @asynccontextmanager
    async def _reserve_whole(self) -> AsyncGenerator[Session]:
        """Have a session that holds nothing, for the length of a block."""
        lane = await self._fleet.reserve_whole()
        try:
            yield lane.session
        except BaseException as exc:
            await settle(lane, within=self._options.release_timeout)  # noqa: ASYNC102 - shields itself
            if isinstance(exc, psycopg.OperationalError):
                self._fleet.check_open()  # closing cancels what runs on the server
            raise
        finally:
            self._fleet.give_back_whole(lane)


@asynccontextmanager
async def open_locks(
    conninfo: Conninfo | Pool,
    *,
    namespace: str | int = "",
    key_scheme: KeyScheme = LockKey.named,
    heartbeat: float = 5.0,
    lost_after: float = 15.0,
    server_timeout: float = 30.0,
    max_locks_per_session: int = 64,
    max_waiting_sessions: int = 8,
    idle_session_ttl: float = 30.0,
    release_timeout: float = 2.0,
    connect_timeout: float = 10.0,
    pooler: Pooler = "auto",
    backoff: Backoff | None = None,
    fence_table: str = DEFAULT_TABLE,
) -> AsyncGenerator[Locks]:
    """Keep server sessions for locks, for the length of a block.

    One session is connected before the block begins. More are opened when they are needed,
    and given back when they have been idle, but for one.

    Args:
        conninfo: Where to connect, see `Conninfo`; asked anew for every session. Several
            hosts without ``target_session_attrs`` get ``read-write``. A `Pool` stands for its
            ``direct_conninfo``, or for where it connects; no connection of its is used.
        namespace: Keeps equal names of different uses apart; for ``key_scheme``.
        key_scheme: Makes a `LockKey` from a name: ``key_scheme(name, namespace=namespace)``.
            One that knows no namespace takes none.
        heartbeat: Seconds of silence after which a session's server is asked for a sign of
            life.
        lost_after: Seconds without a confirmed sign of life after which a session's locks
            are lost; more than ``heartbeat``.
        server_timeout: Seconds for which the server keeps the locks of a client that has
            vanished; more than ``lost_after``, so that a body is cancelled before anybody else
            can hold its lock.
        max_locks_per_session: Locks that one session may hold: its end is the end of them all.
        max_waiting_sessions: Sessions that may stand in the server's queues, one for each key
            that is waited for. Beyond it the server is asked now and then.
        idle_session_ttl: Seconds after which a session that holds nothing is given back.
        release_timeout: Seconds that an unlock may take, or the end of an acquire that was
            given up.
        connect_timeout: Seconds that connecting may take, attempts that fail included, where
            an acquire has no time limit of its own.
        pooler: What is known about a pooler in between. With "auto" one that is found is
            refused, with "session" taken for one that pools sessions.
        backoff: How long to wait between attempts to connect; at most a second by default.
        fence_table: Where fencing tokens are kept, as ``table`` or ``schema.table``.

    Yields:
        What takes locks.

    Raises:
        SessionRequiredError: behind a transaction pooler.
        NotPrimaryError: on a standby.
        ConninfoError: if the conninfo can't be understood.
        ValueError: if a figure is out of range, or unless
            ``heartbeat < lost_after < server_timeout``.
        psycopg.OperationalError: if connecting fails.

    Cancellation:
        Entering is a checkpoint; a cancelled entry leaves no session behind. Leaving cancels
        the bodies of other tasks that hold locks here (`LockLost`, ``closed``), and is shielded
        for at most about twice ``release_timeout``.
    """
    if isinstance(conninfo, Pool):
        pooler = session_pooler(conninfo, pooler)
        conninfo = session_conninfo(conninfo)
    options = LockOptions(
        heartbeat=heartbeat,
        lost_after=lost_after,
        server_timeout=server_timeout,
        release_timeout=release_timeout,
        connect_timeout=connect_timeout,
        backoff=Backoff(maximum=1.0) if backoff is None else backoff,
        max_locks_per_session=max_locks_per_session,
        max_waiting_sessions=max_waiting_sessions,
        idle_session_ttl=idle_session_ttl,
        application_name=f"pgstructured/locks/{namespace}" if namespace else "pgstructured/locks",
        pooler=pooler,
        fence_table=fence_table,
    )
    make_named = _find_scheme(key_scheme, namespace)
    if pooler == "transaction":
        raise session_required()
    async with open_background() as tasks:
        fleet = Fleet(conninfo, options, tasks)
        bell = Bell(fleet, release_timeout=release_timeout)
        fleet.on_notifications = bell.take
        source = ManagedSource(fleet, bell, options)
        candidacies = Candidacies(conninfo, fleet, bell, options)
        try:
            await _connect_first(fleet, options)
            tasks.start_soon(fleet.run_reaper)
            with asked(source):
                yield create(
                    Locks,
                    fleet,
                    source,
                    make_named,
                    options,
                    bell=bell,
                    candidacies=candidacies,
                )
        finally:
            source.close()
            candidacies.begin_closing()
            try:
                await fleet.close()  # noqa: ASYNC102 - shielded and bounded inside
            finally:  # asyncio's own cancellation heeds no shield
                await candidacies.close()  # noqa: ASYNC102 - ditto


async def _connect_first(fleet: Fleet, options: LockOptions) -> None:
    """Have one session, so that what is wrong is said at once."""
    retries = Retries(options, LockRequest(key=LockKey.bigint(0), shared=False))
    while True:
        try:
            fleet.give_back_whole(await fleet.reserve_whole())
        except psycopg.OperationalError as exc:
            error = exc
        else:
            return
        await retries.back_off(error)


def _find_scheme(scheme: KeyScheme, namespace: str | int) -> Callable[[str], LockKey]:
    """Return what makes a key from a name.

    Raises:
        ValueError: if the scheme knows no namespace and is to have one, or is none.
    """
    if not callable(scheme):
        raise ValueError(  # noqa: TRY004 - as every bad option
            f"key_scheme must make a LockKey from a name, not be {scheme!r}"
        )
    if inspect.iscoroutinefunction(scheme):
        raise ValueError("key_scheme must not be asynchronous; make such keys beforehand")
    if namespace == "":
        return scheme
    parameters = inspect.signature(scheme).parameters.values()
    if not any(p.name == "namespace" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"key_scheme {scheme!r} knows no namespace; leave namespace empty")
    try:
        scheme("x", namespace=namespace)  # what is wrong with it is said at once
    except (AttributeError, TypeError, ValueError) as exc:
        raise ValueError(f"namespace {namespace!r} does not suit key_scheme: {exc}") from exc
    return partial(scheme, namespace=namespace)


def _check_limit(limit: object) -> None:
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"limit must be an integer of at least 1, not {limit!r}")


def _order(key: LockKey) -> tuple[int, ...]:
    return (2, *key.as_pair) if key.as_pair is not None else (1, key.as_bigint or 0)
