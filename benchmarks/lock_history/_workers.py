"""The processes of the workers: started, killed, revived, drained."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._worker import Assignment

ROOT = Path(__file__).resolve().parents[2]


class Workers:
    """One process for each assignment, and those that came before it.

    Args:
        assignments: One for each worker; ``process`` and ``path`` are set here.
        folder: Where histories are written.
    """

    def __init__(self, assignments: Sequence[Assignment], folder: Path) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self.histories: list[Path] = []
        self.trouble: list[str] = []
        """What processes said that have ended by themselves."""
        self.started = 0
        self._assignments = assignments
        self._folder = folder
        for number in range(len(assignments)):
            self.running.append(self._start(number))

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        self.started += 1
        assignment = self._assignments[number]
        process = f"{assignment.worker}.{self.started}-{assignment.loop}"
        path = self._folder / f"{process}.jsonl"
        path.touch()
        self.histories.append(path)
        assignment = replace(
            assignment, process=process, path=str(path), seed=f"{assignment.seed}/{self.started}"
        )
        with path.with_suffix(".err").open("wb") as errors:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.lock_history._worker",
                    json.dumps(asdict(assignment)),
                ],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def wait_started(self, timeout: float) -> None:
        """Wait until every process has begun to take locks, or has ended."""
        deadline = time.monotonic() + timeout
        for process, path in zip(self.running, self.histories, strict=True):
            while not path.stat().st_size and process.poll() is None:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"a worker did not start in {timeout:g} s")
                time.sleep(0.01)

    def kill(self, number: int) -> None:
        """End a process with SIGKILL, and start another one in its place."""
        process = self.running[number]
        process.kill()
        self._bury(process)
        self.running[number] = self._start(number)

    def revive(self) -> None:
        """Replace processes that have ended by themselves, and write down that they have."""
        for number, process in enumerate(self.running):
            if process.poll() is not None:
                self._complain(number)
                self._bury(process)
                self.running[number] = self._start(number)

    def drain(self, timeout: float) -> None:
        """Let everybody finish what is under way, and wait until they have.

        A process that has not within ``timeout`` seconds is ended; its history tells the rest.
        """
        for number in range(len(self.running)):
            self._tell(number, b"drain\n")
        waiting = {
            process.stdout: number
            for number, process in enumerate(self.running)
            if process.stdout is not None
        }
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            readable, _, _ = select.select(list(waiting), [], [], left)
            for stream in readable:
                number = waiting.pop(stream)
                if stream.readline() != b"drained\n":
                    self._complain(number)
        for number in waiting.values():
            self.trouble.append(f"worker {number} did not come to an end in {timeout:g} s")
            self.running[number].kill()

    def close(self, timeout: float) -> None:
        """Let everybody close its `Locks` and end, and wait until they have."""
        deadline = time.monotonic() + timeout
        for number in range(len(self.running)):
            self._tell(number, b"close\n")
        for number, process in enumerate(self.running):
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                self.trouble.append(f"worker {number} did not close in {timeout:g} s")
                process.kill()
            if process.wait() > 0:
                self._complain(number)
            self._bury(process)

    def end(self) -> None:
        """End every process, whatever it does."""
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.send_signal(signal.SIGCONT)
            self._bury(process)

    def _tell(self, number: int, what: bytes) -> None:
        stdin = self.running[number].stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which is told where it is waited for
            stdin.write(what)
            stdin.flush()

    def _complain(self, number: int) -> None:
        process = self.running[number]
        said = self.histories_errors(number)
        self.trouble.append(f"worker {number} ended with {process.wait(10)}: {said}")

    def histories_errors(self, number: int) -> str:
        """Return what the last start of a worker has written to stderr."""
        worker = self._assignments[number].worker
        paths = [path for path in self.histories if path.name.startswith(f"{worker}.")]
        return paths[-1].with_suffix(".err").read_text(errors="replace")[-4000:]

    def _bury(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
