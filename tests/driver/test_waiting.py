"""Waiters: every backend's own, and AnyIO's, give the same promises."""

from __future__ import annotations

import socket
import struct
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING

import anyio
import pytest

from pgstructured.driver import _waiting
from pgstructured.driver._waiting import (
    READ,
    WRITE,
    SocketWaiter,
    create_waiter,
    current_task_id,
    poll_now,
    running_event_loop,
    wait_socket,
)
from pgstructured.driver._waiting_anyio import AnyioWaiter
from pgstructured.testing import VirtualClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(params=["best", "anyio"])
def make_waiter(request) -> Callable[[int], SocketWaiter]:
    return create_waiter if request.param == "best" else AnyioWaiter


def fill(sock: socket.socket) -> None:
    with suppress(BlockingIOError):
        while True:
            sock.send(b"x" * 65536)


def drain(sock: socket.socket) -> int:
    total = 0
    try:
        while data := sock.recv(1 << 20):
            total += len(data)
    except BlockingIOError:
        pass
    return total


async def test_chosen_for_the_running_loop(pair, anyio_backend_name) -> None:
    waiter = create_waiter(pair[0].fileno())
    expected = {"asyncio": "AsyncioWaiter", "trio": "TrioWaiter"}[anyio_backend_name]
    assert type(waiter).__name__ == expected
    waiter.close()


async def test_anyio_where_no_known_loop_runs(pair, monkeypatch) -> None:
    nothing_imported = SimpleNamespace(modules={}, platform=sys.platform)
    monkeypatch.setattr(_waiting, "sys", nothing_imported)
    waiter = create_waiter(pair[0].fileno())
    assert type(waiter) is AnyioWaiter


@pytest.mark.parametrize("is_known", [True, False])
async def test_the_current_tasks_number(is_known, monkeypatch) -> None:
    """The same throughout a task, another one in another task, and as AnyIO's."""
    if not is_known:
        monkeypatch.setattr(_waiting, "sys", SimpleNamespace(modules={}, platform=sys.platform))
    numbers: set[int] = set()
    all_noted = anyio.Event()

    async def look() -> None:
        number = current_task_id()
        assert number == anyio.get_current_task().id
        numbers.add(number)
        await all_noted.wait()
        assert number == current_task_id()

    async with anyio.create_task_group() as tg:
        for _ in range(3):
            tg.start_soon(look)
        await anyio.wait_all_tasks_blocked()
        all_noted.set()
        await look()
    assert len(numbers) == 4


@pytest.mark.parametrize("is_known", [True, False])
async def test_the_running_event_loop(is_known, monkeypatch) -> None:
    """What it gives is what AnyIO gives."""
    if not is_known:
        monkeypatch.setattr(_waiting, "sys", SimpleNamespace(modules={}, platform=sys.platform))
    loop = running_event_loop()
    assert anyio.current_time() <= loop.now() <= anyio.current_time()
    assert loop.task_id() == current_task_id()
    with loop.create_scope() as scope:
        scope.cancel()
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert scope.cancel_called


@pytest.mark.parametrize("name", ["asyncio", "trio"])
def test_the_running_event_loops_clock_is_a_virtual_one(name) -> None:
    clock = VirtualClock(name, autojump=None)

    async def look() -> None:
        now = running_event_loop().now
        clock.advance(1000.0)
        assert now() == anyio.current_time() == clock.time()

    backend, options = clock.backend
    anyio.run(look, backend=backend, backend_options=options)


async def test_readable_then_writable(pair, make_waiter) -> None:
    ours, theirs = pair
    waiter = make_waiter(ours.fileno())
    for _ in range(3):
        theirs.send(b"x")
        assert await waiter.wait(READ) == READ
        ours.recv(1)
    assert await waiter.wait(WRITE) == WRITE
    assert await waiter.wait(READ | WRITE) == WRITE
    theirs.send(b"x")
    assert await waiter.wait(READ | WRITE) & READ
    waiter.close()


async def test_wakes_a_parked_task(pair, make_waiter) -> None:
    ours, theirs = pair
    waiter = make_waiter(ours.fileno())
    got: list[int] = []

    async def reader() -> None:
        for _ in range(50):
            got.append(await waiter.wait(READ))
            ours.recv(1)

    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        for n in range(50):
            await anyio.wait_all_tasks_blocked()
            assert len(got) == n
            theirs.send(b"x")
            while len(got) == n:
                await anyio.lowlevel.checkpoint()
    assert got == [READ] * 50
    waiter.close()


