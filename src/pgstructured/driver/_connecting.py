"""Making a connection: every host and address in turn, within one bound, never blocking.

libpq can walk a list of hosts itself, but not without blocking on name
resolution and not within a bound. So each address is an attempt of its own,
and the time that is left is shared out fairly among the attempts that are
left: a silent first host can't use up the time of a healthy second one.
"""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import psycopg
from psycopg._conninfo_utils import get_param, is_ip_address, split_attempts
from psycopg.conninfo import make_conninfo
from psycopg.errors import ConnectionTimeout

from pgstructured.observe import emit

from ._refusing import name_refusal
from ._waiting import wait_socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg.abc import PQGenConn

R = TypeVar("R")

_DEFAULT_PORT: Final = 5432


async def drive_connecting(gen: PQGenConn[R]) -> R:
    """Run a psycopg generator that says at each step which socket it waits for.

    Connecting and cancelling are of this kind: libpq may change sockets at every step.

    Args:
        gen: The generator, not started.

    Returns:
        What the generator returns.

    Cancellation:
        A checkpoint at each wait. A cancelled call closes the generator, and with it the socket.
    """
    try:
        fd, interest = next(gen)
        while True:
            ready = await wait_socket(fd, interest)
            fd, interest = gen.send(ready)
    except StopIteration as stop:
        result: R = stop.value
        return result
    finally:
        gen.close()


async def connect_first(
    params: dict[str, Any],
    start: Callable[[str], PQGenConn[R]],
    *,
    total_timeout: float | None = None,
    attempt_timeout: float | None = None,
) -> R:
    """Connect to the first of the hosts in ``params`` that will have us.

    Args:
        params: Connection parameters, as `psycopg.conninfo.conninfo_to_dict` gives them.
        start: Makes the generator that connects to one conninfo string.
        total_timeout: Seconds for all of it, name resolution included.
        attempt_timeout: Seconds for each address.

    Returns:
        What the first generator that succeeds returns.

    Raises:
        psycopg.errors.ConnectionTimeout: if the last attempt, or all together, took too long.
        psycopg.OperationalError: the last attempt's error; it names all of them if there
            were several.

    Cancellation:
        A checkpoint. A cancelled call closes the socket it was connecting.
    """
    # An effective deadline, not a scope of its own: each attempt's scope is cut by it.
    deadline = None if total_timeout is None else anyio.current_time() + total_timeout
    attempts: list[dict[str, Any]] = []
    with anyio.move_on_after(total_timeout):
        attempts = await _list_attempts(params)
    failures: list[tuple[psycopg.Error, str]] = []
    for index, attempt in enumerate(attempts):
        limit = attempt_timeout
        if deadline is not None:
            share = (deadline - anyio.current_time()) / (len(attempts) - index)
            limit = share if limit is None else min(share, limit)
        try:
            return await _attempt(make_conninfo("", **attempt), start, limit)
        except psycopg.Error as exc:
            name_refusal(exc)
            emit("driver.connect_failed", error=exc)
            failures.append((exc, _describe(attempt)))
    if not failures:
        raise ConnectionTimeout("connection timeout expired while resolving the host name")
    raise _combine(failures)


async def _attempt(conninfo: str, start: Callable[[str], PQGenConn[R]], limit: float | None) -> R:
    with anyio.move_on_after(limit):
        return await drive_connecting(start(conninfo))
    raise ConnectionTimeout("connection timeout expired")


async def _list_attempts(params: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one set of parameters for each address to try, in order."""
    prefer_standby = get_param(params, "target_session_attrs") == "prefer-standby"
    attempts: list[dict[str, Any]] = []
    failure = ""
    for attempt in split_attempts(params):
        try:
            attempts.extend(await _resolve_host(attempt))
        except (OSError, UnicodeError) as exc:
            failure = f"failed to resolve host {attempt.get('host')!r}: {exc}"
    if not attempts:
        raise psycopg.OperationalError(failure)
    if get_param(params, "load_balance_hosts") == "random":
        random.shuffle(attempts)
    if prefer_standby:
        # First a round for a standby anywhere, then one that takes what there is.
        attempts = [
            {**attempt, "target_session_attrs": wanted}
            for wanted in ("standby", "any")
            for attempt in attempts
        ]
    return attempts


async def _resolve_host(attempt: dict[str, Any]) -> list[dict[str, Any]]:
    """Resolve the host name of one attempt, on a thread of the event loop's own resolver."""
    host = get_param(attempt, "host")
    if (
        not host
        or host.startswith(("/", "@"))
        or host[1:2] == ":"  # a Windows path
        or get_param(attempt, "hostaddr")
    ):
        return [attempt]
    if is_ip_address(host):
        return [{**attempt, "hostaddr": host}]
    port = get_param(attempt, "port") or str(_DEFAULT_PORT)
    found = await anyio.getaddrinfo(
        host,
        int(port) if port.isdigit() else port,
        type=socket.SOCK_STREAM,
        proto=socket.IPPROTO_TCP,
    )
    return [{**attempt, "hostaddr": str(address[4][0])} for address in found]


def _describe(attempt: dict[str, Any]) -> str:
    host, port, hostaddr = (attempt.get(key) for key in ("host", "port", "hostaddr"))
    return f"host: {host!r}, port: {port!r}, hostaddr: {hostaddr!r}"


def _combine(failures: list[tuple[psycopg.Error, str]]) -> psycopg.Error:
    """Return one error of the last one's type that tells of all."""
    last, _ = failures[-1]
    if len(failures) == 1:
        return last.with_traceback(None)
    lines = [str(last), "Multiple connection attempts failed. All failures were:"]
    lines.extend(f"- {description}: {error}" for error, description in failures)
    combined = type(last)("\n".join(lines), pgconn=last.pgconn)
    if all(error.sqlstate == last.sqlstate for error, _ in failures):
        combined.sqlstate = last.sqlstate
    return combined
