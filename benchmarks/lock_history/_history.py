"""What workers and the nemesis write down, and what it means."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Outcome = Literal["released", "refused", "timeout", "lost", "cancelled", "failed", "unknown"]
"""How an operation has ended; unknown where its process was killed, or hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of every lock session, and what the time limits allow on top."""

    heartbeat: float = 0.3
    lost_after: float = 1.0
    server_timeout: float = 2.0
    release_timeout: float = 0.8
    connect_timeout: float = 3.0
    patience: float = 1.0
    """Seconds that a busy machine may add to anything."""

    @property
    def liveness(self) -> float:
        """Seconds after the last fault in which everybody who waits has to get the lock."""
        return self.lost_after + self.server_timeout + self.patience


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that the nemesis did."""

    kind: str
    began: float
    """CLOCK_MONOTONIC, before it was done."""
    ended: float = math.inf
    """When it was over: the sessions gone, the server up, the proxy thawed."""
    pids: tuple[int, ...] = ()
    """Server sessions it was aimed at."""
    workers: tuple[int, ...] = ()
    """Worker numbers it was aimed at, or whose proxy."""
    everybody: bool = False
    ends_sessions: bool = False
    """The sessions aimed at are gone, for the server or for the client."""
    pauses: bool = False
    """What was aimed at stood still, or was silent."""

    def meets(self, grant: Grant) -> bool:
        """Whether it was aimed at the session or the process of ``grant``."""
        return self.everybody or grant.pid in self.pids or grant.worker in self.workers


@dataclass(slots=True, kw_only=True)
class Grant:
    """One key that one operation was granted."""

    process: str
    """Unique for each start of a worker."""
    worker: int
    op: int
    key: str
    shared: bool
    pid: int
    token: int | None
    invoked: float
    granted: float
    """When the body began: after the server's reply."""
    ended: float = math.inf
    """When the body ended: before the unlock was sent."""
    told: float = math.inf
    """When the body was cancelled, since the lock was lost."""
    outcome: Outcome = "unknown"
    reason: str | None = None
    returned: float = math.inf
    release_failed: bool = False
    """The unlock could not be confirmed, and this was told by an event, as promised."""

    def __str__(self) -> str:
        mode = "shared" if self.shared else "exclusive"
        token = "" if self.token is None else f" token {self.token}"
        ended = f"{self.ended:.4f} {self.outcome} {self.reason or ''}".rstrip()
        return (
            f"{self.process}/{self.op} {self.key} {mode}{token} on {self.pid}:"
            f" asked {self.invoked:.4f}, held {self.granted:.4f} to {ended}"
        )


@dataclass(slots=True, kw_only=True)
class Operation:
    """One call of `lock`, `try_lock`, `lock_many` or `pg_lock`, and its block."""

    process: str
    worker: int
    op: int
    keys: tuple[str, ...]
    how: str
    invoked: float
    acquire_timeout: float | None = None
    cancel_after: float | None = None
    grants: list[Grant] = field(default_factory=list)
    outcome: Outcome = "unknown"
    reason: str | None = None
    returned: float = math.inf

    @property
    def answered(self) -> float:
        """When it had the lock, or had returned without it."""
        return self.grants[0].granted if self.grants else self.returned

    def __str__(self) -> str:
        return (
            f"{self.process}/{self.op} {self.how} {','.join(self.keys)}:"
            f" asked {self.invoked:.4f}, returned {self.returned:.4f}"
            f" {self.outcome} {self.reason or ''}"
        ).rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """A write to the fenced register: a row of its log, or what a worker was confirmed."""

    key: str
    token: int
    value: int


@dataclass(slots=True, kw_only=True)
class History:
    """Everything that was written down."""

    operations: list[Operation] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    loss_events: dict[tuple[str, str], list[tuple[float, str]]] = field(default_factory=dict)
    """When ``lock.lost`` was told and with what reason, by process and key."""
    confirmed: list[Write] = field(default_factory=list)
    """Writes that a worker knows to be committed."""
    register: dict[str, int] = field(default_factory=dict)
    """The register at the end."""
    log: list[Write] = field(default_factory=list)
    """Every committed write, as the server has it."""
    healed: float = math.inf
    """When the last fault was over."""
    leaks: list[str] = field(default_factory=list)
    """What was left on the server at the end."""
    trouble: list[str] = field(default_factory=list)
    """Errors that nothing promises: of workers, and of calls."""

    @property
    def grants(self) -> list[Grant]:
        """All grants, in the order in which their bodies began."""
        found = [grant for operation in self.operations for grant in operation.grants]
        return sorted(found, key=lambda grant: grant.granted)