@pytest.mark.parametrize("interest", [WRITE, READ | WRITE])
async def test_parks_until_writable(pair, make_waiter, interest) -> None:
    ours, theirs = pair
    fill(ours)
    waiter = make_waiter(ours.fileno())
    got: list[int] = []

    async def writer() -> None:
        got.append(await waiter.wait(interest))

    async with anyio.create_task_group() as tg:
        tg.start_soon(writer)
        await anyio.wait_all_tasks_blocked()
        assert got == []
        drain(theirs)
    assert got == [WRITE]
    waiter.close()


async def test_parks_for_either_and_reads(pair, make_waiter) -> None:
    ours, theirs = pair
    fill(ours)
    waiter = make_waiter(ours.fileno())
    got: list[int] = []

    async def either() -> None:
        got.append(await waiter.wait(READ | WRITE))

    async with anyio.create_task_group() as tg:
        tg.start_soon(either)
        await anyio.wait_all_tasks_blocked()
        theirs.send(b"x")
    assert got == [READ]
    waiter.close()


@pytest.mark.parametrize("interest", [READ, WRITE, READ | WRITE])
async def test_cancelled_wait_leaves_nothing(pair, make_waiter, interest) -> None:
    ours, theirs = pair
    fill(ours)
    waiter = make_waiter(ours.fileno())
    for _ in range(3):
        with anyio.move_on_after(0.01) as scope:
            # One bare exception, not a group: callers tell cancellation by its type.
            with pytest.raises(anyio.get_cancelled_exc_class()) as caught:
                await waiter.wait(interest)
            raise caught.value
        assert scope.cancelled_caught
    theirs.send(b"x")
    assert await waiter.wait(READ) == READ
    waiter.close()


@pytest.mark.parametrize("interest", [READ, WRITE, READ | WRITE])
async def test_close_wakes_a_waiter(pair, make_waiter, interest) -> None:
    ours, _ = pair
    fill(ours)
    waiter = make_waiter(ours.fileno())

    async def wait() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await waiter.wait(interest)

    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        waiter.close()
    waiter.close()
    with pytest.raises(anyio.ClosedResourceError):
        await waiter.wait(interest)
    with pytest.raises(anyio.ClosedResourceError):
        await waiter.wait_idle()


async def test_close_when_a_wait_is_about_to_begin(pair, make_waiter, anyio_backend_name) -> None:
    """The number belongs to another socket by then; nobody must wait for that one."""
    if anyio_backend_name != "trio":
        pytest.skip("asyncio registers at once")
    import trio
    import trio.testing

    ours, _ = pair
    fill(ours)
    number = ours.fileno()
    waiter = make_waiter(number)
    others: list[socket.socket] = []
    ended = False

    class CloseBeforeItsTasks(trio.abc.Instrument):
        def __init__(self) -> None:
            self.spawned: set[trio.lowlevel.Task] = set()

        def task_spawned(self, task: trio.lowlevel.Task) -> None:
            self.spawned.add(task)

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if task in self.spawned and not others:
                waiter.close()
                ours.close()
                others.extend(socket.socketpair())
                (heir,) = (other for other in others if other.fileno() == number)
                heir.setblocking(False)
                fill(heir)

    async def wait() -> None:
        nonlocal ended
        trio.lowlevel.add_instrument(closing)
        with pytest.raises(anyio.ClosedResourceError):
            await waiter.wait(READ | WRITE)
        ended = True

    closing = CloseBeforeItsTasks()
    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(closing)
        with others[0], others[1]:
            tg.cancel_scope.cancel()
            assert ended


async def test_two_tasks_at_once_are_refused(pair, make_waiter) -> None:
    ours, theirs = pair
    waiter = make_waiter(ours.fileno())
    async with anyio.create_task_group() as tg:
        tg.start_soon(waiter.wait, READ)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await waiter.wait(READ)
        theirs.send(b"x")
    waiter.close()


async def test_hang_up_is_readable(pair, make_waiter) -> None:
    ours, theirs = pair
    waiter = make_waiter(ours.fileno())
    assert await waiter.wait(WRITE) == WRITE
    theirs.close()
    assert await waiter.wait(READ) == READ
    assert await waiter.wait(READ | WRITE)
    waiter.close()


