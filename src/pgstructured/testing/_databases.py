"""Databases for tests, by the thousand: over one connection, which is kept."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self, final

import psycopg
from psycopg import sql

from ._standby import FIRST_15

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import TypeVar

    from ._cluster import Cluster

    T = TypeVar("T")


def create_database(connection: psycopg.Connection[Any], name: str, template: str) -> None:
    """Create a database as a copy of another one, to which nobody may be connected."""
    # Copying its files takes a quarter of the time of writing it to the log, which is what
    # newer servers do unless they are told.
    by_file = connection.info.server_version >= FIRST_15
    statement = sql.SQL("create database {} template {} {}").format(
        sql.Identifier(name),
        sql.Identifier(template),
        sql.SQL("strategy file_copy" if by_file else ""),
    )
    connection.execute(statement)


def drop_database(
    connection: psycopg.Connection[Any], name: str, execute: Callable[..., object]
) -> None:
    """Drop a database with the sessions and prepared transactions in it, if it is there.

    Args:
        connection: to another one.
        name: its name.
        execute: runs a statement in the database of the name ``dbname``.
    """
    prepared = "select gid from pg_prepared_xacts where database = %s"
    for (gid,) in connection.execute(prepared, [name]).fetchall():
        execute(sql.SQL("rollback prepared {}").format(gid), dbname=name)
    statement = sql.SQL("drop database if exists {} (force)").format(sql.Identifier(name))
    connection.execute(statement)


@final
class Databases:
    """Makes and drops databases of a cluster, and looks into its catalogs.

    What `Cluster` does with a connection for each call, which costs more than many a test.

    Args:
        cluster: where.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._kept = ExitStack()
        self._connection: psycopg.Connection[Any] | None = None
        self._made = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._kept.close()

    def create(self) -> str:
        """Create a database, and return its name."""
        self._made += 1
        name = f"test_{os.getpid()}_t{self._made}"
        self._run(lambda connection: create_database(connection, name, "template1"))
        return name

    def drop(self, name: str) -> None:
        """Drop a database with the sessions and prepared transactions in it, if it is there."""
        self._run(lambda connection: drop_database(connection, name, self._cluster.execute))

    def execute(self, query: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run a statement that gives rows, and return these."""
        return self._run(lambda connection: connection.execute(query.encode(), params).fetchall())

    def _run(self, work: Callable[[psycopg.Connection[Any]], T]) -> T:
        if self._connection is not None:
            try:
                return work(self._connection)
            except psycopg.OperationalError:  # it may have been ended by a test
                self._kept.close()
        self._connection = self._kept.enter_context(self._cluster.connect())
        return work(self._connection)
