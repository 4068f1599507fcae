"""The demo's workers when they don't do what they should: the demo says so, and ends them."""

from __future__ import annotations

import contextlib
import io
import socket

import anyio
import pytest
from anyio.abc import UNIXSocketStream

from pgstructured.cli import _demo, _demo_processes, main
from pgstructured.cli._demo_processes import DemoFailed, WorkerProcess, open_workers
from pgstructured.cli._demo_worker import Worker, send_line
from pgstructured.cli._terminal import Terminal
from pgstructured.testing import FaultProxy


@pytest.fixture
def proxies(pg_cluster):
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(FaultProxy(pg_cluster.host, pg_cluster.port))
            for name in _demo_processes.BACKENDS
        }


@pytest.fixture
async def worker(proxies):
    """A worker's conductor side, and the stream that the worker would write to."""
    ours, theirs = [await UNIXSocketStream.from_socket(end) for end in socket.socketpair()]
    async with theirs, ours:
        yield WorkerProcess("trio", proxies["trio"], ours), theirs


async def test_workers_that_end_at_once(pg_dsn, proxies, monkeypatch) -> None:
    monkeypatch.setattr(_demo_processes, "WORKER", ("sh", "-c", "exit 1"))
    with anyio.fail_after(30):
        async with open_workers(pg_dsn, proxies, "mark") as (first, second):
            with pytest.raises(DemoFailed, match="the asyncio worker ended before 'listening'"):
                await first.expect("listening")
            with pytest.raises(DemoFailed, match="the trio worker ended before 'listening'"):
                await second.expect("listening")
            with pytest.raises(DemoFailed, match="worker ended before it was told 'hold'"):
                await first.tell("hold")


async def test_workers_that_hang_are_ended(pg_dsn, proxies, monkeypatch) -> None:
    monkeypatch.setattr(_demo_processes, "WORKER", ("sh", "-c", "exec sleep 60"))
    monkeypatch.setattr(_demo_processes, "STEP_TIMEOUT", 0.1)
    monkeypatch.setattr(_demo_processes, "PARTING_TIMEOUT", 0.2)
    with anyio.fail_after(30):
        async with open_workers(pg_dsn, proxies, "mark") as (first, _):
            with pytest.raises(DemoFailed, match=r"asyncio: no 'listening' within 0.1 s; got \[\]"):
                await first.expect("listening")


async def test_workers_are_ended_with_a_conductor_that_fails(pg_dsn, proxies) -> None:
    with anyio.fail_after(30), pytest.raises(DemoFailed, match="of the conductor's own"):
        async with open_workers(pg_dsn, proxies, "mark") as (first, _):
            await first.expect("listening")
            raise DemoFailed("of the conductor's own")


async def test_reports_out_of_order_and_missing(worker, monkeypatch) -> None:
    process, stream = worker
    for event in ("third", "second", "first"):
        await send_line(stream, event=event)
    for event in ("first", "second", "third"):
        assert (await process.expect(event))["event"] == event
    await send_line(stream, event="other")
    monkeypatch.setattr(_demo_processes, "STEP_TIMEOUT", 1.0)
    with pytest.raises(DemoFailed, match=r"no 'wanted' within 1 s; got \['other'\]"):
        await process.expect("wanted")
    assert (await process.expect("other"))["event"] == "other"


async def test_a_report_to_nobody(worker) -> None:
    conductor, stream = worker
    await conductor._stream.aclose()
    with pytest.raises(anyio.BrokenResourceError):
        await send_line(stream, event="listening")
    await Worker("trio", "mark", stream)._report("listening")


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
