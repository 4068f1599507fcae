"""Commands and their arguments."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def _demo(arguments: argparse.Namespace) -> int:
    from ._demo import run_demo  # noqa: PLC0415 - no other command needs a server's binaries

    try:
        return run_demo(arguments.server)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
