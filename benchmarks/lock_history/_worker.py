"""One process that takes locks, and writes down what it asked, got and lost.

Started by the conductor with its `Assignment`. Its standard input tells it to ``drain``
(finish what is under way, then take each key once) and to ``close``; it answers
``drained``. What it knows goes to a file, line by line, so that it may be killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import anyio
import psycopg

from pgstructured.driver import connect
from pgstructured.errors import LockLost, LockTimeout
from pgstructured.locks import HeldLock, LockKey, Locks, open_locks
from pgstructured.locks._lock import find_source
from pgstructured.locks._opening import new_request, open_held
from pgstructured.locks._options import LockOptions
from pgstructured.observe import Event, instrumented

from ._history import Figures
from ._plans import Plan, draw

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from pgstructured.driver import Connection

TASKS = 5


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told, as JSON on its command line."""

    process: str
    worker: int
    loop: str
    seed: str
    conninfo: str
    register: str
    """Where the fenced register is: through the proxy as well, or past it."""
    keys: list[str]
    path: str
    """File to write to."""
    figures: dict[str, float]
    lie: str | None
    """For tests of the checker: how to cheat."""


class Recorder:
    """Writes down; each line is one system call, so none is lost with the process."""

    def __init__(self, assignment: Assignment) -> None:
        self._file = os.open(assignment.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._who = {"process": assignment.process, "worker": assignment.worker}
        self._op = 0

    def next_op(self) -> int:
        self._op += 1
        return self._op

    def note(self, what: str, **facts: Any) -> None:
        record = {"what": what, "at": time.monotonic(), **self._who, **facts}
        os.write(self._file, json.dumps(record).encode() + b"\n")


class Worker:
    """Tasks that take locks."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._recorder = Recorder(assignment)
        self._figures = Figures(**assignment.figures)
        self._options = LockOptions(
            heartbeat=self._figures.heartbeat,
            lost_after=self._figures.lost_after,
            server_timeout=self._figures.server_timeout,
            release_timeout=self._figures.release_timeout,
            connect_timeout=self._figures.connect_timeout,
        )
        self._has_opened = False
        self._draining = anyio.Event()
        self._closing = anyio.Event()

    async def run(self) -> None:
        """Work until standard input says otherwise."""
        with instrumented(self._note_event):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._listen)
                while not self._draining.is_set():
                    try:
                        await self._work_on_locks()
                    except psycopg.OperationalError:
                        if self._has_opened:
                            raise
                        await anyio.sleep(0.1)  # started in the middle of an outage
                if not self._has_opened:
                    await self._work_on_locks()
                tasks.cancel_scope.cancel()

    async def _listen(self) -> None:
        while True:
            await anyio.wait_readable(0)
            said = os.read(0, 100)
            if b"drain" in said:
                self._draining.set()
            if b"close" in said or not said:
                self._draining.set()
                self._closing.set()
                return

    async def _work_on_locks(self) -> None:
        options = asdict(self._figures)
        del options["patience"]
        lots = random.Random(self._assignment.seed)
        async with open_locks(
            self._assignment.conninfo,
            max_locks_per_session=lots.choice((2, 8, 64)),
            max_waiting_sessions=lots.choice((1, 3, 8)),
            idle_session_ttl=lots.choice((0.2, 30.0)),
            **options,
        ) as locks:
            self._has_opened = True
            async with anyio.create_task_group() as tasks:
                for number in range(TASKS):
                    tasks.start_soon(self._run_task, locks, f"{self._assignment.seed}/{number}")
            print("drained", flush=True)
            await self._closing.wait()

    async def _run_task(self, locks: Locks, seed: str) -> None:
        lots = random.Random(seed)
        async with AsyncExitStack() as stack:
            task = _Task(self, locks, lots, stack)
            while not self._draining.is_set():
                await task.operate(draw(lots, self._assignment.keys))
            for key in lots.sample(self._assignment.keys, len(self._assignment.keys)):
                await task.operate(Plan("exclusive", (key,), False, 0.0, None, None, None))

    def _note_event(self, event: Event) -> None:
        if event.name in ("lock.lost", "lock.release_failed"):
            key = event.facts["key"]
            assert isinstance(key, LockKey)
            self._recorder.note(
                event.name.removeprefix("lock."),
                key=key.name,
                reason=str(event.facts.get("reason", event.facts.get("error"))),
            )


class _Task:
    """One task of a worker, with its own connection to the register."""

    def __init__(
        self, worker: Worker, locks: Locks, lots: random.Random, stack: AsyncExitStack
    ) -> None:
        self._assignment = worker._assignment
        self._recorder = worker._recorder
        self._options = worker._options
        self._locks = locks
        self._lots = lots
        self._stack = stack
        self._connection: Connection[Any] | None = None
        self._seen_token = 1

    async def operate(self, plan: Plan) -> None:
        """Run one operation, and write down how it ends."""
        op = self._recorder.next_op()
        self._recorder.note(
            "invoke",
            op=op,
            keys=plan.keys,
            how=f"{plan.how}{' on conninfo' if plan.on_conninfo else ''}",
            acquire_timeout=plan.acquire_timeout,
            cancel_after=plan.cancel_after,
        )
        outcome = "released"
        reason: str | None = None
        unexpected: str | None = None
        try:
            with anyio.move_on_after(plan.cancel_after) as scope:
                if not await self._hold(op, plan):
                    outcome = "refused"
            if scope.cancelled_caught:
                outcome = "cancelled"
        except LockLost as exc:
            outcome, reason = "lost", exc.reason
        except LockTimeout:
            outcome = "timeout"
        except psycopg.OperationalError as exc:
            outcome, reason = "failed", f"{type(exc).__name__}: {exc}"
        except Exception:  # noqa: BLE001 - whatever it is, the checker tells
            outcome, unexpected = "failed", traceback.format_exc()
        self._recorder.note(
            "returned", op=op, outcome=outcome, reason=reason, unexpected=unexpected
        )

    async def _hold(self, op: int, plan: Plan) -> bool:
        if self._assignment.lie == "no lock" and self._lots.random() < 0.3:
            await self._pretend(op, plan)
            return True
        async with self._open(plan) as locks:
            if not locks:
                return False
            self._recorder.note(
                "granted",
                op=op,
                shared=plan.shared,
                locks=[
                    (key, lock.backend_pid, lock.fencing_token)
                    for key, lock in zip(plan.keys, locks, strict=True)
                ],
            )
            is_ended = False
            try:
                await self._body(plan, locks)
                if plan.how == "early release":
                    self._recorder.note("ended", op=op)
                    is_ended = True
                    await locks[0].release()
                    await anyio.sleep(plan.hold)
            finally:
                if not is_ended:
                    self._recorder.note("ended", op=op)
        return True

    @asynccontextmanager
    async def _open(self, plan: Plan) -> AsyncGenerator[tuple[HeldLock, ...]]:
        """Take what the plan says; nothing after a refused try."""
        if plan.how.startswith("many"):
            async with self._locks.lock_many(plan.keys, fenced=plan.fenced) as locks:
                yield locks
            return
        (key,) = plan.keys
        opening: AbstractAsyncContextManager[HeldLock | None]
        is_try = plan.how.startswith("try")
        if plan.on_conninfo:
            request = new_request(
                LockKey.named(key),
                shared=plan.shared,
                acquire_timeout=plan.acquire_timeout,
                is_try=is_try,
                fenced=plan.fenced,
            )
            source = find_source(self._assignment.conninfo, self._options)
            opening = open_held(source, request, HeldLock, ttl=plan.ttl)
        elif is_try:
            opening = self._locks.try_lock(key, shared=plan.shared, fenced=plan.fenced)
        else:
            opening = self._locks.lock(
                key,
                shared=plan.shared,
                acquire_timeout=plan.acquire_timeout,
                ttl=plan.ttl,
                fenced=plan.fenced,
            )
        async with opening as lock:
            yield () if lock is None else (lock,)

    async def _body(self, plan: Plan, locks: tuple[HeldLock, ...]) -> None:
        if plan.how == "refreshed ttl":
            await anyio.sleep(plan.hold / 2)
            await locks[0].refresh()
            await anyio.sleep(plan.hold / 2)
        elif plan.fenced:
            for key, lock in zip(plan.keys, locks, strict=True):
                await self._write(key, lock, plan.hold)
        elif self._assignment.lie == "deaf" and self._lots.random() < 0.3:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(6)
        else:
            await anyio.sleep(plan.hold)

    # ------------------------------------------------------------ the fenced register

    async def _write(self, key: str, lock: HeldLock, hold: float) -> None:
        """Count the register up: what was read before the pause is what is written after it."""
        connection = await self._connect()
        value = await self._read(connection, key)
        await anyio.sleep(hold)
        token = lock.fencing_token
        assert token is not None
        async with connection.transaction():
            await lock.guard(connection)
            if self._lots.random() < 0.2:
                await anyio.sleep(hold)
            await self._put(connection, key, value + 1, token)
        self._recorder.note("wrote", key=key, token=token, value=value + 1)
        self._seen_token = token

    async def _connect(self) -> Connection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = await connect(
                self._assignment.register,
                application_name="history/register",
                connect_timeout=2.0,
                cancel_timeout=0.5,
            )
            self._stack.push_async_callback(self._connection.aclose)
        return self._connection

    async def _read(self, connection: Connection[Any], key: str) -> int:
        cursor = await connection.execute("SELECT value FROM register WHERE key = %s", [key])
        row = await cursor.fetchone()
        assert row is not None
        return int(row[0])

    async def _put(self, connection: Connection[Any], key: str, value: int, token: int) -> None:
        await connection.execute("UPDATE register SET value = %s WHERE key = %s", [value, key])
        await connection.execute("INSERT INTO log VALUES (%s, %s, %s)", [key, token, value])

    async def _pretend(self, op: int, plan: Plan) -> None:
        """Cheat: do as if the lock was held; the checker has to find out."""
        token = self._seen_token if plan.fenced else None
        self._recorder.note(
            "granted", op=op, shared=plan.shared, locks=[(key, 0, token) for key in plan.keys]
        )
        try:
            connection = await self._connect()
            values = [await self._read(connection, key) for key in plan.keys]
            await anyio.sleep(plan.hold)
            if token is not None:
                for key, value in zip(plan.keys, values, strict=True):
                    await self._put(connection, key, value + 1, token)
        finally:
            self._recorder.note("ended", op=op)


async def _leak(assignment: Assignment) -> None:
    """Cheat: keep a lock that nobody knows of."""
    connection = await psycopg.AsyncConnection.connect(assignment.register, autocommit=True)
    await connection.execute("SELECT pg_advisory_lock(1)")
    await anyio.sleep_forever()


async def _run(assignment: Assignment) -> None:
    async with anyio.create_task_group() as tasks:
        if assignment.lie == "leak" and assignment.loop == "asyncio":
            tasks.start_soon(_leak, assignment)
        await Worker(assignment).run()
        tasks.cancel_scope.cancel()


def main() -> None:
    """Do what the command line says."""
    assignment = Assignment(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the conductor's, which then ends us
    anyio.run(
        _run,
        assignment,
        backend="trio" if assignment.loop == "trio" else "asyncio",
        backend_options={"use_uvloop": True} if assignment.loop == "uvloop" else {},
    )


if __name__ == "__main__":
    main()
