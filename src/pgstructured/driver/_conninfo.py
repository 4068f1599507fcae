"""Connection strings: where they come from, and how to show them without secrets."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncContextDecorator
from typing import Any, Final, TypeAlias

import psycopg
from psycopg._conninfo_utils import split_attempts
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgstructured.errors import ConninfoError

Conninfo: TypeAlias = str | Callable[[], Awaitable[str]]
"""What libpq takes (a URL or ``key=value`` pairs, several hosts included), ``"env:NAME"`` to
read that from the environment, or an async callable that returns it, asked at each attempt."""

_ENV: Final = "env:"
_SECRETS: Final = (
    "password",
    "sslpassword",
    "passfile",
    "oauth_client_secret",
    "scram_client_key",
    "scram_server_key",
)
_COMPLAINTS: Final = {
    "missing": "missing = after a keyword",
    "invalid connection option": "it has an option that libpq doesn't know",
    "unterminated quoted string in connection info string": "a quote is not closed",
    "invalid percent-encoded token": "a % in a URL must be followed by two hexadecimal digits",
    "forbidden value %00 in percent-encoded value": "a URL can't hold %00",
    "invalid URI query parameter": "the URL has a parameter that libpq doesn't know",
    "unexpected character": "the URL has a character that is out of place",
    "extra key/value separator": "the URL has a = too many in its parameters",
    "missing key/value separator": "the URL has a parameter without a =",
}
"""libpq's complaints up to the first quote, in words that say what to change."""
_OTHER_SCHEME: Final = re.compile(r"postgres(ql)?\+\w+://")
"""How SQLAlchemy's URLs begin."""
_NAME_BYTES: Final = 63
_DEFAULT_NAME: Final = "pgstructured"


async def resolve_conninfo(conninfo: Conninfo) -> str:
    """Return the connection string that ``conninfo`` stands for.

    Args:
        conninfo: A `Conninfo`.

    Raises:
        ConninfoError: if the environment variable is not set.

    Cancellation:
        A checkpoint only where the callable is one; what the callable raises passes through.
    """
    source: Any = conninfo
    if not isinstance(conninfo, str):
        if not callable(source):
            raise TypeError(
                f"conninfo must be a string or an async callable, not {type(source).__name__}"
            )
        if isinstance(source, AsyncContextDecorator):  # callable, but as a decorator
            raise TypeError("give what `async with ... as` gives; this block was not entered")
        asked: Any = conninfo()
        if not inspect.isawaitable(asked):
            raise TypeError("a conninfo callable must be async, and this one is not")
        answer: Any = await asked
        if not isinstance(answer, str):
            raise TypeError(
                f"the conninfo callable must return a string, not {type(answer).__name__}"
            )
        conninfo = answer
    if conninfo.startswith(_ENV):
        name = conninfo.removeprefix(_ENV)
        if not name.isidentifier():  # and if it is none, it may be anything, so it is not shown
            raise ConninfoError("'env:' must be followed by the name of an environment variable")
        value = os.environ.get(name)
        if value is None:
            raise ConninfoError(
                f"the environment variable {name} is not set; set it to a connection string"
            )
        return value
    return conninfo


def parse_conninfo(conninfo: str, **params: Any) -> dict[str, Any]:
    """Return the parameters of a resolved connection string, with ``params`` over them.

    Raises:
        ConninfoError: if libpq can't parse it, or parses a part of the password as something
            else; the message shows no part of it. Also if one of ``params`` is unknown to libpq.
    """
    try:
        make_conninfo("", **params)
    except psycopg.ProgrammingError:
        names = ", ".join(params)
        raise ConninfoError(f"one of these is no connection parameter: {names}") from None
    try:
        parsed = dict(conninfo_to_dict(conninfo, **params))
    except psycopg.ProgrammingError as exc:
        reason = _shape_of(str(exc))
        if _OTHER_SCHEME.match(conninfo):
            reason = "a URL begins with postgresql:// here, without the name of a driver"
    except UnicodeError:
        reason = "it is not UTF-8, or the %xx in its URL are not"
    else:
        if _is_ambiguous(conninfo, parsed):
            reason = (
                "libpq takes a part of it for something else than it is; write a password's"
                " @ : / ? # % as %40 %3A %2F %3F %23 %25"
            )
        elif (mismatch := _find_mismatch(parsed)) is not None:
            reason = mismatch
        else:
            return parsed
    raise ConninfoError(f"malformed connection string: {reason}")


def mask_conninfo(conninfo: str) -> str:
    """Return ``conninfo`` as ``key=value`` pairs with every secret as ``***``.

    What libpq can't parse, or seems to parse amiss, is not shown at all: it may hold a
    password anywhere.
    """
    if conninfo.startswith(_ENV) and conninfo.removeprefix(_ENV).isidentifier():
        return conninfo
    try:
        params = conninfo_to_dict(conninfo)
    except (psycopg.ProgrammingError, UnicodeError):
        return "<malformed connection string>"
    if _is_ambiguous(conninfo, params):
        return "<ambiguous connection string>"
    return make_conninfo("", **{key: _shown(key, str(value)) for key, value in params.items()})


def clean_application_name(name: str) -> str:
    """Return ``name`` as the server would show it: printable ASCII, 63 bytes at most.

    Every other character becomes ``?``; the server does the same, but less predictably.
    """
    printable = re.sub(r"[^\x20-\x7e]", "?", name)
    return printable[:_NAME_BYTES]


def default_application_name(*parts: str | None) -> str:
    """Return ``pgstructured`` with the non-empty ``parts`` behind it, joined by slashes."""
    return clean_application_name("/".join((_DEFAULT_NAME, *(part for part in parts if part))))


def _shown(key: str, value: str) -> str:
    is_secret = key in _SECRETS or "password" in value.lower()  # as in options=-c x.password=y
    is_conninfo = key == "dbname" and ("=" in value or "://" in value)  # which libpq expands
    return "***" if is_secret or is_conninfo else value


def _shape_of(message: str) -> str:
    """Return libpq's complaint without what it quotes, which may be a piece of a password."""
    told = message.strip().split('"', 1)[0].split("\n", 1)[0].strip(" :(")
    # Only what is known: in another language it may be quoted otherwise.
    return _COMPLAINTS.get(told, "libpq can't parse it")


def _find_mismatch(params: Mapping[str, Any]) -> str | None:
    """Return what is wrong with lists of hosts and ports that don't match, if anything is."""
    try:
        split_attempts(params)
    except psycopg.OperationalError as exc:
        return str(exc)  # counts only
    return None


def _is_ambiguous(conninfo: str, params: Mapping[str, Any]) -> bool:
    """Tell whether libpq may have taken a part of a URL's password for something else.

    An unescaped ``@``, ``:`` or ``/`` of a password ends it early; the rest lands in the
    host, the port or the database's name.
    """
    if not conninfo.startswith(("postgres://", "postgresql://")):
        return False
    ports = str(params.get("port") or "").replace(",", "")
    if ports and not ports.isdigit():
        return True
    hosts = str(params.get("host") or "").split(",")
    if any("@" in host[1:] and not host.startswith("/") for host in hosts):
        return True
    rest = conninfo.partition("://")[2]
    if "@" in rest.partition("/")[0]:
        rest = rest.partition("@")[2]  # behind the credentials, which may hold a ?
    return "@" in rest.partition("?")[0]
