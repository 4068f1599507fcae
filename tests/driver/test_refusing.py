"""A refused connection says why, with the SQLSTATE that libpq keeps to itself."""

from __future__ import annotations

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgstructured.driver import Connection, connect, open_session
from pgstructured.driver._refusing import name_refusal
from pgstructured.supervise import heals


@pytest.mark.parametrize(
    ("change", "sqlstate"),
    [({"dbname": "no_such_db"}, "3D000"), ({"user": "no_such_role"}, "28000")],
)
async def test_refusals_of_a_real_server(pg_dsn, change, sqlstate) -> None:
    conninfo = make_conninfo(pg_dsn, **change)
    for opening in (connect(conninfo), Connection.connect(conninfo)):
        with pytest.raises(psycopg.OperationalError) as caught:
            await opening
        assert caught.value.sqlstate == sqlstate
        assert not heals(caught.value)
    with pytest.raises(psycopg.OperationalError) as caught:
        async with open_session(conninfo):
            pytest.fail("entered")
    assert caught.value.sqlstate == sqlstate


async def test_a_refusal_of_every_host_counts(pg_dsn) -> None:
    port = psycopg.conninfo.conninfo_to_dict(pg_dsn)["port"]
    missing = make_conninfo(
        pg_dsn, dbname="no_such_db", host="127.0.0.1,127.0.0.1", port=f"{port},{port}"
    )
    with pytest.raises(psycopg.OperationalError, match="All failures") as caught:
        await connect(missing)
    assert caught.value.sqlstate == "3D000"
    elsewhere = make_conninfo(missing, port=f"1,{port}")
    with pytest.raises(psycopg.OperationalError, match="All failures") as caught:
        await connect(elsewhere)
    assert caught.value.sqlstate is None  # the other one may come back
    assert heals(caught.value)


@pytest.mark.parametrize(
    ("text", "sqlstate"),
    [
        ('FATAL:  password authentication failed for user "x"', "28P01"),
        ("fe_sendauth: no password supplied", "28P01"),
        ('FATAL:  Peer authentication failed for user "x"', "28000"),
        ('FATAL:  role "x" is not permitted to log in', "28000"),
        ('FATAL:  no pg_hba.conf entry for host "1.2.3.4"', "28000"),
        ('FATAL:  permission denied for database "x"', "42501"),
        ("FATAL:  sorry, too many clients already", "53300"),
        ("FATAL:  out of shared memory\nHINT:  You might need to increase ...", "53200"),
        ("FATAL:  remaining connection slots are reserved for roles", "53300"),
        ("FATAL:  the database system is starting up", "57P03"),
        ("FATAL:  the database system is not yet accepting connections", "57P03"),
        ("FATAL:  no such database: x", "3D000"),
        ("session is read-only", "25006"),
        ("Connection refused", None),
        ("FATAL:  das geht nicht", None),
    ],
)
def test_what_is_recognised(text, sqlstate) -> None:
    error = psycopg.OperationalError(
        f'connection failed: connection to server at "h", port 5432 failed: {text}'
    )
    name_refusal(error)
    assert error.sqlstate == sqlstate


def test_what_is_known_stays() -> None:
    error = psycopg.errors.AdminShutdown("password authentication failed")
    name_refusal(error)
    assert error.sqlstate == "57P01"
