"""The table for people and the JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

from ._statistics import Figure, Judged, figure, judge, reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._suite import Metric, Target
    from ._workers import Outcome

MANY = 1000  # from which on figures need no decimals
MARKS = {"met": "ok", "missed": "MISSED", "open": "open", "not measured": "not measured", "": ""}
METRICS: dict[Metric, str] = {"cpu": "CPU", "p50": "p50", "rate": "rate"}


def as_text(outcome: Outcome) -> Iterator[str]:
    """Yield the lines of a benchmark's table."""
    benchmark = outcome.benchmark
    yield f"{benchmark.name}: {benchmark.title}"
    what = "figures of" if benchmark.figures else "microseconds per"
    yield f"  medians of {outcome.rounds} rounds, {what} {benchmark.unit}"
    own = benchmark.figures
    heads = (
        "".join(f"{name:>12}" for name in own) or f"{'client CPU':>12}{'p50':>12}{'per second':>14}"
    )
    yield f"  {'':34}{heads}"
    for variant in benchmark.variants:
        label = variant.label
        if samples := outcome.samples.get(label):
            values = [
                median(reading(sample, metric) for sample in samples) for metric in own or METRICS
            ]
            widths = ("12.2f",) * len(own) or ("12.2f", "12.2f", "14,.0f")
            shown = "".join(f"{value:{width}}" for value, width in zip(values, widths, strict=True))
            yield f"  {label:34}{shown}"
        elif label in outcome.missing:
            yield f"  {label:34}not available: {outcome.missing[label]}"
        else:
            yield f"  {label:34}FAILED: {outcome.errors[label].splitlines()[-1]}"
    yield ""
    yield f"  {'ratio':60}{'median':>8}   {'95 %':12}   wanted"
    for target in benchmark.targets:
        yield f"  {_target_line(judge(outcome, target))}".rstrip()
    yield ""


def _target_line(judged: Judged) -> str:
    target, ratio = judged.target, judged.ratio
    metric = METRICS.get(target.metric, target.metric)
    baseline = "" if target.baseline is None else f"  :  {target.baseline}"
    what = f"{metric:4} {target.subject}{baseline}"
    if ratio is None:
        measured = f"{'-':>8}   {'':12}"
    else:
        digits = 2 if ratio.median < MANY else 0
        interval = f"{ratio.low:.{digits}f}-{ratio.high:.{digits}f}"
        measured = f"{ratio.median:8.{digits}f}   {interval:12}"
    return f"{what:60}{measured}   {_limit(target):12}{MARKS[judged.verdict]}"


def _limit(target: Target) -> str:
    if target.at_most is not None:
        return f"<= {_short(target.at_most)}"
    return "" if target.at_least is None else f">= {_short(target.at_least)}"


def _short(limit: float) -> str:
    return f"{limit:.2f}" if limit < MANY else f"{limit:,.0f}"


def as_data(outcome: Outcome) -> dict[str, Any]:
    """Return everything that a benchmark gave, for JSON."""
    return {
        "title": outcome.benchmark.title,
        "unit": outcome.benchmark.unit,
        "rounds": outcome.rounds,
        "scale": outcome.scale,
        "variants": {
            label: {
                **{
                    metric: _as_dict(figure([reading(sample, metric) for sample in samples]))
                    for metric in (*METRICS, *outcome.benchmark.figures)
                },
                "samples": [asdict(sample) for sample in samples],
            }
            for label, samples in outcome.samples.items()
        },
        "missing": outcome.missing,
        "errors": outcome.errors,
        "ratios": [
            {
                **asdict(judged.target),
                "ratio": None if judged.ratio is None else _as_dict(judged.ratio),
                "verdict": judged.verdict,
            }
            for judged in (judge(outcome, target) for target in outcome.benchmark.targets)
        ],
    }


def _as_dict(value: Figure) -> dict[str, float]:
    return {key: round(number, 4) for key, number in asdict(value).items()}
