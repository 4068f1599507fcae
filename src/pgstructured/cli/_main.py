"""Commands and their arguments."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_ALL: Final = object()
"""The ``KEY`` of ``--list`` without one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``pgstructured``.

    Args:
        argv: The arguments after the program's name; the process's own by default.

    Returns:
        The process's exit code: 0 if everything that was asked for happened.
    """
    parser = argparse.ArgumentParser(
        prog="pgstructured", description="Structured concurrency for Postgres."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="see locks and notifications survive a killed session and a frozen network",
        description="Start a private Postgres and two processes, one on asyncio and one on trio."
        " Let them hand over a lock and receive notifications; then kill their sessions, then"
        " freeze their network, and check that every loss is told and nothing is missed."
        " Takes less than 30 seconds. Exits with 0 only if every step really happened.",
    )
    demo.add_argument(
        "--server",
        metavar="DSN",
        help="use this server (over TCP) instead of starting one; a table is made and dropped",
    )
    demo.set_defaults(run=_demo)
    lock = commands.add_parser(
        "lock",
        help="create the table for fencing, see who holds locks",
        description="Create the table for fencing tokens, or print who holds and who waits for"
        " advisory locks of a database.",
    )
    action = lock.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--create", action="store_true", help="create the fence table, unless there is one"
    )
    action.add_argument(
        "--list",
        nargs="?",
        const=_ALL,
        metavar="KEY",
        help="print the sessions of all locks, or of one: a name, a number, or two with a comma"
        " (--list=-1,2 where it begins with a minus)",
    )
    lock.add_argument(
        "--dsn",
        default="",
        help="the database, as libpq takes it, or env:NAME to read that from the environment;"
        " else the environment (PGHOST, PGDATABASE, ...) says",
    )
    lock.add_argument("--table", help="with --create: its name, or schema.name")
    lock.set_defaults(run=_lock)
    arguments = parser.parse_args(argv)
    if getattr(arguments, "table", None) is not None and not arguments.create:
        lock.error("--table goes with --create")
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read it has gone, as ``head`` does. What is left must not be tried again at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return 1
    return code


def _demo(arguments: argparse.Namespace) -> int:
    from ._demo import run_demo  # noqa: PLC0415 - no other command needs a server's binaries

    return run_demo(arguments.server)


def _lock(arguments: argparse.Namespace) -> int:
    from ._lock import create_fence_table, list_locks  # noqa: PLC0415 - as above: what it takes

    if arguments.create:
        return create_fence_table(arguments.dsn, arguments.table)
    return list_locks(arguments.dsn, None if arguments.list is _ALL else arguments.list)
