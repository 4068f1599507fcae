"""`EventLog`: what a program sees of a log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from pgstructured._util import create

from ._appending import Appender
from ._creating import create_log
from ._cursor_store import CursorStore
from ._cursors import as_cursor
from ._following import Pages, open_following
from ._names import Names
from ._partitions import check_partition_size
from ._reading import Reader, check_limit, check_topics
from ._trimming import Trimmer, check_lock_timeout, check_older_than
from ._waking import check_poll, open_wake_ups

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from contextlib import AbstractAsyncContextManager

    from psycopg import AsyncConnection

    from pgstructured.notify import NotifyBus, Publisher
    from pgstructured.pool import Pool

    from ._cursors import Cursor, EventId
    from ._events import Page
    from ._following import Following
    from ._waking import WakeUps


@final
class EventLog:
    """Events in a table, of which no reader misses any.

    Making one needs no server: it is what the log is called. `create` makes the tables.

    Args:
        table: The table's name, at most 55 bytes; three more have names that begin so.
        schema: The schema it is in; None for where the connections' ``search_path`` finds it.
        publisher: Wakes the followers after the commit. Without, the transaction that appends
            notifies, for which the server makes transactions commit one by one.

    Raises:
        ValueError: if a name is none that the server would take as it is.
    """

    def __init__(
        self,
        table: str = "pgstructured_event",
        *,
        schema: str | None = None,
        publisher: Publisher | None = None,
    ) -> None:
        self._names = names = Names(table, schema)
        self._appender = Appender(names, publisher)
        self._reader = Reader(names)
        self._trimmer = Trimmer(names)
        self._cursors = create(CursorStore, names)

    def __repr__(self) -> str:
        return f"<EventLog {self._names}>"

    @property
    def channel(self) -> str:
        """The channel on which followers are woken."""
        return self._names.channel

    @property
    def cursors(self) -> CursorStore:
        """Cursors that are kept in the database, under names of consumers."""
        return self._cursors

    async def create(
        self, conn: AsyncConnection[Any], *, partition_size: int | None = None
    ) -> None:
        """Create the tables unless they are there; any number of processes may do so at once.

        Where they are there and have been restored from a dump to a server that is younger, the
        events are adopted: they are kept, and all cursors expire.

        Args:
            conn: Any psycopg connection. In a transaction they come with its commit.
            partition_size: Keep the events in partitions of so many ids, which `trim` drops as a
                whole: 100,000 to some millions, so that there are about a dozen. None
                leaves a log that is there as it is, and makes a new one without partitions.

        Raises:
            ValueError: if the log is there without partitions, or with partitions of another
                size; or if ``partition_size`` is out of its range.
            psycopg.Error: what the server says.

        Cancellation:
            As statements on ``conn``; a cancelled call leaves all of the tables or none.
        """
        await create_log(conn, self._names, partition_size=check_partition_size(partition_size))

    async def append(self, conn: AsyncConnection[Any], topic: str, payload: Any) -> EventId:
        """Append an event in the connection's transaction.

        Readers get it once that has committed, and never if it is rolled back. In autocommit,
        and outside of a transaction, it is committed at once.

        Args:
            conn: Any psycopg connection.
            topic: What it is about; any text without a NUL.
            payload: Any JSON value, or `bytes`. The server takes some 250 megabytes of JSON;
                of bytes 500 are the most, and a few are best.

        Returns:
            Its id.

        Raises:
            TypeError: if the payload is no JSON value, or the topic no text.
            ValueError: if there are more bytes than a reader could get.
            psycopg.Error: what the server says.

        Cancellation:
            As a statement on ``conn``.
        """
        return await self._appender.append(conn, topic, payload)

    async def append_many(
        self, conn: AsyncConnection[Any], items: Iterable[tuple[str, Any]]
    ) -> list[EventId]:
        """Append events in the connection's transaction, all in one statement.

        As `append`, and many times faster than one by one.

        Args:
            conn: Any psycopg connection.
            items: Pairs of topic and payload.

        Returns:
            Their ids, in the order of the items.

        Raises:
            TypeError: if a payload is no JSON value, or a topic no text.
            ValueError: if there are more bytes in a payload than a reader could get.
            psycopg.Error: what the server says.

        Cancellation:
            As a statement on ``conn``; a checkpoint also where there are no items.
        """
        return await self._appender.append_many(conn, items)

    async def read(
        self,
        conn: AsyncConnection[Any],
        cursor: Cursor | str,
        *,
        topics: Collection[str] | None = None,
        limit: int = 1000,
    ) -> Page:
        """Return the events that come after a cursor.

        It never waits: not for transactions that are open, either. What they append comes
        after the cursor of this page, whatever its ids are. Events that the connection's own
        transaction has appended are no exception.

        The events of a page are in the order of their ids: as they were appended, whoever did.
        So one that was appended by somebody who had seen another one comes after that.

        In ``REPEATABLE READ`` only what was committed before the transaction's snapshot is
        there.

        Args:
            conn: Any psycopg connection to the primary.
            cursor: Where to begin; a `Cursor` or its text.
            topics: Which events; None for all. A cursor is to be used with the same ones again:
                it counts the others as seen.
            limit: The most to return.

        Returns:
            The page. Without events the reader has caught up.

        Raises:
            CursorExpiredError: if events that come next have been trimmed; or if the cursor is
                not of this log, or of a state of it that no longer is.
            ValueError: if ``cursor`` is no cursor, or ``topics`` or ``limit`` are impossible.
            TypeError: if ``topics`` are no collection of texts.
            NotPrimaryError: on a standby.
            psycopg.Error: what the server says.

        Cancellation:
            As a statement on ``conn``.
        """
        return await self._reader.read(
            conn, as_cursor(cursor), topics=check_topics(topics), limit=check_limit(limit)
        )

    async def now(self, conn: AsyncConnection[Any]) -> Cursor:
        """Return the cursor that has seen what is committed now, and nothing else.

        Raises:
            CursorExpiredError: if the log was restored from elsewhere; `create` adopts it.
            NotPrimaryError: on a standby.
            psycopg.Error: what the server says.

        Cancellation:
            As a statement on ``conn``.
        """
        return await self._reader.now(conn)

    def follow(
        self,
        bus: NotifyBus,
        pool: Pool,
        cursor: Cursor | str,
        *,
        topics: Collection[str] | None = None,
        poll: float = 30.0,
        limit: int = 1000,
    ) -> AbstractAsyncContextManager[Following]:
        """Receive the events after a cursor, and then new ones as they are committed.

        Each comes at least once, and not twice while nothing is lost: a consumer that begins
        anew at the cursor that it kept sees again what it did after that, with the same ids.

        Nothing runs beside the consumer. A page is read when it asks for an event and there
        is none; a connection is borrowed for that, and for no longer. Where the server can't
        be reached reading is tried again until it can.

        Args:
            bus: Tells of new events; a bus to the same database.
            pool: Lends the connections to read with.
            cursor: Where to begin; a `Cursor` or its text.
            topics: Which events; None for all.
            poll: Seconds after which to look without having been told, for what the bus
                could not tell.
            limit: Events in one page, which is what is kept in memory.

        Yields:
            The stream.

        Raises:
            ValueError: if ``cursor`` is no cursor, or an option is out of its range.
            BusUnavailableError: if the bus has died.
            anyio.ClosedResourceError: if the bus is closed.

        Cancellation:
            Entering is a checkpoint, and waits while the bus is down. Leaving takes no time.
        """
        pages = Pages(
            self._names,
            self._reader,
            pool,
            as_cursor(cursor),
            topics=check_topics(topics),
            limit=check_limit(limit),
        )
        return open_following(bus, self.channel, pages, poll=check_poll(poll))

    def wake_ups(
        self, bus: NotifyBus, *, poll: float = 30.0
    ) -> AbstractAsyncContextManager[WakeUps]:
        """Be told when to read: at once, and then whenever there may be something new.

        For consumers that read in transactions of their own, with `cursors`.

        Args:
            bus: Tells of new events; a bus to the same database.
            poll: Seconds after which to look without having been told.

        Yields:
            A stream of None.

        Raises:
            ValueError: if ``poll`` is out of its range.
            BusUnavailableError: if the bus has died.
            anyio.ClosedResourceError: if the bus is closed.

        Cancellation:
            Entering is a checkpoint, and waits while the bus is down. Leaving takes no time.
        """
        return open_wake_ups(bus, self.channel, check_poll(poll))

    async def trim(
        self,
        conn: AsyncConnection[Any],
        older_than: float,
        *,
        expire_cursors: bool = False,
        batch_size: int = 10_000,
        lock_timeout: float = 0.5,
    ) -> int:
        """Remove old events.

        It goes from the front, by transactions in the order in which they began to write, and
        ends at the first event that is too young, is after a stored cursor, or is from a time
        when a transaction was running that still is. Cursors that have seen all that is
        removed go on being good; others get `CursorExpiredError`.

        Where the events are in partitions it drops those at the front of which all that may be
        said, and makes new ones ahead. What is old in a partition that also has younger events
        waits for these; but when the newest event of the log is old, everything that may go
        does. Partitions that can't be dropped or made now are left, and the event
        ``log.partitions_left`` says why.

        Transactions in which a consumer has begun, by ``load`` of a new name or by ``save`` of
        the beginning, are waited for: what is after its cursor is to be kept.

        Args:
            conn: Any psycopg connection. In autocommit each batch is a transaction, and each
                partition; else appending waits from the first one on until the end of yours.
            older_than: Seconds since an event was appended after which it may go.
            expire_cursors: Remove also what stored cursors have not seen. The event
                ``log.cursors_expired`` names them.
            batch_size: How many to remove in one statement.
            lock_timeout: Seconds to wait until nobody else uses the table, for each partition;
                all who come meanwhile wait behind.

        Returns:
            How many were removed.

        Raises:
            ValueError: if ``older_than``, ``batch_size`` or ``lock_timeout`` is out of its
                range.
            psycopg.Error: what the server says.

        Cancellation:
            As statements on ``conn``; batches and partitions that are committed stay so.
        """
        return await self._trimmer.trim(
            conn,
            check_older_than(older_than),
            expire_cursors=expire_cursors,
            batch_size=check_limit(batch_size, "batch_size"),
            lock_timeout=check_lock_timeout(lock_timeout),
        )
