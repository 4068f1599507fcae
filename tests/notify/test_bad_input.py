"""What is wrong is said at once, by name, and leaves nothing behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from pgstructured import connect, open_pool
from pgstructured.errors import BusUnavailableError, ConninfoError, DeliveryError
from pgstructured.notify import Channel, notify, notify_many, open_notify_bus


@dataclass
class Unhashable:
    def __call__(self, payload: str) -> str:
        return payload


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        ({"connect_timeout": None}, ValueError, "connect_timeout must be more than 0"),
        ({"heartbeat_timeout": None}, ValueError, "heartbeat_timeout must be more than 0"),
        ({"heartbeat": "5"}, ValueError, "heartbeat must be more than 0"),
        ({"max_outage": 0}, ValueError, "max_outage must be more than 0"),
        ({"unlisten_linger": None}, ValueError, "unlisten_linger must be 0 or more"),
        ({"backoff": None}, TypeError, "backoff must be a Backoff"),
        ({"channels": [1]}, TypeError, "a channel is a str or a Channel, not int"),
        ({"channels": 1}, TypeError, "channels must be a collection of channels"),
        ({"name": 1}, TypeError, "name must be text"),
    ],
)
async def test_options(options, kind, complaint) -> None:
    with pytest.raises(kind, match=complaint):
        async with open_notify_bus("host=127.0.0.1", **options):
            pytest.fail("entered")


@pytest.mark.parametrize("initial_connect", ["fail", "retry", "background"])
@pytest.mark.parametrize(
    "conninfo", ["foo", "postgres://u:p@ss@localhost/db", "host=127.0.0.1,127.0.0.2 port=1,2,3"]
)
async def test_a_conninfo_that_can_never_work(conninfo, initial_connect) -> None:
    with anyio.fail_after(20), pytest.raises(ConninfoError):
        async with open_notify_bus(conninfo, initial_connect=initial_connect):
            pytest.fail("entered")


async def test_a_conninfo_callable_that_is_not_async() -> None:
    conninfo: Any = lambda: "host=127.0.0.1"  # noqa: E731 - Any, for it is wrong on purpose
    with pytest.raises(TypeError, match="a conninfo callable must be async"):
        async with open_notify_bus(conninfo):
            pytest.fail("entered")


async def wants_all(notification) -> bool:
    return True


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        ({"buffer": None}, ValueError, "buffer must be at least 1"),
        ({"buffer": 1.5}, ValueError, "buffer must be at least 1"),
        ({"buffer": math.nan, "overflow": "latest"}, ValueError, "buffer must be at least 1"),
        ({"where": "payload"}, TypeError, "where must be a function"),
        ({"where": wants_all}, TypeError, "where must be a function"),
    ],
)
async def test_options_of_a_subscription(pg_dsn, options, kind, complaint) -> None:
    async with open_notify_bus(pg_dsn) as bus:
        with pytest.raises(kind, match=complaint):
            async with bus.subscribe("a", **options):
                pytest.fail("entered")


@pytest.mark.parametrize("max_items", [0, 1.5, "1"])
async def test_how_many_to_receive(pg_dsn, max_items) -> None:
    async with open_notify_bus(pg_dsn) as bus, bus.subscribe("a") as subscription:
        with pytest.raises(ValueError, match="max_items must be a whole number"):
            await subscription.receive_many(max_items)


async def test_what_is_no_connection(pg_dsn) -> None:
    pool: Any
    async with open_pool(pg_dsn) as pool:
        with pytest.raises(TypeError, match=r"conn must be a Connection.*not Pool"):
            await notify(pool, "a")
        with pytest.raises(TypeError, match=r"conn must be a Connection.*not Pool"):
            await notify_many(pool, [("a", "1")])


@pytest.mark.parametrize("item", [("a",), ("a", "1", "2"), "a", None])
async def test_what_is_no_pair(pg_dsn, item) -> None:
    async with await connect(pg_dsn) as conn:
        with pytest.raises(TypeError, match="items must be pairs of a channel and a payload"):
            await notify_many(conn, [("a", "1"), item])


@pytest.mark.parametrize("callback", [None, wants_all])
async def test_what_cannot_be_called_after_a_commit(pg_dsn, callback) -> None:
    async with await connect(pg_dsn) as conn, conn.transaction():
        with pytest.raises(TypeError, match="callback must be a function, and no async one"):
            conn.after_commit(callback)


@pytest.mark.parametrize("option", ["decode", "encode"])
def test_a_codec_that_is_no_function(option) -> None:
    options: dict[str, Any] = {option: 1}
    with pytest.raises(TypeError, match=f"{option} must be a function"):
        Channel("a", **options)


def test_a_kind_that_is_no_type() -> None:
    kind: Any = 1
    with pytest.raises(TypeError, match="1 has no JSON of its own"):
        Channel.of("a", kind)


def test_a_decoder_that_cannot_be_looked_up() -> None:
    with pytest.raises(TypeError, match="decode must be hashable"):
        Channel("a", decode=Unhashable())


@pytest.mark.parametrize("initial_connect", ["fail", "retry"])
async def test_the_probes_verdict_comes_before_a_short_timeout(
    pgbouncer_transaction, pg_dsn, initial_connect
) -> None:
    with anyio.fail_after(10), pytest.raises(DeliveryError, match="pooler"):
        async with open_notify_bus(
            pgbouncer_transaction.dsn(pg_dsn), connect_timeout=2.0, initial_connect=initial_connect
        ):
            pytest.fail("entered")


async def test_an_outage_that_cuts_the_first_attempt_says_so(pg_dsn, fault_proxy) -> None:
    fault_proxy.freeze("down")
    with anyio.fail_after(8), pytest.raises(BusUnavailableError, match="still connecting"):
        async with open_notify_bus(
            fault_proxy.dsn(pg_dsn), initial_connect="retry", max_outage=0.4
        ):
            pytest.fail("entered")
