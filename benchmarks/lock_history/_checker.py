"""Does a history keep what the locks promise? Pure: histories in, violations out.

==  =======================================================================================
C1  Exclusive holders of a key never overlap, from the start of the body until it ends or is
    cancelled for a loss. Only if a session of the two was ended from outside may they, and
    only for so long; and a cancelled body ends soon.
C2  No update of the fenced register is lost: what was committed is there, each value once,
    each one more than the one before, tokens never falling.
C3  Tokens are unique, and grow in the order of the grants.
C4  At the end the server has no advisory lock and no session of ours.
C5  After the last fault everybody who waits gets the lock in time; at any time a call with
    a time limit returns in time.
C6  A session's end is one `LockLost` for each block that it met: not none, not two, and no
    loss without a cause.
C0  Nothing else goes wrong: no error that nothing promises.
==  =======================================================================================

"Whose body began later" is not "who was granted the lock later" where a process was paused
in between; where that matters it is excused, and the fenced register decides.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ._history import Figures, Grant, History, Operation

_SERVER_SIDE = ("terminated", "crashed", "disconnected")
"""Reasons of a loss that need a cause outside of the program."""
_OWN = ("unconfirmed", "expired", "fenced")
"""Other reasons that may come up; nothing closes, sets an idle timeout, or promotes here."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept."""

    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.check}: {self.text}"


def check(history: History, figures: Figures) -> list[Violation]:
    """Return all violations."""
    checks = {
        "C0": iter(history.trouble),
        "C1": _check_exclusion(history, figures),
        "C2": _check_register(history),
        "C3": _check_tokens(history.grants),
        "C4": iter(history.leaks),
        "C5": _check_liveness(history, figures),
        "C6": _check_losses(history),
    }
    return [Violation(name, text) for name, texts in checks.items() for text in texts]


def by_key(grants: Iterable[Grant]) -> dict[str, list[Grant]]:
    """Return the grants of each key, in their order."""
    found: dict[str, list[Grant]] = defaultdict(list)
    for grant in grants:
        found[grant.key].append(grant)
    return found


# ---------------------------------------------------------------- C1


def _check_exclusion(history: History, figures: Figures) -> Iterator[str]:
    for grants in by_key(history.grants).values():
        open_grants: list[Grant] = []
        for later in grants:
            open_grants = [grant for grant in open_grants if _end(grant, history) > later.granted]
            for earlier in open_grants:
                if not (earlier.shared and later.shared):
                    yield from _judge_overlap(earlier, later, history, figures)
            open_grants.append(later)


def _judge_overlap(
    earlier: Grant, later: Grant, history: History, figures: Figures
) -> Iterator[str]:
    causes = [
        fault
        for fault in history.faults
        if fault.ends_sessions
        and fault.began < later.granted
        and any(fault.meets(grant) and fault.ended > grant.invoked for grant in (earlier, later))
    ]
    is_told = earlier.told <= later.granted
    if not causes and not is_told:
        yield f"two holders at once, without a cause: {earlier} | {later}"
        return
    allowed = figures.release_timeout + figures.patience
    if not is_told:
        allowed += figures.lost_after
    over = min(_end(earlier, history), _end(later, history)) - later.granted
    over -= _paused(earlier, history) + _paused(later, history)
    if over > allowed:
        yield f"a lost lock's body went on for {over:.2f} s: {earlier} | {later}"


def _end(grant: Grant, history: History) -> float:
    """Return when the body ended; that of a process that was killed, with it."""
    if grant.ended < math.inf:
        return grant.ended
    kills = [
        fault.began
        for fault in history.faults
        if fault.kind == "kill worker"
        and grant.worker in fault.workers
        and fault.began >= grant.granted
    ]
    return min(kills, default=math.inf)


def _paused(grant: Grant, history: History) -> float:
    """Return for how long its process, session or proxy stood still while it was wanted or held."""
    end = min(grant.ended, grant.returned)
    return sum(
        max(0.0, min(fault.ended, end) - max(fault.began, grant.invoked))
        for fault in history.faults
        if fault.pauses and fault.meets(grant)
    )


# ---------------------------------------------------------------- C2


def _check_register(history: History) -> Iterator[str]:
    rows = defaultdict(list)
    for write in history.log:
        rows[write.key].append(write)
    for key, value in history.register.items():
        written = sorted(rows[key], key=lambda write: write.value)
        if [write.value for write in written] != list(range(1, value + 1)):
            counts = Counter(write.value for write in written)
            twice = [number for number, count in counts.items() if count > 1]
            yield (
                f"{key}: an update was lost: {len(written)} were committed, the register is"
                f" {value}; written twice: {twice}"
            )
        for one, other in pairwise(written):
            if other.token < one.token:
                yield f"{key}: a stale holder wrote: {other} after {one}"
    missing = set(history.confirmed) - set(history.log)
    for write in missing:
        yield f"{write.key}: a confirmed write is gone: {write}"


# ---------------------------------------------------------------- C3