def read_records(history: History, lines: Iterable[str]) -> None:
    """Add what one start of a worker has written; its last line may be cut short."""
    operations: dict[int, Operation] = {}
    failed: list[dict[str, Any]] = []
    for line in lines:
        if not line.endswith("\n"):
            break  # killed while writing
        record = json.loads(line)
        _READERS[record["what"]](history, operations, failed, record)
    for record in failed:
        _mark_failed_release(operations.values(), record)
    history.operations.extend(operations.values())


def _read_invoke(
    history: History, operations: dict[int, Operation], failed: object, record: dict[str, Any]
) -> None:
    del history, failed
    operations[record["op"]] = Operation(
        process=record["process"],
        worker=record["worker"],
        op=record["op"],
        keys=tuple(record["keys"]),
        how=record["how"],
        invoked=record["at"],
        acquire_timeout=record["acquire_timeout"],
        cancel_after=record["cancel_after"],
    )


def _read_granted(
    history: History, operations: dict[int, Operation], failed: object, record: dict[str, Any]
) -> None:
    del history, failed
    operation = operations[record["op"]]
    for key, pid, token in record["locks"]:
        operation.grants.append(
            Grant(
                process=operation.process,
                worker=operation.worker,
                op=operation.op,
                key=key,
                shared=record["shared"],
                pid=pid,
                token=token,
                invoked=operation.invoked,
                granted=record["at"],
            )
        )


def _read_ended(
    history: History, operations: dict[int, Operation], failed: object, record: dict[str, Any]
) -> None:
    del history, failed
    for grant in operations[record["op"]].grants:
        grant.ended = record["at"]


def _read_returned(
    history: History, operations: dict[int, Operation], failed: object, record: dict[str, Any]
) -> None:
    del failed
    operation = operations[record["op"]]
    operation.outcome = record["outcome"]
    operation.reason = record["reason"]
    operation.returned = record["at"]
    for grant in operation.grants:
        grant.outcome, grant.reason = operation.outcome, operation.reason
        grant.returned = operation.returned
        if operation.outcome == "lost":
            losses = history.loss_events.get((grant.process, grant.key), [])
            own = [loss for loss in losses if loss[0] >= grant.granted]
            if own:
                grant.told, grant.reason = own[0]
            elif len(operation.grants) > 1:
                grant.outcome, grant.reason = "released", None  # another one of them was lost
    if record["unexpected"]:
        history.trouble.append(f"{operation}: {record['unexpected']}")


def _read_lost(
    history: History, operations: object, failed: object, record: dict[str, Any]
) -> None:
    del operations, failed
    place = (record["process"], record["key"])
    history.loss_events.setdefault(place, []).append((record["at"], record["reason"]))


def _read_release_failed(
    history: History, operations: object, failed: list[dict[str, Any]], record: dict[str, Any]
) -> None:
    del history, operations
    failed.append(record)


def _read_wrote(
    history: History, operations: object, failed: object, record: dict[str, Any]
) -> None:
    del operations, failed
    history.confirmed.append(Write(key=record["key"], token=record["token"], value=record["value"]))


_READERS = {
    "invoke": _read_invoke,
    "granted": _read_granted,
    "ended": _read_ended,
    "returned": _read_returned,
    "lost": _read_lost,
    "release_failed": _read_release_failed,
    "wrote": _read_wrote,
}


def _mark_failed_release(operations: Iterable[Operation], record: dict[str, Any]) -> None:
    """Find whose unlock it was: the one of that key that was just leaving its block."""
    leaving: Sequence[Grant] = [
        grant
        for operation in operations
        for grant in operation.grants
        if grant.key == record["key"] and grant.ended <= record["at"] <= grant.returned
    ]
    for grant in leaving:
        grant.release_failed = True
