"""Every Python block of README.md and docs/ is a test, on asyncio, uvloop and trio.

Blocks are written as inside an ``async def``: ``await`` and ``async with`` may stand at
their top. Names go on from block to block of a document; each block has a new, empty
database, which ``"env:DATABASE_URL"`` names. A block with ``def test_...`` in it is handed
to pytest as a file of its own. A program calls `anyio.run` itself, and runs on the backend
whose turn it is unless it names one.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import anyio
from sybil import Sybil
from sybil.parsers.myst import CodeBlockParser
from sybil.sybil import SybilCollection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from sybil import Document, Example, Region

_FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | annotations.compiler_flag
_FIXTURE = "pg_dsn"
_PYTEST_SECONDS = 60


def _sybil(name: str, backend: str, options: dict[str, Any]) -> Sybil:
    async def run(code: Any, namespace: dict[str, Any]) -> None:
        await _evaluate(code, namespace)

    def evaluate(example: Example) -> None:
        namespace = example.namespace
        environment = {"DATABASE_URL": namespace.pop(_FIXTURE)}
        source = str(example.parsed)
        if _is_tests(source):
            _run_pytest(source, environment)
            return
        padding = "\n" * (example.line + example.parsed.line_offset)
        code = compile(padding + source, example.path, "exec", flags=_FLAGS, dont_inherit=True)
        anyio_run = functools.partial(anyio.run, backend=backend, backend_options=options)
        namespace.setdefault("__name__", "__main__")
        with mock.patch.dict(os.environ, environment), mock.patch.object(anyio, "run", anyio_run):
            if code.co_flags & inspect.CO_COROUTINE:
                anyio.run(run, code, namespace)
            else:
                exec(code, namespace)  # noqa: S102 - our own documentation

    find = CodeBlockParser(language="python", evaluator=evaluate)

    def parse(document: Document) -> Iterable[Region]:
        # Tests choose their backends themselves, so once is enough for them.
        return (r for r in find(document) if name == "asyncio" or not _is_tests(str(r.parsed)))

    return Sybil(
        name=name,
        parsers=[parse],
        patterns=["README.md", "docs/*.md", "docs/**/*.md"],
        fixtures=[_FIXTURE],
    )


def _is_tests(source: str) -> bool:
    return "def test_" in source


def _evaluate(code: Any, namespace: dict[str, Any]) -> Awaitable[None]:
    coroutine: Awaitable[None] = eval(code, namespace)  # noqa: S307 - our own documentation
    return coroutine


def _run_pytest(source: str, environment: dict[str, str]) -> None:
    """Run a block of tests as their reader would, with the plugin that the package brings."""
    with tempfile.TemporaryDirectory(prefix="pgstructured-docs-") as folder:
        Path(folder, "test_block.py").write_text(source, encoding="utf-8")
        Path(folder, "pytest.ini").write_text(
            "[pytest]\nanyio_mode = auto\nfilterwarnings = error\n", encoding="utf-8"
        )
        done = subprocess.run(  # noqa: S603 - this interpreter, our own documentation
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder],
            cwd=folder,
            env={**os.environ, **environment, "PYTEST_ADDOPTS": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_PYTEST_SECONDS,
            check=False,
            text=True,
        )
        if done.returncode != 0:
            raise AssertionError(f"pytest said about this block:\n{done.stdout}")


pytest_collect_file = SybilCollection(
    [
        _sybil("asyncio", "asyncio", {"debug": True}),
        _sybil("uvloop", "asyncio", {"use_uvloop": True}),
        _sybil("trio", "trio", {}),
    ]
).pytest()
