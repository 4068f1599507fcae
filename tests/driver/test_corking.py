"""What many tasks send at once goes out in one go, and nothing is left behind in a socket."""

from __future__ import annotations

import socket
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgstructured.driver import ConnectionState, _corking, open_session
from pgstructured.driver._gathering import Gathering
from pgstructured.driver._waiting import create_waiter
from pgstructured.errors import ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from pgstructured.driver import Command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told to wait")

TASKS = 40
Calls = list[tuple[str, int]]


@pytest.fixture
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def test_it_waits_until_it_is_let_go(tcp_pair) -> None:
    ours, theirs = tcp_pair

    def waits() -> bool:
        assert _corking.hold(ours.fileno())
        ours.send(b"a")
        try:
            theirs.recv(10)
        except BlockingIOError:
            return True
        finally:
            _corking.let_go(ours.fileno())
        return False

    # For 0.2 s at most, and so more than once on a machine that has been asleep.
    assert any(waits() for _ in range(5))
    ours.send(b"b")
    theirs.setblocking(True)
    assert theirs.recv(10) == b"ab"


def test_what_is_no_tcp_does_not_wait() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not _corking.hold(ours.fileno())
        ours.send(b"a")
        assert theirs.recv(10) == b"a"


@pytest.fixture
def calls(monkeypatch) -> Calls:
    """What is held back and let go, in that order."""
    made: Calls = []

    def spy(name: str, call: Callable[[int], object]) -> Callable[[int], object]:
        def called(fd: int) -> object:
            made.append((name, fd))
            return call(fd)

        return called

    for name in ("hold", "let_go"):
        spied = spy(name, getattr(_corking, name))
        for module in ("_waiting_asyncio", "_waiting_trio"):
            monkeypatch.setattr(f"pgstructured.driver.{module}.{name}", spied)
    return made


def assert_all_let_go(calls: Calls) -> None:
    names = [name for name, _ in calls]
    if names[-1] == "hold":  # whoever was answered has closed the session at once
        names.pop()
    assert names.count("hold") == names.count("let_go")
    assert names[-1] == "let_go"


@asynccontextmanager
async def many_at_once(session, work) -> AsyncGenerator[anyio.abc.TaskGroup]:
    """Run ``work`` in many tasks, whose first answers are likely to come in one read."""
    async with anyio.create_task_group() as tasks:
        for number in range(TASKS):
            tasks.start_soon(work, session, number)
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        time.sleep(0.02)
        yield tasks


async def ask_twice(session, number: int) -> None:
    for _ in range(2):
        assert (await session.execute(f"SELECT {number}")).scalar() == str(number)


def refuse_all(*_: object) -> Command:
    raise AssertionError("nothing was gathered")


async def test_signals_of_a_socket_that_nobody_serves(tcp_pair, calls) -> None:
    waiter = create_waiter(tcp_pair[0].fileno())
    signals = [waiter.create_signal() for _ in range(8)]
    gathering = Gathering(refuse_all, AssertionError)
    waiter.set_all(signals, gathering)
    assert not gathering.is_on
    for signal in signals:
        await signal.wait()
    waiter.close()
    assert not calls


async def test_two_that_have_read_let_go_once(tcp_pair, calls, anyio_backend_name) -> None:
    """On trio a deputy may be at it when what it reads for is, too."""
    if anyio_backend_name != "trio":
        pytest.skip("only on trio two tasks may read")
    from pgstructured.driver import _waiting_trio

    waiter = _waiting_trio.TrioWaiter(tcp_pair[0].fileno())
    service = _waiting_trio._Service(waiter, lambda: None)
    gathering = Gathering(refuse_all, AssertionError)
    service._is_reading = True
    for _ in range(2):
        service.hold([waiter.create_signal() for _ in range(8)], gathering)
        assert gathering.is_on
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(service._let_go)
    assert not gathering.is_on
    assert [name for name, _ in calls] == ["hold", "let_go"]
    service.end()
    service._own.close()
    service._deputys.close()
    waiter.close()


async def test_commands_of_many_go_out_together(pg_dsn, calls) -> None:
    async with open_session(pg_dsn) as session:
        with anyio.fail_after(30):
            while not calls:
                async with many_at_once(session, ask_twice):
                    pass
    assert_all_let_go(calls)
    assert len({fd for _, fd in calls}) == 1


async def test_over_a_unix_socket_each_goes_by_itself(pg_cluster, pg_dsn, calls) -> None:
    dsn = make_conninfo(pg_dsn, host=str(pg_cluster.socket_directory))
    async with open_session(dsn) as session:
        with anyio.fail_after(30):
            while not calls:
                async with many_at_once(session, ask_twice):
                    pass
    assert {name for name, _ in calls} == {"hold"}


async def test_a_task_that_is_answered_closes_the_session(pg_dsn, calls) -> None:
    """What was its descriptor by then is none of ours."""
    refused = 0

    async def ask_and_close(session, number: int) -> None:
        nonlocal refused
        try:
            assert (await session.execute(f"SELECT {number}")).scalar() == str(number)
            await session.aclose(close_timeout=0)
        except (anyio.ClosedResourceError, ConnectionLostError):
            refused += 1

    with anyio.fail_after(30):
        while not calls:
            async with open_session(pg_dsn) as session:
                async with many_at_once(session, ask_and_close):
                    pass
                assert session.state is ConnectionState.CLOSED
    with psycopg.connect(pg_dsn) as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)
    names = [name for name, _ in calls]
    assert names.count("let_go") <= names.count("hold")


async def test_a_cancelled_task_lets_go_of_what_it_holds(pg_dsn, calls) -> None:
    """On trio it is whoever waits that reads, and that may be cancelled at once."""
    async with open_session(pg_dsn) as session:
        with anyio.fail_after(30):
            while not calls:
                async with many_at_once(session, ask_twice) as tasks:
                    await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
            assert (await session.execute("SELECT 1")).scalar() == "1"
    assert_all_let_go(calls)
