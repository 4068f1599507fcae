"""``pgstructured demo``: two processes, one lock, one bus, and everything that can end them.

The conductor below starts a private server and two workers (`_demo_worker`), one
on asyncio and one on trio. Each worker's traffic goes through a `FaultProxy` of
its own, so that the network of one can fail. What a worker reports is checked
here; one step that does not really happen makes the demo fail.
"""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
import psycopg
from psycopg import sql

from pgstructured.driver import mask_conninfo, open_connection, parse_conninfo, resolve_conninfo
from pgstructured.errors import ConninfoError, PgStructuredError
from pgstructured.notify import notify_many
from pgstructured.testing import Cluster, FaultProxy, ServerError

from ._demo_processes import BACKENDS, STEP_TIMEOUT, DemoFailed, WorkerProcess, open_workers
from ._terminal import Terminal

if TYPE_CHECKING:
    from pgstructured.driver import Connection

_ORDERS: Final = 500
_PROMPTLY: Final = 1.0
"""Seconds within which the body of a lost lock has to be cancelled."""
_FAILURES: Final = (
    DemoFailed,
    ServerError,
    psycopg.Error,
    PgStructuredError,
    OSError,
)


def run_demo(server: str | None) -> int:
    """Run the demo and return its exit code.

    Args:
        server: Connection string of the server to use; None to start a private one.
    """
    terminal = Terminal()
    failures: list[BaseException] = []
    try:
        with ExitStack() as stack:
            terminal.chapter("A real Postgres")
            if server is not None:
                server = anyio.run(resolve_conninfo, server)
            base = _find_server(server, terminal, stack)
            proxies = {name: stack.enter_context(_open_proxy(base)) for name in BACKENDS}
            anyio.run(_conduct, base, proxies, terminal)
    except* _FAILURES as group:
        failures = _leaves(group)
    for failure in failures:
        terminal.fail(str(failure) or type(failure).__name__)
    verdict = "The demo failed." if failures else "Every step happened; nothing was missed."
    print(f"\n{verdict}", flush=True)
    return 1 if failures else 0


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    group = cast("BaseExceptionGroup[BaseException]", error)
    return [leaf for member in group.exceptions for leaf in _leaves(member)]


def _find_server(server: str | None, terminal: Terminal, stack: ExitStack) -> str:
    if server is not None:
        terminal.succeed(f"using {mask_conninfo(server)}")
        return server
    terminal.tell("starting a private server")
    began = time.monotonic()
    cluster = stack.enter_context(Cluster())
    terminal.succeed(
        f"PostgreSQL on 127.0.0.1:{cluster.port}, ready in {time.monotonic() - began:.2f} s"
    )
    return cluster.create_database()


def _open_proxy(base: str) -> FaultProxy:
    params = parse_conninfo(base)
    host = str(params.get("hostaddr") or params.get("host") or "")
    if not host or host.startswith(("/", "@")) or "," in host:
        raise ConninfoError(
            "--server must name one host, reached over TCP, for its network to fail"
        )
    return FaultProxy(host, int(params.get("port") or 5432))


async def _conduct(base: str, proxies: dict[str, FaultProxy], terminal: Terminal) -> None:
    mark = f"pgstructured_demo_{secrets.token_hex(4)}"
    table = sql.Identifier(mark)
    async with open_connection(base) as conn:
        await conn.execute(sql.SQL("CREATE TABLE {} (id int PRIMARY KEY)").format(table))
        try:
            async with open_workers(base, proxies, mark) as workers:
                demo = _Demo(conn, mark, workers, terminal)
                await demo.listen()
                await demo.hand_over()
                await demo.notify()
                await demo.kill_sessions()
                await demo.freeze_network()
                await demo.compare()
            await demo.find_leftovers()
        finally:
            with anyio.move_on_after(2, shield=True):
                await conn.execute(sql.SQL("DROP TABLE {}").format(table))


