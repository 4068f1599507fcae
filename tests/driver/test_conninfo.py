"""Connection strings: where they come from, and that no secret is ever shown."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Self

import anyio
import psycopg
import pytest

from pgstructured.driver import (
    connect,
    mask_conninfo,
    open_connection,
    open_session,
    resolve_conninfo,
)
from pgstructured.driver._conninfo import (
    _shape_of,
    clean_application_name,
    default_application_name,
    parse_conninfo,
)
from pgstructured.errors import ConninfoError

if TYPE_CHECKING:
    from collections.abc import Generator

SECRET = "sEcReT"
DANGEROUS = [
    'postgres://u:pa"sEcReT@h/db x=',
    "postgres://u:sEcReT%zz@h/db",
    'postgres://u:%zz"sEcReT@h/db',
    "postgres://u:%zz\nsEcReT@h/db",
    "password=x sEcReT",
    'password=x "sEcReT',
    'password=x "a"sEcReT',
    "host=h password='a sEcReT",
    "password = 'it''sEcReT' host=h",
    "password=a sEcReT=b",
    "password=a\\ sEcReT",
    "postgres://u:p@sEcReT@h/db",
    "postgres://u:sEcReT/x@h/db",
    "postgres://u:12/sEcReT@h/db",
    "postgres://u:1/sEcReT?x@h/db",
    "postgres://u:x?sEcReT@h/db",
    "postgres://u@h/db?password=sEcReT",
    "postgres://u@h/db?password=a&sEcReT",
    "postgres://u@h/db?sslpassword=sEcReT",
    "postgres://u:[sEcReT@h/db",
    "postgres://u:x:sEcReT@h/db",
    "postgres://u:x?y@/sEcReT@h/db",
    "postgres://u:x?y@sEcReT,@h/db",
    "postgres://u:sEcReT%ff@h/db",
    "postgres://u:sEcReT\udcff@h/db",
    "postgres://u:sEcReT%40h/db",
    "postgres://sEcReT%40h",
    "password=x\nsEcReT",
    "env:postgres://u:sEcReT@h/db",
    "env:",
    "sEcReT",
    "postgresql://u:sEcReT@h:port/db",
    "postgres://u:pw@[::1]sEcReT/db",
    "user=u password = sEcReT host = h",
    "sslpassword='sEcReT'",
    "dbname=postgres://u:sEcReT@h/db",
    "dbname='user=u password=sEcReT'",
    "options='-c x.password=sEcReT'",
]


@pytest.mark.parametrize("conninfo", DANGEROUS)
def test_no_secret_is_shown(conninfo) -> None:
    assert SECRET not in mask_conninfo(conninfo)
    error: ConninfoError | None = None
    try:
        parse_conninfo(conninfo)
    except ConninfoError as exc:
        error = exc
    if error is not None:  # that it parses is fine too
        assert SECRET not in str(error)
        assert error.__cause__ is None
        assert error.__context__ is None


@pytest.mark.parametrize(
    ("conninfo", "shown"),
    [
        ("", ""),
        ("postgresql://u:pw@h:1/db", "user=u password=*** dbname=db host=h port=1"),
        ("host=a,b port=1,2 user='x y'", "user='x y' host=a,b port=1,2"),
        ("env:MY_DSN", "env:MY_DSN"),
        ("host=@abstract", "host=@abstract"),
        ("host=/run/a@b", "host=/run/a@b"),
        ("postgresql:///db?host=/run/a@b", "dbname=db host=/run/a@b"),
        ("postgresql://u:p%40ss@h/db", "user=u password=*** dbname=db host=h"),
        ("host=x =", "<malformed connection string>"),
        ("postgresql://u:p@ss@h/db", "<ambiguous connection string>"),
    ],
)
def test_what_is_shown(conninfo, shown) -> None:
    assert mask_conninfo(conninfo) == shown


@pytest.mark.parametrize(
    ("conninfo", "complaint"),
    [
        ("host", "missing = after a keyword"),
        ("postgresql+asyncpg://u:secret@h/db", "without the name of a driver"),
        ("no_such_key=1", "an option that libpq doesn't know"),
        ("postgresql://u:p@ss@h/db", "%40"),
        ("postgresql://u:12x/db", "%3A"),
        ("host='x", "a quote is not closed"),
        ("postgresql://u:%ff@h/db", "not UTF-8"),
        ("host=a,b port=1,2,3", "could not match 3 port numbers"),
    ],
)
async def test_malformed(conninfo, complaint) -> None:
    with pytest.raises(ConninfoError, match=complaint):
        await connect(conninfo)
    with pytest.raises(ValueError, match=complaint):
        async with open_session(conninfo):
            pytest.fail("entered")


async def test_where_it_comes_from(monkeypatch) -> None:
    monkeypatch.setenv("MY_DSN", "host=x")

    async def fresh() -> str:
        return "env:MY_DSN"

    assert await resolve_conninfo("host=y") == "host=y"
    assert await resolve_conninfo("env:MY_DSN") == "host=x"
    assert await resolve_conninfo(fresh) == "host=x"
    monkeypatch.delenv("MY_DSN")
    with pytest.raises(ConninfoError, match="MY_DSN is not set"):
        await resolve_conninfo("env:MY_DSN")
    with pytest.raises(ConninfoError, match="name of an environment variable"):
        await resolve_conninfo("env:no name")


async def test_bad_sources() -> None:
    async def number() -> str:
        return 7  # type: ignore[return-value]

    async def failing() -> str:
        raise ZeroDivisionError

    with pytest.raises(TypeError, match="not int"):
        await resolve_conninfo(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not int"):
        await resolve_conninfo(number)
    with pytest.raises(TypeError, match="was not entered"):
        await resolve_conninfo(open_connection("host=x"))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        await connect(failing)


async def test_callables_of_other_kinds() -> None:
    class Vault:
        """Gives a conninfo where it has been entered."""

        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def __call__(self) -> str:
            return "host=x"

    @types.coroutine
    def of_old() -> Generator[None, None, str]:
        yield from anyio.lowlevel.checkpoint().__await__()
        return "host=y"

    async with Vault() as vault:
        assert await resolve_conninfo(vault) == "host=x"
    assert await resolve_conninfo(of_old) == "host=y"


async def test_a_host_that_is_not_there_is_named() -> None:
    with pytest.raises(psycopg.OperationalError, match=r"nosuchhost\.invalid"):
        await connect("host=nosuchhost.invalid", connect_timeout=5)


def test_what_is_not_known_is_not_shown() -> None:
    assert SECRET not in _shape_of(f"fehlendes »=« nach »{SECRET}« in der Zeichenkette")


def test_application_names() -> None:
    assert clean_application_name("a\tb\x7fé") == "a?b??"
    assert clean_application_name("x" * 80) == "x" * 63
    assert default_application_name() == "pgstructured"
    assert default_application_name("name", None, "space") == "pgstructured/name/space"
