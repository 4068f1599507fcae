"""Supervision under virtual time: attempts, backoff, generations, outages."""

from __future__ import annotations

import itertools

import anyio
import psycopg
import pytest

from pgstructured import _util
from pgstructured.observe import Event, instrumented
from pgstructured.supervise import GaveUp, Supervision, heals, supervise
from pgstructured.testing import virtual_backend

STEADY = _util.Backoff(initial=1.0, maximum=8.0, factor=2.0, reset_after=10.0)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return virtual_backend(request.param)


@pytest.fixture
def longest_delays(monkeypatch):
    """Full jitter's upper edge, so that a wait is a known figure."""
    monkeypatch.setattr("random.uniform", lambda low, high: high)


class Scripted:
    """An attempt that does what a list says, then stays live."""

    def __init__(self, *steps: object) -> None:
        self.steps = list(steps)
        self.began: list[float] = []

    async def __call__(self, supervision: Supervision) -> None:
        self.began.append(anyio.current_time())
        step = self.steps.pop(0) if self.steps else "live"
        if isinstance(step, BaseException):
            raise step
        if isinstance(step, float):
            await anyio.sleep(step)
            raise psycopg.OperationalError("connecting took long and failed")
        supervision.declare_live()
        if isinstance(step, tuple):
            await anyio.sleep(step[0])
            if step[1] is not None:
                raise step[1]
            return
        await anyio.sleep_forever()


async def run(attempt: Scripted, seconds: float, **options) -> Supervision:
    state = Supervision()
    with anyio.move_on_after(seconds):
        await supervise(attempt, what="it", supervision=state, **{"backoff": STEADY, **options})
    return state


def gaps(times: list[float]) -> list[float]:
    return [round(later - earlier, 2) for earlier, later in itertools.pairwise(times)]


async def test_first_attempt_makes_generation_one(longest_delays) -> None:
    attempt = Scripted()
    state = await run(attempt, 5)
    assert (state.generation, state.attempts, state.failures) == (1, 1, 0)
    assert state.live_since is not None


async def test_delays_grow_to_the_maximum(longest_delays) -> None:
    refused = psycopg.OperationalError("refused")
    attempt = Scripted(*[refused] * 6)
    state = await run(attempt, 100)
    assert gaps(attempt.began) == [1, 2, 4, 8, 8, 8]
    assert state.generation == 1
    assert state.attempts == 7


async def test_the_count_starts_anew_only_after_healthy_time(longest_delays) -> None:
    lost = psycopg.OperationalError("lost")
    attempt = Scripted(lost, lost, (1.0, lost), (10.0, lost), (0.0, None))
    state = await run(attempt, 200)
    # A second live is no health: the delay goes on growing; ten seconds are.
    assert gaps(attempt.began) == [1, 2, 1 + 4, 10 + 1, 2]
    assert state.generation == 4
    assert "ended" in str(state.last_error)


async def test_an_error_that_does_not_heal_comes_out(longest_delays) -> None:
    with pytest.raises(psycopg.errors.InvalidPassword):
        await run(Scripted(psycopg.errors.InvalidPassword("no")), 5)
    with pytest.raises(ZeroDivisionError):
        await run(Scripted(ZeroDivisionError()), 5)
    attempt = Scripted(ZeroDivisionError())
    state = await run(attempt, 5, is_transient=lambda exc: True)
    assert state.generation == 1


async def test_max_outage_counts_from_the_beginning(longest_delays) -> None:
    refused = psycopg.OperationalError("refused")
    began = anyio.current_time()
    with pytest.raises(GaveUp) as caught:
        await run(Scripted(*[refused] * 9), 100, max_outage=5.0)
    assert anyio.current_time() - began == pytest.approx(5, abs=0.1)
    assert caught.value.__cause__ is refused
    assert caught.value.last_error is refused


async def test_max_outage_cuts_an_attempt_short(longest_delays) -> None:
    began = anyio.current_time()
    with pytest.raises(GaveUp) as caught:
        await run(Scripted(60.0), 100, max_outage=5.0)
    assert anyio.current_time() - began == pytest.approx(5, abs=0.1)
    assert "still connecting" in str(caught.value.last_error)
    assert caught.value.__cause__ is caught.value.last_error


async def test_max_outage_counts_from_the_last_live_moment(longest_delays) -> None:
    lost = psycopg.OperationalError("lost")
    began = anyio.current_time()
    with pytest.raises(GaveUp):
        await run(Scripted((50.0, lost), *[lost] * 20), 1000, max_outage=5.0)
    assert anyio.current_time() - began == pytest.approx(55, abs=0.1)


async def test_events_tell_of_every_attempt(longest_delays) -> None:
    seen: list[Event] = []
    lost = psycopg.OperationalError("lost")
    with instrumented(seen.append):
        await run(Scripted(lost, lost), 20)
    assert [event.name for event in seen] == ["supervise.attempt_failed"] * 2
    assert [event.facts["delay"] for event in seen] == [1, 2]
    assert seen[0].facts["error"] is lost


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (psycopg.OperationalError("refused"), True),
        (psycopg.errors.CannotConnectNow("starting up"), True),
        (psycopg.errors.TooManyConnections("53300"), True),
        (psycopg.errors.AdminShutdown("57P01"), True),
        (psycopg.errors.InvalidPassword("28P01"), False),
        (psycopg.errors.InvalidCatalogName("3D000"), False),
        (psycopg.errors.ReadOnlySqlTransaction("25006"), True),
        (ConnectionResetError(), True),
        (ValueError(), False),
    ],
)
async def test_what_heals(error, expected) -> None:
    assert heals(error) is expected


async def test_a_supervision_of_nothing_counts_too() -> None:
    supervision = Supervision()
    assert supervision.declare_live() == 1
    assert supervision.declare_live() == 2
