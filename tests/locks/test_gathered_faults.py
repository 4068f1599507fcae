"""Locks that go to the server as one command, while tasks are cancelled and networks break.

That they go as one is made sure of: a proxy keeps the answers of many tasks back until all of
them have come, so that one read answers all, and `Sent` tells what went out together.
"""

from __future__ import annotations

import random
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.lowlevel
import psycopg
import pytest

from pgstructured.driver._wire import Wire
from pgstructured.errors import LockLost, LockTimeout
from pgstructured.locks import LockKey
from pgstructured.locks._statements import TRY, UNLOCK, params_of
from pgstructured.testing import assert_cancellable

from .conftest import SOON, hold, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence

NEVER = 120.0
EVERYBODY = "everybody"  # what the proxy waits for
COMMON = 10**6  # the keys from here on are for getting together
SILENT = {"heartbeat": NEVER / 2, "lost_after": NEVER, "server_timeout": 2 * NEVER}
DIRECTIONS = ["up", "down", "both"]
TOGETHER = {
    statement.together.name: (what, shared)
    for what, statements in (("try", TRY), ("unlock", UNLOCK))
    for (_, shared), statement in statements.items()
}
HELD = (
    "SELECT l.pid, l.classid::bigint, l.objid::bigint, l.objsubid, l.mode = 'ShareLock'"
    " FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database"
    " WHERE l.locktype = 'advisory' AND l.granted AND d.datname = current_database()"
)


class Want(NamedTuple):
    """What one task asks for."""

    key: LockKey
    shared: bool = False
    method: str = "lock"

    def on(self, locks, **options):
        return getattr(locks, self.method)(self.key, shared=self.shared, **options)

    def held_by(self, pid) -> tuple[Any, ...]:
        """What the server shows of it."""
        return (pid, *self.key.pg_locks_ids, self.shared)


KINDS = list(product((False, True), (False, True), ("lock", "try_lock")))
"""Whether it is a pair, and shared; and how it is asked for."""


def want(number: int, *, is_pair: bool, shared: bool, method: str) -> Want:
    if is_pair:
        key = LockKey.pair(-(2**31) + number, 2**31 - 1 - number)
    elif number % 2:
        key = LockKey.named(f"gathered {number}")
    else:
        key = LockKey.bigint(-(2**63) + number)
    return Want(key, shared, method)


def some_of_each(first: int, times: int = 1) -> list[Want]:
    """One of each kind after the other, so that the same kind is never next to itself."""
    return [
        want(first + number, is_pair=is_pair, shared=shared, method=method)
        for number, (is_pair, shared, method) in enumerate(KINDS * times)
    ]


class Sent:
    """What went out as one command for many, and something to do before that."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, bool, tuple[bytes, ...]]] = set()
        self._hook: tuple[str, frozenset[Want], Callable[[Wire], object]] | None = None
        self.caught: list[Want] = []
        """What was in the command that the hook has waited for, and those behind it."""

    def clear(self) -> None:
        self._seen.clear()

    def has(self, what: str, wanted: Want) -> bool:
        """Whether it was asked for so together with others."""
        return (what, wanted.shared, params_of(wanted.key)) in self._seen

    def before(self, what: str, of: Collection[Want], do: Callable[[Wire], object]) -> None:
        """Do something, once, before some of the keys are asked for together."""
        self._hook, self.caught = (what, frozenset(of), do), []

    def note(self, wire: Wire, name: bytes, params: Sequence[bytes]) -> None:
        what, shared = TOGETHER[name]
        values = list(zip(*(column[1:-1].split(b",") for column in params), strict=True))
        assert len(values) > 1
        self._seen.update((what, shared, value) for value in values)
        if self._hook is not None and self._hook[0] == what:
            _, wants, do = self._hook
            found = [w for w in wants if w.shared == shared and params_of(w.key) in values]
            if found and not self.caught:
                do(wire)
            self.caught += found


@pytest.fixture
def sent(monkeypatch) -> Sent:
    """What goes out together."""
    sent = Sent()
    send = Wire.send_prepared

    def spy(wire, statement, params, *args):
        if statement.name in TOGETHER:
            sent.note(wire, statement.name, params)
        return send(wire, statement, params, *args)

    monkeypatch.setattr(Wire, "send_prepared", spy)
    return sent


@pytest.fixture
def open_proxied(fault_proxy, pg_dsn, open_quick):
    """`open_quick` through the proxy: ``open_proxied(**options of open_locks)``."""
    return partial(open_quick, fault_proxy.dsn(pg_dsn))


@pytest.fixture
def observer(pg_dsn):
    with psycopg.connect(pg_dsn, autocommit=True) as conn:
        yield conn


@pytest.fixture
def on_server(observer):
    """What is held on the server: by which session, the key's numbers, whether shared."""
    return lambda: set(observer.execute(HELD).fetchall())