class _Demo:
    """The steps, in order."""

    def __init__(
        self, conn: Connection[Any], mark: str, workers: list[WorkerProcess], terminal: Terminal
    ) -> None:
        self._conn = conn
        self._mark = mark
        self._first, self._second = self._workers = workers
        self._terminal = terminal
        self._stored = 0

    async def listen(self) -> None:
        """Both workers subscribe."""
        self._terminal.chapter("Two processes, one on asyncio and one on trio")
        for worker in self._workers:
            report = await worker.expect("listening")
            worker.bus_pid = report["pid"]
            self._check(
                report["generation"] == 1,
                f"{worker.name} listens on its bus (session {worker.bus_pid}, generation 1)",
            )

    async def hand_over(self) -> None:
        """The lock goes from one to the other, and is held by one at a time."""
        self._terminal.chapter("A lock is handed over")
        await self._first.tell("hold", watch="session")
        report = await self._first.expect("acquired")
        self._terminal.succeed(f"asyncio holds the lock (session {report['pid']})")
        await self._second.tell("hold", watch="session")
        await self._wait_for_waiter()
        self._terminal.succeed("trio waits for it")
        released_at = time.monotonic()
        await self._first.tell("release")
        report = await self._second.expect("acquired")
        self._terminal.succeed(
            f"asyncio released, trio holds it {_ms(report['at'] - released_at)} later"
            f" (session {report['pid']})"
        )
        await self._first.expect("released")
        self._holder_pid = report["pid"]

    async def notify(self) -> None:
        """Every notification reaches both."""
        self._terminal.chapter("Notifications")
        await self._order(_ORDERS)
        for worker in self._workers:
            await self._wait_until_complete(worker)
            self._terminal.succeed(f"{worker.name} received all {_ORDERS}")

    async def kill_sessions(self) -> None:
        """The server ends the sessions: the lock's holder and both buses are told."""
        self._terminal.chapter("Their server sessions are killed")
        await self._first.tell("hold", watch="session")
        await self._wait_for_waiter()
        for worker in self._workers:
            worker.proxy.refuse()  # so that what is sent now can't be received
        killed_at = time.monotonic()
        await self._kill(self._holder_pid)
        await self._expect_loss(self._second, killed_at, "terminated", "57P01")
        report = await self._first.expect("acquired")
        self._terminal.succeed(
            f"asyncio, which was waiting, holds the lock (session {report['pid']})"
        )
        for worker in self._workers:
            await self._kill(worker.bus_pid)
        await self._order(_ORDERS)
        self._terminal.tell(f"{_ORDERS} more orders while nobody can listen")
        for worker in self._workers:
            worker.proxy.accept()
        for worker in self._workers:
            await self._expect_gap(worker, generation=2, at_least=_ORDERS)
        await self._first.tell("release")
        await self._first.expect("released")

    async def freeze_network(self) -> None:
        """The network of one falls silent: no packet, no error, only a heartbeat can tell."""
        self._terminal.chapter("The network of trio freezes")
        worker = self._second
        await worker.tell("hold", watch="heartbeat")
        report = await worker.expect("acquired")
        self._terminal.succeed(f"trio holds the lock again (session {report['pid']})")
        frozen_at = time.monotonic()
        worker.proxy.freeze("both")
        await self._order(_ORDERS)
        self._terminal.tell(f"frozen; {_ORDERS} more orders meanwhile")
        await self._expect_loss(worker, frozen_at, "unconfirmed", None, promptly=5.0)
        worker.proxy.thaw()
        await self._expect_gap(worker, generation=3, at_least=_ORDERS)
        await self._first.tell("hold", watch="session")
        await self._first.expect("acquired")
        self._terminal.succeed("asyncio holds the lock now")
        await self._first.tell("release")
        await self._first.expect("released")

    async def compare(self) -> None:
        """What each worker has is what was ever ordered."""
        self._terminal.chapter("Nothing missing")
        for worker in self._workers:
            await self._wait_until_complete(worker)
            self._terminal.succeed(f"{worker.name} has all {self._stored} orders")

    async def find_leftovers(self) -> None:
        """Nothing of the workers is left on the server."""
        left = -1
        with anyio.move_on_after(STEP_TIMEOUT):
            while left:
                left = await self._count(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
                )
        self._check(left == 0, "both processes ended; no session, no lock is left on the server")

    # ------------------------------------------------------------ pieces

    def _check(self, happened: bool, text: str) -> None:  # noqa: FBT001 - it is the point
        if not happened:
            raise DemoFailed(f"this did not happen: {text}")
        self._terminal.succeed(text)

    async def _order(self, count: int) -> None:
        """Store orders and notify of them, in one transaction."""
        numbers = range(self._stored + 1, self._stored + count + 1)
        async with self._conn.transaction():
            insert = sql.SQL("INSERT INTO {} SELECT generate_series(%s::int, %s::int)")
            await self._conn.execute(
                insert.format(sql.Identifier(self._mark)), [numbers.start, numbers.stop - 1]
            )
            await notify_many(self._conn, [(self._mark, str(number)) for number in numbers])
        self._stored += count

    async def _expect_loss(
        self,
        worker: WorkerProcess,
        since: float,
        reason: str,
        sqlstate: str | None,
        promptly: float = _PROMPTLY,
    ) -> None:
        cancelled = await worker.expect("body_cancelled")
        lost = await worker.expect("lost")
        took = cancelled["cancelled_at"] - since
        self._check(
            took < promptly, f"{worker.name}: the body was cancelled {_ms(took)} after it happened"
        )
        word = f"SQLSTATE {sqlstate}" if sqlstate else "the server said nothing"
        self._check(
            (lost["reason"], lost["sqlstate"]) == (reason, sqlstate),
            f"{worker.name}: LockLost, reason {lost['reason']!r} ({word})",
        )

    async def _expect_gap(self, worker: WorkerProcess, *, generation: int, at_least: int) -> None:
        gap = await worker.expect("gap")
        worker.bus_pid = gap["pid"]
        self._check(
            (gap["reason"], gap["generation"]) == ("reconnected", generation),
            f"{worker.name}: Gap('reconnected'), generation {gap['generation']},"
            f" after {gap['outage']:.2f} s without a sign of life",
        )
        resynced = await worker.expect("resynced")
        self._check(
            resynced["missed"] >= at_least,
            f"{worker.name}: resynced, {resynced['missed']} orders found that it had missed",
        )

    async def _wait_until_complete(self, worker: WorkerProcess) -> None:
        wanted = list(range(1, self._stored + 1))
        seen: list[int] = []
        with anyio.move_on_after(STEP_TIMEOUT):
            while seen != wanted:
                await worker.tell("count")
                seen = (await worker.expect("count"))["seen"]
        if seen != wanted:
            raise DemoFailed(f"{worker.name} has {len(seen)} of {len(wanted)} orders")

    async def _wait_for_waiter(self) -> None:
        waiting = 0
        with anyio.move_on_after(STEP_TIMEOUT):
            while not waiting:
                waiting = await self._count(
                    "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
                    " WHERE locktype = 'advisory' AND NOT granted AND application_name = %s"
                )
        if not waiting:
            raise DemoFailed("nobody waits for the lock")

    async def _count(self, query: Any) -> int:
        row = await (await self._conn.execute(query, [self._mark])).fetchone()
        return int(row[0]) if row is not None else 0

    async def _kill(self, pid: int) -> None:
        await self._conn.execute("SELECT pg_terminate_backend(%s)", [pid])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
