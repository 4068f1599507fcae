"""``python -m benchmarks.lock_history``: run, print the counts, fail on a violation."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._checker import Violation, check, find_outlived, find_unexplained
from ._conductor import run
from ._history import Figures

if TYPE_CHECKING:
    from ._history import History

SHOWN = 20


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lock_history", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long things break")
    parser.add_argument("--seed", type=int, default=1, help="what the lots are drawn from")
    parser.add_argument("--processes", type=int, default=3, help="workers; their loops alternate")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="seconds a busy machine may add to anything"
    )
    parser.add_argument("--calm", action="store_true", help="break nothing")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the histories there")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.add_argument(
        "--lie", choices=("no lock", "deaf", "leak"), help="let workers cheat: this has to fail"
    )
    return parser.parse_args()


def count(history: History, violations: list[Violation]) -> dict[str, Any]:
    """Return what there was of everything."""
    return {
        "operations": len(history.operations),
        "outcomes": dict(Counter(operation.outcome for operation in history.operations)),
        "grants": len(history.grants),
        "fenced grants": sum(grant.token is not None for grant in history.grants),
        "losses": dict(
            Counter(grant.reason for grant in history.grants if grant.reason in REASONS)
        ),
        "unexplained silence": len(find_unexplained(history)),
        "cancelled bodies outlived": len(find_outlived(history)),
        "releases unconfirmed": sum(grant.release_failed for grant in history.grants),
        "guarded writes": len(history.log),
        "processes": len({operation.process for operation in history.operations}),
        "faults": dict(Counter(fault.kind for fault in history.faults)),
        "violations": dict(Counter(violation.check for violation in violations)),
    }


REASONS = (
    "terminated",
    "crashed",
    "disconnected",
    "idle_timeout",
    "unconfirmed",
    "expired",
    "closed",
    "not_primary",
    "fenced",
)


def main() -> int:
    """Run what the command line asks for; 1 if a promise was not kept."""
    arguments = _arguments()
    figures = Figures(patience=arguments.patience)
    history = run(
        seconds=arguments.seconds,
        seed=arguments.seed,
        processes=arguments.processes,
        figures=figures,
        calm=arguments.calm,
        lie=arguments.lie,
        keep=arguments.keep,
    )
    violations = check(history, figures)
    counts = count(history, violations)
    if arguments.json:
        print(json.dumps(counts))
    else:
        for name, value in counts.items():
            print(f"{name + ':':28}{value}")
    for violation in violations[:SHOWN]:
        print(violation, file=sys.stderr)
    if len(violations) > SHOWN:
        print(f"… and {len(violations) - SHOWN} more", file=sys.stderr)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
