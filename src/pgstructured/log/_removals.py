"""What a call of `EventLog.trim` has removed, and who has missed it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, final

from pgstructured.observe import emit

from . import _statements as sql

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from typing import LiteralString

    from psycopg import AsyncCursor

    from ._names import Names


@final
class Removals:
    """Counts, and tells in the end.

    Args:
        names: The log's.
        expires: Whether stored cursors may miss something.
    """

    def __init__(self, names: Names, *, expires: bool) -> None:
        self._names = names
        self._expires = expires
        self._statement: LiteralString = names.fill(sql.EXPIRED_CURSORS)
        self._expired: set[str] = set()
        self.count = 0

    @asynccontextmanager
    async def watched(self, cursor: AsyncCursor[Any]) -> AsyncGenerator[None]:
        """Note which stored cursors miss what a block removes."""
        before = await self._find(cursor)
        yield
        self._expired |= await self._find(cursor) - before

    async def _find(self, cursor: AsyncCursor[Any]) -> set[str]:
        if not self._expires:
            return set()
        await cursor.execute(self._statement, ())
        return {name for (name,) in await cursor.fetchall()}

    def tell(self) -> None:
        """Tell instruments what there is to be told."""
        if self.count:
            emit("log.trimmed", log=str(self._names), count=self.count)
        if self._expired:
            emit("log.cursors_expired", log=str(self._names), names=sorted(self._expired))
