"""The demo's workers when they don't do what they should: the demo says so, and ends them."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import anyio
import pytest

from pgstructured.cli import _demo, _demo_processes, main
from pgstructured.cli._demo_processes import DemoFailed, WorkerProcess, open_workers
from pgstructured.cli._demo_worker import send_line
from pgstructured.cli._terminal import Terminal
from pgstructured.testing import FaultProxy

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def proxies(pg_cluster):
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(FaultProxy(pg_cluster.host, pg_cluster.port))
            for name in _demo_processes.BACKENDS
        }


@pytest.fixture
async def worker(tmp_path, proxies):
    """A worker's conductor side, and the stream that the worker would write to."""
    path = tmp_path / "w.sock"
    async with await anyio.create_unix_listener(path) as listener:
        theirs = await anyio.connect_unix(path)
        ours = await listener.accept()
        async with theirs, ours:
            yield WorkerProcess("trio", proxies["trio"], ours), theirs


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "worker"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


async def open_them(pg_dsn, proxies, tmp_path) -> None:
    async with open_workers(pg_dsn, proxies, tmp_path, "mark"):
        pytest.fail("started")


async def test_a_worker_that_ends_at_once(pg_dsn, proxies, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.executable", program(tmp_path, "exit 1"))
    with anyio.fail_after(10), pytest.raises(DemoFailed, match="asyncio worker did not start"):
        await open_them(pg_dsn, proxies, tmp_path)


async def test_a_worker_that_hangs_is_ended(pg_dsn, proxies, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.executable", program(tmp_path, "exec sleep 60"))
    monkeypatch.setattr(_demo_processes, "STEP_TIMEOUT", 0.2)
    with anyio.fail_after(10), pytest.raises(DemoFailed, match="asyncio worker did not start"):
        await open_them(pg_dsn, proxies, tmp_path)


async def test_reports_out_of_order_and_missing(worker, monkeypatch) -> None:
    process, stream = worker
    await send_line(stream, event="second")
    await send_line(stream, event="first")
    assert (await process.expect("first"))["event"] == "first"
    assert (await process.expect("second"))["event"] == "second"
    await send_line(stream, event="other")
    monkeypatch.setattr(_demo_processes, "STEP_TIMEOUT", 0.1)
    with pytest.raises(DemoFailed, match=r"no 'wanted' within 0.1 s; got \['other'\]"):
        await process.expect("wanted")
    assert (await process.expect("other"))["event"] == "other"


async def test_steps_that_do_not_happen(worker, monkeypatch) -> None:
    process, stream = worker
    demo = _demo._Demo(None, "mark", [process, process], Terminal(io.StringIO()))  # type: ignore[arg-type]
    with pytest.raises(DemoFailed, match="this did not happen: a miracle"):
        demo._check(False, "a miracle")
    demo._stored = 2
    monkeypatch.setattr(_demo, "STEP_TIMEOUT", 0.1)
    await send_line(stream, event="count", seen=[1])
    with pytest.raises(DemoFailed, match="trio has 1 of 2 orders"):
        await demo._wait_until_complete(process)

    async def none(query: str) -> int:
        await anyio.lowlevel.checkpoint()
        return 0

    monkeypatch.setattr(demo, "_count", none)
    with pytest.raises(DemoFailed, match="nobody waits for the lock"):
        await demo._wait_for_waiter()


def test_interrupted(monkeypatch, capsys) -> None:
    def interrupt(server: str | None) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(_demo, "run_demo", interrupt)
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err
