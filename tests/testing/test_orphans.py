"""Nothing outlives its owner, as root and as a normal user."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from pgstructured.testing import PgBouncerNotFoundError, find_pgbouncer
from pgstructured.testing._guard import child_pids, is_running, wait_gone

_OWNER = """
    import json, sys, time
    from pgstructured.testing._cluster import Cluster
    from pgstructured.testing._guard import child_pids

    bindir, bouncer = sys.argv[1:]
    cluster = Cluster(bindir=bindir)
    cluster.start()
    processes = [cluster._process]
    folders = [str(cluster.socket_directory)]
    if bouncer:
        from pgstructured.testing._bouncer import PgBouncer

        pooler = PgBouncer(cluster)
        pooler.__enter__()
        assert pooler.admin("SHOW VERSION")
        processes.append(pooler._process)
        folders.append(str(pooler._folder))
    answer = {
        "pid": cluster.pid,
        "children": [*child_pids(cluster.pid), *(process.pid for process in processes)],
        "guards": [pid for process in processes for pid in process.guard_pids],
        "folders": folders,
    }
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        eval(line)
        print("done", flush=True)
    cluster.close()
    print("closed", flush=True)
"""


class Owner:
    def __init__(self, runner, binaries, *, bouncer=False):
        self.process = runner.start(_OWNER, str(binaries.bindir), "x" if bouncer else "")
        line = self.process.stdout.readline()
        assert line.startswith("{"), line + self.process.communicate(timeout=10)[0]
        found = json.loads(line)
        self.pid = found["pid"]
        self.servers = frozenset(found["children"])
        self.guards = frozenset(found["guards"])
        self.folders = [Path(folder) for folder in found["folders"]]

    def do(self, expression):
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.communicate(timeout=10)

    def assert_nothing_left(self):
        assert not wait_gone(self.servers | self.guards, 20.0)
        deadline = time.monotonic() + 20
        while any(folder.exists() for folder in self.folders):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_owner_closes(runner, binaries):
    with Owner(runner, binaries) as owner:
        said, _ = owner.process.communicate(timeout=30)
        assert said == "closed\n"
        assert owner.process.returncode == 0
        owner.assert_nothing_left()


def test_owner_killed(runner, some_binaries):
    with Owner(runner, some_binaries) as owner:
        owner.process.kill()
        owner.assert_nothing_left()


def test_owner_and_one_guard_killed(runner, some_binaries):
    for which in (0, 1):
        with Owner(runner, some_binaries) as owner:
            os.kill(sorted(owner.guards)[which], signal.SIGKILL)
            time.sleep(0.1)
            assert is_running(owner.pid)
            owner.process.kill()
            owner.assert_nothing_left()


def test_owner_killed_with_everything_frozen(runner, some_binaries):
    with Owner(runner, some_binaries) as owner:
        (checkpointer, *_) = sorted(child_pids(owner.pid))
        owner.do(f"cluster.freeze({checkpointer})")
        owner.do("cluster.freeze()")
        owner.process.kill()
        owner.assert_nothing_left()


def test_interrupt_from_the_terminal_is_the_owners(runner, some_binaries):
    # Ctrl-C goes to the whole process group, which is not the server's nor its guards'.
    with Owner(runner, some_binaries) as owner:
        for pid in owner.servers | owner.guards:
            if pid == owner.pid or pid in owner.guards:
                assert os.getpgid(pid) != os.getpgid(owner.process.pid)


def test_a_guard_ignores_what_a_terminal_sends(runner, some_binaries):
    with Owner(runner, some_binaries) as owner:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            for guard in owner.guards:
                os.kill(guard, number)
        owner.process.kill()
        owner.assert_nothing_left()


def test_pooler_of_a_killed_owner(runner, some_binaries):
    try:
        find_pgbouncer()
    except PgBouncerNotFoundError as error:
        pytest.skip(str(error))
    with Owner(runner, some_binaries, bouncer=True) as owner:
        assert len(owner.folders) == 2
        owner.process.kill()
        owner.assert_nothing_left()
