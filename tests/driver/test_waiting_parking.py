"""Parking: one task waits, another wakes it, on the known loops and on any."""

from __future__ import annotations

import sys

import anyio
import pytest

from pgstructured.driver import _waiting_parking
from pgstructured.driver._waiting_parking import Parking, create_parking
from pgstructured.testing import assert_cancellable


@pytest.fixture(params=["of the loop", "of any loop"])
def parking(request, anyio_backend) -> Parking:
    if request.param == "of any loop":
        return _waiting_parking._AnyioParking()
    return None  # type: ignore[return-value] # made by the test, inside of the loop


async def wait(parking: Parking, woken: list[int]) -> None:
    await parking.wait()
    woken.append(1)


async def test_woken_again_and_again(parking) -> None:
    parking = parking or create_parking()
    woken: list[int] = []
    parking.wake()  # nobody is there
    for count in range(3):
        async with anyio.create_task_group() as tg:
            tg.start_soon(wait, parking, woken)
            await anyio.wait_all_tasks_blocked()
            assert len(woken) == count
            parking.wake()
            parking.wake()  # on its way already
        assert len(woken) == count + 1


async def test_cancelled(parking) -> None:
    parking = parking or create_parking()

    async def one() -> None:
        await parking.wait()

    await assert_cancellable(one)
    woken: list[int] = []
    with anyio.move_on_after(0.01):
        await wait(parking, woken)
    parking.wake()  # nobody is there any more
    assert not woken
    async with anyio.create_task_group() as tg:
        tg.start_soon(wait, parking, woken)
        await anyio.wait_all_tasks_blocked()
        parking.wake()
    assert woken


async def test_which_one() -> None:
    kind = type(create_parking()).__name__
    trio = sys.modules.get("trio")
    runs_trio = trio is not None and trio.lowlevel.in_trio_task()
    assert kind == ("_TrioParking" if runs_trio else "_AsyncioParking")


def test_where_no_loop_is_known(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncio", None)
    made: list[str] = []
    monkeypatch.setattr(_waiting_parking, "_AnyioParking", lambda: made.append("of any loop"))
    create_parking()
    assert made == ["of any loop"]
