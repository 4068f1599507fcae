"""One leader among candidates."""

from __future__ import annotations

import random
from typing import Any, cast

import anyio
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgstructured.driver import open_session
from pgstructured.errors import (
    LockAlreadyHeldError,
    LockKeyError,
    LockLost,
    LockNotHeldError,
    LockTimeout,
)
from pgstructured.locks import Election, Leadership, LockKey, open_locks
from pgstructured.locks._statements import CHANNEL, ring_payload
from pgstructured.observe import instrumented
from pgstructured.testing import assert_cancellable

SOON = 20  # seconds that nothing here takes on any machine
KEY = LockKey.named("e")


@pytest.fixture
def refusals():
    """Wait until so many more sessions could not be had."""
    seen: list[Any] = []

    async def check(count):
        begun = len(seen)
        with anyio.fail_after(SOON):
            while len(seen) < begun + count:  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.01)

    def note(event):
        if event.name == "lock.session_failed":
            seen.append(event)

    with instrumented(note):
        yield check


@pytest.fixture
def ended(pg_cluster, pg_dsn):
    """Wait until the server has noticed the end of every session."""

    async def check():
        with anyio.fail_after(SOON):
            while pg_cluster.sessions(pg_dsn):  # noqa: ASYNC110 - it is not ours
                await anyio.sleep(0.01)

    return check


async def lead(locks, candidate, *, task_status=anyio.TASK_STATUS_IGNORED, **kwargs) -> None:
    """Lead until it is cancelled."""
    async with locks.election("e", candidate=candidate).campaign(**kwargs) as leadership:
        task_status.started(leadership)
        await anyio.sleep_forever()


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("candidate", ["", "x" * 41, "a\n", "é", "a\x7f", "a\0"])
async def test_bad_candidates(pg_dsn, candidate):
    async with open_locks(pg_dsn) as locks:
        with pytest.raises(ValueError, match="candidate"):
            locks.election("e", candidate=candidate)


