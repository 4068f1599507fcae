"""Events reach the log and every instrument, and nothing that listens can do harm."""

from __future__ import annotations

import logging
import math

import anyio
import pytest

from pgstructured.observe import EVENTS, Event, emit, instrumented


async def test_an_instrument_is_told_what_the_table_lists():
    seen: list[Event] = []
    before = anyio.current_time()
    with instrumented(seen.append):
        emit("lock.released", key="a key", held_for=1.0)
    emit("lock.released", key="another", held_for=1.0)  # nobody listens any more
    (event,) = seen
    assert event.name == "lock.released"
    assert event.facts == {"key": "a key", "held_for": 1.0}
    assert before <= event.at <= anyio.current_time()
    with pytest.raises(TypeError):
        event.facts["key"] = "changed"  # type: ignore[index]


def test_an_event_outside_of_an_event_loop() -> None:
    seen: list[Event] = []
    with instrumented(seen.append):
        emit("driver.failed", backend_pid=1, error=None)
    [event] = seen
    assert event.name == "driver.failed"
    assert math.isnan(event.at)


async def test_instruments_nest_and_end_with_their_block():
    first: list[Event] = []
    second: list[Event] = []
    with instrumented(first.append):
        with instrumented(second.append), instrumented(second.append):
            emit("bus.closed", generation=1)
        emit("bus.closed", generation=2)
    assert [event.facts["generation"] for event in first] == [1, 2]
    assert [event.facts["generation"] for event in second] == [1, 1]


async def test_an_instrument_that_raises_harms_nobody(caplog):
    seen: list[Event] = []

    def broken(event):
        raise RuntimeError("an instrument's own fault")

    with instrumented(broken), instrumented(seen.append):
        emit("bus.closed", generation=1)
    assert len(seen) == 1
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "bus.closed" in record.getMessage()
    assert isinstance(record.exc_info[1], RuntimeError)


def test_the_log_has_them_too(caplog):
    with caplog.at_level(logging.INFO, logger="pgstructured"):
        emit("lock.released", key="a key", held_for=1.0)
        emit("lock.acquire_started", key="a key", shared=False)  # DEBUG
    (record,) = caplog.records
    assert record.name == "pgstructured.locks"
    assert record.levelno == logging.INFO
    assert "key='a key'" in record.getMessage()
    assert record.facts == {"key": "a key", "held_for": 1.0}


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_has_a_room_a_level_and_a_meaning(name, caplog):
    kind = EVENTS[name]
    with caplog.at_level(logging.DEBUG, logger="pgstructured"):
        emit(name, **dict.fromkeys(kind.facts))
    (record,) = caplog.records
    assert record.name.startswith("pgstructured.")
    assert record.levelno == kind.level
    assert kind.meaning in record.getMessage()


def test_an_event_that_is_not_in_the_table_is_a_mistake():
    with pytest.raises(KeyError):
        emit("lock.forgotten")
