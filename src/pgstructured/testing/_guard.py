"""Server processes that never outlive their owner.

A guard is a shell that waits for the end of a pipe. Only the owner has the
other end, so however the owner ends (kill -9 included) the guard wakes up, ends
the server and removes its folder. Two guards watch each server, so that one of
them may die too.

The server is a direct child of the owner, which can then wait for it. Its
process tells the guards its id before it becomes the server, so there is no
moment in which an owner's death would leave one behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from ._account import server_environment
from ._errors import ServerFailedError

if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence

    from ._account import Account

POLL_INTERVAL = 0.005

# Arguments: the signal that ends the server, the folder to remove. Lines read: the server's id
# first, then those of its stopped processes (which must run again to be ended).
_GUARD = """
trap '' HUP INT TERM
ending=$1 folder=$2
set --
while read -r pid; do
  case $pid in *[!0-9]* | '') ;; *) set -- "$@" "$pid" ;; esac
done
if [ $# -gt 0 ]; then
  kill -s "$ending" "$1"
  kill -s CONT "$@"
  n=0
  while kill -s 0 "$1" && [ $n -lt 80 ]; do n=$((n + 1)); sleep 0.1; done
  kill -s KILL "$1"
fi
rm -rf "$folder"
""".strip()

# Arguments: the log file, the server's command. It starts with a guard on stdout, the other on
# stderr (a plain shell knows no file numbers above 9), says its id to both and leaves them.
_SERVER = """
echo $$
echo $$ >&2
log=$1
shift
exec "$@" >>"$log" 2>&1
""".strip()


@final
class GuardedProcess:
    """A server process with its guards."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        account: Account,
        folder: Path,
        log: Path,
        ending: str,
    ) -> None:
        """Start it.

        Args:
            command: program and arguments.
            account: whose process it becomes.
            folder: its working folder, removed by the guards when the owner has died.
            log: file that its output is appended to.
            ending: name of the signal that ends it at once, such as ``QUIT``.
        """
        options = account.popen_options()
        environment = server_environment()
        self._pipes: list[int] = []
        self._guards: list[subprocess.Popen[Any]] = []
        try:
            for _ in range(2):
                reading, writing = os.pipe()
                self._pipes.append(writing)
                try:
                    guard = subprocess.Popen(
                        ["/bin/sh", "-c", _GUARD, "pgstructured-guard", ending, str(folder)],
                        stdin=reading,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        cwd="/",
                        env=environment,
                        start_new_session=True,
                        **options,
                    )
                finally:
                    os.close(reading)
                self._guards.append(guard)
            self._server = subprocess.Popen(
                ["/bin/sh", "-c", _SERVER, "sh", str(log), *command],
                stdin=subprocess.DEVNULL,
                stdout=self._pipes[0],
                stderr=self._pipes[1],
                cwd=folder,
                env=environment,
                start_new_session=True,
                **options,
            )
        except BaseException:
            self._dismiss()
            raise

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._server.pid

    @property
    def guard_pids(self) -> tuple[int, ...]:
        """Process ids of the guards."""
        return tuple(guard.pid for guard in self._guards)

    @property
    def returncode(self) -> int | None:
        """Exit status once the server has ended, else None."""
        return self._server.poll()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the server, if it still runs."""
        self._server.send_signal(number)

    def tell_stopped(self, pid: int) -> None:
        """Let the guards know of a process that has to run again before it can be ended."""
        for pipe in self._pipes:
            try:
                os.write(pipe, b"%d\n" % pid)
            except BrokenPipeError:
                continue  # that guard has died; the other one is there for this

    def wait(self, timeout: float) -> bool:
        """Wait until the server has ended; return whether it has."""
        try:
            self._server.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        self._dismiss()
        return True

    def kill(self) -> None:
        """End it with SIGKILL, and wait for that."""
        self._server.kill()
        if not self.wait(10.0):
            raise ServerFailedError(f"process {self.pid} survived SIGKILL for 10 s")

    def _dismiss(self) -> None:
        # Killed before their pipes are closed, so that they don't act on it.
        for guard in self._guards:
            guard.kill()
            guard.wait()
        for pipe in self._pipes:
            os.close(pipe)
        self._guards, self._pipes = [], []


def child_pids(parent: int) -> frozenset[int]:
    """Return the ids of a process's children."""
    return frozenset(pid for pid, (of, _) in _processes().items() if of == parent)


def wait_gone(pids: frozenset[int], timeout: float) -> frozenset[int]:
    """Wait until processes have ended; return those that have not."""
    deadline = time.monotonic() + timeout
    while pids := frozenset(pid for pid in pids if is_running(pid)):
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL_INTERVAL)
    return pids


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    found = _process(pid)
    return found is not None and found[1] not in "ZX"


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by SIGSTOP."""
    found = _process(pid)
    return found is not None and found[1] in "Tt"


if sys.platform == "linux":

    def _process(pid: int) -> tuple[int, str] | None:
        """Return parent and state letter of a process."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, parent = text.rpartition(")")[2].split()[:2]
        return int(parent), state

    def _processes() -> dict[int, tuple[int, str]]:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return {pid: found for pid in pids if (found := _process(pid)) is not None}

else:  # pragma: no cover - other systems have no /proc; the tests run on Linux

    def _process(pid: int) -> tuple[int, str] | None:
        return _processes().get(pid)

    def _processes() -> dict[int, tuple[int, str]]:
        said = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,state="],
            capture_output=True,
            text=True,
            check=True,
            timeout=10.0,
        )
        rows = (line.split() for line in said.stdout.splitlines())
        return {int(pid): (int(parent), state[0]) for pid, parent, state in rows}