@pytest.fixture
def together(fault_proxy, on_server):
    """Run something in tasks that are all answered by one read just before."""

    @asynccontextmanager
    async def run_together(
        locks,
        works: Sequence[Callable[[], Awaitable[None]]],
        *,
        first: Sequence[Want] | None = None,
        others: Sequence[Want] = (),
        begin: Callable[[], object] = lambda: None,
    ) -> AsyncGenerator[anyio.abc.TaskGroup]:
        """Run ``works``; each after a lock of its own, unless ``first`` is what they ask for.

        ``others`` is what tasks that ``begin`` starts ask for, to be answered with them.
        """
        meeting = [Want(LockKey.bigint(COMMON + number)) for number in range(len(works))]

        async def run(number: int, work: Callable[[], Awaitable[None]]) -> None:
            if first is None:
                async with meeting[number].on(locks):
                    pass
            await work()

        async def read(*, task_status) -> None:
            command = lane.session.send([("SELECT 1", ())])
            task_status.started()
            await command.wait()

        lane = max((lane for lane in locks._fleet.lanes if lane.is_open), key=lambda x: x.slots)
        pid = lane.session.backend_pid
        met = {mine.held_by(pid) for mine in (*(meeting if first is None else first), *others)}
        await lane.session.execute("")  # so that nobody else waits there, as a heartbeat does
        fault_proxy.merge(EVERYBODY.encode())
        async with anyio.create_task_group() as tasks:
            # On trio who waits first reads for all, and sends alone what it has to send then.
            await tasks.start(read)
            begin()
            for number, work in enumerate(works):
                tasks.start_soon(run, number, work)
            await wait_until(lambda: met <= on_server())
            await anyio.sleep(0.02)  # the names of the keys are sent meanwhile, and not in between
            lane.session.send([(f"SELECT '{EVERYBODY}'", ())])
            yield tasks

    return run_together


# ---------------------------------------------------------------- answers


async def test_some_of_them_are_refused(
    pg_dsn, open_quick, open_proxied, settled, sent, on_server, together, waiting
):
    """Each is told its own answer, whatever those beside it are told; who waits has it later."""
    wanted = some_of_each(0, times=4)
    taken = wanted[::3]
    late = [mine for mine in taken if mine.method == "lock"]
    answers: dict[Want, str] = {}

    async def take(mine: Want) -> None:
        async with mine.on(locks) as lock:
            if lock is None:
                answers[mine] = "refused"
                return
            answers[mine] = "had"
            assert mine.held_by(lock.backend_pid) in on_server()

    async with open_quick(pg_dsn) as other, open_proxied() as locks:
        with anyio.fail_after(SOON):
            async with AsyncExitStack() as stack:
                theirs = [await stack.enter_async_context(other.lock(x.key)) for x in taken]
                async with together(locks, [partial(take, mine) for mine in wanted]):
                    await wait_until(lambda: len(answers) == len(wanted) - len(late))
                    await waiting(len(late))
                    assert answers == {
                        mine: "refused" if mine in taken else "had"
                        for mine in wanted
                        if mine not in late
                    }
                    assert all(sent.has("try", mine) for mine in wanted)
                    for lock in theirs:
                        await lock.release()
        assert {answers[mine] for mine in late} == {"had"}
        await settled(locks)
        assert locks.statistics().sessions_lost == 0


# ---------------------------------------------------------------- cancellations


