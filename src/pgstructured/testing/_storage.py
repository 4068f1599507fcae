"""Folders of servers, and the cache of initdb'ed templates.

A cluster's folder is in memory (``/dev/shm``) where there is room, else in the
system's folder for temporary files. The template of a version is made once per
machine and user; a private cluster is a copy of it, which takes a tenth of the
time of an initdb.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ._account import is_ours, server_environment
from ._errors import ServerFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._account import Account
    from ._binaries import ServerBinaries

_MEMORY = Path("/dev/shm")  # noqa: S108 - folders in it are made by mkdtemp or checked for their owner
_MEMORY_NEEDED = 256 << 20
_INITDB_TIMEOUT = 120.0
_INITDB = (
    "--username=postgres",
    "--auth=trust",
    "--encoding=UTF8",
    "--locale=C",
    "--no-sync",
    "--no-instructions",
)


def storage_folder() -> Path:
    """Return the folder that folders of servers are made in."""
    try:
        status = os.statvfs(_MEMORY)
    except OSError:  # pragma: no cover - a system without it
        return Path(tempfile.gettempdir())
    roomy = status.f_bavail * status.f_frsize >= _MEMORY_NEEDED
    return _MEMORY if roomy and os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def make_folder(account: Account, *, prefix: str = "pgstructured-") -> Path:
    """Make a folder that only the account (and root) can look into."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=storage_folder()))
    account.own(folder)
    return folder


def make_data(binaries: ServerBinaries, account: Account, data: Path, *, template: bool) -> None:
    """Make a data folder: a copy of the cached template, or by initdb.

    Raises:
        ServerFailedError: initdb failed; says what it said.
    """
    if not template:
        _initdb(binaries, account, data)
        return
    # The same build has one template, whichever virtual environment it is in.
    size = (binaries.bindir / "postgres").stat().st_size
    identity = f"1\0{binaries.version}\0{size}\0{_INITDB}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    cache = storage_folder() / f"pgstructured-template-{account.uid}-{digest}"
    if not is_ours(cache, account.uid):
        _build_template(binaries, account, cache)
    copy_tree(cache, data, account)


def _build_template(binaries: ServerBinaries, account: Account, cache: Path) -> None:
    building = make_folder(account, prefix=f"{cache.name}-")
    try:
        _initdb(binaries, account, building / "data")
        try:
            (building / "data").rename(cache)
        except OSError:
            # Another process may have been faster: a rename onto its folder fails.
            if not is_ours(cache, account.uid):
                raise
    finally:
        shutil.rmtree(building)


def _initdb(binaries: ServerBinaries, account: Account, data: Path) -> None:
    try:
        done = subprocess.run(
            [binaries.program("initdb"), *_INITDB, "-D", str(data)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=data.parent,
            env=server_environment(),
            check=False,
            timeout=_INITDB_TIMEOUT,
            **account.popen_options(),
        )
    except subprocess.TimeoutExpired as error:
        raise ServerFailedError(f"initdb took longer than {_INITDB_TIMEOUT:.0f} s") from error
    if done.returncode:
        raise ServerFailedError(f"initdb failed ({done.returncode}):\n{done.stdout[-2000:]}")


def copy_tree(
    source: Path,
    target: Path,
    account: Account,
    *,
    leave_out: Callable[[str], bool] = lambda _: False,
) -> None:
    """Copy a data folder, also one in use, for the account.

    Args:
        source: the folder; files that vanish meanwhile are left out.
        target: made by this.
        account: owner of the copy.
        leave_out: told each path relative to ``source``; true leaves it out.
    """
    target.mkdir(mode=0o700)
    account.own(target)
    for path, folders, files in os.walk(source):
        here = Path(path)
        relative = here.relative_to(source)
        folders[:] = [name for name in folders if not leave_out(str(relative / name))]
        for name in folders:
            made = target / relative / name
            made.mkdir(mode=0o700)
            account.own(made)
        for name in files:
            if leave_out(str(relative / name)):
                continue
            copy = target / relative / name
            try:
                shutil.copyfile(here / name, copy)
            except FileNotFoundError:
                continue
            copy.chmod(0o600)
            account.own(copy)
