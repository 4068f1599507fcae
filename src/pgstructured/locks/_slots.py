"""The slots of a semaphore: who may try them, and in which order.

A semaphore of N is N locks, its *slots*, and one more, its *turnstile*. Whoever wants a
slot and finds none free takes the turnstile, waiting in line for it, and keeps it until
there is a slot. So one waiter looks for slots, the one that has waited longest, and the
others stand in the turnstile's queue: the process' own, and the server's.

==================  ============================================  ====================
a task              if                                            then
==================  ============================================  ====================
is in line          others of this process were here before       waits for its turn
passes              nobody has the turnstile, or waits for it     tries all slots
stands at the       it was refused                                tries all slots, and
turnstile                                                         again when one is let
                                                                  go, or time has passed
==================  ============================================  ====================

Only one task of a `Locks` tries at a time: a session that holds a slot would be granted
the same slot again. Slots that this `Locks` holds are known, and not tried.
"""

from __future__ import annotations

import math
import random
from contextlib import ExitStack
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Final, NamedTuple, final

import anyio
import psycopg

from pgstructured.driver import current_task_id
from pgstructured.errors import ConnectionLostError, LockAlreadyHeldError, LockError, LockTimeout
from pgstructured.observe import emit

from . import _derivations
from ._keys import LockKey
from ._queues import Hold, KeyQueue
from ._refusals import not_in_time, translated
from ._releasing import abandon, unlock
from ._retrying import Retries
from ._statements import first_free_statement, ring_payload, unlock_statement
from ._tasks import holds_elsewhere

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pgstructured.driver import Command

    from ._bell import Bell, Ring
    from ._fleet import Fleet
    from ._grip import LockRequest
    from ._lanes import Lane
    from ._managed import ManagedSource
    from ._options import LockOptions
    from ._queues import Place
    from ._shares import ManagedGrip

_AT_ONCE: Final = 50
"""Slots that one statement tries."""
_POLL: Final = 1.0
"""Seconds after which slots are tried again: who dies in one tells nobody."""
_NO_PID: Final = -1
_CACHED_KEYS: Final = 65_536


class TakenSlot(NamedTuple):
    """A slot that was granted."""

    number: int
    key: LockKey
    grip: ManagedGrip