@pytest.mark.parametrize("stays", [False, True], ids=["", "staying"])
@pytest.mark.parametrize(("is_pair", "shared", "method"), KINDS)
async def test_cancelled_at_every_await(  # noqa: PLR0915 - one story
    cancel_at,
    is_pair,
    shared,
    method,
    stays,
    open_proxied,
    settled,
    sent,
    observer,
    on_server,
    together,
):
    """One of many that are asked for together: nothing is left of it, and the others have theirs.

    Where it is shared, somebody else's share of it stays, too.
    """
    victim = want(0, is_pair=is_pair, shared=shared, method=method)
    wanted = some_of_each(10, times=2)
    holding = some_of_each(100)
    at = ""
    reached: set[str] = set()
    places = {"asking", "leaving"} | ({"holding"} if stays else set())

    async def take() -> None:
        nonlocal at
        at = "asking"
        async with victim.on(locks) as lock:
            assert lock is not None
            at = "holding"
            if stays:
                await lock.refresh()
            at = "leaving"
        at = "done"

    async def be_cancelled(scope, number) -> None:
        def cancel() -> None:
            reached.add(at)
            scope.cancel()

        with scope:
            await cancel_at(take(), SimpleNamespace(cancel=cancel), number)

    async def take_beside(mine: Want) -> None:
        async with mine.on(locks) as lock:
            if stays:
                await lock.refresh()
            assert mine.held_by(lock.backend_pid) in on_server()

    async with open_proxied() as locks, AsyncExitStack() as stack:
        held = [await stack.enter_async_context(mine.on(locks)) for mine in holding]
        (lane,) = locks._fleet.lanes
        expected = {mine.held_by(lane.backend_pid) for mine in holding}
        if shared:
            function = (
                "pg_advisory_lock_shared(%s)"
                if not is_pair
                else ("pg_advisory_lock_shared(%s, %s)")
            )
            numbers = victim.key.as_pair or (victim.key.as_bigint,)
            observer.execute(f"SELECT {function}", numbers)
            expected.add(victim.held_by(observer.info.backend_pid))

        number, is_over = 0, False
        with anyio.fail_after(2 * SOON):
            while not is_over:
                assert number < 100
                sent.clear()
                scope = anyio.CancelScope()
                works = [partial(take_beside, mine) for mine in wanted]
                works.insert(len(works) // 2, partial(be_cancelled, scope, number))
                async with together(locks, works):
                    pass
                await wait_until(lambda: on_server() == expected)
                await wait_until(lambda: lane.slots == len(holding))
                for lock in held:
                    lock.assert_held()
                async with victim.on(locks) as lock:
                    assert lock is not None
                    assert lock.backend_pid == lane.backend_pid
                    await lock.refresh()
                is_gathered = sent.has("try", victim)
                if not stays and at in ("leaving", "done"):
                    is_gathered &= sent.has("unlock", victim)
                if not is_gathered:
                    continue  # once more, whatever it was that came in between
                number += 1
                if not scope.cancel_called:  # it has come too late: there is nothing more to try
                    # On trio who reads for others suspends more often: then one may be left out.
                    number, is_over = 0, reached == places
        assert reached == places
        assert locks._fleet.lanes == [lane]
        await stack.aclose()
        await settled(locks)
        assert locks.statistics().sessions_lost == 0


async def test_cancelled_before_it_is_asked_for(open_proxied, settled, sent, on_server, together):
    """It goes out with the others' all the same, and is undone."""
    kinds = set(KINDS)
    cancelled: set[Any] = set()

    async def have(mine: Want) -> None:
        async with mine.on(locks) as lock:
            assert mine.held_by(lock.backend_pid) in on_server()

    async def enter(mine: Want) -> None:
        async with mine.on(locks):
            raise AssertionError("it was cancelled before")

    async def check(mine: Want) -> None:
        await assert_cancellable(partial(enter, mine))

    async with open_proxied() as locks:
        with anyio.fail_after(2 * SOON):
            while cancelled != kinds:
                sent.clear()
                having, not_having = some_of_each(0), some_of_each(100)
                works = [
                    partial(work, mine)
                    for both in zip(having, not_having, strict=True)
                    for work, mine in zip((have, check), both, strict=True)
                ]
                async with together(locks, works):
                    pass
                await wait_until(lambda: not on_server())
                for kind, mine in zip(KINDS, not_having, strict=True):
                    if sent.has("try", mine):
                        cancelled.add(kind)
                async with AsyncExitStack() as stack:
                    for mine in (*having, *not_having):
                        assert await stack.enter_async_context(mine.on(locks)) is not None
        await settled(locks)
        assert locks.statistics().sessions_opened == 1


async def test_released_by_who_is_cancelled(open_proxied, settled, sent, on_server, together):
    """Their unlocks go out as one, and are waited for."""
    wanted = some_of_each(0, times=2)
    released: set[Want] = set()

    async def release(mine: Want) -> None:
        async with mine.on(locks) as lock:
            await assert_cancellable(lock.release)
            assert mine.held_by(lock.backend_pid) not in on_server()

    async with open_proxied() as locks:
        with anyio.fail_after(2 * SOON):
            while released != set(wanted):
                sent.clear()
                async with together(locks, [partial(release, mine) for mine in wanted]):
                    pass
                assert not on_server()
                released.update(mine for mine in wanted if sent.has("unlock", mine))
        await settled(locks)
        assert locks.statistics().sessions_opened == 1


async def test_many_are_cancelled(  # noqa: PLR0915 - one story
    cancel_at, open_proxied, settled, sent, on_server, together
):
    """By themselves and by each other, before, after and while they are answered; some in line."""
    rng = random.Random(20261)
    alone = 16  # so many have a key of their own
    tasks_count = 24
    caught = {"asking": 0, "leaving": 0}
    inside: dict[LockKey, list[bool]] = {}
    scopes: list[anyio.CancelScope] = []
    places: list[str] = []
    ended_at: dict[int, str] = {}

    def cancel(number: int) -> None:
        ended_at.setdefault(number, places[number])
        scopes[number].cancel()

    async def take(mine: Want, number: int, stays: bool, victims: dict[str, int]) -> None:
        def be(where: str) -> None:
            places[number] = where
            if where in victims:
                cancel(victims[where])

        be("asking")
        async with mine.on(locks) as lock:
            assert lock is not None
            others = inside.setdefault(mine.key, [])
            assert not others or (mine.shared and all(others)), f"two holders of {mine.key}"
            others.append(mine.shared)
            try:
                be("holding")
                if stays:
                    await anyio.lowlevel.checkpoint()
            finally:
                others.remove(mine.shared)
            be("leaving")
        be("done")

    async def work(mine: Want, number: int, at: int, stays: bool, victims: dict[str, int]) -> None:
        with scopes[number]:
            myself = SimpleNamespace(cancel=partial(cancel, number))
            await cancel_at(take(mine, number, stays, victims), myself, at)
        place = ended_at.get(number)
        if place in caught and number < alone:
            caught[place] += sent.has("try" if place == "asking" else "unlock", mine)

    async with open_proxied() as locks:
        with anyio.fail_after(2 * SOON):
            rounds = 0
            while rounds < 25 or not all(caught.values()):
                rounds += 1
                sent.clear()
                ended_at.clear()
                scopes[:] = [anyio.CancelScope() for _ in range(tasks_count)]
                places[:] = [""] * tasks_count
                # The last of them want the same key, whoever else has it.
                wanted = some_of_each(0, times=2) + [
                    want(50, is_pair=False, shared=number % 2 == 0, method="lock")
                    for number in range(tasks_count - alone)
                ]
                works = []
                for number, mine in enumerate(wanted):
                    at, stays = rng.choice((0, 0, 1, 2, 100)), rng.random() < 0.3
                    victims = {
                        when: rng.randrange(tasks_count)
                        for when in ("asking", "holding", "leaving", "done")
                        if rng.random() < 0.2
                    }
                    works.append(partial(work, mine, number, at, stays, victims))
                rng.shuffle(works)
                async with together(locks, works):
                    pass
                await wait_until(lambda: not on_server())
                await settled(locks)
        assert locks.statistics().sessions_lost == 0
        for mine in some_of_each(0, times=2):
            async with mine.on(locks) as lock:
                assert lock is not None


@pytest.mark.parametrize("place", ["asking", "leaving"])
async def test_cancelled_by_no_scope(
    place, anyio_backend_name, cancel_at, open_proxied, settled, sent, on_server, together
):
    """Asyncio's own cancellation heeds no shield; what is under way is seen to all the same."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than that of scopes")
    import asyncio

    wanted, meeting = some_of_each(0, times=2), Want(LockKey.bigint(2 * COMMON))
    victim = some_of_each(100)[0]
    was_gathered = False

    async def take() -> None:
        async with victim.on(locks):
            pass

    async def be_cancelled() -> None:
        async with meeting.on(locks):
            pass
        await cancel_at(take(), asyncio.current_task(), 0 if place == "asking" else 1)

    def start(begun: list[asyncio.Future[None]]) -> None:
        begun.append(asyncio.ensure_future(be_cancelled()))

    async def take_beside(mine: Want) -> None:
        async with mine.on(locks) as lock:
            assert mine.held_by(lock.backend_pid) in on_server()

    with anyio.fail_after(2 * SOON):
        while not was_gathered:
            sent.clear()
            async with open_proxied() as locks:
                begun: list[asyncio.Future[None]] = []
                works = [partial(take_beside, mine) for mine in wanted]
                begin = partial(start, begun)
                async with together(locks, works, others=[meeting], begin=begin):
                    await asyncio.wait(begun)
                assert begun[0].cancelled()
                was_gathered = sent.has("try" if place == "asking" else "unlock", victim)
                await wait_until(lambda: not on_server())
                await settled(locks)
                async with victim.on(locks) as lock:
                    assert lock is not None
                assert locks.statistics().sessions_lost == 0


# ---------------------------------------------------------------- silence


@pytest.mark.parametrize("limit", ["release_timeout", "lost_after", "both"])
@pytest.mark.parametrize("direction", DIRECTIONS)
async def test_frozen_as_unlocks_are_sent(
    direction, limit, fault_proxy, open_proxied, settled, sent, on_server, together, events, gone
):
    """Who lets go leaves in time, who holds is told in time; each by its own limit."""
    limits = {
        "release_timeout": 0.4 if limit != "lost_after" else NEVER,
        "lost_after": 1.0 if limit != "release_timeout" else NEVER,
        "server_timeout": 2 * NEVER,
    }
    holding, leaving = some_of_each(100), some_of_each(0, times=2)
    losses: list[LockLost] = []
    left: list[Want] = []

    async def leave(mine: Want) -> None:
        async with mine.on(locks):
            pass
        left.append(mine)

    def count_given_up() -> int:
        return [name for name, _ in events].count("lock.release_failed")

    sent.before("unlock", leaving, lambda wire: fault_proxy.freeze(direction))
    async with (
        open_proxied(**limits) as locks,
        AsyncExitStack() as stack,
    ):
        if limit != "both":  # that is left while nothing is heard
            stack.callback(fault_proxy.thaw)
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as holders:
                held = [await holders.start(hold, mine.on(locks), losses) for mine in holding]
                expected = {
                    mine.held_by(lock.backend_pid) for mine, lock in zip(holding, held, strict=True)
                }
                async with together(
                    locks, [partial(leave, mine) for mine in leaving], first=leaving
                ):
                    await wait_until(lambda: set(sent.caught) == set(leaving))
                    if limit == "lost_after":
                        await wait_until(lambda: len(losses) == len(holding))
                        assert left == []
                        fault_proxy.thaw()
                assert len(left) == len(leaving) == len(set(left))
                if limit == "release_timeout":
                    assert count_given_up() == len(leaving)
                    assert losses == []
                    fault_proxy.thaw()
                    for lock in held:
                        await lock.refresh()
                    await wait_until(lambda: on_server() == expected)
                    holders.cancel_scope.cancel()
                elif limit == "lost_after":
                    assert count_given_up() == 0
                else:
                    await wait_until(lambda: len(losses) == len(holding))
                    assert count_given_up() == len(leaving)
        assert [loss.reason for loss in losses] == ["unconfirmed"] * len(losses)
        assert not any(loss.certain for loss in losses)
        if limit != "both":
            await settled(locks)
            await wait_until(lambda: not on_server())
            async with leaving[0].on(locks) as lock:
                assert lock is not None
    fault_proxy.thaw()
    await gone(within=SOON, sessions=1)


@pytest.mark.parametrize("end", ["cancelled", "time", "heard of again"])
@pytest.mark.parametrize("direction", DIRECTIONS)
async def test_frozen_as_tries_are_sent(
    direction, end, fault_proxy, open_proxied, settled, sent, on_server, together, gone
):
    """Given up within ``release_timeout``, or had later; others' locks on the session are held."""
    limits = {"release_timeout": 0.4, **SILENT}
    holding, wanted = some_of_each(100), some_of_each(0, times=2)
    if end == "time":
        wanted = [mine for mine in wanted if mine.method == "lock"]
    options = {"acquire_timeout": 0.2} if end == "time" else {}
    outcomes: list[str] = []
    is_over = anyio.Event()

    async def take(mine: Want) -> None:
        try:
            async with mine.on(locks, **options) as lock:
                assert lock is not None
                outcomes.append("had")
                await is_over.wait()
        except LockTimeout:
            outcomes.append("timed out")

    sent.before("try", wanted, lambda wire: fault_proxy.freeze(direction))
    async with open_proxied(**limits) as locks:
        async with AsyncExitStack() as stack:
            held = [await stack.enter_async_context(mine.on(locks)) for mine in holding]
            (lane,) = locks._fleet.lanes
            expected = {mine.held_by(lane.backend_pid) for mine in holding}
            asked_for = {mine.held_by(lane.backend_pid) for mine in wanted}
            with anyio.fail_after(SOON):
                async with together(locks, [partial(take, mine) for mine in wanted]) as tasks:
                    await wait_until(lambda: set(sent.caught) == set(wanted))
                    if direction == "down":  # granted, and nobody knows
                        await wait_until(lambda: on_server() >= expected | asked_for)
                    if end == "cancelled":
                        tasks.cancel_scope.cancel()
                    elif end == "heard of again":
                        fault_proxy.thaw()
                        await wait_until(lambda: len(outcomes) == len(wanted))
                        assert on_server() == expected | asked_for
                        is_over.set()
            had = {"cancelled": [], "time": ["timed out"], "heard of again": ["had"]}[end]
            assert outcomes == had * len(wanted)
            fault_proxy.thaw()
            for lock in held:
                await lock.refresh()
            await wait_until(lambda: on_server() == expected)
            for mine in wanted:
                async with mine.on(locks) as lock:
                    assert lock is not None
        await settled(locks)
        assert locks.statistics().sessions_lost == 0
    await gone(within=SOON, sessions=1)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
async def test_a_session_is_given_up_as_tries_are_sent(
    direction, pg_dsn, fault_proxy, open_hasty, settled, sent, on_server, together, gone
):
    """Who holds loses it; who asks does so again, on another session."""
    holding = some_of_each(100)
    wanted = [mine for mine in some_of_each(0, times=4) if mine.method == "lock"]
    losses: list[LockLost] = []
    pids: list[int] = []
    is_over = anyio.Event()

    async def take(mine: Want) -> None:
        async with mine.on(locks) as lock:
            pids.append(lock.backend_pid)
            await is_over.wait()

    limits = {"lost_after": 1.0, "server_timeout": 2.0, "connect_timeout": SOON}
    sent.before("try", wanted, lambda wire: fault_proxy.freeze(direction))
    async with open_hasty(fault_proxy.dsn(pg_dsn), **limits) as locks:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as holders:
                for mine in holding:
                    lost = await holders.start(hold, mine.on(locks), losses)
                async with together(locks, [partial(take, mine) for mine in wanted]):
                    await wait_until(lambda: set(sent.caught) == set(wanted))
                    await wait_until(lambda: len(losses) == len(holding))
                    await wait_until(lambda: locks.statistics().sessions_lost)
                    assert pids == []
                    fault_proxy.thaw()
                    await wait_until(lambda: len(pids) == len(wanted))
                    is_over.set()
        assert {loss.reason for loss in losses} == {"unconfirmed"}
        assert lost.backend_pid not in pids
        await settled(locks)
    await gone(within=SOON, sessions=1)


@pytest.mark.parametrize("what", ["try", "unlock"])
async def test_given_up_all_at_once(what, fault_proxy, open_proxied, settled, sent, together, gone):
    """Nothing is held on their session then, so it ends: not one waited for the others' ends."""
    limits = {"release_timeout": 0.4, **SILENT}
    wanted = some_of_each(0, times=2)

    async def take(mine: Want) -> None:
        async with mine.on(locks):
            pass

    sent.before(what, wanted, lambda wire: fault_proxy.freeze())
    async with open_proxied(**limits) as locks:
        first = wanted if what == "unlock" else None
        with anyio.fail_after(SOON):
            async with together(
                locks, [partial(take, mine) for mine in wanted], first=first
            ) as tasks:
                await wait_until(lambda: set(sent.caught) == set(wanted))
                if what == "try":
                    tasks.cancel_scope.cancel()
            await wait_until(lambda: not locks._fleet.lanes)
            fault_proxy.thaw()
            async with wanted[0].on(locks) as lock:
                assert lock is not None
        await settled(locks)
        assert locks.statistics().sessions_lost == 0
    await gone(within=SOON, sessions=1)


async def test_given_up_beside_others_again(
    fault_proxy, open_proxied, settled, sent, together, gone
):
    """What was given up and then answered counts no more, so the others' session stays open."""
    limits = {"release_timeout": 0.4, **SILENT}
    wanted = some_of_each(0)

    async def take(mine: Want) -> None:
        async with mine.on(locks):
            raise AssertionError("no answer")

    async with open_proxied(**limits) as locks:
        async with locks.lock("beside") as beside:
            (lane,) = locks._fleet.lanes
            for _ in range(2):
                sent.before("try", wanted, lambda wire: fault_proxy.freeze())
                with anyio.fail_after(SOON):
                    async with together(locks, [partial(take, mine) for mine in wanted]) as tasks:
                        await wait_until(lambda: set(sent.caught) == set(wanted))
                        tasks.cancel_scope.cancel()
                    fault_proxy.thaw()
                    await beside.refresh()
                    await wait_until(lambda: lane.slots == 1)
        await settled(locks)
        assert locks.statistics().sessions_opened == 1
    await gone(within=SOON, sessions=1)


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("when", ["as it is sent", "before its answer"])
@pytest.mark.parametrize("how", ["reset", "killed"])
@pytest.mark.parametrize("what", ["try", "unlock"])
async def test_the_session_ends(  # noqa: PLR0915 - one story
    what, how, when, pg_cluster, fault_proxy, open_proxied, settled, sent, on_server, together, gone
):
    """Each is told of its own: nobody has a lock that the server has not, or leaves one there."""
    holding = some_of_each(100)
    wanted = [mine for mine in some_of_each(0, times=4) if mine.method == "lock"]
    losses: list[LockLost] = []
    outcomes: list[str] = []
    pids: list[int] = []
    is_over = anyio.Event()
    # What the server has said before it was killed is heard.
    was_answered = (how, when) == ("killed", "before its answer")
    is_lost = was_answered if what == "try" else not was_answered

    async def take(mine: Want) -> None:
        try:
            async with mine.on(locks) as lock:
                pids.append(lock.backend_pid)
                if what == "try":
                    await is_over.wait()
                    assert mine.held_by(lock.backend_pid) in on_server()
            outcomes.append("had")
        except LockLost as exc:
            outcomes.append(exc.reason)

    def end(pid: int) -> None:
        if how == "reset":
            fault_proxy.reset()
        else:
            pg_cluster.terminate_backend(pid)

    def begin(wire: Wire) -> None:
        if when == "as it is sent":
            end(wire.backend_pid)
        else:
            fault_proxy.freeze("down")

    sent.before(what, wanted, begin)
    async with open_proxied() as locks:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as holders:
                for mine in holding:
                    lost = await holders.start(hold, mine.on(locks), losses)
                pid = lost.backend_pid
                expected = {mine.held_by(pid) for mine in holding}
                asked_for = {mine.held_by(pid) for mine in wanted} if what == "try" else set()
                first = wanted if what == "unlock" else None
                async with together(locks, [partial(take, mine) for mine in wanted], first=first):
                    await wait_until(lambda: set(sent.caught) == set(wanted))
                    if when == "before its answer":
                        # The server has done it, and nobody knows.
                        await wait_until(lambda: on_server() == expected | asked_for)
                        end(pid)
                        await wait_until(lambda: not on_server())
                        fault_proxy.thaw()
                    await wait_until(lambda: len(losses) == len(holding))
                    if what == "try" and not is_lost:
                        await wait_until(lambda: len(pids) == len(wanted))
                        is_over.set()
        reason = "disconnected" if how == "reset" else "terminated"
        assert [loss.reason for loss in losses] == [reason] * len(holding)
        assert outcomes == [reason if is_lost else "had"] * len(wanted)
        if what == "try" and not is_lost:
            assert pid not in pids
        assert locks.statistics().sessions_lost == 1
        await settled(locks)
        await wait_until(lambda: not on_server())
        for mine in (*holding, *wanted):
            async with mine.on(locks) as lock:
                assert lock is not None
    await gone(within=SOON, sessions=1)
