"""Breaks things, by lot, and writes down what it did and when.

What lasts (a frozen proxy, a stopped process) is healed later, while other things break.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg

from pgstructured.testing import ServerError

from ._history import Fault

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from pgstructured.testing import Cluster, FaultProxy

    from ._workers import Workers

PACE = (0.05, 0.6)
"""Seconds from one fault to the next."""
LONGEST = 2.6
"""Seconds that a pause or silence lasts at most: more than ``server_timeout``."""
SHORT = 0.6
LONG_SHARE = 0.3
TELLING = 1.0
"""Seconds in which both ends know of the end of a connection, if they run."""
GONE_TIMEOUT = 10.0
KILLED_TIMEOUT = 6.0
"""A server that ends its sessions uses SIGKILL after five seconds."""

HOLDERS = (
    "select pid from pg_locks join pg_database d on d.oid = database"
    " where locktype = 'advisory' and granted and datname = %s"
)
WAITERS = HOLDERS.replace("and granted", "and not granted")
SESSIONS = "select pid from pg_stat_activity where datname = %s and pid <> pg_backend_pid()"


class Nemesis:
    """Faults of one server, its workers and the proxies between them."""

    def __init__(
        self,
        cluster: Cluster,
        database: str,
        proxies: list[FaultProxy],
        workers: Workers,
        lots: random.Random,
    ) -> None:
        self.faults: list[Fault] = []
        self._cluster = cluster
        self._database = database
        self._proxies = proxies
        self._workers = workers
        self._lots = lots
        self._lasting: list[tuple[float, int, Callable[[], None]]] = []
        self._busy: set[object] = set()
        self._kinds: dict[Callable[[], None], float] = {
            self._terminate_holder: 8,
            self._terminate_waiter: 3,
            self._terminate_all: 1,
            self._kill_backend: 1,
            self._restart_fast: 0.7,
            self._restart_immediate: 0.7,
            self._reset_proxy: 4,
            self._half_close_proxy: 3,
            self._freeze_proxy: 5,
            self._delay_proxy: 3,
            self._stop_backend: 5,
            self._stop_worker: 5,
            self._kill_worker: 3,
        }

    def run(self, until: float) -> None:
        """Break things until ``until`` (CLOCK_MONOTONIC), then heal everything."""
        while (now := time.monotonic()) < until:
            self._heal(now)
            self._workers.revive()
            (breaking,) = self._lots.choices(list(self._kinds), list(self._kinds.values()))
            # Those say that the server is down, or the process gone: nothing was done.
            with suppress(psycopg.Error, ServerError, ValueError):
                breaking()
            self._end_failed()
            time.sleep(self._lots.uniform(*PACE))
        self.heal_all()

    def heal_all(self) -> None:
        """End whatever lasts."""
        self._heal(float("inf"))
        self._cluster.start()
        self._wait_up()
        self._workers.revive()

    # ------------------------------------------------------------ sessions

    def _terminate_holder(self) -> None:
        self._terminate("terminate a holder", self._pick(HOLDERS, 1))

    def _terminate_waiter(self) -> None:
        self._terminate("terminate a waiter", self._pick(WAITERS, 1))

    def _terminate_all(self) -> None:
        self._terminate("terminate all", self._pick(SESSIONS, 1000))

    def _terminate(self, kind: str, pids: list[int]) -> None:
        if not pids:
            return
        number = self._begin(kind, pids=tuple(pids), ends_sessions=True)
        self._execute("select pg_terminate_backend(pid) from unnest(%s::int[]) pid", [pids])
        self._wait_gone(pids)
        self._end(number)

    def _kill_backend(self) -> None:
        """The server then ends all sessions and recovers."""
        for pid in self._pick(HOLDERS, 1):
            number = self._begin("kill a backend", everybody=True, ends_sessions=True)
            everybody = self._pick(SESSIONS, 1000)
            self._cluster.kill_backend(pid)
            # One that has just ended by itself can't be killed, and nothing comes of it.
            with suppress(TimeoutError):
                self._wait_gone(everybody, KILLED_TIMEOUT)
            self._wait_up()
            self._end(number)

    def _stop_backend(self) -> None:
        for pid in self._pick(HOLDERS, 1):
            if pid in self._busy:
                return
            number = self._begin("stop a backend", pids=(pid,), pauses=True)
            self._cluster.freeze(pid)
            self._last(number, pid, partial(self._thaw_backend, pid))

    def _thaw_backend(self, pid: int) -> None:
        with suppress(ServerError, ValueError):  # it has ended, with the server
            self._cluster.thaw(pid)

    # ------------------------------------------------------------ server

    def _restart_fast(self) -> None:
        number = self._begin("restart fast", everybody=True, ends_sessions=True)
        self._cluster.restart("fast")
        self._end(number)

    def _restart_immediate(self) -> None:
        number = self._begin("restart immediate", everybody=True, ends_sessions=True)
        self._cluster.restart("immediate")
        self._end(number)

    # ------------------------------------------------------------ network

    def _reset_proxy(self) -> None:
        worker, proxy = self._pick_proxy()
        number = self._begin("reset", workers=(worker,), ends_sessions=True)
        proxy.reset()
        self._end(number)

    def _half_close_proxy(self) -> None:
        worker, proxy = self._pick_proxy()
        way = self._lots.choice(("up", "down"))
        number = self._begin(f"half-close {way}", workers=(worker,), ends_sessions=True)
        proxy.half_close("up" if way == "up" else "down")
        # The one end tells the other, once it runs.
        self.faults[number] = replace(
            self.faults[number], ended=time.monotonic() + LONGEST + TELLING
        )

    def _freeze_proxy(self) -> None:
        worker, proxy = self._pick_proxy()
        if proxy in self._busy:
            return
        number = self._begin("freeze", workers=(worker,), pauses=True)
        proxy.freeze(self._lots.choice(("up", "down", "both")))
        self._last(number, proxy, proxy.thaw)

    def _delay_proxy(self) -> None:
        worker, proxy = self._pick_proxy()
        if proxy in self._busy:
            return
        number = self._begin("delay", workers=(worker,), pauses=True)
        proxy.delay(self._lots.uniform(0.01, 0.4))
        self._last(number, proxy, lambda: proxy.delay(0))

    def _pick_proxy(self) -> tuple[int, FaultProxy]:
        number = self._lots.randrange(len(self._proxies))
        return number, self._proxies[number]

    # ------------------------------------------------------------ workers

    def _stop_worker(self) -> None:
        worker = self._lots.randrange(len(self._proxies))
        process = self._workers.running[worker]
        if process.pid in self._busy:
            return
        number = self._begin("stop worker", workers=(worker,), pauses=True)
        os.kill(process.pid, signal.SIGSTOP)
        self._last(number, process.pid, lambda: process.send_signal(signal.SIGCONT))

    def _kill_worker(self) -> None:
        worker = self._lots.randrange(len(self._proxies))
        number = self._begin("kill worker", workers=(worker,), ends_sessions=True)
        self._workers.kill(worker)
        self._end(number)

    # ------------------------------------------------------------ bookkeeping

    def _begin(self, kind: str, **facts: Any) -> int:
        self.faults.append(Fault(kind=kind, began=time.monotonic(), **facts))
        return len(self.faults) - 1

    def _end(self, number: int) -> None:
        self.faults[number] = replace(self.faults[number], ended=time.monotonic())

    def _end_failed(self) -> None:
        """Let nothing seem to last that has come to nothing: it would excuse whatever comes."""
        lasting = {number for _, number, _ in self._lasting}
        for number, fault in enumerate(self.faults):
            if fault.ended == float("inf") and number not in lasting:
                self._end(number)

    def _last(self, number: int, thing: object, heal: Callable[[], None]) -> None:
        """Let a fault last for a while."""
        self._busy.add(thing)

        def heal_it() -> None:
            heal()
            self._busy.discard(thing)
            self._end(number)

        longest = LONGEST if self._lots.random() < LONG_SHARE else SHORT
        due = time.monotonic() + self._lots.uniform(0.05, longest)
        self._lasting.append((due, number, heal_it))

    def _heal(self, now: float) -> None:
        for entry in sorted(self._lasting, key=lambda entry: entry[:2]):
            if entry[0] <= now:
                entry[2]()
                self._lasting.remove(entry)

    def _pick(self, query: str, count: int) -> list[int]:
        pids = sorted({row[0] for row in self._execute(query, [self._database])})
        return self._lots.sample(pids, min(count, len(pids)))

    def _execute(self, query: str, params: list[Any]) -> list[tuple[Any, ...]]:
        return self._cluster.execute(query, params)

    def _wait_gone(self, pids: list[int], timeout: float = GONE_TIMEOUT) -> None:
        """Wait until the processes have ended; one that is stopped does so once it goes on."""
        deadline = time.monotonic() + timeout
        while any(_exists(pid) for pid in pids if pid not in self._busy):
            if time.monotonic() > deadline:
                raise TimeoutError(f"sessions that were ended are still there: {pids}")
            time.sleep(0.002)

    def _wait_up(self) -> None:
        deadline = time.monotonic() + GONE_TIMEOUT
        while True:
            try:
                self._execute("select 1", [])
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
