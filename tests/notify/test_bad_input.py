"""What is wrong is said at once, by name, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
import pytest

from pgstructured.errors import BusUnavailableError, ConninfoError, DeliveryError
from pgstructured.notify import Channel, open_notify_bus


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
