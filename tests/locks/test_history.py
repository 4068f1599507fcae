"""The history checker: it finds what is wrong in histories made by hand, and workers that cheat.

And a short run of the real thing; ``nox -s lock_history`` makes a long one.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.lock_history._checker import check, find_outlived, find_unexplained
from benchmarks.lock_history._history import (
    Fault,
    Figures,
    Grant,
    History,
    Operation,
    Write,
    read_records,
)

ROOT = Path(__file__).parents[2]
FIGURES = Figures()


def operation(process="0.1", *, keys=("key",), at=1.0, until=2.0, outcome="released", **facts):
    """An operation that asks 0.1 s before it is granted; ``**facts`` of its grants."""
    reason = facts.pop("reason", None)
    limits = {
        name: facts.pop(name) for name in ("acquire_timeout", "cancel_after") if name in facts
    }
    returned = facts.pop("returned", until + 0.1 if until < math.inf else math.inf)
    invoked = facts.pop("invoked", at - 0.1)
    worker = int(process.split(".")[0])
    made = Operation(
        process=process,
        worker=worker,
        op=1,
        keys=keys,
        how="exclusive",
        invoked=invoked,
        outcome=outcome,
        reason=reason,
        returned=returned,
        **limits,
    )
    if outcome not in ("refused", "timeout"):
        made.grants = [
            Grant(
                process=process,
                worker=worker,
                op=1,
                key=key,
                shared=facts.get("shared", False),
                pid=facts.get("pid", 100 + worker),
                token=facts.get("token"),
                told=facts.get("told", math.inf),
                invoked=invoked,
                granted=at,
                ended=until,
                outcome=outcome,
                reason=reason,
                returned=returned,
                release_failed=facts.get("release_failed", False),
            )
            for key in keys
        ]
    return made


def history(*operations, **facts):
    """A history whose events of losses fit what was raised."""
    made = History(operations=list(operations), **facts)
    if "loss_events" not in facts:
        for one in operations:
            if one.outcome == "lost":
                for key in one.keys:
                    made.loss_events.setdefault((one.process, key), []).append((1.5, one.reason))
    return made


def found(made, figures=FIGURES):
    return [violation.check for violation in check(made, figures)]


def ended(kind="terminate", began=1.2, until=1.3, **aim):
    return Fault(kind=kind, began=began, ended=until, ends_sessions=True, **aim)


# ---------------------------------------------------------------- C1


def test_holders_one_after_the_other_are_right():
    made = history(operation("0.1"), operation("1.1", at=2.0, until=3.0))
    assert check(made, FIGURES) == []


def test_two_holders_at_once_are_found():
    made = history(operation("0.1"), operation("1.1", at=1.9, until=3.0))
    (violation,) = check(made, FIGURES)
    assert violation.check == "C1"
    assert "without a cause" in str(violation)


def test_two_holders_in_one_process_are_found():
    made = history(operation("0.1"), operation("0.1", at=1.5, until=1.6))
    assert found(made) == ["C1"]


def test_holders_of_different_keys_may_overlap():
    made = history(operation("0.1"), operation("1.1", keys=("other",), at=1.5, until=3.0))
    assert found(made) == []


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(True, True, []), (True, False, ["C1"]), (False, True, ["C1"])],
)
def test_shared_holders_may_overlap_each_other(first, second, expected):
    made = history(
        operation("0.1", shared=first), operation("1.1", at=1.5, until=3.0, shared=second)
    )
    assert found(made) == expected


def test_an_overlap_behind_another_short_one_is_found():
    made = history(
        operation("0.1", shared=True, until=5.0),
        operation("1.1", at=1.5, until=1.6, shared=True),
        operation("2.1", at=4.0, until=4.1),
    )
    assert found(made) == ["C1"]


@pytest.mark.parametrize(
    "aim",
    [{"pids": (100,)}, {"workers": (0,)}, {"everybody": True}],
    ids=lambda aim: next(iter(aim)),
)
def test_a_session_that_was_ended_excuses_an_overlap(aim):
    lost = operation("0.1", until=1.6, outcome="lost", reason="terminated")
    made = history(lost, operation("1.1", at=1.5, until=3.0), faults=[ended(**aim)])
    assert found(made) == []


@pytest.mark.parametrize(
    "fault",
    [
        ended(pids=(999,)),
        ended(pids=(100,), began=1.55, until=1.58),
        ended(pids=(100,), began=0.1, until=0.2),
        Fault(kind="freeze", began=1.2, ended=1.3, workers=(0,), pauses=True),
    ],
    ids=["another's", "too late", "before", "no end"],
)
def test_what_does_not_excuse_an_overlap(fault):
    made = history(operation("0.1"), operation("1.1", at=1.5, until=3.0), faults=[fault])
    assert "C1" in found(made)


def test_a_body_that_goes_on_long_after_its_loss_is_found():
    late = operation("0.1", until=9.0, outcome="lost", reason="terminated")
    fault = ended(pids=(100,))
    made = history(late, operation("1.1", at=1.5, until=8.0), faults=[fault])
    assert found(made) == ["C1"]
    stopped = Fault(kind="stop worker", began=1.4, ended=8.9, workers=(0,), pauses=True)
    assert found(replace(made, faults=[fault, stopped])) == []


def test_a_killed_process_holds_until_it_was_killed():
    killed = operation("0.1", until=math.inf, outcome="unknown")
    kill = ended("kill worker", began=1.5, until=1.55, workers=(0,))
    assert found(history(killed, operation("1.1", at=1.6, until=3.0), faults=[kill])) == []
    assert "C1" in found(history(killed, operation("1.1", at=1.4, until=1.45), faults=[kill]))


def test_a_body_that_was_cancelled_in_time_may_take_a_moment_to_end():
    lost = operation("0.1", until=2.0, outcome="lost", reason="unconfirmed", told=1.5)
    made = history(lost, operation("1.1", at=1.6, until=9.0))
    assert found(made) == []
    assert find_outlived(made) == lost.grants
    assert found(replace(made, operations=[lost, operation("1.1", at=1.4, until=9.0)])) == ["C1"]
    endless = operation("0.1", until=9.0, outcome="lost", reason="unconfirmed", told=1.5)
    assert found(replace(made, operations=[endless, made.operations[1]])) == ["C1"]


# ---------------------------------------------------------------- C2


def writes(*rows):
    return [Write(key="key", token=token, value=value) for value, token in rows]


def test_a_register_that_was_counted_up_is_right():
    log = writes((1, 1), (2, 1), (3, 5))
    assert found(history(register={"key": 3}, log=log, confirmed=log[1:])) == []


@pytest.mark.parametrize(
    ("value", "rows"),
    [(2, [(1, 1), (2, 2), (2, 3)]), (3, [(1, 1), (3, 3)]), (1, [(1, 1), (2, 2)]), (1, [])],
    ids=["twice", "left out", "set back", "not in the log"],
)
def test_a_lost_update_is_found(value, rows):
    assert "C2" in found(history(register={"key": value}, log=writes(*rows)))


def test_a_write_under_an_older_token_is_found():
    assert found(history(register={"key": 2}, log=writes((1, 7), (2, 6)))) == ["C2"]


def test_a_confirmed_write_that_is_gone_is_found():
    made = history(register={"key": 1}, log=writes((1, 1)), confirmed=writes((2, 2)))
    assert found(made) == ["C2"]


# ---------------------------------------------------------------- C3


def test_tokens_that_grow_are_right():
    made = history(operation(token=1), operation(at=3.0, until=4.0, token=5), operation(at=5.0))
    assert found(replace(made, operations=made.operations[:2])) == []


def test_a_token_that_was_given_twice_is_found():
    made = history(operation(token=1), operation(at=3.0, until=4.0, token=1))
    assert found(made) == ["C3"]


def test_tokens_that_fall_are_found():
    made = history(operation(token=2), operation(at=3.0, until=4.0, token=1))
    assert found(made) == ["C3"]


def test_a_lost_lock_whose_body_began_late_may_have_a_smaller_token():
    late = {"at": 2.5, "until": 2.6, "invoked": 0.5, "outcome": "lost", "reason": "terminated"}
    made = history(
        operation("0.1", token=2),
        operation("1.1", token=1, **late),
        faults=[ended(pids=(101,), began=0.7, until=0.8)],
    )
    assert found(made) == []


# ---------------------------------------------------------------- C4, C0


def test_leaks_and_trouble_are_violations():
    assert found(history(leaks=["a lock"], trouble=["an error"])) == ["C0", "C4"]


# ---------------------------------------------------------------- C5


def test_a_waiter_that_never_gets_the_lock_is_found():
    waiting = operation(outcome="timeout", returned=math.inf)
    waiting.outcome = "unknown"
    assert found(history(waiting, healed=2.0)) == ["C5"]
    killed = ended("kill worker", workers=(0,))
    assert found(history(waiting, healed=2.0, faults=[killed])) == []


def test_a_waiter_that_gets_the_lock_too_late_is_found():
    late = operation(invoked=1.0, at=9.0, until=9.1)
    assert found(history(late, healed=2.0)) == ["C5"]
    assert found(history(late, healed=2.0), replace(FIGURES, patience=20.0)) == []
    assert found(history(late, healed=8.0)) == []


@pytest.mark.parametrize("limit", ["acquire_timeout", "cancel_after"])
def test_a_call_that_returns_long_after_its_time_limit_is_found(limit):
    late = operation(outcome="timeout", at=1.1, returned=5.0, **{limit: 0.5})
    assert found(history(late)) == ["C5"]
    stopped = Fault(kind="stop worker", began=1.2, ended=4.9, workers=(0,), pauses=True)
    assert found(history(late, faults=[stopped])) == []


def test_a_block_that_is_left_too_slowly_is_found():
    assert found(history(operation(until=2.0, returned=9.0))) == ["C5"]


# ---------------------------------------------------------------- C6


def test_a_loss_with_its_cause_is_right():
    lost = operation(outcome="lost", reason="terminated")
    assert found(history(lost, faults=[ended(pids=(100,))])) == []


@pytest.mark.parametrize("reason", ["terminated", "crashed", "disconnected", "closed"])
def test_a_loss_without_a_cause_is_found(reason):
    assert found(history(operation(outcome="lost", reason=reason))) == ["C6"]


@pytest.mark.parametrize("reason", ["expired", "unconfirmed", "fenced"])
def test_a_loss_that_needs_no_end_of_a_session(reason):
    assert found(history(operation(outcome="lost", reason=reason))) == []


def test_a_session_that_ended_without_a_loss_is_found():
    silent = operation()
    faults = [ended(pids=(100,))]
    assert found(history(silent, faults=faults)) == ["C6"]
    # Behind a silent network it could not be told, and an event says so.
    told = operation(release_failed=True)
    assert found(history(told, faults=faults)) == []
    # It may have ended just before.
    assert found(history(silent, faults=[ended(pids=(100,), until=2.05)])) == []


@pytest.mark.parametrize("events", [0, 2])
def test_losses_that_are_told_not_once_are_found(events):
    lost = operation(outcome="lost", reason="expired")
    told = {("0.1", "key"): [(1.5, "expired")] * events}
    assert found(history(lost, loss_events=told)) == ["C6"]


def test_a_loss_may_have_been_told_where_a_cancellation_won():
    told = {("0.1", "key"): [(1.5, "expired")]}
    assert found(history(operation(outcome="cancelled"), loss_events=told)) == []
    assert found(history(operation(outcome="released"), loss_events=told)) == ["C6"]


def test_silence_without_a_fault_is_counted():
    lost = operation(outcome="lost", reason="unconfirmed")
    assert len(find_unexplained(history(lost))) == 1
    fault = Fault(kind="freeze", began=1.2, ended=1.9, workers=(0,), pauses=True)
    assert find_unexplained(history(lost, faults=[fault])) == []


# ---------------------------------------------------------------- reading


def record(what, at, **facts):
    return json.dumps({"what": what, "at": at, "process": "0.1", "worker": 0, **facts}) + "\n"


def test_records_are_read_up_to_the_one_that_was_cut_short():
    asked = {"keys": ["red", "blue"], "how": "many", "acquire_timeout": None, "cancel_after": None}
    gone = {"outcome": "lost", "reason": "expired", "unexpected": None}
    made = History()
    read_records(
        made,
        [
            record("invoke", 1.0, op=1, **asked),
            record("granted", 1.1, op=1, shared=False, locks=[["red", 7, 3], ["blue", 8, None]]),
            record("wrote", 1.15, key="red", token=3, value=1),
            record("lost", 1.2, key="blue", reason="expired"),
            record("ended", 1.2, op=1),
            record("release_failed", 1.3, key="red", reason="too late"),
            record("returned", 1.4, op=1, **gone),
            record("invoke", 1.5, op=2, **asked),
            record("returned", 1.6, op=2, **{**gone, "outcome": "failed", "unexpected": "a bug"}),
            record("invoke", 1.7, op=3, **asked)[:20],
        ],
    )
    red, blue = made.grants
    assert (red.key, red.outcome, red.token, red.release_failed) == ("red", "released", 3, True)
    assert (blue.key, blue.outcome, blue.reason, blue.pid) == ("blue", "lost", "expired", 8)
    assert made.confirmed == [Write(key="red", token=3, value=1)]
    assert len(made.operations) == 2
    assert "a bug" in made.trouble[0]


# ---------------------------------------------------------------- the real thing


def run(*arguments):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.lock_history", "--json", "--patience", "15"),
            *arguments,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout), done


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_short_run_keeps_every_promise():
    counts, done = run("--seconds", "8", "--seed", "3")
    assert (done.returncode, counts["violations"]) == (0, {}), done.stderr
    assert counts["grants"] > 0
    assert counts["fenced grants"] > 0
    assert counts["guarded writes"] > 0
    assert counts["faults"]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("lie", "expected"), [("no lock", {"C1", "C2", "C3"}), ("leak", {"C4"})])
def test_workers_that_cheat_are_found(lie, expected):
    counts, done = run("--seconds", "3", "--calm", "--lie", lie, "--patience", "1")
    assert done.returncode == 1
    assert expected <= set(counts["violations"]), done.stderr
