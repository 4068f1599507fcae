"""Virtual time, the sequencer and the assertion, on every backend."""

from __future__ import annotations

import time

import anyio
import anyio.lowlevel
import pytest

from pgstructured.testing import Sequencer, VirtualClock, assert_cancellable, virtual_backend

NAMES = ("asyncio", "trio")


def run(clock, fn):
    name, options = clock.backend
    return anyio.run(fn, backend=name, backend_options=options)


async def settle():
    # AnyIO's own `wait_all_tasks_blocked` sleeps on asyncio, and here nobody would wake it.
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("name", NAMES)
def test_waits_cost_nothing(name):
    clock = VirtualClock(name)

    async def main():
        before = anyio.current_time()
        assert before == clock.time()
        with anyio.move_on_after(1800):
            await anyio.sleep(3600)
        assert anyio.current_time() - before == pytest.approx(1800)
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 5)
            await anyio.sleep(7)
        assert clock.time() - before == pytest.approx(1807)

    started = time.monotonic()
    run(clock, main)
    assert time.monotonic() - started < 1000


@pytest.mark.parametrize("name", NAMES)
def test_only_the_test_moves_it(name):
    clock = VirtualClock(name, autojump=None)

    async def main():
        woken = []

        async def sleep(seconds):
            await anyio.sleep(seconds)
            woken.append(seconds)

        async with anyio.create_task_group() as group:
            group.start_soon(sleep, 10)
            group.start_soon(sleep, 20)
            await settle()
            clock.advance(10)
            await settle()
            assert woken == [10]
            # Real I/O goes on: the loop waits for a thread.
            await anyio.to_thread.run_sync(time.sleep, 0.01)
            assert woken == [10]
            clock.advance(10)
        assert woken == [10, 20]

    run(clock, main)


@pytest.mark.parametrize("name", NAMES)
def test_io_is_given_a_moment(name):
    async def main():
        with anyio.fail_after(3600):
            await anyio.to_thread.run_sync(time.sleep, 0.01)

    run(VirtualClock(name, autojump=10.0), main)


def test_time_does_not_go_backwards():
    with pytest.raises(ValueError, match="backwards"):
        VirtualClock("asyncio").advance(-1)


class TestAsAFixture:
    @pytest.fixture(params=NAMES)
    def anyio_backend(self, request):
        return virtual_backend(request.param)

    async def test_a_day(self):
        await anyio.sleep(86_400)

    async def test_another(self):
        await anyio.sleep(86_400)


# ---------------------------------------------------------------- sequencer


async def test_blocks_run_in_their_order():
    sequencer = Sequencer()
    order = []

    async def worker(*positions):
        for position in positions:
            async with sequencer(position):
                order.append(position)

    async with anyio.create_task_group() as group:
        group.start_soon(worker, 1, 3)
        group.start_soon(worker, 0, 2)
        group.start_soon(worker, 4)
    assert order == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="block 4"):
        async with sequencer(4):
            pass


async def test_a_cancelled_block_lets_the_next_one_in():
    sequencer = Sequencer()
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with sequencer(1):
            pass
    with anyio.fail_after(5):
        async with sequencer(2):
            pass


# ---------------------------------------------------------------- assertion


async def test_assert_cancellable():
    await assert_cancellable(anyio.lowlevel.checkpoint)

    async def never():
        pass

    with pytest.raises(AssertionError, match="never noticed"):
        await assert_cancellable(never)