async def test_other_bad_figures(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        with pytest.raises(LockKeyError):
            locks.election("", candidate="a")
        election = locks.election("e", candidate="a")
        with pytest.raises(ValueError, match="acquire_timeout"):
            election.campaign(acquire_timeout=-1)
        with pytest.raises(ValueError, match="ttl"):
            election.campaign(ttl=0)
        for kind in (Election, Leadership):
            with pytest.raises(TypeError):
                cast("Any", kind)()


# ---------------------------------------------------------------- leading


@pytest.mark.parametrize("candidate", ["a", "x" * 40, ' it\'s \\ "me" '])
async def test_the_server_shows_who_leads(pg_dsn, pg_cluster, candidate, events):
    dsn = make_conninfo(pg_dsn, application_name="another")
    async with open_locks(dsn) as locks:
        election = locks.election("e", candidate=candidate)
        assert (election.key, election.candidate) == (KEY, candidate)
        assert repr(election) == f"<Election {KEY} candidate={candidate!r}>"
        assert await election.leader() is None
        async with election.campaign() as leadership:
            assert isinstance(leadership, Leadership)
            assert (leadership.key, leadership.candidate) == (KEY, candidate)
            assert not leadership.shared
            assert leadership.fencing_token is None
            (lock,) = pg_cluster.advisory_locks(pg_dsn)
            assert lock.pid == leadership.backend_pid
            names = {s.pid: s.application_name for s in pg_cluster.sessions(pg_dsn)}
            assert names.pop(lock.pid) == candidate
            assert set(names.values()) == {"another"}
            assert await election.leader() == candidate
            (holder,) = await locks.holders("e")
            assert holder.application_name == candidate
            async with open_locks(pg_dsn) as others:
                assert await others.election("e", candidate="b").leader() == candidate
                (holder,) = await others.holders()
                assert holder.key.name == "e"
        assert await election.leader() is None
    told = [name for name, _ in events if "session" not in name]
    assert told == ["lock.acquire_started", "lock.acquired", "lock.released"]


async def test_a_conninfo_that_is_asked_for(pg_dsn):
    async def conninfo() -> str:
        return make_conninfo(pg_dsn, application_name="another")

    async with open_locks(conninfo) as locks:
        election = locks.election("e", candidate="a")
        async with election.campaign():
            assert await election.leader() == "a"


async def test_one_leads_and_the_other_waits(pg_dsn, waiting, unlocked):
    """Two candidates of one process; hand-over is the server's."""
    elected: dict[str, float] = {}

    async def stand(name) -> None:
        async with locks.election("e", candidate=name).campaign():
            elected[name] = anyio.current_time()

    async with open_locks(pg_dsn, max_waiting_sessions=1) as locks:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with locks.election("e", candidate="first").campaign() as leadership:
                    for count, name in enumerate(("second", "third"), 1):
                        tasks.start_soon(stand, name)
                        waiters = await waiting(count)
                    assert {x.pid for x in waiters} == {
                        x.backend_pid for x in await locks.waiters("e") if x.key.name == "e"
                    }
                    assert locks.statistics().waiting_sessions == 0
                    ended = anyio.current_time()
                    await leadership.release()
        assert list(elected) == ["second", "third"]
        print(f"handed over in {(elected['second'] - ended) * 1000:.1f} ms")  # noqa: T201
        await unlocked()


async def test_in_time_or_not(pg_dsn, unlocked):
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        async with anyio.create_task_group() as tasks:
            await tasks.start(lead, locks, "a")
            for limit in (0, 0.05):
                with pytest.raises(LockTimeout):
                    async with others.election("e", candidate="b").campaign(acquire_timeout=limit):
                        pass
            assert await others.election("e", candidate="b").leader() == "a"
            tasks.cancel_scope.cancel()
        await unlocked()
        async with others.election("e", candidate="b").campaign(acquire_timeout=0):
            pass


async def test_a_task_that_would_wait_for_itself(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        async with locks.election("e", candidate="a").campaign():
            for name in ("a", "b"):
                with pytest.raises(LockAlreadyHeldError):
                    async with locks.election("e", candidate=name).campaign():
                        pass
        async with locks.lock("e"):
            with pytest.raises(LockAlreadyHeldError):
                async with locks.election("e", candidate="a").campaign():
                    pass


async def test_fenced(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        await locks.create_fence_table()
        tokens: list[int] = []
        for name in ("a", "b"):
            async with locks.election("e", candidate=name).campaign(fenced=True) as leadership:
                assert leadership.fencing_token is not None
                tokens.append(leadership.fencing_token)
                assert await locks.election("e", candidate=name).leader() == name
        assert tokens[1] > tokens[0]


async def test_a_ttl(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
            async with locks.election("e", candidate="a").campaign(ttl=0.05):
                await anyio.sleep_forever()
        assert caught.value.reason == "expired"
        assert await locks.election("e", candidate="a").leader() is None


# ---------------------------------------------------------------- resigning


@pytest.mark.parametrize("where", ["same process", "another"])
async def test_asked_to_resign(pg_dsn, where):
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        asking = (locks if where == "same process" else others).election("e", candidate="b")
        await asking.request_resign()  # reaches nobody
        with anyio.fail_after(SOON):
            async with locks.election("e", candidate="a").campaign() as leadership:
                with anyio.move_on_after(0.05) as scope:
                    await leadership.wait_resign_requested()
                assert scope.cancelled_caught
                async with others.election("other", candidate="a").campaign() as another:
                    began = anyio.current_time()
                    await asking.request_resign()
                    await leadership.wait_resign_requested()
                    took = anyio.current_time() - began
                    await leadership.wait_resign_requested()  # at once from now on
                    with anyio.move_on_after(0.05) as scope:
                        await another.wait_resign_requested()
                    assert scope.cancelled_caught  # it was not meant
        print(f"asked in {took * 1000:.1f} ms")  # noqa: T201
        async with asking.campaign() as leadership:  # nobody has asked this one
            with anyio.move_on_after(0.05) as scope:
                await leadership.wait_resign_requested()
            assert scope.cancelled_caught


async def test_who_is_seen_to_lead_can_be_asked_at_once(pg_dsn):
    """No request is lost between the grant and the leader's ear; none reaches the next one."""
    terms: list[str] = []

    async def run(locks, candidate) -> None:
        while len(terms) < 20:
            async with locks.election("e", candidate=candidate).campaign() as leadership:
                terms.append(candidate)
                await leadership.wait_resign_requested()

    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        asking = others.election("e", candidate="x")
        last = None
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run, locks, "a")
                tasks.start_soon(run, locks, "b")
                asked = 0
                while len(terms) < 20 or asked < len(terms):
                    leaders = [holder.backend_pid for holder in await others.holders("e")]
                    if leaders and leaders != last:
                        last = leaders
                        asked += 1
                        await asking.request_resign()
                    elif len(terms) >= 20 and not leaders:
                        break
                tasks.cancel_scope.cancel()
    assert len(terms) >= 20


async def test_nobody_is_asked_any_more(pg_dsn, pg_cluster):
    """Whoever waits for a request is told when the time in office is over."""
    ends: list[type[Exception]] = []

    async def wait(leadership, *, task_status) -> None:
        task_status.started()
        try:
            await leadership.wait_resign_requested()
        except (LockLost, LockNotHeldError) as exc:
            ends.append(type(exc))

    async with open_locks(pg_dsn) as locks:
        election = locks.election("e", candidate="a")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with election.campaign() as leadership:
                    await tasks.start(wait, leadership)
                with pytest.raises(LockLost):
                    async with election.campaign() as leadership:
                        await tasks.start(wait, leadership)
                        pg_cluster.terminate_backend(leadership.backend_pid)
                        await anyio.sleep_forever()
        assert ends == [LockNotHeldError, LockLost]
        with pytest.raises(LockLost):
            await leadership.wait_resign_requested()


async def test_waiting_for_a_request_is_cancellable(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        async with locks.election("e", candidate="a").campaign() as leadership:
            await assert_cancellable(leadership.wait_resign_requested)


# ---------------------------------------------------------------- observing


async def test_observing(pg_dsn, waiting):
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        election = others.election("e", candidate="-")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks, election.observe() as changes:
                assert await changes.receive() is None
                async with locks.election("e", candidate="a").campaign():
                    assert await changes.receive() == "a"
                    tasks.start_soon(lead, others, "b")
                    await waiting(1)
                    async with election.observe() as beside:
                        assert await beside.receive() == "a"  # what is, not what will be
                assert await changes.receive() == "b"
                tasks.cancel_scope.cancel()


async def test_the_end_of_a_leader_without_a_successor(pg_dsn, pg_cluster):
    async with open_locks(pg_dsn) as locks:
        election = locks.election("e", candidate="a")
        with anyio.fail_after(SOON):
            async with election.observe() as changes:
                async with election.campaign():
                    assert await changes.receive() == "a"
                began = anyio.current_time()
                assert await changes.receive() is None
                print(f"seen in {(anyio.current_time() - began) * 1000:.1f} ms")  # noqa: T201
                with pytest.raises(LockLost):
                    async with election.campaign() as leadership:
                        assert await changes.receive() == "a"
                        pg_cluster.terminate_backend(leadership.backend_pid)
                        await anyio.sleep_forever()
                assert await changes.receive() is None


async def test_a_slow_observer_gets_the_last(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        async with locks.election("e", candidate="-").observe() as changes:
            assert await changes.receive() is None
            for name in ("a", "b", "c"):
                async with locks.election("e", candidate=name).campaign():
                    pass
            async with locks.election("e", candidate="d").campaign():
                assert await changes.receive() == "d"
                with anyio.move_on_after(0.05) as scope:
                    await changes.receive()
                assert scope.cancelled_caught


async def test_observing_survives_lost_sessions(pg_dsn, pg_cluster, fault_proxy, refusals):
    dsn = fault_proxy.dsn(pg_dsn)
    async with open_locks(pg_dsn) as others, open_locks(dsn, connect_timeout=0.5) as locks:
        heard: list[str | None] = []

        async def listen(*, task_status) -> None:
            async with locks.election("e", candidate="-").observe() as changes:
                heard.append(await changes.receive())
                task_status.started()
                async for leader in changes:
                    heard.append(leader)
                    news.set()

        news = anyio.Event()
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                await tasks.start(listen)
                fault_proxy.refuse()
                fault_proxy.reset()
                async with others.election("e", candidate="a").campaign():
                    await refusals(2)
                    assert heard == [None]  # no news, and not the end
                    fault_proxy.accept()
                    await news.wait()
                    news = anyio.Event()
                    for session in pg_cluster.sessions(pg_dsn):
                        if session.application_name == "pgstructured/locks":
                            pg_cluster.terminate_backend(session.pid)
                await news.wait()
                tasks.cancel_scope.cancel()
        assert heard == [None, "a", None]


async def test_observing_ends_for_good(pg_dsn, pg_cluster_private):
    """What does not heal is said."""
    dsn = pg_cluster_private.create_database()
    async with open_locks(dsn, idle_session_ttl=100) as locks:
        async with locks.election("e", candidate="-").observe() as changes:
            assert await changes.receive() is None
            with anyio.fail_after(SOON):
                await anyio.to_thread.run_sync(pg_cluster_private.drop_database, dsn)
                with pytest.raises(psycopg.OperationalError, match="does not exist"):
                    await changes.receive()


async def test_observing_where_there_is_no_primary_for_a_while(pg_cluster_private, refusals):
    """So it is during a failover."""
    standby_of = pg_cluster_private
    with standby_of.standby() as standby:
        hosts = {
            "host": f"{standby_of.host},{standby.host}",
            "port": f"{standby_of.port},{standby.port}",
        }
        dsn = make_conninfo("user=postgres dbname=postgres", **hosts)
        async with open_locks(dsn, connect_timeout=2.0) as locks:
            async with locks.election("e", candidate="-").observe() as changes:
                assert await changes.receive() is None
                heard: list[str | None] = []
                has_heard = anyio.Event()

                async def listen() -> None:
                    heard.append(await changes.receive())
                    has_heard.set()

                with anyio.fail_after(2 * SOON):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(listen)
                        await anyio.to_thread.run_sync(standby_of.stop, "immediate")
                        await refusals(2)
                        assert heard == []
                        await anyio.to_thread.run_sync(standby.promote)
                        await lead_until(standby.dsn(), has_heard)
                assert heard == ["new"]


async def lead_until(dsn, event) -> None:
    async with open_locks(dsn) as locks:
        async with locks.election("e", candidate="new").campaign():
            await event.wait()


async def test_the_stream_is_closed(pg_dsn, monkeypatch):
    monkeypatch.setattr("pgstructured.locks._election._POLL", 1000.0)
    async with open_locks(pg_dsn) as locks:
        election = locks.election("e", candidate="a")

        async def receive() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await changes.receive()
            closed.set()

        closed = anyio.Event()
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks, election.observe() as changes:
                assert await changes.receive() is None
                tasks.start_soon(receive)
                await anyio.wait_all_tasks_blocked()
                with pytest.raises(anyio.BusyResourceError):
                    await changes.receive()
                await changes.aclose()
                await closed.wait()  # told, and not found by looking
            with pytest.raises(anyio.ClosedResourceError):
                await changes.receive()
            await changes.aclose()


async def test_observing_is_cancellable(pg_dsn):
    async with open_locks(pg_dsn) as locks:
        async with locks.election("e", candidate="a").observe() as changes:
            await assert_cancellable(changes.receive)


# ---------------------------------------------------------------- death


async def test_a_leader_dies(pg_dsn, pg_cluster, waiting):
    elected: list[str] = []

    async def stand() -> None:
        async with others.election("e", candidate="b").campaign():
            elected.append("b")

    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                with pytest.raises(LockLost) as caught:
                    async with locks.election("e", candidate="a").campaign() as leadership:
                        tasks.start_soon(stand)
                        await waiting(1)
                        pg_cluster.terminate_backend(leadership.backend_pid)
                        await anyio.sleep_forever()
                assert caught.value.reason == "terminated"
    assert elected == ["b"]


async def test_a_candidate_dies_in_line(pg_dsn, pg_cluster, waiting):
    """It stands in line anew."""
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:

        async def stand() -> None:
            async with others.election("e", candidate="b").campaign():
                elected.append("b")

        elected: list[str] = []
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with locks.election("e", candidate="a").campaign():
                    tasks.start_soon(stand)
                    (waiter,) = await waiting(1)
                    pg_cluster.terminate_backend(waiter.pid)
                    while (await waiting(1))[0].pid == waiter.pid:  # noqa: ASYNC110 - nobody tells
                        await anyio.sleep(0.01)
                    assert elected == []
        assert elected == ["b"]


async def test_a_leader_behind_a_silent_network(
    pg_dsn, pg_cluster, fault_proxy, open_hasty, waiting
):
    """Its body ends before anybody else can lead."""
    elected: list[float] = []

    async def stand() -> None:
        async with others.election("e", candidate="b").campaign():
            elected.append(anyio.current_time())

    async with open_locks(pg_dsn) as others:
        async with open_hasty(fault_proxy.dsn(pg_dsn)) as locks:
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    with pytest.raises(LockLost) as caught:
                        async with locks.election("e", candidate="a").campaign():
                            tasks.start_soon(stand)
                            await waiting(1)
                            fault_proxy.freeze()
                            try:
                                await anyio.sleep_forever()
                            finally:
                                assert elected == []
                                assert await_holder(pg_cluster, pg_dsn) == "a"
                    assert caught.value.reason == "unconfirmed"
                    fault_proxy.thaw()
    assert len(elected) == 1


def await_holder(pg_cluster, pg_dsn) -> str:
    (pid,) = [x.pid for x in pg_cluster.advisory_locks(pg_dsn) if x.granted]
    (name,) = [x.application_name for x in pg_cluster.sessions(pg_dsn) if x.pid == pid]
    return str(name)


# ---------------------------------------------------------------- closing


async def test_a_farewell_without_an_answer(pg_dsn, fault_proxy, ended):
    """It has resigned by then, which was answered: nothing was lost."""

    async def cut_off():
        await anyio.to_thread.run_sync(fault_proxy.wait_held)
        await anyio.sleep(0.1)  # what was answered before is read
        fault_proxy.reset()

    async with open_locks(fault_proxy.dsn(pg_dsn), release_timeout=SOON) as locks:
        async with anyio.create_task_group() as tasks:
            async with locks.election("e", candidate="a").campaign() as leadership:
                await leadership.refresh()  # the greeting was answered
                fault_proxy.hold(b"pg_notify")
                tasks.start_soon(cut_off)
        assert not leadership.is_lost
    await ended()


@pytest.mark.parametrize("is_closed_at_once", [True, False])
async def test_others_are_told_who_has_resigned(pg_dsn, ended, is_closed_at_once):
    """After the unlock, and also where everything is closed in the same breath."""
    told = anyio.Event()
    payload = ring_payload(KEY, "released").encode()

    def hear(notifications) -> None:
        if any(notification.extra == payload for notification in notifications):
            told.set()

    with anyio.fail_after(SOON):
        async with open_session(pg_dsn, on_notifications=hear) as session:
            await session.execute(f"LISTEN {CHANNEL}")
            async with open_locks(pg_dsn) as locks:
                async with locks.election("e", candidate="a").campaign() as leadership:
                    assert not told.is_set()
                if not is_closed_at_once:
                    await told.wait()
            await told.wait()
            assert not leadership.is_lost
    await ended()


async def test_a_resignation_takes_no_connection(pg_dsn, pg_cluster, fault_proxy, ended):
    """To close the session asks the server to cancel nothing: that might be what tells others."""
    with anyio.fail_after(SOON):
        async with open_locks(fault_proxy.dsn(pg_dsn)) as locks:
            for count in range(5):
                async with locks.election("e", candidate="a").campaign():
                    assert fault_proxy.accepted == 2 + count
                while len(pg_cluster.sessions(pg_dsn)) > 1:  # noqa: ASYNC110 - it is not ours
                    await anyio.sleep(0.01)
        assert fault_proxy.accepted == 6
    await ended()


async def test_a_session_that_is_killed_after_the_unlock(pg_dsn, pg_cluster, ended):
    """Nobody is to be told of it, and nothing breaks."""
    with anyio.fail_after(SOON):
        async with open_locks(pg_dsn) as locks:
            async with locks.election("e", candidate="a").campaign() as leadership:
                await leadership.release()
                pg_cluster.terminate_backend(leadership.backend_pid)
                await anyio.sleep(0.1)  # longer than it would linger
            assert not leadership.is_lost
            assert await locks.election("e", candidate="b").leader() is None
    await ended()


async def test_closing_right_away(pg_dsn, ended):
    """A session that is just being opened does not keep it."""
    with anyio.fail_after(SOON):
        for pause in (0, 0.005, 0.01, 0.02, 0.03):
            async with open_locks(pg_dsn) as locks:
                async with locks.election("e", candidate="a").observe() as changes:
                    assert await changes.receive() is None
                    await anyio.sleep(pause)
            await ended()


async def test_closing_ends_who_leads_and_who_waits_and_who_looks(pg_dsn, waiting):
    ends: dict[str, BaseException] = {}

    async def stand(name, *, task_status=anyio.TASK_STATUS_IGNORED) -> None:
        try:
            async with locks.election("e", candidate=name).campaign():
                task_status.started()
                await anyio.sleep_forever()
        except (LockLost, anyio.ClosedResourceError) as exc:
            ends[name] = exc

    async def observe(*, task_status) -> None:
        async with locks.election("e", candidate="-").observe() as changes:
            assert await changes.receive() == "a"
            task_status.started()
            with pytest.raises(anyio.EndOfStream) as caught:
                await changes.receive()
            ends["observer"] = caught.value

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with open_locks(pg_dsn) as locks:
                await tasks.start(stand, "a")
                tasks.start_soon(stand, "b")
                await waiting(1)
                await tasks.start(observe)
                await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.ClosedResourceError):
                async with locks.election("e", candidate="c").campaign():
                    pass
            with pytest.raises(anyio.ClosedResourceError):
                await locks.election("e", candidate="c").leader()
            with pytest.raises(anyio.ClosedResourceError):
                await locks.election("e", candidate="c").request_resign()
    loss = ends.pop("a")
    assert isinstance(loss, LockLost)
    assert loss.reason == "closed"
    assert isinstance(ends.pop("b"), anyio.ClosedResourceError)
    assert isinstance(ends.pop("observer"), anyio.EndOfStream)
    assert not ends


async def test_a_body_that_does_not_end_with_the_locks(pg_dsn, ended):
    """It is given its time, and then its session is ended all the same."""
    finish = anyio.Event()

    async def stand(*, task_status) -> None:
        with pytest.raises(LockLost) as caught:
            async with locks.election("e", candidate="a").campaign():
                task_status.started()
                with anyio.CancelScope(shield=True):
                    await finish.wait()
        assert caught.value.reason == "closed"

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with open_locks(pg_dsn, release_timeout=0.2) as locks:
                await tasks.start(stand)
            await ended()
            finish.set()


async def test_detached(pg_dsn, ended):
    """It outlives its block, but not the `Locks`."""
    async with open_locks(pg_dsn) as locks:
        election = locks.election("e", candidate="a")
        async with election.campaign() as leadership:
            detached = leadership.detach()
            with pytest.raises(LockNotHeldError):
                await leadership.wait_resign_requested()
        assert await election.leader() == "a"
        await detached.release()
        assert await election.leader() is None
        async with election.campaign() as leadership:
            detached = leadership.detach()
        assert await election.leader() == "a"
    await ended()
    with pytest.raises(LockLost) as caught:
        await detached.release()
    assert caught.value.reason == "closed"


# ---------------------------------------------------------------- cancellation


async def test_a_campaign_is_cancellable(pg_dsn, unlocked):
    async with open_locks(pg_dsn) as locks, open_locks(pg_dsn) as others:

        async def campaign() -> None:
            async with locks.election("e", candidate="a").campaign():
                pass

        await assert_cancellable(campaign)
        async with others.election("e", candidate="b").campaign():
            await assert_cancellable(campaign)
        await assert_cancellable(locks.election("e", candidate="a").leader)
        await assert_cancellable(locks.election("e", candidate="a").request_resign)
        await unlocked()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_cancelled_at_random_moments(pg_dsn, unlocked, seed):
    """Never two leaders, and nothing is left."""
    rng = random.Random(seed)
    leaders: list[str] = []
    elected = cancelled = 0

    async def stand(locks, name, rng) -> None:
        nonlocal elected, cancelled
        election = locks.election("e", candidate=name)
        for _ in range(8):
            with anyio.move_on_after(rng.random() * 0.1) as scope:
                async with election.campaign():
                    leaders.append(name)
                    elected += 1
                    try:
                        assert leaders == [name], f"seed {seed}"
                        await anyio.sleep(rng.random() * 0.01)
                    finally:
                        leaders.remove(name)
            cancelled += scope.cancelled_caught

    async with open_locks(pg_dsn) as one, open_locks(pg_dsn) as two:
        with anyio.fail_after(2 * SOON):
            async with anyio.create_task_group() as tasks:
                for name, locks in (("a", one), ("b", two), ("c", one), ("d", two)):
                    tasks.start_soon(stand, locks, name, random.Random(rng.random()))
        await unlocked()
    print(f"seed {seed}: {elected} elected, {cancelled} cancelled")  # noqa: T201
    assert cancelled