@final
class Slots:
    """The slots of one semaphore, for the tasks of one `Locks`.

    Args:
        key: The semaphore's own key, which is never locked.
        source: What takes the turnstile, and keeps count of what is held.
        fleet: The sessions.
        bell: What tells that a slot was let go.
        options: Figures.
    """

    def __init__(
        self, key: LockKey, source: ManagedSource, fleet: Fleet, bell: Bell, options: LockOptions
    ) -> None:
        self._key = key
        self._source = source
        self._fleet = fleet
        self._bell = bell
        self._options = options
        self._turnstile = slot_key(key, "turnstile")
        self._slot = _slot_keys(key)
        self._line = KeyQueue(self._turnstile)
        self._is_asking = False
        self._leaving: anyio.Event | None = None
        self._hearing = ExitStack()
        self._heard = 0
        self._ring: Ring | None = None

    @property
    def release_timeout(self) -> float:
        """Seconds an unlock may take."""
        return self._options.release_timeout

    @property
    def waiting(self) -> int:
        """How many tasks want a slot, but for one that is known to want the turnstile."""
        return self._line.waiting - self._is_asking

    async def take(self, limit: int, request: LockRequest) -> TakenSlot:
        """Take one of ``limit`` slots.

        Raises:
            LockTimeout: if none could be had in time.
            LockAlreadyHeldError: if this task holds all of them.
            PgStructuredError: as a lock.
            psycopg.Error: what the server says.
            anyio.ClosedResourceError: if the `Locks` is closed.

        Cancellation:
            A checkpoint. Nothing is left, after ``release_timeout`` at most.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        if all(self._source.holds(key) for key in self._all(limit)):
            raise self._all_are_own(limit)
        retries = Retries(self._options, request)
        if not request.acquire_timeout:
            return await self._take(limit, request, retries)
        with anyio.CancelScope(deadline=retries.deadline):
            return await self._take(limit, request, retries)
        raise not_in_time(request)

    def _all(self, limit: int) -> Iterator[LockKey]:
        return map(self._slot, range(limit))

    # ------------------------------------------------------------ in line

    async def _take(self, limit: int, request: LockRequest, retries: Retries) -> TakenSlot:
        # Shared: a try then waits for the answer that is on its way, and not for a slot.
        place = self._line.enter(current_task_id(), shared=True, is_try=not request.may_wait)
        taken: TakenSlot | None = None
        try:
            await place.wait()
            if place.has_turn:
                taken = await self._pass(place, limit, request, retries)
            else:
                await anyio.lowlevel.checkpoint()
        finally:
            self._line.withdraw(place)
            if self._line.is_idle:
                self._hear_nothing()
        if taken is None:
            raise not_in_time(request)
        return taken

    async def _pass(
        self, place: Place, limit: int, request: LockRequest, retries: Retries
    ) -> TakenSlot | None:
        await self._wait_left()
        taken = await self._try_slots(limit, retries, gate=self._turnstile)
        if taken is not None or not request.may_wait:
            return taken
        self._line.begin_waiting(place)
        self._source.count_contended()
        emit("lock.contended", key=self._key, shared=False)
        while taken is None:
            grip = await self._take_turnstile(request, retries)
            taken = await self._stand(grip, limit, retries)
        return taken

    # ------------------------------------------------------------ at the turnstile

    async def _take_turnstile(self, request: LockRequest, retries: Retries) -> ManagedGrip:
        await self._wait_left()
        limit = request.acquire_timeout
        if limit is not None:  # not 0: that would be one try
            limit = max(retries.deadline - anyio.current_time(), 1e-6)
        wanted = request._replace(key=self._turnstile, acquire_timeout=limit)
        self._is_asking = True
        try:
            grip = await self._source.ask(wanted)
        except LockTimeout as exc:
            raise not_in_time(request) from exc.__cause__
        finally:
            self._is_asking = False
        if grip is None:
            raise AssertionError("only a try gives None")  # pragma: no cover - for the types
        return grip

    async def _stand(self, grip: ManagedGrip, limit: int, retries: Retries) -> TakenSlot | None:
        """Wait for a slot; give None if the turnstile was lost before there was one."""
        taken: TakenSlot | None = None
        standing = anyio.CancelScope()

        def look() -> None:
            if grip.has_ended or grip.now() >= grip.overdue_at:
                standing.cancel()

        grip.watch.add(look, math.inf)
        try:
            with standing:
                ring = self._hear(limit)
                while taken is None:
                    retries.begin()
                    taken = await self._try_slots(limit, retries, gate=None)
                    if taken is None:
                        with anyio.move_on_after(_POLL):
                            await ring.wait()
        finally:
            grip.watch.discard(look)
            # Nobody waits for it: neither a body that may begin, nor one that is cancelled.
            self._leaving = anyio.Event()
            self._fleet.start_soon(self._leave_turnstile, grip, self._leaving)
        return taken

    async def _wait_left(self) -> None:
        """Wait until the turnstile has been left: it would let this `Locks` pass until then."""
        if self._leaving is not None:
            await self._leaving.wait()

    async def _leave_turnstile(self, grip: ManagedGrip, left: anyio.Event) -> None:
        try:
            _, failure = await unlock(grip, self._options.release_timeout)
            if failure is not None and not grip.has_ended:
                await abandon(grip, self._turnstile, failure)
            elif failure is not None:
                grip.forget()
        finally:
            self._leaving = None
            left.set()

    def _hear(self, limit: int) -> Ring:
        """Return what rings when one of the slots is let go, until nobody is in line."""
        if self._ring is None or self._heard < limit:
            self._hear_nothing()
            payloads = [ring_payload(key, "released") for key in self._all(limit)]
            self._ring = self._hearing.enter_context(self._bell.hearing(payloads))
            self._heard = limit
        return self._ring

    def _hear_nothing(self) -> None:
        self._ring = None
        self._hearing.close()

    # ------------------------------------------------------------ asking the server

    async def _try_slots(
        self, limit: int, retries: Retries, *, gate: LockKey | None
    ) -> TakenSlot | None:
        """Take one of the slots if one is free, and nobody has the gate; sessions may die."""
        while True:
            try:
                return await self._try_once(limit, gate)
            except psycopg.OperationalError as exc:
                error = exc
            if isinstance(error, ConnectionLostError):
                retries.begin()  # it was connected until now
            await retries.back_off(error)

    async def _try_once(self, limit: int, gate: LockKey | None) -> TakenSlot | None:
        first = random.randrange(limit)  # noqa: S311 - so that not all try the same one first
        numbers = chain(range(first, limit), range(first))
        free = (n for n in numbers if not self._source.is_in_use(self._slot(n)))
        while some := list(islice(free, _AT_ONCE)):
            taken = await self._try_some(some, limit, gate)
            if taken is not None:
                return taken
        return None

    async def _try_some(
        self, numbers: Sequence[int], limit: int, gate: LockKey | None
    ) -> TakenSlot | None:
        lane = await self._fleet.reserve()
        keys = [self._slot(number) for number in numbers]
        try:
            command = lane.session.send([(first_free_statement(keys, gate=gate), ())])
            try:
                await command.wait()
            except BaseException:
                await self._undo(lane, command, keys)  # noqa: ASYNC102 - shielded and bounded inside
                raise
            with translated(self._key):
                answer = command.result().scalar()
            if answer is None:
                self._check_task(lane, limit)
        except psycopg.Error:
            # Refused is no proof that nothing was granted: what was ends with the session.
            lane.is_doomed = True
            self._fleet.give_back(lane)
            raise
        except (LockError, anyio.ClosedResourceError):
            self._fleet.give_back(lane)
            raise
        if answer is None:
            self._fleet.give_back(lane)
            return None
        key = keys[int(answer)]
        grip = self._source.adopt(Hold(lane, key, shared=False))
        if grip is None:  # a task asks for the slot by its own key just now: it may have it
            await self._undo(lane, command, keys)
            return None
        lane.add_name(key)
        return TakenSlot(numbers[int(answer)], key, grip)

    def _check_task(self, lane: Lane, limit: int) -> None:
        """Refuse a task that would wait for slots that are all its own, by other sources too."""
        if all(holds_elsewhere(lane.identity, key, _NO_PID) for key in self._all(limit)):
            raise self._all_are_own(limit)

    def _all_are_own(self, limit: int) -> LockAlreadyHeldError:
        return LockAlreadyHeldError(
            f"this task holds all {limit} of the semaphore {self._key} already"
        )

    async def _undo(self, lane: Lane, command: Command, keys: Sequence[LockKey]) -> None:
        """Give back what was granted in vain; go on in the background if that is slow.

        Cancellation:
            Shielded, at most ``release_timeout``.
        """
        undone = anyio.Event()

        async def undo() -> None:
            try:
                await command.wait()
                answer = command.result().scalar()
                if answer is not None:
                    await lane.session.execute(unlock_statement(keys[int(answer)], shared=False))
            except (psycopg.Error, anyio.ClosedResourceError):
                lane.is_doomed = True  # what was granted all the same ends with its session
            finally:
                lane.given_up -= 1
                self._fleet.give_back(lane)
                undone.set()

        lane.given_up += 1
        self._fleet.start_soon(undo)
        with anyio.move_on_after(self._options.release_timeout, shield=True):
            await undone.wait()
        if not undone.is_set() and lane.is_given_up:
            with anyio.CancelScope(shield=True):  # doesn't wait for the server
                await lane.session.aclose(close_timeout=0)


def _slot_keys(key: LockKey) -> Callable[[int], LockKey]:
    """Return what makes a slot's key when it is asked for: a limit may be any number."""

    @lru_cache(_CACHED_KEYS)
    def slot(number: int) -> LockKey:
        return slot_key(key, str(number))

    return slot


def slot_key(key: LockKey, part: str) -> LockKey:
    """Return the key of a semaphore's slot, by its number from 0, or of its turnstile.

    HKDF-SHA256 (RFC 5869) of the key's numbers in decimal, a pair's with a comma between
    them, without salt, with the information ``pgstructured semaphore v1``, a zero byte and
    ``part``; 8 bytes, little-endian, ``bigint``.
    """
    pair = key.as_pair
    numbers = str(key.as_bigint) if pair is None else f"{pair[0]},{pair[1]}"
    kind = part if part == "turnstile" else f"slot {part}"
    return LockKey(
        as_bigint=_derivations.semaphore(numbers, part),
        name=f"{numbers if key.name is None else key.name} {kind}",
        scheme="semaphore",
    )
