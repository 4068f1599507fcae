"""``python -m benchmarks``: run, print the table, write the JSON."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import psycopg

from ._report import as_data, as_text
from ._server import Pinning, pinned_server
from ._suite import SUITE
from ._workers import chosen, run

PACKAGES = (
    "pgstructured",
    "psycopg",
    "psycopg-binary",
    "psycopg-pool",
    "anyio",
    "trio",
    "uvloop",
    "asyncpg",
    "asyncpg-listen",
    "triopg",
    "sqlalchemy",
    "sqlalchemy-dlock",
    "pals",
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = ", ".join(benchmark.name for benchmark in SUITE)
    parser.add_argument("names", nargs="*", help=f"beginnings of names; default: all of {names}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, less data")
    parser.add_argument("--rounds", type=int, help="rounds of every benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--dsn", help="a server to use instead of a private one")
    parser.add_argument(
        "--pin",
        choices=get_args(Pinning),
        default="same",
        help="client and server on the same processor (default), on two, or as the system likes",
    )
    arguments = parser.parse_args()
    if not list(chosen(SUITE, arguments.names)):
        parser.error(f"no such benchmark; there are {names}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


def _about(dsn: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with psycopg.connect(dsn) as connection:
        server = connection.info.parameter_status("server_version")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "-"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "server": server,
        "pin": arguments.pin,
        "quick": arguments.quick,
        "versions": versions,
    }


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main() -> int:
    """Run what the command line asks for; 1 if something broke, whatever the ratios are."""
    arguments = _arguments()
    results: dict[str, Any] = {}
    broken = False
    with pinned_server(arguments.dsn, arguments.pin) as dsn:
        about = _about(dsn, arguments)
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        print(f"Python {about['python']}, server {about['server']}, pinned: {about['pin']}")
        print(f"{versions}\n")
        for benchmark in chosen(SUITE, arguments.names):
            rounds = benchmark.quick_rounds if arguments.quick else benchmark.rounds
            outcome = run(
                benchmark,
                dsn,
                rounds=arguments.rounds or rounds,
                quick=arguments.quick,
                progress=_progress,
            )
            _progress("")
            print("\n".join(as_text(outcome)), flush=True)
            results[benchmark.name] = as_data(outcome)
            broken = broken or bool(outcome.errors)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"about": about, "benchmarks": results}, indent=1))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