class TestIdleWatcher:
    async def test_woken_when_nobody_waits(self, pair, make_waiter) -> None:
        ours, theirs = pair
        waiter = make_waiter(ours.fileno())
        results: list[bool] = []

        async def watch() -> None:
            results.append(await waiter.wait_idle())

        async with anyio.create_task_group() as tg:
            tg.start_soon(watch)
            await anyio.wait_all_tasks_blocked()
            theirs.send(b"x")
        assert results == [True]
        ours.recv(1)
        waiter.close()

    async def test_gives_way_to_an_operation(self, pair, make_waiter) -> None:
        ours, theirs = pair
        waiter = make_waiter(ours.fileno())
        seen: list[bool] = []
        operations = 0

        async def watch() -> None:
            while True:
                seen.append(await waiter.wait_idle())

        async with anyio.create_task_group() as tg:
            tg.start_soon(watch)
            await anyio.wait_all_tasks_blocked()
            for _ in range(20):
                theirs.send(b"x")
                assert await waiter.wait(READ) == READ
                ours.recv(1)
                operations += 1
                # What an operation reads is not the watcher's.
                assert True not in seen
            tg.cancel_scope.cancel()
        assert operations == 20
        waiter.close()

    async def test_survives_an_operation_that_only_writes(self, pair, make_waiter) -> None:
        ours, theirs = pair
        fill(ours)
        waiter = make_waiter(ours.fileno())
        woken = anyio.Event()

        async def watch() -> None:
            while not await waiter.wait_idle():
                pass
            woken.set()

        async def write() -> None:
            assert await waiter.wait(WRITE) == WRITE

        async with anyio.create_task_group() as tg:
            tg.start_soon(watch)
            await anyio.wait_all_tasks_blocked()
            tg.start_soon(write)
            await anyio.wait_all_tasks_blocked()
            theirs.send(b"x")
            await anyio.wait_all_tasks_blocked()
            assert not woken.is_set()
            drain(theirs)
            with anyio.fail_after(5):
                await woken.wait()
        waiter.close()

    async def test_close_wakes_it(self, pair, make_waiter) -> None:
        waiter = make_waiter(pair[0].fileno())

        async def watch() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await waiter.wait_idle()

        async with anyio.create_task_group() as tg:
            tg.start_soon(watch)
            await anyio.wait_all_tasks_blocked()
            waiter.close()


async def test_a_reset_right_behind_data_is_served() -> None:
    """On uvloop an error drops the registration, and one read finds nothing but the data."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    client.setblocking(False)
    waiter = create_waiter(client.fileno())
    seen: list[bytes | None] = []

    def read_once() -> None:
        try:
            seen.append(client.recv(100))
        except ConnectionResetError:
            seen.append(None)
            waiter.close()

    with client, anyio.fail_after(10):
        async with anyio.create_task_group() as tg:

            async def serve() -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    await waiter.serve(read_once)

            tg.start_soon(serve)
            await anyio.wait_all_tasks_blocked()
            server.sendall(b"x")
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            server.close()  # by a reset
    assert seen == [b"x", None]


async def test_a_recycled_descriptor_is_no_stranger(make_waiter) -> None:
    """Driver study, pitfall 7: a stale registration makes a recycled number hang."""
    for _ in range(5):
        ours, theirs = socket.socketpair()
        waiter = make_waiter(ours.fileno())
        theirs.send(b"x")
        assert await waiter.wait(READ) == READ
        waiter.close()
        ours.close()
        theirs.close()


async def test_ready_socket_does_not_starve_the_loop(pair, make_waiter) -> None:
    ours, theirs = pair
    waiter = make_waiter(ours.fileno())
    turns = 0

    async def ticker() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    theirs.send(b"x")
    async with anyio.create_task_group() as tg:
        tg.start_soon(ticker)
        for _ in range(20_000):
            assert await waiter.wait(READ | WRITE)
        tg.cancel_scope.cancel()
    assert turns > 1
    waiter.close()


async def test_wait_socket_once(pair) -> None:
    ours, theirs = pair
    assert await wait_socket(ours.fileno(), WRITE) == WRITE
    assert await wait_socket(ours.fileno(), READ | WRITE) == WRITE
    theirs.send(b"x")
    assert await wait_socket(ours.fileno(), READ) == READ
    assert poll_now(ours.fileno(), READ | WRITE) == READ | WRITE
    ours.recv(1)
    assert poll_now(ours.fileno(), READ) == 0


class Unusual(BaseException):
    """Neither an Exception nor the event loop's own."""


