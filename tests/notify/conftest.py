"""What the tests of the bus share: somebody to publish, to break things, and to look."""

from __future__ import annotations

from contextlib import contextmanager

import anyio
import psycopg
import pytest
from psycopg import sql

from pgstructured import Backoff
from pgstructured.notify import Notification
from pgstructured.observe import instrumented


class Kit:
    """A session of the test's own, blocking, and what tests do all the time."""

    quick = Backoff(initial=0.01, maximum=0.05, reset_after=0.05)

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.conn = psycopg.connect(dsn, autocommit=True)

    def execute(self, query, params=()):
        cursor = self.conn.execute(query, params)
        return cursor.fetchall() if cursor.description else []

    def notify(self, channel, *payloads):
        """Notify once for each payload, in one transaction."""
        self.execute("SELECT pg_notify(%s, p) FROM unnest(%s::text[]) AS p", (channel, [*payloads]))

    def kill(self, bus):
        """End the bus's session."""
        self.execute("SELECT pg_terminate_backend(%s)", (bus.backend_pid,))

    @staticmethod
    async def take(subscription, count):
        """Receive so many items, one by one; notifications as their payloads."""
        items: list[object] = []
        with anyio.fail_after(20):
            while len(items) < count:
                item = await subscription.receive()
                items.append(item.payload if isinstance(item, Notification) else item)
        return items

    @staticmethod
    async def eventually(condition, *, every=0.005):
        with anyio.fail_after(4000 * every):
            while not condition():  # noqa: ASYNC110 - it may be the server's
                await anyio.sleep(every)

    @staticmethod
    async def listening(bus):
        """Return the channels that the server says the bus's session listens to."""
        session = bus._link.session
        result = await session.execute(  # that session may take bytes as they are
            "SELECT encode(convert_to(c, 'UTF8'), 'hex') FROM pg_listening_channels() AS c"
        )
        return {bytes.fromhex(row[0]).decode() for row in result.rows}

    @staticmethod
    @contextmanager
    def events():
        """Note the events of the bus: names and facts."""
        seen = []
        with instrumented(lambda event: seen.append((event.name, dict(event.facts)))):
            yield seen


@pytest.fixture
def kit(pg_dsn):
    kit = Kit(pg_dsn)
    yield kit
    kit.conn.close()


@pytest.fixture
def database_in(request, kit, pg_cluster):
    """Make a database of an encoding; yield its conninfo."""
    encoding = request.param
    ours = psycopg.conninfo.conninfo_to_dict(kit.dsn)["dbname"]
    name = f"{ours}_{encoding.lower()}"
    pg_cluster.execute(
        f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
    )
    yield pg_cluster.dsn(name)
    pg_cluster.drop_database(pg_cluster.dsn(name))


class Ears:
    """A session that listens to ``a``, ``b`` and an odd one, for what was published."""

    channels = ("a", "b", 'b"\\')

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg.connect(dsn, autocommit=True)
        self._told: list[tuple[str, str]] = []
        self.conn.add_notify_handler(lambda told: self._told.append((told.channel, told.payload)))
        for channel in self.channels:
            self.conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))

    def so_far(self):
        """Return what has come by now: channels and payloads."""
        self.conn.execute("SELECT 1")
        return list(self._told)

    def __call__(self):
        """Return everything that was committed until now."""
        end = ("a", "the end")
        self.conn.execute("NOTIFY a, 'the end'")
        while end not in self._told:  # what nobody waits for any more may come behind it
            self.conn.execute("SELECT 1")
        self._told.remove(end)
        return list(self._told)


@pytest.fixture
def heard(pg_dsn):
    ears = Ears(pg_dsn)
    yield ears
    ears.conn.close()
