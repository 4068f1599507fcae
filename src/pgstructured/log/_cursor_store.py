"""Cursors that are kept in the database, under a consumer's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import psycopg
from psycopg import AsyncCursor
from psycopg.rows import tuple_row

from pgstructured._util import NoPublicConstructor
from pgstructured.errors import CursorExpiredError

from . import _statements as sql
from ._cursors import NOTHING, Cursor, as_cursor, parts_of

if TYPE_CHECKING:
    from datetime import datetime
    from typing import LiteralString

    from psycopg import AsyncConnection

    from ._names import Names


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCursor:
    """A cursor that is kept in the database."""

    name: str
    """The consumer's."""
    cursor: Cursor
    """How far the consumer has come."""
    saved_at: datetime
    """When it was saved last, by the server's clock."""


@final
class CursorStore(metaclass=NoPublicConstructor):
    """Keeps the cursors of consumers in the database; `EventLog.cursors` is the one of a log.

    A consumer that loads its cursor, does its work and saves the next one in a single
    transaction does everything exactly once: both are committed, or neither. Consumers with the
    same name take turns; those with different names each get all events.

    While a cursor is stored `EventLog.trim` keeps what it has not seen.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._save: LiteralString = names.fill(sql.SAVE)
        self._save_beginning: LiteralString = names.fill(sql.SAVE_BEGINNING)
        self._begin: LiteralString = names.fill(sql.BEGIN)
        self._load: LiteralString = names.fill(sql.LOAD)
        self._load_for_update: LiteralString = names.fill(sql.LOAD_FOR_UPDATE)
        self._forget: LiteralString = names.fill(sql.FORGET)
        self._list: LiteralString = names.fill(sql.LIST)

    def __repr__(self) -> str:
        return f"<CursorStore of {self._names}>"

    async def load(
        self,
        conn: AsyncConnection[Any],
        name: str,
        *,
        for_update: bool = True,
        initial: Cursor | str | None = None,
    ) -> Cursor:
        """Return the cursor of a consumer, and keep others of its name from going on.

        A name that is new is stored first, and what comes after its cursor is kept for it
        from then on: the log is not trimmed again until the transaction has ended. A trim that
        is under way is waited for.

        Args:
            conn: Any psycopg connection, in the transaction that is to `save` the next cursor.
            name: The consumer's.
            for_update: Lock it until the end of the transaction: another ``load`` of that name
                waits. Without, this only looks.
            initial: Where a new consumer begins: `Cursor.beginning`, which is the default,
                or `EventLog.now`.

        Raises:
            psycopg.ProgrammingError: if it is to be locked and there is no transaction.
            ValueError: if ``initial`` is no cursor.
            psycopg.errors.SerializationFailure: in ``REPEATABLE READ``, if another one of that
                name has saved meanwhile; or if the name is new, and the log was trimmed.
            psycopg.Error: what else the server says.

        Cancellation:
            As statements on ``conn``.
        """
        if for_update and conn.autocommit and conn.info.transaction_status.name == "IDLE":
            raise psycopg.ProgrammingError(
                "a cursor is locked until the end of a transaction, and there is none: use"
                " conn.transaction(), or for_update=False to look only"
            )
        start = Cursor.beginning() if initial is None else as_cursor(initial)
        statement = self._load_for_update if for_update else self._load
        position = await self._find(conn, statement, name)
        if position is None:
            async with AsyncCursor(conn, row_factory=tuple_row) as beginning:
                await beginning.execute(self._begin, self._values(name, start))
            # Not what was put in: another one may have been quicker, and gone on.
            position = await self._find(conn, statement, name)
        if position is None:
            raise self._state_is_gone()
        return Cursor.parse(position)

    async def save(self, conn: AsyncConnection[Any], name: str, cursor: Cursor | str) -> None:
        """Store how far a consumer has come.

        `Cursor.beginning` is stored as the place before what is kept now. For that a trim that
        is under way is waited for, and the next one waits until the transaction has ended.

        Args:
            conn: Any psycopg connection, in the transaction of the consumer's work.
            name: The consumer's.
            cursor: ``Page.cursor``, or ``Event.cursor`` of the last one that is done.

        Raises:
            ValueError: if ``cursor`` is no cursor.
            CursorExpiredError: if the log has no state; run `EventLog.create`.
            psycopg.errors.SerializationFailure: in ``REPEATABLE READ``, if ``cursor`` is the
                beginning and the log was trimmed meanwhile.
            psycopg.Error: what the server says.

        Cancellation:
            As a statement on ``conn``.
        """
        values = self._values(name, as_cursor(cursor))
        statement = self._save_beginning if values["epoch"] is None else self._save
        async with AsyncCursor(conn, row_factory=tuple_row) as saving:
            await saving.execute(statement, values)
            saved = saving.rowcount
        if not saved:
            raise self._state_is_gone()

    async def delete(self, conn: AsyncConnection[Any], name: str) -> bool:
        """Forget a consumer: nothing is kept for it any more.

        Args:
            conn: Any psycopg connection.
            name: The consumer's.

        Returns:
            Whether there was one.

        Raises:
            psycopg.Error: what the server says.

        Cancellation:
            As a statement on ``conn``.
        """
        async with AsyncCursor(conn, row_factory=tuple_row) as deleting:
            await deleting.execute(self._forget, (name,))
            return deleting.rowcount > 0

    async def list(self, conn: AsyncConnection[Any]) -> list[StoredCursor]:
        """Return all stored cursors, by name.

        Args:
            conn: Any psycopg connection.

        Raises:
            psycopg.Error: what the server says.

        Cancellation:
            As a statement on ``conn``.
        """
        async with AsyncCursor(conn, row_factory=tuple_row) as listing:
            await listing.execute(self._list, ())
            rows = await listing.fetchall()
        return [
            StoredCursor(name=name, cursor=Cursor.parse(position), saved_at=saved_at)
            for name, position, saved_at in rows
        ]

    @staticmethod
    async def _find(conn: AsyncConnection[Any], statement: LiteralString, name: str) -> str | None:
        async with AsyncCursor(conn, row_factory=tuple_row) as cursor:
            await cursor.execute(statement, (name,))
            row = await cursor.fetchone()
        return None if row is None else row[0]

    def _values(self, name: str, cursor: Cursor) -> dict[str, Any]:
        epoch, base, seen, window, after = parts_of(cursor)
        known = seen or NOTHING
        page = window or NOTHING
        return {
            "name": name,
            "position": None if epoch is None else str(cursor),
            "epoch": epoch,
            "base": None if epoch is None else base,
            "seen": str(known.snapshot),
            "seen_id": known.last_id,
            "page": str(page.snapshot),
            "page_id": after,
        }

    def _state_is_gone(self) -> CursorExpiredError:
        return CursorExpiredError(f"the state of event log {self._names} is gone; run create()")