class TestServing:
    async def test_calls_back_for_every_readiness(self, pair, make_waiter) -> None:
        ours, theirs = pair
        waiter = make_waiter(ours.fileno())
        got = bytearray()
        times: list[float] = []

        def on_readable() -> None:
            got.extend(ours.recv(1))
            # AnyIO's synchronous functions work although no task may be running.
            times.append(anyio.current_time() - waiter.now())
            anyio.Event().set()

        async with anyio.create_task_group() as tg:
            tg.start_soon(waiter.serve, on_readable)
            for expected in range(1, 30):
                theirs.send(b"x")
                with anyio.fail_after(5):
                    while len(got) < expected:
                        await anyio.lowlevel.checkpoint()
            tg.cancel_scope.cancel()
        assert all(abs(difference) < 1 for difference in times)
        theirs.send(b"x")
        await anyio.wait_all_tasks_blocked()
        assert len(got) == 29
        waiter.close()

    async def test_takes_the_place_of_a_waiting_task(self, pair, make_waiter) -> None:
        waiter = make_waiter(pair[0].fileno())
        async with anyio.create_task_group() as tg:
            tg.start_soon(waiter.serve, pytest.fail)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await waiter.serve(pytest.fail)
            tg.cancel_scope.cancel()
        waiter.close()
        with pytest.raises(anyio.ClosedResourceError):
            await waiter.serve(pytest.fail)

    async def test_close_ends_it(self, pair, make_waiter) -> None:
        waiter = make_waiter(pair[0].fileno())

        async def serve() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await waiter.serve(pytest.fail)

        async with anyio.create_task_group() as tg:
            tg.start_soon(serve)
            await anyio.wait_all_tasks_blocked()
            waiter.close()

    @pytest.mark.parametrize("kind", [ZeroDivisionError, Unusual])
    async def test_what_the_callback_raises_comes_out(self, pair, make_waiter, kind) -> None:
        ours, theirs = pair
        waiter = make_waiter(ours.fileno())

        def on_readable() -> None:
            ours.recv(1)
            raise kind

        theirs.send(b"x")
        with anyio.fail_after(5), pytest.raises(kind):
            await waiter.serve(on_readable)
        waiter.close()

    async def test_ctrl_c_in_the_callback_is_the_event_loops(self, pair) -> None:
        """As in any callback: asyncio and trio end their run with it."""
        ours, theirs = pair

        def run_a_loop(backend: str) -> None:
            async def main() -> None:
                waiter = create_waiter(ours.fileno())

                def on_readable() -> None:
                    ours.recv(1)
                    raise KeyboardInterrupt

                theirs.send(b"x")
                try:
                    await waiter.serve(on_readable)
                finally:
                    waiter.close()

            with pytest.raises(KeyboardInterrupt):
                anyio.run(main, backend=backend)

        for backend in ("asyncio", "trio"):
            await anyio.to_thread.run_sync(run_a_loop, backend)

    async def test_a_hang_up_is_told(self, pair, make_waiter) -> None:
        ours, theirs = pair
        waiter = make_waiter(ours.fileno())

        def on_readable() -> None:
            assert ours.recv(1) == b""
            waiter.close()

        async with anyio.create_task_group() as tg:

            async def serve() -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    await waiter.serve(on_readable)

            tg.start_soon(serve)
            await anyio.wait_all_tasks_blocked()
            theirs.close()

    async def test_plain_asyncio_needs_no_anyio_run(self, pair) -> None:
        """A program that never calls anyio.run: AnyIO can't tell the loop in a callback."""
        import asyncio

        def in_a_loop_of_its_own() -> None:
            async def main() -> None:
                ours, theirs = pair
                waiter = create_waiter(ours.fileno())
                done = asyncio.Event()

                def on_readable() -> None:
                    ours.recv(1)
                    anyio.current_time()
                    done.set()

                task = asyncio.create_task(waiter.serve(on_readable))
                theirs.send(b"x")
                await asyncio.wait_for(done.wait(), 5)
                task.cancel()
                waiter.close()

            asyncio.run(main())

        await anyio.to_thread.run_sync(in_a_loop_of_its_own)