def _check_tokens(grants: list[Grant]) -> Iterator[str]:
    for key, granted in by_key(grants).items():
        fenced = [grant for grant in granted if grant.token is not None]
        counts = Counter(grant.token for grant in fenced)
        for token, count in counts.items():
            if count > 1:
                yield f"{key}: token {token} was given {count} times"
        greatest: Grant | None = None
        for grant in fenced:
            if greatest is not None and _is_inverted(greatest, grant):
                yield f"{key}: tokens fell: {greatest} | {grant}"
            if greatest is None or (grant.token or 0) > (greatest.token or 0):
                greatest = grant


def _is_inverted(earlier: Grant, later: Grant) -> bool:
    if (later.token or 0) >= (earlier.token or 0):
        return False  # if equal, it has been said
    # Its body may have begun after it had lost the lock, and another one had been granted it.
    return later.invoked > earlier.granted or later.outcome == "released"


# ---------------------------------------------------------------- C5


def _check_liveness(history: History, figures: Figures) -> Iterator[str]:
    for operation in history.operations:
        if operation.answered == math.inf and not _was_killed(operation, history):
            yield f"never answered: {operation}"
        elif history.healed < operation.answered < math.inf:
            late = operation.answered - max(history.healed, operation.invoked)
            if late > figures.liveness:
                yield f"answered {late:.2f} s after the last fault: {operation}"
        yield from _check_timeout(operation, history, figures)


def _check_timeout(operation: Operation, history: History, figures: Figures) -> Iterator[str]:
    limits = [
        limit for limit in (operation.acquire_timeout, operation.cancel_after) if limit is not None
    ]
    if limits and operation.answered < math.inf:
        began, ended = operation.invoked, operation.answered
        over = ended - began - _stopped(operation, history, began, ended) - min(limits)
        if over > figures.release_timeout + figures.patience:
            yield f"answered {over:.2f} s after its time limit: {operation}"
    if operation.grants and operation.returned < math.inf:
        began, ended = operation.grants[0].ended, operation.returned
        over = ended - began - _stopped(operation, history, began, ended)
        # A session of its own is closed on top of it.
        if over > 2 * figures.release_timeout + figures.patience:
            yield f"left its block {over:.2f} s after its body had ended: {operation}"


def _stopped(operation: Operation, history: History, began: float, ended: float) -> float:
    """Return for how long of that time the process stood still."""
    return sum(
        max(0.0, min(fault.ended, ended) - max(fault.began, began))
        for fault in history.faults
        if fault.kind == "stop worker" and operation.worker in fault.workers
    )


def _was_killed(operation: Operation, history: History) -> bool:
    return any(
        fault.kind == "kill worker"
        and operation.worker in fault.workers
        and fault.ended > operation.invoked
        for fault in history.faults
    )


# ---------------------------------------------------------------- C6


def _check_losses(history: History) -> Iterator[str]:
    raised: Counter[tuple[str, str]] = Counter()
    others: Counter[tuple[str, str]] = Counter()
    for operation in history.operations:
        for key in operation.keys:
            place = (operation.process, key)
            # Of several locks one LockLost is raised; a cancellation from outside wins over it.
            is_exact = operation.outcome == "lost" and len(operation.keys) == 1
            is_possible = operation.outcome in ("lost", "cancelled", "unknown")
            raised[place] += is_exact
            others[place] += is_possible and not is_exact
    for place in raised.keys() | history.loss_events.keys():
        told, least = len(history.loss_events.get(place, [])), raised[place]
        if not least <= told <= least + others[place]:
            most = least + others[place]
            yield f"{place}: {least} to {most} losses were raised, {told} were told by events"
    for grant in history.grants:
        yield from _check_loss(grant, history)


def _check_loss(grant: Grant, history: History) -> Iterator[str]:
    aimed = [fault for fault in history.faults if fault.ends_sessions and fault.meets(grant)]
    if grant.outcome == "lost" and grant.reason in _SERVER_SIDE:
        # A session may have died a little before its grant was known.
        if not any(f.began < grant.returned and f.ended > grant.invoked for f in aimed):
            yield f"lost without a cause: {grant}"
        return
    if grant.outcome == "lost" and grant.reason not in _OWN:
        yield f"lost for a reason that can't be: {grant}"
    if grant.outcome != "released" or grant.release_failed:
        return
    for fault in aimed:
        if grant.granted < fault.began and fault.ended < grant.ended:
            yield f"its session was ended ({fault.kind}), and it was not told: {grant}"


def find_outlived(history: History) -> list[Grant]:
    """Return grants whose body was cancelled in time, and still had to end when the next began.

    Not what a lock promises, but what it should avoid: the clean-up of a body is work, too.
    """
    found = []
    for grants in by_key(history.grants).values():
        for earlier, later in pairwise(grants):
            if not (earlier.shared and later.shared) and (
                earlier.told <= later.granted < earlier.ended < math.inf
            ):
                found.append(earlier)
    return found


def find_unexplained(history: History) -> list[Grant]:
    """Return losses by silence that no fault explains: a busy machine may cause them."""
    return [
        grant
        for grant in history.grants
        if grant.reason == "unconfirmed"
        and not any(
            fault.began < grant.returned and fault.ended > grant.invoked and fault.meets(grant)
            for fault in history.faults
        )
    ]
