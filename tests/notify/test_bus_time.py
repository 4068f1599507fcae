"""The bus over long times, which are virtual here."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from pgstructured.errors import BusUnavailableError
from pgstructured.notify import open_notify_bus
from pgstructured.testing import virtual_backend

NAMES: list[Any] = ["asyncio", "trio"]


# A moment of real time before each jump: the server is real, and may be slow.
with_a_server = pytest.mark.parametrize(
    "anyio_backend",
    [virtual_backend(name, autojump=0.7) for name in NAMES],
    ids=NAMES,
    scope="module",
)
without_one = pytest.mark.parametrize(
    "anyio_backend",
    [virtual_backend(name, autojump=0.05) for name in NAMES],
    ids=NAMES,
    scope="module",
)


@with_a_server
async def test_an_hour_of_lingering(kit) -> None:
    async with open_notify_bus(kit.dsn, unlisten_linger=3600, heartbeat=None) as bus:
        async with bus.subscribe("a"):
            pass
        left_at = anyio.current_time()
        await anyio.sleep(3500)
        assert await kit.listening(bus) == {"a"}
        await kit.eventually(lambda: not bus.channels, every=30)
        assert anyio.current_time() - left_at >= 3600
        assert await kit.listening(bus) == set()


@with_a_server
async def test_a_day_of_silence_is_no_loss(kit) -> None:
    async with (
        open_notify_bus(kit.dsn, heartbeat=14_400) as bus,
        bus.subscribe("a") as subscription,
    ):
        await anyio.sleep(86_400)
        assert bus.generation == 1
        assert bus.statistics().heartbeat_rtt is not None
        kit.notify("a", "x")
        assert await kit.take(subscription, 1) == ["x"]


@without_one
async def test_ten_minutes_of_refusals() -> None:
    """Attempts grow rarer: thirty seconds at most between two, full jitter."""
    began = anyio.current_time()
    with pytest.raises(BusUnavailableError):
        async with open_notify_bus(
            "host=127.0.0.1 port=1", initial_connect="background", max_outage=600
        ) as bus:
            await anyio.sleep_forever()
    assert 600 <= anyio.current_time() - began < 700
    assert 20 < bus.statistics().attempts < 120
