"""A real PgBouncer in front of a cluster."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, Self, final

import psycopg
from psycopg.rows import dict_row

from ._account import server_account
from ._cluster import database_name, make_dsn
from ._errors import PgBouncerNotFoundError, ServerFailedError
from ._guard import POLL_INTERVAL, GuardedProcess
from ._ports import free_port
from ._storage import make_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from psycopg.abc import RV, PQGen

    from ._cluster import Cluster

PoolMode = Literal["transaction", "session", "statement"]

_HOST = "127.0.0.1"
_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin")
_LOG_TAIL = 3000
_SETTINGS: dict[str, str] = {
    "listen_addr": _HOST,
    "auth_type": "trust",
    "admin_users": "postgres",
    # After an outage it would refuse to try again for 15 s.
    "server_login_retry": "1",
    "max_client_conn": "500",
    "default_pool_size": "20",
    "stats_period": "3600",
}


def find_pgbouncer() -> str:
    """Return the path of the PgBouncer program on this machine.

    Raises:
        PgBouncerNotFoundError: there is none.
    """
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_FOLDERS))
    found = shutil.which("pgbouncer", path=path)
    if found is None:
        raise PgBouncerNotFoundError(
            "no pgbouncer on PATH or in /usr/sbin; install your system's package pgbouncer"
        )
    return found


class _Console(psycopg.Connection[Any]):
    """A connection to its console, whose operations have a deadline."""

    deadline: float
    """As `time.monotonic` counts."""

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        left = max(self.deadline - time.monotonic(), 0.0)
        return super().wait(gen, interval, left if timeout is None else min(left, timeout))


@final
class PgBouncer:
    """A PgBouncer of one's own in front of a `Cluster`; it ends with its owner.

    A context manager: it starts on entering.

    Args:
        cluster: the server, which has to be running.
        pool_mode: when a server's session is given to another client.
        default_pool_size: sessions on the server per database and user.
        settings: further settings of its ``[pgbouncer]`` section.
        timeout: seconds that starting and stopping may take.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        pool_mode: PoolMode = "transaction",
        default_pool_size: int = 20,
        settings: Mapping[str, str] | None = None,
        timeout: float = 10.0,
    ) -> None:
        self._settings = {
            **_SETTINGS,
            "pool_mode": pool_mode,
            "default_pool_size": str(default_pool_size),
            **(settings or {}),
        }
        self._cluster = cluster
        self._account = server_account()
        self._timeout = timeout
        self._folder: Path | None = None
        self._process: GuardedProcess | None = None
        self._port = 0

    def __enter__(self) -> Self:
        try:
            self._start()
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

    @property
    def host(self) -> str:
        """Its address."""
        return _HOST

    @property
    def port(self) -> int:
        """Its TCP port."""
        return self._port

    @property
    def pid(self) -> int:
        """Its process id."""
        if self._process is None:
            raise ServerFailedError("the pooler is not running")
        return self._process.pid

    def dsn(self, database: str = "postgres", **params: object) -> str:
        """Return a connection URL through the pooler.

        Args:
            database: name or connection URL of a database of the cluster.
            **params: further connection parameters.
        """
        return make_dsn(_HOST, self._port, database_name(database), params)

    def log_text(self) -> str:
        """Return what it has logged."""
        if self._folder is None:
            return ""
        try:
            return (self._folder / "pgbouncer.log").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def admin(self, command: str, *, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Run a command of its console, such as ``PAUSE``, ``RESUME`` or ``SHOW POOLS``.

        Args:
            command: as its manual has it.
            timeout: seconds that it may take; ``PAUSE``, for one, waits for open transactions.
                Connecting takes 2 at least where the pooler does not answer at all.

        Returns:
            The rows, by the names of their columns.

        Raises:
            ServerFailedError: it was not done in time. The pooler goes on with it nevertheless:
                after a ``PAUSE`` it is paused until ``RESUME``.
            psycopg.Error: what the pooler says.
        """
        deadline = time.monotonic() + timeout
        try:
            connection = _Console.connect(
                self.dsn("pgbouncer"),
                autocommit=True,
                connect_timeout=max(math.ceil(timeout), 1),
                cursor_factory=psycopg.ClientCursor,
            )
            with closing(connection):
                connection.deadline = deadline
                # Its console knows the simple protocol only.
                cursor = connection.cursor(row_factory=dict_row).execute(command.encode())
                return cursor.fetchall() if cursor.description is not None else []
        # The second is what `wait` raises, and has no public name.
        except (psycopg.errors.ConnectionTimeout, psycopg.errors._WaitTimeout) as exc:  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - see above
            raise ServerFailedError(
                f"pgbouncer has not done {command!r} within {timeout} s, and goes on with it: a"
                " PAUSE waits for open transactions, and lasts until RESUME"
            ) from exc

    def close(self) -> None:
        """End it and every connection through it, and remove its folder."""
        try:
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM)
                if not self._process.wait(self._timeout):
                    self._process.kill()
                    raise ServerFailedError(f"pgbouncer did not stop in {self._timeout} s")
        finally:
            self._process = None
            if self._folder is not None:
                shutil.rmtree(self._folder)
                self._folder = None

    def _start(self) -> None:
        program = find_pgbouncer()
        self._folder = make_folder(self._account)
        deadline = time.monotonic() + self._timeout
        while True:
            self._port = free_port(_HOST)
            self._write_settings(self._folder)
            self._process = GuardedProcess(
                [program, str(self._folder / "pgbouncer.ini")],
                account=self._account,
                folder=self._folder,
                log=self._folder / "pgbouncer.log",
                ending="TERM",
            )
            if self._wait_ready(self._process, deadline):
                return
            # Somebody may have taken the port between our look and its own.
            if "Address already in use" not in self.log_text() or time.monotonic() >= deadline:
                raise ServerFailedError(
                    f"pgbouncer did not start; the end of its log:\n{self.log_text()[-_LOG_TAIL:]}"
                )
            self._process.wait(self._timeout)
            (self._folder / "pgbouncer.log").unlink()

    def _write_settings(self, folder: Path) -> None:
        settings = {
            **self._settings,
            "listen_port": str(self._port),
            # With a socket there it would start without its port, where that is taken.
            "unix_socket_dir": "",
            "auth_file": str(folder / "users.txt"),
        }
        server = f"host={self._cluster.host} port={self._cluster.port}"
        lines = ["[databases]", f"* = {server}", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        contents = {"pgbouncer.ini": "\n".join([*lines, ""]), "users.txt": '"postgres" ""\n'}
        for name, text in contents.items():
            (folder / name).write_text(text, encoding="utf-8")
            self._account.own(folder / name)

    def _wait_ready(self, process: GuardedProcess, deadline: float) -> bool:
        while process.returncode is None:
            if "process up" in self.log_text():
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_INTERVAL)
        return False
