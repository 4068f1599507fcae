"""A server's processes and folder; no SQL.

    new ──start──> running ──stop, kill──> stopped ──start──> running
     any ──close──> new (its folder is gone)

Freezing is beside this: stopping and killing thaw what is frozen.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from typing import TYPE_CHECKING, Literal

from ._account import readable_binaries, server_account
from ._binaries import ServerBinaries, find_server_binaries
from ._errors import ServerFailedError
from ._guard import POLL_INTERVAL, GuardedProcess, child_pids, is_stopped, wait_gone
from ._ports import free_port
from ._storage import make_data, make_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

StopMode = Literal["fast", "immediate"]

HOST = "127.0.0.1"
_SETTINGS: dict[str, str] = {
    "listen_addresses": HOST,
    "max_connections": "200",
    "shared_buffers": "16MB",
    # The machine's crash is not tested, so nothing waits for disks. Commits are still written
    # before they are confirmed: they outlive a killed server.
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "jit": "off",
    "max_prepared_transactions": "10",
    "wal_level": "replica",
    "max_wal_senders": "5",
    "wal_keep_size": "64MB",
    "hot_standby": "on",
    # Servers killed with SIGKILL leave segments of the default kind behind.
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %u@%d ",
}
_SIGNALS: dict[StopMode, signal.Signals] = {
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_FREEZE_TIMEOUT = 5.0
_CHILDREN_GRACE = 1.0
_LOG_TAIL = 3000
_STATUS_LINE = 7  # of postmaster.pid


class Server:
    """What `Cluster` is below its SQL; see there for the arguments."""

    def __init__(
        self,
        *,
        version: int | None,
        bindir: str | os.PathLike[str] | None,
        settings: Mapping[str, str] | None,
        template: bool,
        timeout: float,
    ) -> None:
        self._version = version
        self._bindir = bindir
        self._settings = dict(settings or {})
        self._template = template
        self._timeout = timeout
        self._account = server_account()
        self._folder: Path | None = None
        self._port = 0
        self._process: GuardedProcess | None = None
        self._frozen: set[int] = set()

    # ---------------------------------------------------------------- where it is

    @property
    def host(self) -> str:
        """Its address."""
        return HOST

    @property
    def port(self) -> int:
        """Its TCP port; the same after every restart."""
        self._home()
        return self._port

    @property
    def socket_directory(self) -> Path:
        """The folder of its Unix socket: what libpq takes as ``host``."""
        return self._home()

    @property
    def data_directory(self) -> Path:
        """Its data folder."""
        return self._home() / "data"

    @property
    def log_path(self) -> Path:
        """Its log."""
        return self._home() / "server.log"

    @property
    def pid(self) -> int:
        """Process id of the postmaster."""
        return self._running().pid

    @property
    def is_running(self) -> bool:
        """Whether the postmaster is there (it may be frozen)."""
        return self._process is not None and self._process.returncode is None

    def log_text(self) -> str:
        """Return what the server has logged, over all its restarts."""
        try:
            return self.log_path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    # ---------------------------------------------------------------- lifetime

    def start(self) -> None:
        """Start the server and wait until it accepts connections; a running one is left alone.

        Raises:
            ServerNotFoundError: there are no programs of a server on this machine.
            ServerFailedError: it did not start; shows the end of its log.
        """
        if self.is_running:
            return
        binaries = readable_binaries(
            find_server_binaries(version=self._version, bindir=self._bindir), self._account
        )
        is_new = self._folder is None
        if self._folder is None:
            self._folder = make_folder(self._account)
            self._make_data(binaries)
        deadline = time.monotonic() + self._timeout
        while True:
            self._dismiss()
            if is_new:
                self._port = free_port(HOST)
            self._write_settings()
            logged = len(self.log_text())
            self._process = GuardedProcess(
                [binaries.program("postgres"), "-D", str(self.data_directory)],
                account=self._account,
                folder=self._folder,
                log=self.log_path,
                ending="QUIT",
            )
            if self._wait_ready(self._process, deadline):
                return
            # Somebody took the port between our look and the server's: a first start takes
            # another one, and a restart waits for its own.
            is_taken = "could not bind" in self.log_text()[logged:]
            if not is_taken or time.monotonic() >= deadline:
                raise self._failure("the server ended while starting")

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait until it has ended; without effect on a stopped one.

        What is frozen is thawed first.

        Args:
            mode: ``fast`` ends sessions and writes a checkpoint; ``immediate``
                drops everything, and the next start recovers.

        Raises:
            ServerFailedError: it did not stop in time, and has been killed.
        """
        process = self._process
        if process is None:
            return
        process.send_signal(_SIGNALS[mode])
        for pid in self._frozen:
            send_signal(pid, signal.SIGCONT)
        if not process.wait(self._timeout):
            self.kill()
            raise self._failure(f"the server did not stop ({mode}) in {self._timeout} s")
        self._dismiss()

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start; the port, the data and the log stay."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop the server at once and remove its folder."""
        try:
            self.stop("immediate")
        finally:
            if self._folder is not None:
                shutil.rmtree(self._folder)
                self._folder = None

    # ---------------------------------------------------------------- faults

    def kill(self) -> None:
        """End the postmaster with SIGKILL. Its other processes notice, or are killed too.

        The server can be started again after that.
        """
        process = self._running()
        children = child_pids(process.pid)
        process.kill()
        # They end by themselves unless they are stopped or busy, and a new start needs them gone.
        for pid in wait_gone(children - self._frozen, _CHILDREN_GRACE) | self._frozen:
            send_signal(pid, signal.SIGKILL)
        wait_gone(children, self._timeout)
        self._dismiss()

    def kill_backend(self, pid: int) -> None:
        """End one process of the server with SIGKILL: all others end, and the server recovers.

        Args:
            pid: as ``pg_backend_pid()`` says.

        Raises:
            ValueError: it is no process of this server.
        """
        send_signal(self._own_process(pid), signal.SIGKILL)

    def freeze(self, pid: int | None = None) -> None:
        """Stop a process as it is (SIGSTOP): it keeps what it has and answers nobody.

        Args:
            pid: of a session; the postmaster's where None, so that sessions go on
                and new ones hang.

        Raises:
            ValueError: it is no process of this server.
        """
        target = self._own_process(pid)
        self._running().tell_stopped(target)
        self._frozen.add(target)
        send_signal(target, signal.SIGSTOP)
        deadline = time.monotonic() + _FREEZE_TIMEOUT
        while not is_stopped(target):
            if time.monotonic() >= deadline:
                raise self._failure(f"process {target} did not stop in {_FREEZE_TIMEOUT} s")
            time.sleep(POLL_INTERVAL)

    def thaw(self, pid: int | None = None) -> None:
        """Let a frozen process go on.

        Args:
            pid: the postmaster's where None.
        """
        target = self._own_process(pid)
        send_signal(target, signal.SIGCONT)
        self._frozen.discard(target)

    # ---------------------------------------------------------------- below

    def _make_data(self, binaries: ServerBinaries) -> None:
        make_data(binaries, self._account, self.data_directory, template=self._template)

    def _home(self) -> Path:
        if self._folder is None:
            raise ServerFailedError("the cluster has not been started")
        return self._folder

    def _running(self) -> GuardedProcess:
        if self._process is None or self._process.returncode is not None:
            raise ServerFailedError("the server is not running")
        return self._process

    def _own_process(self, pid: int | None) -> int:
        postmaster = self.pid
        if pid is not None and pid not in child_pids(postmaster):
            raise ValueError(f"{pid} is no process of this server")
        return postmaster if pid is None else pid

    def _dismiss(self) -> None:
        if self._process is not None:
            self._process.wait(self._timeout)
        self._process = None
        self._frozen.clear()

    def _write_settings(self) -> None:
        settings = {
            **_SETTINGS,
            "port": str(self._port),
            "unix_socket_directories": str(self._home()),
            **self._settings,
        }
        quoted = {name: value.replace("'", "''") for name, value in settings.items()}
        lines = [f"{name} = '{value}'\n" for name, value in quoted.items()]
        # Written in place: the file stays its owner's.
        (self.data_directory / "postgresql.conf").write_text("".join(lines), encoding="utf-8")

    def _wait_ready(self, process: GuardedProcess, deadline: float) -> bool:
        """Wait until sessions are accepted; false where the process has ended before."""
        while process.returncode is None:
            if self._status(process.pid) == "ready":
                return True
            if time.monotonic() >= deadline:
                self.kill()
                raise self._failure(f"the server was not ready in {self._timeout} s")
            time.sleep(POLL_INTERVAL)
        return False

    def _status(self, pid: int) -> str | None:
        """Return what the postmaster says of itself in its file's last line."""
        try:
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return None
        is_its_own = len(lines) > _STATUS_LINE and lines[0].strip() == str(pid)
        return lines[_STATUS_LINE].strip() if is_its_own else None

    def _failure(self, message: str) -> ServerFailedError:
        return ServerFailedError(f"{message}; the end of its log:\n{self.log_text()[-_LOG_TAIL:]}")


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
