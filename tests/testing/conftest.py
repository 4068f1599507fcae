"""What the tests of this room share."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import pgstructured
from pgstructured.testing import Cluster, ServerBinaries, ServerNotFoundError, find_server_binaries
from pgstructured.testing._account import readable_binaries, server_account

_PYTHONS = (sys.executable, "/usr/bin/python3")


@pytest.fixture(params=[18, 15], ids=["pg18", "pg15"])
def binaries(request) -> ServerBinaries:
    try:
        found = find_server_binaries(version=request.param)
        # A virtual environment below a folder that is root's alone is closed to the server.
        return readable_binaries(found, server_account())
    except ServerNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def some_binaries() -> ServerBinaries:
    """Programs of a server, where the version makes no difference."""
    return find_server_binaries()


@pytest.fixture
def cluster(binaries):
    """A private server of either version."""
    with Cluster(bindir=binaries.bindir) as cluster:
        yield cluster


@dataclass
class Runner:
    """Runs Python programs as a user of the system."""

    python: str
    environment: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, "-c", textwrap.dedent(program), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
            cwd="/",
            **self.options,
        )


@pytest.fixture(params=["root", "user"])
def runner(request) -> Runner:
    """Programs run as root, and as a user without any rights."""
    import os

    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    if (os.geteuid() == 0) == (request.param == "root"):
        return Runner(sys.executable, environment)
    if request.param == "root":
        pytest.skip("these tests don't run as root")
    # The packages as they are, for whichever Python the user can run.
    folders = [str(Path(pgstructured.__file__).parents[1]), *(p for p in sys.path if "site-" in p)]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    options = {"user": "nobody", "group": -1, "extra_groups": []}
    import pwd

    options["group"] = pwd.getpwnam("nobody").pw_gid
    complaints = []
    for python in _PYTHONS:
        found = Runner(python, environment, options)
        try:
            probe = found.start("import pgstructured.testing._cluster")
        except (PermissionError, FileNotFoundError) as error:
            complaints.append(str(error))
            continue
        said, _ = probe.communicate(timeout=30)
        if probe.returncode == 0:
            return found
        complaints.append(said.strip().rpartition("\n")[2])
    pytest.skip(f"no Python that the user nobody can run this package with: {complaints}")