class TestSignals:
    async def test_set_before_and_after(self, pair, make_waiter) -> None:
        waiter = make_waiter(pair[0].fileno())
        early, late = waiter.create_signal(), waiter.create_signal()
        early.set()
        early.set()
        await early.wait()
        async with anyio.create_task_group() as tg:
            tg.start_soon(late.wait)
            await anyio.wait_all_tasks_blocked()
            late.set()
        waiter.close()

    async def test_one_that_says_it_is_a_checkpoint(self, pair, make_waiter) -> None:
        """The wait for it notices a cancellation that nobody has looked for before."""
        waiter = make_waiter(pair[0].fileno())
        signal = waiter.create_signal()
        with anyio.fail_after(5), anyio.CancelScope() as scope:
            scope.cancel()
            if not signal.is_checkpoint:
                await anyio.lowlevel.checkpoint_if_cancelled()
            await signal.wait()
        assert scope.cancelled_caught
        signal.set()
        assert not signal.is_checkpoint
        await signal.wait()
        waiter.close()

    async def test_cancelled_wait(self, pair, make_waiter) -> None:
        waiter = make_waiter(pair[0].fileno())
        signal = waiter.create_signal()
        for _ in range(2):
            with anyio.move_on_after(0.01) as scope:
                await signal.wait()
            assert scope.cancelled_caught
        signal.set()
        await signal.wait()
        waiter.close()

    async def test_set_from_a_callback(self, pair, make_waiter) -> None:
        ours, theirs = pair
        waiter = make_waiter(ours.fileno())
        signal = waiter.create_signal()

        def on_readable() -> None:
            ours.recv(1)
            signal.set()
            signal.set()

        async with anyio.create_task_group() as tg:
            tg.start_soon(waiter.serve, on_readable)
            await anyio.wait_all_tasks_blocked()
            theirs.send(b"x")
            with anyio.fail_after(5):
                await signal.wait()
            tg.cancel_scope.cancel()
        waiter.close()

    async def test_set_by_a_task_beside_one_that_serves(self, pair, make_waiter) -> None:
        waiter = make_waiter(pair[0].fileno())
        signal = waiter.create_signal()
        async with anyio.create_task_group() as tg:
            tg.start_soon(waiter.serve, pytest.fail)
            await anyio.wait_all_tasks_blocked()
            tg.start_soon(signal.wait)
            await anyio.wait_all_tasks_blocked()
            signal.set()
            with anyio.fail_after(5):
                await signal.wait()
            await anyio.wait_all_tasks_blocked()
            tg.cancel_scope.cancel()
        waiter.close()

    async def test_many_wait_while_one_serves(self, pair, make_waiter) -> None:
        """Whoever reads, everything is read and everybody is woken."""
        ours, theirs = pair
        waiter = make_waiter(ours.fileno())
        signals = [waiter.create_signal() for _ in range(20)]
        woken: list[int] = []

        def on_readable() -> None:
            with suppress(BlockingIOError):  # called for nothing, which is allowed
                signals[ours.recv(1)[0]].set()

        async def wait(number: int) -> None:
            await signals[number].wait()
            woken.append(number)

        async with anyio.create_task_group() as tg:
            tg.start_soon(waiter.serve, on_readable)
            await anyio.wait_all_tasks_blocked()
            for number in range(20):
                tg.start_soon(wait, number)
            await anyio.wait_all_tasks_blocked()
            theirs.send(bytes(range(10)))
            with anyio.fail_after(5):
                while len(woken) < 10:
                    await anyio.lowlevel.checkpoint()
            assert sorted(woken) == list(range(10))
            await anyio.wait_all_tasks_blocked()
            for number in reversed(range(10, 20)):
                theirs.send(bytes([number]))
                with anyio.fail_after(5):
                    while number not in woken:
                        await anyio.lowlevel.checkpoint()
            tg.cancel_scope.cancel()
        assert sorted(woken) == list(range(20))
        waiter.close()

    async def test_a_cancelled_wait_leaves_the_one_that_serves(self, pair, make_waiter) -> None:
        ours, theirs = pair
        waiter = make_waiter(ours.fileno())
        got: list[bytes] = []

        async with anyio.create_task_group() as tg:
            tg.start_soon(waiter.serve, lambda: got.append(ours.recv(1)))
            await anyio.wait_all_tasks_blocked()
            for _ in range(3):
                with anyio.move_on_after(0.01) as scope:
                    await waiter.create_signal().wait()
                assert scope.cancelled_caught
                theirs.send(b"x")
                await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(5):
                while len(got) < 3:
                    await anyio.lowlevel.checkpoint()
            tg.cancel_scope.cancel()
        assert got == [b"x"] * 3
        waiter.close()

    @pytest.mark.parametrize("kind", [ZeroDivisionError, Unusual])
    async def test_what_the_callback_raises_is_not_the_waiters(
        self, pair, make_waiter, kind
    ) -> None:
        ours, theirs = pair
        waiter = make_waiter(ours.fileno())
        signal = waiter.create_signal()
        outcomes: list[str] = []

        def on_readable() -> None:
            ours.recv(1)
            raise kind

        async def serve() -> None:
            with pytest.raises(kind):
                await waiter.serve(on_readable)
            outcomes.append("raised where it was served")
            await anyio.wait_all_tasks_blocked()
            signal.set()

        async def wait() -> None:
            await signal.wait()
            outcomes.append("set")

        with anyio.fail_after(5):
            async with anyio.create_task_group() as tg:
                tg.start_soon(serve)
                await anyio.wait_all_tasks_blocked()
                tg.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                theirs.send(b"x")
        assert outcomes == ["raised where it was served", "set"]
        waiter.close()

    @pytest.mark.parametrize("how", ["close", "cancel"])
    async def test_the_end_of_serving_ends_no_wait(self, pair, make_waiter, how) -> None:
        ours, theirs = pair
        waiter = make_waiter(ours.fileno())
        signal = waiter.create_signal()
        is_woken = False

        async def serve(scope: anyio.CancelScope) -> None:
            with scope, suppress(anyio.ClosedResourceError):
                await waiter.serve(pytest.fail)

        async def wait() -> None:
            nonlocal is_woken
            await signal.wait()
            is_woken = True

        async with anyio.create_task_group() as tg:
            serving = anyio.CancelScope()
            tg.start_soon(serve, serving)
            await anyio.wait_all_tasks_blocked()
            tg.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            if how == "close":
                waiter.close()
            else:
                serving.cancel()
            theirs.send(b"x")  # nobody's any more
            await anyio.wait_all_tasks_blocked()
            assert not is_woken
            signal.set()
        assert is_woken
        waiter.close()

    @pytest.mark.parametrize("is_awaited", [False, True])
    async def test_closed_in_the_turn_in_which_data_came(
        self, pair, make_waiter, is_awaited
    ) -> None:
        """No calls come after `close`, whichever of the two runs first."""
        ours, theirs = pair
        for _ in range(20):
            waiter = make_waiter(ours.fileno())
            signal = waiter.create_signal()
            is_closed = False

            def on_readable() -> None:
                ours.recv(1)
                assert not is_closed  # noqa: B023 - of this round

            async def serve() -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    await waiter.serve(on_readable)  # noqa: B023 - of this round

            async with anyio.create_task_group() as tg:
                tg.start_soon(serve)
                await anyio.wait_all_tasks_blocked()
                if is_awaited:
                    tg.start_soon(signal.wait)
                    await anyio.wait_all_tasks_blocked()
                theirs.send(b"x")
                await anyio.lowlevel.checkpoint()
                is_closed = True
                waiter.close()
                signal.set()
            drain(ours)

    @pytest.mark.parametrize("closes", ["callback", "other task"])
    async def test_without_epoll(self, pair, monkeypatch, anyio_backend_name, closes) -> None:
        """As on macOS: nobody reads in the place of another."""
        if anyio_backend_name != "trio":
            pytest.skip("only trio's waiter has a use for it")
        from pgstructured.driver import _waiting_trio

        monkeypatch.setattr(_waiting_trio, "_HAS_EPOLL", False)
        ours, theirs = pair
        waiter = create_waiter(ours.fileno())
        signals = [waiter.create_signal() for _ in range(3)]
        left = list(signals)

        def on_readable() -> None:
            ours.recv(1)
            left.pop(0).set()
            if not left and closes == "callback":
                waiter.close()

        async def serve() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await waiter.serve(on_readable)

        async with anyio.create_task_group() as tg:
            tg.start_soon(serve)
            for signal in signals:
                theirs.send(b"x")
                with anyio.fail_after(5):
                    await signal.wait()
            waiter.close()
