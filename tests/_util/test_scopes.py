"""Background tasks that end with their block, and say one cause as itself."""

from __future__ import annotations

import anyio
import pytest

from pgstructured._util import open_background


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
