"""What must not be committed, and which backend's modules may be imported where."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pgstructured"
LOCK_FILES = {"uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "pylock.toml"}
# Written so that this file does not find itself.
FORBIDDEN = re.compile(
    r"pythonhoste[d]|pyp[i]\.org/|/roo[t]/|/wor[k]/|/hom[e]/\w|/tm[p]/[a-z]|/User[s]/"
)
BACKENDS = {"asyncio", "trio", "uvloop", "sniffio"}
# Of psycopg: the interface to libpq, what runs on it, and every private name.
PSYCOPG_INSIDES = re.compile(r"psycopg\.(pq|generators|waiting|_\w+)\b.*")
MAY_IMPORT_PSYCOPG_INSIDES = re.compile(r"(driver|testing)/.*")
MAY_IMPORT_BACKENDS = re.compile(r"driver/_waiting\w*\.py|testing/_clock\.py")


@pytest.fixture(scope="module")
def committed():
    """Files of the checkout that git has or would take."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing here was committed")
    done = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=30,
    )
    return [ROOT / name for name in done.stdout.decode().split("\0") if name]


def test_no_lock_file(committed):
    assert [path for path in committed if path.name in LOCK_FILES] == []


def test_no_package_host_and_no_path_of_a_machine(committed):
    found = []
    for path in committed:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # binary, or removed and not yet committed
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, 1)
            if FORBIDDEN.search(line)
        ]
    assert found == []


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def source_modules():
    return {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}


def test_backends_are_imported_only_where_sockets_wait_and_clocks_tick():
    found = [
        f"{module}: {name}"
        for module, path in source_modules().items()
        if not MAY_IMPORT_BACKENDS.fullmatch(module)
        for name in imported_modules(path)
        if name.partition(".")[0] in BACKENDS
    ]
    assert found == []


def test_only_driver_and_testing_know_the_insides_of_psycopg():
    # import-linter can't say it: to it an external package is one module.
    found = [
        f"{module}: {name}"
        for module, path in source_modules().items()
        if not MAY_IMPORT_PSYCOPG_INSIDES.fullmatch(module)
        for name in imported_modules(path)
        if PSYCOPG_INSIDES.fullmatch(name)
    ]
    assert found == []


def run_python(program, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
    )


def test_importing_it_imports_no_trio_and_no_uvloop():
    done = run_python(
        """
        import sys
        import pgstructured, pgstructured.cli, pgstructured.driver, pgstructured.errors
        import pgstructured.locks, pgstructured.notify, pgstructured.observe
        import pgstructured.supervise, pgstructured.testing
        print(sorted({"trio", "uvloop"} & set(sys.modules)))
        """
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_on_trio_no_asyncio_event_loop_is_made(pg_dsn):
    pytest.importorskip("trio")
    done = run_python(
        """
        import asyncio, sys
        import anyio

        def refuse(*_args, **_kwargs):
            raise AssertionError("an asyncio event loop was made")

        asyncio.BaseEventLoop.__init__ = asyncio.new_event_loop = refuse
        from pgstructured import open_connection, open_notify_bus, pg_lock
        from pgstructured.notify import notify

        async def main(dsn):
            async with (
                open_connection(dsn, heartbeat=5) as connection,
                open_notify_bus(dsn, channels=["news"]) as bus,
                bus.subscribe("news") as news,
                pg_lock(dsn, "a key"),
            ):
                await notify(connection, "news", "hello")
                print((await news.receive()).payload)

        anyio.run(main, sys.argv[1], backend="trio")
        """,
        pg_dsn,
    )
    assert (done.stdout.strip(), done.stderr) == ("hello", "")
