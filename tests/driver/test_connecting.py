"""Connecting: which address is tried, in which order, and for how long."""

from __future__ import annotations

import anyio
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgstructured.driver import connect


async def test_a_name_is_resolved(pg_dsn) -> None:
    conn = await connect(make_conninfo(pg_dsn, host="localhost"))
    await conn.execute("SELECT 1")
    await conn.aclose()


@pytest.mark.parametrize(
    "params", [{"load_balance_hosts": "random"}, {"target_session_attrs": "prefer-standby"}]
)
async def test_lists_of_hosts(pg_dsn, params) -> None:
    port = conninfo_to_dict(pg_dsn)["port"]
    several = make_conninfo(pg_dsn, host="127.0.0.1,127.0.0.1", port=f"1,{port}", **params)
    conn = await connect(several)
    assert str(conn.info.port) == port
    await conn.aclose()


async def test_a_resolver_that_does_not_answer(monkeypatch) -> None:
    async def silence(*args, **kwargs) -> list[object]:
        await anyio.sleep_forever()
        return []

    monkeypatch.setattr(anyio, "getaddrinfo", silence)
    with anyio.fail_after(5), pytest.raises(psycopg.errors.ConnectionTimeout, match="resolving"):
        await connect("host=slow.invalid", connect_timeout=0.2)


async def test_a_unix_socket(pg_cluster, pg_dsn) -> None:
    conn = await connect(make_conninfo(pg_dsn, host=str(pg_cluster.socket_directory)))
    await conn.execute("SELECT 1")
    await conn.aclose()


async def test_a_name_that_can_not_be_encoded(pg_dsn) -> None:
    with pytest.raises(psycopg.OperationalError, match="failed to resolve"):
        await connect("host=ü..")
    port = conninfo_to_dict(pg_dsn)["port"]
    conn = await connect(make_conninfo(pg_dsn, host="ü..,127.0.0.1", port=port))
    await conn.aclose()
