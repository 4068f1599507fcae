"""Medians over rounds of ratios within a round, and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ._suite import Metric, Target
    from ._workers import Outcome, Sample

Verdict = Literal["met", "missed", "open", "not measured", ""]


@dataclass(frozen=True, slots=True)
class Figure:
    """A median and the interval that holds it with 95 % confidence (order statistics)."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Judged:
    """A target and what became of it."""

    target: Target
    ratio: Figure | None
    verdict: Verdict


def figure(values: list[float]) -> Figure:
    """Return the median of ``values`` with its interval."""
    ordered = sorted(values)
    reach = int(0.98 * sqrt(len(ordered))) + 1
    middle = (len(ordered) - 1) / 2
    low = ordered[max(0, int(middle - reach))]
    high = ordered[min(len(ordered) - 1, int(middle + reach + 0.5))]
    return Figure(median(ordered), low, high)


def reading(sample: Sample, metric: Metric) -> float:
    """Return what ``metric`` is in ``sample``: microseconds, or units per second."""
    if metric == "rate":
        return 1e6 / sample.wall
    if metric in sample.figures:
        return sample.figures[metric]
    return sample.cpu if metric == "cpu" else sample.p50


def judge(outcome: Outcome, target: Target) -> Judged:
    """Compare the two variants of ``target``, round by round, or one with its limit.

    The verdict goes by the median. "open" says that the limit is missed by less than what
    the noise of this run can tell.
    """
    subject = outcome.samples.get(target.subject)
    if not subject:
        return Judged(target, None, "not measured")
    readings = [reading(sample, target.metric) for sample in subject]
    if target.baseline is not None:
        baseline = outcome.samples.get(target.baseline)
        if not baseline:
            return Judged(target, None, "not measured")
        readings = [
            ours / reading(theirs, target.metric)
            for ours, theirs in zip(readings, baseline, strict=True)
        ]
    ratio = figure(readings)
    if target.at_most is not None:
        return Judged(
            target, ratio, _verdict(ratio.median <= target.at_most, ratio.low <= target.at_most)
        )
    if target.at_least is not None:
        return Judged(
            target, ratio, _verdict(ratio.median >= target.at_least, ratio.high >= target.at_least)
        )
    return Judged(target, ratio, "")


def _verdict(met: bool, possible: bool) -> Verdict:
    if met:
        return "met"
    return "open" if possible else "missed"
