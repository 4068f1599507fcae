"""Connection strings: where they come from, and how to show them without secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import psycopg
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
    source: object = conninfo
    if not isinstance(conninfo, str):
        if not callable(source):
            raise TypeError(
                f"conninfo must be a string or an async callable, not {type(source).__name__}"
            )
        answer: Any = await conninfo()
        if not isinstance(answer, str):
            raise TypeError(
                f"the conninfo callable must return a string, not {type(answer).__name__}"
            )
        conninfo = answer
    if conninfo.startswith(_ENV):
        name = conninfo.removeprefix(_ENV)
        if not name:
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
        ConninfoError: if libpq can't parse it; the message shows no part of it but keywords.
    """
    try:
        return dict(conninfo_to_dict(conninfo, **params))
    except psycopg.ProgrammingError as exc:
        reason = _redact_parse_error(str(exc))
    raise ConninfoError(f"malformed connection string: {reason}; see libpq-connect's conninfo")


def mask_conninfo(conninfo: str) -> str:
    """Return ``conninfo`` as ``key=value`` pairs with every secret as ``***``.

    What libpq can't parse is not shown at all, for it may hold a password anywhere.
    """
    if conninfo.startswith(_ENV):
        return conninfo
    try:
        params = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        return "<malformed connection string>"
    shown = {key: "***" if key in _SECRETS else value for key, value in params.items()}
    if _may_hold_password(conninfo, params):
        return "<connection string with an ambiguous password>"
    return make_conninfo("", **shown)


def clean_application_name(name: str) -> str:
    """Return ``name`` as the server would show it: printable ASCII, 63 bytes at most.

    Every other character becomes ``?``; the server does the same, but less predictably.
    """
    printable = re.sub(r"[^\x20-\x7e]", "?", name)
    return printable[:_NAME_BYTES]


def default_application_name(*parts: str | None) -> str:
    """Return ``pgstructured`` with the non-empty ``parts`` behind it, joined by slashes."""
    return clean_application_name("/".join((_DEFAULT_NAME, *(part for part in parts if part))))


def _redact_parse_error(message: str) -> str:
    # libpq quotes what it could not parse, and that may be a piece of a password.
    return re.sub(r'"(?:[^"]|"")*"', '"***"', message.strip().splitlines()[0])


def _may_hold_password(conninfo: str, params: dict[str, Any]) -> bool:
    """Tell whether libpq took a part of a password for something else.

    An unescaped ``@`` or ``/`` in a URL's password ends it early; the rest lands in host,
    port or database name.
    """
    if "://" not in conninfo:
        return False
    rest = conninfo.split("://", 1)[1].split("?", 1)[0]
    if rest.count("@") > 1:
        return True
    return "@" in str(params.get("dbname") or "") or "@" in str(params.get("host") or "")
