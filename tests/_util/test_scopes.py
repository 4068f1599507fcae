"""Background tasks that end with their block, and say one cause as itself."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from pgstructured._util import contained, open_background


class BodyError(Exception):
    pass


class TaskError(Exception):
    pass


async def fail():
    raise TaskError


async def fail_when_cancelled():
    try:
        await anyio.sleep_forever()
    finally:
        raise TaskError


async def test_leaving_ends_what_still_runs():
    ended = anyio.Event()

    async def run():
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    async with open_background() as tasks:
        tasks.start_soon(run)
        await anyio.wait_all_tasks_blocked()
    assert ended.is_set()


async def test_the_bodys_error_comes_out_as_itself():
    error = BodyError()
    with pytest.raises(BodyError) as caught:
        async with open_background() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            raise error
    assert caught.value is error


async def test_a_tasks_error_cancels_the_body_and_comes_out_as_itself():
    with pytest.raises(TaskError):
        async with open_background() as tasks:
            tasks.start_soon(fail)
            await anyio.sleep_forever()


async def test_two_causes_stay_a_group():
    with pytest.raises(ExceptionGroup) as caught:
        async with open_background() as tasks:
            tasks.start_soon(fail_when_cancelled)
            await anyio.wait_all_tasks_blocked()
            raise BodyError
    assert {type(error) for error in caught.value.exceptions} == {BodyError, TaskError}


async def test_a_cancellation_from_outside_goes_through():
    with anyio.CancelScope() as scope:
        async with open_background() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_contained_task_is_as_any_other():
    with pytest.raises(TaskError):
        async with open_background() as tasks:
            tasks.start_soon(contained, fail)
            await anyio.sleep_forever()
    async with open_background() as tasks:
        tasks.start_soon(contained, nest)
        await anyio.wait_all_tasks_blocked()


async def nest():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        await anyio.sleep_forever()


async def test_asyncios_own_cancellation_while_it_is_left(cancel_at, anyio_backend_name):
    """AnyIO counts what the inner group has cancelled as if it had cancelled the outer one."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than that of scopes")

    async def work():
        async with open_background() as tasks:
            tasks.start_soon(contained, nest)
            await anyio.lowlevel.checkpoint()
        ended.append(number)

    ended: list[int] = []
    for number in range(100):

        async def run(number=number):
            await cancel_at(work(), asyncio.current_task(), number)

        task = asyncio.ensure_future(run())
        await asyncio.wait([task])
        if not task.cancelled():
            break
        assert task.cancelling() == 1
    assert ended == [number]  # for the last one there was nothing to cancel
    assert number >= 2
    assert task.cancelling() == 0


async def test_asyncio_cancels_a_background_task(anyio_backend_name):
    """The body would be cancelled, and nobody told: a block that seems to have gone well."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than that of scopes")
    others = asyncio.all_tasks()
    is_over = False
    with pytest.raises(RuntimeError, match="cut short"):
        async with open_background() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            await anyio.wait_all_tasks_blocked()
            for task in asyncio.all_tasks() - others:
                task.cancel()
            await anyio.sleep(20)
            is_over = True
    assert not is_over
