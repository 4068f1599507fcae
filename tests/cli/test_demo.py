"""The demo, run as a user runs it: in a process of its own."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time

import psycopg
import pytest

from pgstructured.cli import main
from pgstructured.cli._terminal import Terminal

COMMAND = [sys.executable, "-m", "pgstructured", "demo"]

STEPS = [
    "asyncio listens on its bus",
    "trio listens on its bus",
    "asyncio holds the lock",
    "trio waits for it",
    "asyncio released, trio holds it",
    "asyncio received all 500",
    "trio received all 500",
    "trio: LockLost, reason 'terminated' (SQLSTATE 57P01)",
    "asyncio, which was waiting, holds the lock",
    "asyncio: Gap('reconnected'), generation 2",
    "trio: Gap('reconnected'), generation 2",
    "trio holds the lock again",
    "trio: LockLost, reason 'unconfirmed'",
    "trio: Gap('reconnected'), generation 3",
    "asyncio holds the lock now",
    "asyncio has all 1500 orders",
    "trio has all 1500 orders",
    "no session, no lock is left",
]


def test_every_step_happens_on_a_private_server() -> None:
    began = time.monotonic()
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 30  # the contract's bound
    position = 0
    for step in STEPS:
        position = done.stdout.index(step, position)
    assert "\x1b" not in done.stdout  # piped: plain
    assert done.stderr == ""


def test_on_a_given_server_it_leaves_nothing(pg_cluster, pg_dsn) -> None:
    done = subprocess.run(
        [*COMMAND, "--server", pg_dsn], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no session, no lock is left" in done.stdout
    with psycopg.connect(pg_dsn) as conn:
        tables = conn.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        assert tables.fetchone() == (0,)


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        ("postgresql://127.0.0.1:1/nowhere", "refused"),
        ("host=/run dbname=x", "over TCP"),
        ("postgresql://one,two/x", "one host"),
        ("password=se cret", "malformed connection string"),
        ("postgres://h:abc/db", "malformed connection string"),
        ("env:NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_a_server_that_will_not_do(server, complaint, capsys) -> None:
    assert main(["demo", "--server", server]) == 1
    output = capsys.readouterr().out
    assert complaint in output
    assert "cret" not in output
    assert "The demo failed." in output


def test_a_missing_server_is_a_clear_error() -> None:
    env = {**os.environ, "PGSTRUCTURED_PG_BIN": "/nonexistent"}
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.returncode == 1
    assert "/nonexistent" in done.stdout
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_everything(pg_cluster, pg_dsn) -> None:
    process = subprocess.Popen(
        # A test run in the background of a shell ignores SIGINT, and its children with it.
        ["env", "--default-signal=INT", *COMMAND, "--server", pg_dsn],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "holds the lock" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells all of them
    _, complaint = process.communicate(timeout=20)
    assert process.returncode == 130
    assert complaint.endswith("interrupted\n")
    assert "Traceback" not in complaint
    with psycopg.connect(pg_dsn) as conn:
        tables = conn.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        assert tables.fetchone() == (0,)


def test_nobody_reads_on() -> None:
    process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout:
        process.stdout.readline()
    with process.stderr:
        assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=20) == 1


class TestTerminal:
    def test_colour_on_a_terminal(self, monkeypatch) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        leader, follower = pty.openpty()
        with os.fdopen(follower, "w", encoding="utf-8") as out:
            terminal = Terminal(out)
            terminal.chapter("Title")
            terminal.tell("going on")
            terminal.succeed("done")
            terminal.fail("not done")
            shown = ""
            while "not done" not in shown:
                shown += os.read(leader, 4096).decode()
        os.close(leader)
        assert "\x1b[1mTitle\x1b[0m" in shown
        assert "✓" in shown
        assert "✗" in shown

    def test_plain_elsewhere(self) -> None:
        raw = io.BytesIO()
        out = io.TextIOWrapper(raw, encoding="ascii")
        terminal = Terminal(out)
        terminal.succeed("done")
        terminal.fail("not done")
        shown = raw.getvalue().decode()
        assert "ok done" in shown
        assert "FAILED not done" in shown
