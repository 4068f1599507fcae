"""Backoff: its arithmetic, with no clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings, strategies as st

from pgstructured import Backoff


def test_the_bound_doubles_up_to_the_maximum():
    backoff = Backoff(initial=0.5, maximum=3.0, factor=2.0)
    assert [backoff.bound(attempt) for attempt in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


@settings(deadline=None)
@given(st.integers(0, 10**9))
def test_a_delay_lies_below_its_bound_also_after_years_of_failures(attempt):
    backoff = Backoff(initial=0.1, maximum=30.0)
    assert 0 <= backoff.delay(attempt) <= backoff.bound(attempt) <= 30.0


def test_delays_differ():
    backoff = Backoff()
    assert len({backoff.delay(3) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    "figures",
    [
        {"initial": 0},
        {"initial": -1},
        {"initial": math.nan},
        {"maximum": math.inf},
        {"initial": 2, "maximum": 1},
        {"factor": 0.5},
        {"reset_after": -1},
    ],
)
def test_impossible_figures_are_refused(figures):
    with pytest.raises(ValueError, match="backoff"):
        Backoff(**figures)
