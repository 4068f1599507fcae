"""A private, real Postgres server, and what tests do in it."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, final
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from ._databases import create_database, drop_database
from ._guard import POLL_INTERVAL
from ._server import HOST, Server
from ._standby import copy_primary

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from types import TracebackType

    from ._binaries import ServerBinaries

_CONNECT_TIMEOUT = 10


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSession:
    """A client's session, as ``pg_stat_activity`` has it."""

    pid: int
    """Its process id on the server."""
    application_name: str
    """What it calls itself."""
    state: str | None
    """Such as ``idle`` or ``active``."""
    query: str
    """Its present statement, or its last one."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLock:
    """An advisory lock, as ``pg_locks`` has it."""

    pid: int | None
    """The session; None for a prepared transaction's."""
    classid: int
    """Upper half of a bigint key, or the first of a pair."""
    objid: int
    """Lower half of a bigint key, or the second of a pair."""
    objsubid: int
    """1 for a bigint key, 2 for a pair."""
    shared: bool
    """Whether it is a shared one."""
    granted: bool
    """Whether it is held; else it is waited for."""


@final
class Cluster(Server):
    """A private Postgres server, with the databases that tests make in it.

    A context manager: it starts on entering, and on leaving stops and removes
    its folder. It works as root (the server runs as an unprivileged account) and
    as a normal user, and the server ends with its owner, whatever ends that.

    It listens on 127.0.0.1 and on a Unix socket and trusts every user of this
    machine: it is for tests. What is in it does not survive a crash of the machine.

    Args:
        version: major version to look for; the first server found where None.
        bindir: folder of the server's programs, instead of looking for one
            (see `find_server_binaries`).
        settings: server settings over this class's own, such as
            ``{"max_connections": "20"}``.
        template: copy the cached template of this version, making it where it is
            missing; false runs an initdb of its own.
        timeout: seconds that starting, stopping, promoting or one statement of
            `execute` may take.
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
        super().__init__(
            version=version, bindir=bindir, settings=settings, template=template, timeout=timeout
        )
        self._databases = 0
        self._primary: Cluster | None = None
        self._standbys: list[Cluster] = []

    def __enter__(self) -> Self:
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
        return f"<Cluster {state} on port {self._port}>"

    def close(self) -> None:
        """Stop the server at once, remove its folder, and do the same for its standbys."""
        try:
            for standby in self._standbys:
                standby.close()
        finally:
            super().close()

    def dsn(self, dbname: str = "postgres", **params: object) -> str:
        """Return a connection URL.

        Args:
            dbname: the database.
            **params: further connection parameters, such as ``application_name``.
        """
        return make_dsn(HOST, self.port, dbname, params)

    # ---------------------------------------------------------------- standby

    def standby(self, *, settings: Mapping[str, str] | None = None) -> Cluster:
        """Start a standby that streams from this server, and wait until it does.

        It is closed with this cluster, or before by its own `close` or block.

        Args:
            settings: settings over those of this cluster.
        """
        # At least the primary's limits, or it refuses to start.
        standby = Cluster(
            version=self._version,
            bindir=self._bindir,
            settings={**self._settings, **(settings or {})},
            timeout=self._timeout,
        )
        standby._primary = self
        self._standbys.append(standby)
        standby._settings["primary_conninfo"] = (
            f"host={HOST} port={self.port} user=postgres application_name=standby{id(standby)}"
        )
        standby.start()
        self._wait_until(
            "select exists (select from pg_stat_replication"
            " where application_name = %s and state = 'streaming')",
            [f"standby{id(standby)}"],
            "the standby did not start to stream",
        )
        return standby

    def promote(self) -> None:
        """Make a standby a primary of its own, and wait until it is one.

        Raises:
            ServerFailedError: it was not in time.
            psycopg.errors.ObjectNotInPrerequisiteState: it is no standby.
        """
        self.execute("select pg_promote(false)")
        self._wait_until("select not pg_is_in_recovery()", [], "the standby was not promoted")

    def _make_data(self, binaries: ServerBinaries) -> None:
        if self._primary is None:
            super()._make_data(binaries)
        else:
            copy_primary(self._primary, self.data_directory, self._account)

    def _wait_until(self, query: str, params: Sequence[Any], complaint: str) -> None:
        deadline = time.monotonic() + self._timeout
        while not self.execute(query, params)[0][0]:
            if time.monotonic() >= deadline:
                raise self._failure(f"{complaint} in {self._timeout} s")
            time.sleep(POLL_INTERVAL)

    # ---------------------------------------------------------------- databases

    @contextmanager
    def connect(self, dbname: str = "postgres") -> Generator[psycopg.Connection[Any]]:
        """Open a plain connection in autocommit mode; it is closed at the end of the block.

        Args:
            dbname: the database.
        """
        options = f"-c statement_timeout={int(self._timeout * 1000)}"
        with psycopg.connect(
            self.dsn(dbname, application_name="pgstructured/testing", options=options),
            autocommit=True,
            connect_timeout=_CONNECT_TIMEOUT,
        ) as connection:
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
        text = query if isinstance(query, sql.Composed) else query.encode()
        with self.connect(dbname) as connection:
            cursor = connection.execute(text, params)
            return cursor.fetchall() if cursor.description is not None else []

    def create_database(self, name: str | None = None, *, template: str = "template1") -> str:
        """Create a database and return its connection URL.

        Args:
            name: its name; a new one where None.
            template: the database to copy. Nobody may be connected to it.
        """
        if name is None:
            self._databases += 1
            name = f"test_{os.getpid()}_{self._databases}"
        with self.connect() as connection:
            create_database(connection, name, template)
        return self.dsn(name)

    def drop_database(self, database: str) -> None:
        """Drop a database with the sessions and prepared transactions in it, if it is there.

        Args:
            database: its name or its connection URL.
        """
        with self.connect() as connection:
            drop_database(connection, database_name(database), self.execute)

    # ---------------------------------------------------------------- sessions

    def terminate_backend(self, pid: int) -> bool:
        """End a session as an administrator does; return whether there was one to signal.

        Args:
            pid: as ``pg_backend_pid()`` says.
        """
        return bool(self.execute("select pg_terminate_backend(%s)", [pid])[0][0])

    def sessions(self, database: str) -> list[ServerSession]:
        """Return the clients' sessions in a database.

        Args:
            database: its name or its connection URL.
        """
        rows = self.execute(
            "select pid, application_name, state, query from pg_stat_activity"
            " where datname = %s and backend_type = 'client backend'"
            " and pid <> pg_backend_pid() order by backend_start",
            [database_name(database)],
        )
        return [
            ServerSession(pid=pid, application_name=name, state=state, query=query)
            for pid, name, state, query in rows
        ]

    def advisory_locks(self, database: str) -> list[ServerLock]:
        """Return the advisory locks of a database, held and waited for.

        Args:
            database: its name or its connection URL.
        """
        rows = self.execute(
            "select l.pid, l.classid::bigint, l.objid::bigint, l.objsubid,"
            " l.mode = 'ShareLock', l.granted"
            " from pg_locks l join pg_database d on d.oid = l.database"
            " where l.locktype = 'advisory' and d.datname = %s order by l.granted desc, l.pid",
            [database_name(database)],
        )
        return [
            ServerLock(
                pid=pid, classid=high, objid=low, objsubid=kind, shared=shared, granted=granted
            )
            for pid, high, low, kind, shared, granted in rows
        ]


def make_dsn(host: str, port: int, dbname: str, params: Mapping[str, object]) -> str:
    """Return a connection URL for the user postgres."""
    query = urlencode({name: str(value) for name, value in params.items()}, quote_via=quote)
    url = f"postgresql://postgres@{host}:{port}/{quote(dbname, safe='')}"
    return f"{url}?{query}" if query else url


def database_name(database: str) -> str:
    """Return the database of a connection URL or string; a plain name is itself."""
    if "://" not in database and "=" not in database:
        return database
    return str(conninfo_to_dict(database)["dbname"])
