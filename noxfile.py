"""Every check under one name; `.ci/run` calls these and nothing else.

``nox`` alone runs what a change must pass; ``nox -s lint typing`` the quick ones.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import nox
from nox.command import CommandFailed

PYTHONS = ["3.11", "3.12", "3.13"]

# pyenv's shims stand on PATH for versions that they then refuse to run.
_PYENV = sorted(Path.home().glob(".pyenv/versions/3.1[1-9]*/bin"))
os.environ["PATH"] = os.pathsep.join([*map(str, _PYENV), os.environ["PATH"]])
os.environ.setdefault("UV_PYTHON_DOWNLOADS", "never")

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.sessions = [
    "lint",
    "typing",
    "layers",
    "coverage",
    "wheel",
    "trio_only",
    "asyncio_only",
    "docs",
]

# So many tests may fail once, and pass by themselves; see .ci/run.
_UNSTABLE = 2

# What is tested where not every extra is installed; needs neither Sybil nor the root conftest.
_SMOKE = ["--confcutdir=tests", "tests/test_smoke.py"]


def _other_python() -> str | None:
    """Return a Python that the README's own test run doesn't use, if there is one."""
    for version in reversed(PYTHONS[1:]):
        python = shutil.which(f"python{version}")
        if python is None:
            continue
        done = subprocess.run([python, "-c", ""], check=False)  # noqa: S603 - a Python from PATH
        if done.returncode == 0:
            return version
    return None


def _python_files(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in Path(folder).rglob("*.py"))


def _pytest(session: nox.Session, *arguments: str) -> None:
    session.run("python", "-m", "pytest", *arguments, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, the rules of ruff and of flake8-async, spelling."""
    session.install("-e", ".[lint]")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    # On files: given a folder it fails. Ruff lacks ASYNC101 and ASYNC102.
    session.run(
        *("flake8-async", "--anyio", "--enable=ASYNC"),
        "--startable-in-context-manager=run_notify_bus",
        *_python_files("src"),
    )
    session.run("codespell")


@nox.session
def typing(session: nox.Session) -> None:
    """Mypy and pyright, strict, and a public interface that is typed to 100 %."""
    pyright = "pyright" if shutil.which("node") else "pyright[nodejs]"
    session.install("-e", ".[typing]", pyright)
    session.run("mypy")
    session.run("pyright")
    report = session.run(
        *("pyright", "--ignoreexternal", "--outputjson", "--verifytypes", "pgstructured"),
        success_codes=[0, 1],
        silent=True,
    )
    completeness = json.loads(str(report))["typeCompleteness"]
    if completeness["completenessScore"] != 1:
        for symbol in completeness["symbols"]:
            if symbol["isExported"] and not symbol["isTypeKnown"]:
                session.log(symbol["name"])
        session.error(f"typed to {completeness['completenessScore']:.1%}, not to 100 %")
    session.log("the public interface is typed to 100 %")


@nox.session
def layers(session: nox.Session) -> None:
    """Imports point down only."""
    session.install("-e", ".[lint]")
    session.run("lint-imports", "--no-cache")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Everything, on one version of Python."""
    session.install("-e", ".[test]")
    _pytest(session)


@nox.session(python=_other_python())
def coverage(session: nox.Session) -> None:
    """Everything, and every branch of ``src`` taken."""
    session.install("-e", ".[test]")
    data = Path(session.create_tmp(), "coverage")
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    session.env["COVERAGE_FILE"] = str(data.resolve() / "data")
    pytest = ("coverage", "run", "-m", "pytest", "-o", f"cache_dir={data.resolve() / 'cache'}")
    # Two at a time: they wait more than they work.
    in_parallel = ("--numprocesses=2", "--dist=loadfile")
    try:
        session.run(*pytest, *in_parallel, *session.posargs)
    except CommandFailed:
        last_failed = data / "cache/v/cache/lastfailed"
        failures = json.loads(last_failed.read_text()) if last_failed.exists() else ()
        if not 1 <= len(failures) <= _UNSTABLE:
            raise
        session.run(*pytest, "--last-failed", "--last-failed-no-failures=none")
    session.run("coverage", "combine", "--quiet")
    if again := _tests_of_what_was_missed(session, data / "report.json"):
        # A race may decide about a line; about a line that nothing tests it never does.
        session.log(f"not all was covered; once more: {' '.join(again)}")
        session.run(*pytest, *in_parallel, *again)
        session.run("coverage", "combine", "--append", "--quiet")
    session.run("coverage", "report")


def _tests_of_what_was_missed(session: nox.Session, report: Path) -> list[str]:
    """Return the folders of tests of the packages that are not covered as a whole."""
    session.run("coverage", "json", "--quiet", "--fail-under=0", "-o", str(report), silent=True)
    files = json.loads(report.read_text())["files"]
    missed = [
        Path(name)
        for name, file in files.items()
        if file["summary"]["missing_lines"] or file["summary"]["missing_branches"]
    ]
    folders = {Path("tests", path.parent.name) for path in missed}
    return sorted(str(folder) for folder in folders if folder.is_dir())


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel as users get it: built, installed alone, tested from there."""
    session.install("build")
    dist = Path(session.create_tmp(), "dist").resolve()
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--wheel", "--outdir", str(dist), silent=True)
    (built,) = dist.glob("*.whl")
    session.install(f"{built}[test]")
    where = session.run(
        "python", "-c", "import pgstructured; print(pgstructured.__file__)", silent=True
    )
    if Path("src").resolve() in Path(str(where).strip()).resolve().parents:
        session.error("the wheel is not what is tested")
    session.run("pgstructured", "--help", silent=True)
    _pytest(session, *_SMOKE, "tests/test_public_api.py")


@nox.session
def trio_only(session: nox.Session) -> None:
    """On trio, with asyncio forbidden to run: importable, for it can't be uninstalled."""
    session.install("-e", ".[demo]", "pytest", "pytest-timeout")
    session.env["PGSTRUCTURED_SMOKE"] = "trio"
    _pytest(session, *_SMOKE)


@nox.session
def asyncio_only(session: nox.Session) -> None:
    """On asyncio, with trio not installed."""
    session.install("-e", ".[binary,embedded]", "pytest", "pytest-timeout")
    session.run("python", "-c", "import importlib.util as u; assert u.find_spec('trio') is None")
    session.env["PGSTRUCTURED_SMOKE"] = "asyncio"
    _pytest(session, *_SMOKE)


@nox.session
def lock_history(session: nox.Session) -> None:
    """Locks of several processes, while everything breaks: five minutes, another seed each time."""
    session.install("-e", ".[demo,uvloop]")
    seed = str(int.from_bytes(os.urandom(3)))
    arguments = session.posargs or ["--seconds", "300", "--seed", seed]
    session.run("python", "-m", "benchmarks.lock_history", *arguments)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as pages; its examples are run by the tests."""
    session.install("-e", ".[docs]")
    pages = Path(session.create_tmp(), "pages")
    session.run("sphinx-build", "-W", "-b", "html", "docs", str(pages))
