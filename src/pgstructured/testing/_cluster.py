"""A private, real Postgres server.

    new ──start──> running ──stop, kill──> stopped ──start──> running
     any ──close──> closed (its folder is gone)

Freezing is beside this: `Cluster.stop` and `Cluster.kill` thaw what is frozen.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, LiteralString, Self, cast, final
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql

from ._account import readable_binaries, server_account
from ._binaries import find_server_binaries
from ._errors import ServerFailedError
from ._guard import POLL_INTERVAL, GuardedProcess, child_pids, is_stopped, wait_gone
from ._ports import free_port
from ._storage import make_data, make_folder

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from types import TracebackType

StopMode = Literal["fast", "immediate"]

HOST = "127.0.0.1"
_SETTINGS: dict[str, str] = {
    "listen_addresses": HOST,
    "max_connections": "200",
    "shared_buffers": "16MB",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
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
_LOG_TAIL = 3000


@final
class Cluster:
    """A private Postgres server, with the databases that tests make in it.

    A context manager: it starts on entering, and on leaving stops and removes
    its folder. It works as root (the server runs as an unprivileged account) and
    as a normal user, and the server ends with its owner, whatever ends that.

    It listens on 127.0.0.1 and on a Unix socket, and trusts every local user:
    what is in it is for tests. Nothing in it survives a crash of the machine.

    Args:
        version: major version to look for; the first server found where None.
        bindir: folder of the server's programs, instead of looking for one
            (see `find_server_binaries`).
        settings: server settings over this class's own, such as
            ``{"max_connections": "20"}``.
        template: copy the cached template of this version, and make it where it
            is missing; false runs an initdb of its own.
        timeout: seconds that starting, stopping and promoting may take.
    """

    def __init__(
        self,
        *,
        version: int | None = None,
        bindir: str | os.PathLike[str] | None = None,
        settings: Mapping[str, str] | None = None,
        template: bool = True,
        timeout: float = 30.0,
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
        self._databases = 0

    def __enter__(self) -> Self:
        if not self.is_running:
            try:
                self.start()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "running" if self.is_running else "stopped"
        return f"<Cluster {state}, port {self._port or None}>"

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

    def dsn(self, dbname: str = "postgres", **params: object) -> str:
        """Return a connection URL.

        Args:
            dbname: the database.
            **params: further connection parameters, such as ``application_name``.
        """
        query = f"?{urlencode({k: str(v) for k, v in params.items()}, quote_via=quote)}"
        database = quote(dbname, safe="")
        return f"postgresql://postgres@{HOST}:{self.port}/{database}{query if params else ''}"

    def log_text(self) -> str:
        """Return what the server has logged, over all its restarts."""
        try:
            return self.log_path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    # ---------------------------------------------------------------- lifetime

    def start(self) -> None:
        """Start the server and wait until it accepts connections.

        Raises:
            ServerNotFoundError: there are no programs of a server on this machine.
            ServerFailedError: it did not start; shows the end of its log.
        """
        if self.is_running:
            return
        self._forget()
        binaries = readable_binaries(
            find_server_binaries(version=self._version, bindir=self._bindir), self._account
        )
        new = self._folder is None
        if self._folder is None:
            self._folder = make_folder(self._account)
            make_data(binaries, self._account, self.data_directory, template=self._template)
        deadline = time.monotonic() + self._timeout
        while True:
            if new:
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
            if self._wait_ready(deadline):
                return
            self._process.wait(0)
            self._process = None
            # Somebody took the port between our look and the server's: with a first start any
            # other does, and a restart waits for it.
            taken = "could not bind" in self.log_text()[logged:]
            if not taken or time.monotonic() >= deadline:
                raise self._failed("the server ended while starting")

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait until it has ended; without effect on a stopped one.

        Args:
            mode: ``fast`` ends sessions and writes a checkpoint; ``immediate``
                drops everything, and the next start recovers.

        Raises:
            ServerFailedError: it did not stop in time, and has been killed.
        """
        process = self._process
        if process is None:
            return
        self._thaw_all()
        process.send_signal(_SIGNALS[mode])
        if not process.wait(self._timeout):
            self.kill()
            raise self._failed(f"the server did not stop ({mode}) in {self._timeout} s")
        self._forget()

    def close(self) -> None:
        """Stop the server at once and remove its folder."""
        try:
            self.stop("immediate")
        finally:
            if self._folder is not None:
                shutil.rmtree(self._folder)
                self._folder = None

    def _home(self) -> Path:
        if self._folder is None:
            raise ServerFailedError("the cluster has not been started")
        return self._folder

    def _running(self) -> GuardedProcess:
        if self._process is None or self._process.returncode is not None:
            raise ServerFailedError("the server is not running")
        return self._process

    def _forget(self) -> None:
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

    def _wait_ready(self, deadline: float) -> bool:
        """Wait until sessions are accepted; false where the process has ended before."""
        process = self._running()
        while process.returncode is None:
            if self._status() == "ready":
                return True
            if time.monotonic() >= deadline:
                self.kill()
                raise self._failed(f"the server was not ready in {self._timeout} s")
            time.sleep(POLL_INTERVAL)
        return False

    def _status(self) -> str | None:
        try:
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return None
        fresh = len(lines) >= 8 and lines[0].strip() == str(self.pid)
        return lines[7].strip() if fresh else None

    def _failed(self, message: str) -> ServerFailedError:
        return ServerFailedError(f"{message}; the end of its log:\n{self.log_text()[-_LOG_TAIL:]}")

    # ---------------------------------------------------------------- faults

    def kill(self) -> None:
        """End the postmaster with SIGKILL, and its processes with it."""
        process = self._running()
        children = child_pids(process.pid)
        process.kill()
        # They notice by themselves, unless they are stopped or busy; a new start waits for all.
        if remaining := wait_gone(children, 1.0):
            for pid in remaining:
                os.kill(pid, signal.SIGKILL)
            wait_gone(remaining, 10.0)
        self._forget()

    def _thaw_all(self) -> None:
        pass

    # ---------------------------------------------------------------- databases

    @contextmanager
    def connect(self, dbname: str = "postgres") -> Generator[psycopg.Connection[Any]]:
        """Open a plain connection in autocommit mode, closed at the end of the block."""
        connection = psycopg.connect(
            self.dsn(dbname, application_name="pgstructured/testing"),
            autocommit=True,
            connect_timeout=int(self._timeout),
        )
        with connection:
            yield connection

    def execute(
        self,
        query: str | sql.Composed,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        dbname: str = "postgres",
    ) -> list[tuple[Any, ...]]:
        """Run a statement on a connection of its own, and return its rows.

        Args:
            query: SQL, with psycopg's placeholders where there are parameters.
            params: their values.
            dbname: the database.
        """
        text = query if isinstance(query, sql.Composed) else cast("LiteralString", query)
        with self.connect(dbname) as connection:
            cursor = connection.execute(text, params)
            return cursor.fetchall() if cursor.description is not None else []

    def create_database(self, name: str | None = None, *, template: str = "template1") -> str:
        """Create a database and return its connection URL.

        Args:
            name: its name; one that is new where None.
            template: the database to copy. Nobody may be connected to it.
        """
        if name is None:
            self._databases += 1
            name = f"test_{os.getpid()}_{self._databases}"
        with self.connect() as connection:
            strategy = " strategy file_copy" if connection.info.server_version >= 150000 else ""
            statement = "create database {} template {}" + strategy
            connection.execute(
                sql.SQL(cast("LiteralString", statement)).format(
                    sql.Identifier(name), sql.Identifier(template)
                )
            )
        return self.dsn(name)

    def drop_database(self, database: str) -> None:
        """Drop a database, and end the sessions in it.

        Args:
            database: its name or its connection URL.
        """
        name = database_name(database)
        self.execute(sql.SQL("drop database if exists {} (force)").format(sql.Identifier(name)))


def database_name(database: str) -> str:
    """Return the database of a connection URL or string; a plain name is itself."""
    if "://" not in database and "=" not in database:
        return database
    found = psycopg.conninfo.conninfo_to_dict(database).get("dbname")
    return str(found)
