"""Settings that hold for one operation, as policies of row-level security look at.

``SET LOCAL`` takes no parameters, so they travel through ``set_config``. Every value is local
to a transaction: what a connection is given back with is never another tenant's.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg
from psycopg.rows import tuple_row

from pgstructured.errors import InvalidIdentifierError

from ._cursors import cursor_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from pgstructured.driver import Connection

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(?:\.[A-Za-z_][A-Za-z0-9_$]*)*")
_TO_ROLL_BACK: Final = 1.0
"""Seconds until a ROLLBACK that is not answered is given up as a cancelled one."""


@final
class Settings:
    """The settings of a store, and the statements that make and undo them.

    Args:
        values: The settings by their names.

    Raises:
        InvalidIdentifierError: A name is none that Postgres takes.
        TypeError: A value is no text.
        ValueError: A value can't be sent.
    """

    __slots__ = ("_read", "_write", "names", "parameters")

    def __init__(self, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            _check(name, value)
        self.names: Final = tuple(values)
        self.parameters: Final = tuple(part for pair in values.items() for part in pair)
        count = len(self.names)
        # Quoted, for a pool looks for `set_config(` in what is run, and wipes the session after.
        one = 'pg_catalog."set_config"(%s, %s, true)'
        self._write: Final = f"SELECT {', '.join([one] * count)}".encode()
        one = "pg_catalog.current_setting(%s, true)"
        self._read: Final = f"SELECT {', '.join([one] * count)}".encode()

    async def apply(self, conn: Connection[Any]) -> None:
        """Set them, for the transaction that is open."""
        await cursor_of(conn, tuple_row).execute(self._write, self.parameters)

    @asynccontextmanager
    async def at_once(self, conn: Connection[Any]) -> AsyncGenerator[None]:
        """Have them hold for what a block sends, in a transaction that is one round trip.

        Everything is sent before an answer is waited for, COMMIT too: after an error the server
        skips the rest. (Without BEGIN and COMMIT it would be a transaction all the same, but
        psycopg can't take an error of its end.)

        Cancellation:
            Leaving is a checkpoint. A transaction that is still open is rolled back, shielded,
            and bounded: after a second, ``cancel_timeout`` begins.
        """
        try:
            async with conn.pipeline():
                await conn.execute("BEGIN", prepare=False)
                await self.apply(conn)
                yield
                await conn.execute("COMMIT", prepare=False)
        except BaseException:
            # Where that fails the connection has, and says why.
            with anyio.move_on_after(_TO_ROLL_BACK, shield=True), suppress(psycopg.Error):
                await conn.rollback()
            raise

    @asynccontextmanager
    async def held(self, conn: Connection[Any]) -> AsyncGenerator[None]:
        """Have them hold for a block in a transaction that goes on after it.

        The block is a savepoint: rolling back to it takes them back, as with everything. Where
        it ends well they are set to what they were.

        Cancellation:
            Entering and leaving are checkpoints. A cancelled block is rolled back, shielded, and
            bounded by ``cancel_timeout``.
        """
        async with conn.transaction() as block:
            cursor = cursor_of(conn, tuple_row)
            await cursor.execute(self._read, self.names)
            await self.apply(conn)
            yield
            if conn.info.transaction_status.name == "INERROR":  # a stream that was left early
                raise psycopg.Rollback(block)
            before = await cursor.fetchone() or ()
            # The last one first: what was set before a role was taken may want the old one back.
            pairs = reversed(list(zip(self.names, before, strict=True)))
            setting_back = [part for pair in pairs for part in pair]
            await cursor_of(conn, tuple_row).execute(self._write, setting_back)


def _check(name: object, value: object) -> None:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise InvalidIdentifierError(
            f"setting name {name!r} is not made of ASCII letters, digits, underscores and dots"
        )
    if not isinstance(value, str):
        raise TypeError(f"the value of {name} must be a str, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"the value of {name} has a NUL character in it")
