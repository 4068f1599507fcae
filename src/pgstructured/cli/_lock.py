"""``pgstructured lock``: the fence table, and who holds what."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import anyio
import psycopg

from pgstructured.driver import open_session
from pgstructured.errors import ConninfoError, LockKeyError, PgStructuredError
from pgstructured.locks import LockKey
from pgstructured.locks._fencing import FenceTable
from pgstructured.locks._looking import fetch_holders, fetch_waiters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgstructured.locks._looking import LockHolder

_HEADINGS: Final = (
    *("STATE", "NAME", "NUMBERS", "PID", "APPLICATION", "USER", "CLIENT"),
    *("WAITS SINCE", "BLOCKED BY"),
)
_WRONG_USE: Final = 2


def create_fence_table(dsn: str, name: str | None) -> int:
    """Create the fence table and return the process's exit code.

    Args:
        dsn: Where; see `pgstructured.driver.Conninfo`.
        name: ``table`` or ``schema.table``; None for the default.
    """
    try:
        table = FenceTable() if name is None else FenceTable(name)
    except ValueError as exc:
        return _fail(exc, _WRONG_USE)

    async def create() -> None:
        async with open_session(dsn, application_name="pgstructured/cli") as session:
            await table.create(session)

    try:
        anyio.run(create)
    except (psycopg.Error, PgStructuredError) as exc:
        return _fail(exc, _code_of(exc))
    print(_printable(f"the fence table {table.quoted_name} is there"))
    return 0


def list_locks(dsn: str, text: str | None) -> int:
    """Print who holds and who waits for advisory locks, and return the process's exit code.

    Args:
        dsn: Where; see `pgstructured.driver.Conninfo`.
        text: One lock, as `LockKey.parse` reads it; None for all.
    """
    found: list[LockHolder] = []

    async def look(key: LockKey | None) -> None:
        async with open_session(dsn, application_name="pgstructured/cli") as session:
            found.extend(await fetch_holders(session, key))
            found.extend(await fetch_waiters(session, key))

    try:
        anyio.run(look, None if text is None else LockKey.parse(text))
    except (psycopg.Error, PgStructuredError) as exc:
        return _fail(exc, _code_of(exc))
    if found:
        _print_table([_HEADINGS, *map(_row, found)])
    else:
        print("nobody holds it" if text is not None else "nobody holds an advisory lock")
    return 0


def _row(holder: LockHolder) -> tuple[str, ...]:
    numbers = (holder.key.as_bigint,) if holder.key.as_pair is None else holder.key.as_pair
    since = holder.waiting_since
    return (
        ("held" if holder.granted else "waits") + (" shared" if holder.shared else ""),
        holder.key.name or "",
        ",".join(map(str, numbers)),
        "prepared" if holder.backend_pid is None else str(holder.backend_pid),
        holder.application_name or "",
        holder.user or "",
        holder.client_address or "",
        "" if since is None else f"{since:%Y-%m-%d %H:%M:%S}Z",
        ",".join("prepared" if pid == 0 else str(pid) for pid in holder.blocked_by),
    )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    cells = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def _printable(text: str) -> str:
    """Return ``text`` so that it can do nothing to a terminal, and be written to this one.

    Names on a server are anybody's.
    """
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    encoding = sys.stdout.encoding or "ascii"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _code_of(error: Exception) -> int:
    return _WRONG_USE if isinstance(error, ConninfoError | LockKeyError) else 1


def _fail(error: Exception, code: int) -> int:
    print(f"pgstructured lock: {_printable(' '.join(str(error).split()))}", file=sys.stderr)
    return code
