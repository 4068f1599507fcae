"""``pgstructured lock``."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import psycopg
import pytest

from pgstructured.cli import _lock, main
from pgstructured.locks import LockKey
from pgstructured.locks._names import note

KEY = LockKey.named("nightly")


@pytest.fixture
def run(pg_dsn, capsys):
    """Run the command in this process: ``code, out, err = run("--list")``."""

    def command(*arguments, dsn=pg_dsn):
        code = main(["lock", "--dsn", dsn, *arguments])
        return (code, *capsys.readouterr())

    return command


def take(conn, *keys, call="pg_advisory_lock"):
    for key in keys:
        numbers = key.as_pair or (key.as_bigint,)
        arguments = ", ".join(
            f"'{number}'::{'int4' if key.as_pair else 'int8'}" for number in numbers
        )
        conn.execute(f"SELECT {call}({arguments}){note([key])}".encode())


@pytest.fixture
def conn(pg_dsn):
    with psycopg.connect(pg_dsn, autocommit=True, application_name="worker") as opened:
        yield opened


def test_create(run, conn):
    assert run("--create") == (0, 'the fence table "pgstructured_fence" is there\n', "")
    assert run("--create")[0] == 0
    conn.execute("SELECT token, name, holder, granted_at, released_at FROM pgstructured_fence")


def test_create_by_another_name(run, conn):
    conn.execute("CREATE SCHEMA app")
    assert run("--create", "--table", "app.Fence") == (
        0,
        'the fence table "app"."Fence" is there\n',
        "",
    )
    conn.execute('SELECT FROM app."Fence"')


def test_create_that_fails(run):
    code, out, err = run("--create", "--table", "nowhere.fence")
    assert (code, out) == (1, "")
    assert err.startswith("pgstructured lock: ")
    assert 'schema "nowhere" does not exist' in err
    code, out, err = run("--create", "--table", "a.b.c")
    assert (code, out) == (2, "")
    assert "a fence table is named 'table' or 'schema.table'" in err


def test_list_nobody(run):
    assert run("--list") == (0, "nobody holds an advisory lock\n", "")
    assert run("--list", "nightly") == (0, "nobody holds it\n", "")


def test_list(run, conn, pg_dsn):
    take(conn, LockKey.bigint(7), LockKey.pair(-1, 2), call="pg_advisory_lock_shared")
    take(conn, KEY)
    pid = conn.info.backend_pid
    with psycopg.connect(pg_dsn) as waiter:
        waiter_pid = waiter.info.backend_pid
        waiter.pgconn.send_query(f"SELECT pg_advisory_lock({KEY.as_bigint})".encode())
        statement = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = %s"
        while conn.execute(statement + note([KEY]), [waiter_pid]).fetchone() == (0,):
            pass
        code, out, err = run("--list")
        _, named, _ = run("--list", "nightly")
        _, shared, _ = run("--list=-1,2")
        assert run("--list", "7")[1].count("\n") == 2
        take(conn, KEY, call="pg_advisory_unlock")
        while waiter.pgconn.get_result() is not None:
            pass
    assert (code, err) == (0, "")
    headings, *lines = out.splitlines()
    assert re.split(r"  +", headings) == list(_lock._HEADINGS)
    cells = [re.split(r" {2,}", line) for line in lines]
    numbers = str(KEY.as_bigint)
    rest = [str(pid), "worker", "postgres", "127.0.0.1"]
    assert ["held", "nightly", numbers, *rest] in cells
    assert ["held shared", "7", *rest] in cells
    assert ["held shared", "-1,2", *rest] in cells
    (waits,) = (row for row in cells if row[0] == "waits")
    assert waits[1:3] == [numbers, str(waiter_pid)]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ", waits[-2])
    assert waits[-1] == str(pid)
    assert len({line.index("postgres") for line in lines}) == 1
    assert [line.split()[:2] for line in named.splitlines()[1:]] == [
        ["held", "nightly"],
        ["waits", "nightly"],
    ]
    assert shared.splitlines()[1].startswith("held shared")


@pytest.mark.pg_leaks_ok  # it is a leak, until the database is dropped
def test_list_a_prepared_transaction(run, conn):
    conn.execute("BEGIN; SELECT pg_advisory_xact_lock(7)")
    conn.execute(f"PREPARE TRANSACTION '{conn.info.dbname}'")
    _, out, _ = run("--list")
    assert out.splitlines()[1].split() == ["held", "7", "prepared"]


def test_hostile_names(run, conn, monkeypatch):
    take(conn, LockKey(as_bigint=7, name="\x1b[2J bell \a line\nend é 漢 \ud800 \u202e"))
    _, out, _ = run("--list")
    assert "  \\x1b[2J bell \\x07 line\\nend é 漢 \\ud800 \\u202e  " in out
    # On a terminal that can't show it.
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert main(["lock", "--list", "--dsn", conn.info.dsn]) == 0
    ascii_only.flush()
    shown = ascii_only.buffer.getvalue().decode()
    assert "  \\x1b[2J bell \\x07 line\\nend \\xe9 \\u6f22 \\ud800 \\u202e  " in shown
    without_encoding = io.StringIO()
    monkeypatch.setattr(sys, "stdout", without_encoding)
    assert main(["lock", "--list", "--dsn", conn.info.dsn]) == 0
    assert "\\xe9 \\u6f22" in without_encoding.getvalue()


def test_the_key_may_be_any_word(run, conn):
    """No name is an option's own word."""
    take(conn, LockKey.named("all"), KEY)
    assert len(run("--list", "all")[1].splitlines()) == 2
    assert len(run("--list")[1].splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--list", "9223372036854775808"], "out of range"),
        (["--list", ""], "must not be empty"),
        (["--list", "--dsn", "postgresql://u:secret@h:x/"], "malformed connection string"),
        (["--list", "--dsn", "env:NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE is not set"),
        (["--create", "--dsn", "secret"], "malformed connection string"),
    ],
)
def test_wrong_use(run, arguments, told):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert "secret" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["--create", "--list"], ["--list", "a", "b"], ["--list", "--table", "x"]]
)
def test_wrong_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(["lock", *arguments])
    assert caught.value.code == 2
    assert "usage: pgstructured" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["--create", "--list"])
def test_no_server(run, action):
    code, out, err = run(action, dsn="host=127.0.0.1 port=1 password=secret")
    assert (code, out) == (1, "")
    assert "refused" in err
    assert "secret" not in err


def test_interrupted(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(_lock, "list_locks", interrupt)
    assert main(["lock", "--list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_nobody_reads_on(pg_dsn, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["lock", "--list", "--dsn", pg_dsn]) == 1


def test_the_environment_says_where(pg_dsn, conn):
    info = conn.info
    environment = {
        "PGHOST": info.host,
        "PGPORT": str(info.port),
        "PGUSER": info.user,
        "PGDATABASE": info.dbname,
        "OURS": pg_dsn,
    }
    take(conn, KEY)
    for arguments in (["--list"], ["--list", "--dsn", "env:OURS"]):
        done = subprocess.run(
            [sys.executable, "-m", "pgstructured", "lock", *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "nightly" in done.stdout
