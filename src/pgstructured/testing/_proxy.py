"""A TCP proxy that breaks connections in every way a network can.

It runs in a thread of its own on plain selectors, so it goes on while the event
loop under test is blocked, and is the same for every backend.
"""

from __future__ import annotations

import math
import socket
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, Self, final
from urllib.parse import quote, urlencode

from psycopg.conninfo import conninfo_to_dict

from ._lane import Direction, Hook, HookKind
from ._relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

Directions = Literal["up", "down", "both"]

_HOST = "127.0.0.1"
_TIMEOUT = 10.0


@final
class FaultProxy:
    """A proxy between clients and one server, on 127.0.0.1.

    A context manager. Every method may be called from any thread, and its effect
    is in force when it returns. ``up`` is from the client to the server.

    What is set (freeze, delay, ...) holds for the connections there are and for
    those that come, libpq's cancel requests among them: a connection made while
    frozen is accepted and then silent.

    The methods that wait block their thread, and so the event loop that runs in
    it: call them through `anyio.to_thread.run_sync` where the loop has to go on.

    Args:
        host: address of the server, or its name, which is looked up once.
        port: its TCP port.

    Raises:
        OSError: there is no such host.
    """

    def __init__(self, host: str, port: int) -> None:
        self._relay = Relay(*_look_up(host, port))
        self._commands: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._thread = threading.Thread(
            target=self._run, name="pgstructured-fault-proxy", daemon=True
        )
        self._changed = threading.Condition()
        self._counts = self._relay.counts()
        self._closing = False
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def host(self) -> str:
        """The address it listens on."""
        return _HOST

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return self._relay.port

    def dsn(self, base: str) -> str:
        """Return a connection URL through the proxy.

        Args:
            base: connection URL or string of the server; its address is replaced.
        """
        params = {k: str(v) for k, v in conninfo_to_dict(base).items() if v is not None}
        for name in ("host", "hostaddr", "port"):
            params.pop(name, None)
        user = quote(params.pop("user", ""), safe="")
        password = quote(params.pop("password", ""), safe="")
        credentials = f"{user}:{password}" if password else user
        database = quote(params.pop("dbname", ""), safe="")
        query = f"?{urlencode(params, quote_via=quote)}" if params else ""
        at = f"{credentials}@" if credentials else ""
        return f"postgresql://{at}{_HOST}:{self.port}/{database}{query}"

    # ---------------------------------------------------------------- ending connections

    def reset(self) -> None:
        """Reset every connection (RST), towards both sides."""
        self._call(self._relay.reset)

    def fin(self) -> None:
        """End every connection in order (FIN), towards both sides."""
        self._call(lambda: self._relay.half_close(_ways("both")))

    def half_close(self, direction: Direction) -> None:
        """End one direction of every connection: its receiver sees the end, the other way goes on.

        Args:
            direction: ``down`` lets clients see the end, ``up`` the server.
        """
        self._call(lambda: self._relay.half_close(_ways(direction)))

    def refuse(self) -> None:
        """Refuse new connections; those that are there go on."""
        self._call(self._relay.refuse)

    def accept(self) -> None:
        """Accept new connections again."""
        self._call(self._relay.listen)

    # ---------------------------------------------------------------- slowing them down

    def freeze(self, direction: Directions = "both") -> None:
        """Let nothing through any more, not even the end of a connection."""
        self._call(lambda: self._relay.set_frozen(_ways(direction), frozen=True))

    def thaw(self, direction: Directions = "both") -> None:
        """Let everything through again, in order."""
        self._call(lambda: self._relay.set_frozen(_ways(direction), frozen=False))

    def delay(self, seconds: float, direction: Directions = "both") -> None:
        """Pass on everything that comes from now on so much later; 0 ends it.

        Raises:
            ValueError: the delay is negative or not finite.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a delay must be a finite number of seconds from 0, not {seconds}")
        self._call(lambda: self._relay.set_delay(_ways(direction), seconds))

    def throttle(self, bytes_per_second: float | None, direction: Directions = "both") -> None:
        """Pass on no more than so many bytes per second, in each connection; None ends it.

        Raises:
            ValueError: the rate is not above 0, or not finite: to let nothing through is `freeze`.
        """
        if bytes_per_second is not None and not 0 < bytes_per_second < math.inf:
            raise ValueError(f"a rate must be a finite number above 0, not {bytes_per_second}")
        self._call(lambda: self._relay.set_rate(_ways(direction), bytes_per_second))

    # ---------------------------------------------------------------- by pattern

    def hold(self, pattern: bytes, direction: Direction = "down") -> None:
        """Keep back everything from the next occurrence of a pattern on, until `release`.

        It is for one connection, the first in which the pattern comes. Where the
        pattern comes in pieces, those before its last one have passed.
        """
        self._hook("hold", pattern, direction)

    def cut(self, pattern: bytes, direction: Direction = "up") -> None:
        """Pass on the next occurrence of a pattern, and reset its connection right after it.

        The server still acts on what it has got: a moment after the client knows
        of the reset.
        """
        self._hook("cut", pattern, direction)

    def merge(self, pattern: bytes, direction: Direction = "down") -> None:
        """Keep back everything until a pattern has come, then pass it on as one piece.

        So that a reader gets at once what the sender had sent in several writes.
        """
        self._hook("merge", pattern, direction)

    def release(self, direction: Directions = "both") -> None:
        """Pass on what is held, as one piece, and forget patterns that have not come."""
        self._call(lambda: self._relay.release(_ways(direction)))

    def _hook(self, kind: HookKind, pattern: bytes, direction: Direction) -> None:
        given: Any = pattern
        if not isinstance(given, bytes):  # or it would end the thread
            raise TypeError(f"a pattern must be bytes, not {type(given).__name__}")
        if not pattern:
            raise ValueError("an empty pattern")
        self._call(lambda: self._relay.ways[direction].hooks.append(Hook(kind, pattern)))

    # ---------------------------------------------------------------- looking

    @property
    def connections(self) -> int:
        """How many connections are open."""
        self._call(lambda: None)
        return self._counts.open

    @property
    def accepted(self) -> int:
        """How many connections have been accepted so far."""
        self._call(lambda: None)
        return self._counts.accepted

    def wait_connections(self, count: int, timeout: float = _TIMEOUT) -> None:
        """Wait until exactly so many connections are open.

        Raises:
            TimeoutError: that did not happen in time.
        """
        self._wait(lambda: self._counts.open == count, f"{count} open connections", timeout)

    def wait_accepted(self, count: int, timeout: float = _TIMEOUT) -> None:
        """Wait until at least so many connections have been accepted since the start.

        Raises:
            TimeoutError: that did not happen in time.
        """
        self._wait(lambda: self._counts.accepted >= count, f"{count} connects", timeout)

    def wait_held(self, timeout: float = _TIMEOUT) -> None:
        """Wait until something is held back by `hold` or `merge`.

        Raises:
            TimeoutError: that did not happen in time.
        """
        self._wait(lambda: self._counts.held > 0, "held bytes", timeout)

    def _wait(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                raise TimeoutError(f"no {what} within {timeout} s; there are {self._counts}")

    # ---------------------------------------------------------------- its thread

    def close(self) -> None:
        """Reset what is open and end the thread; a second call does nothing."""
        if not self._closing:
            self._call(self._end)
        self._thread.join(_TIMEOUT)

    def _end(self) -> None:
        # In its thread: that can't end before whoever closes it has seen to it that it will.
        self._relay.reset()
        self._closing = True

    def _call(self, command: Callable[[], object]) -> None:
        if self._closing:
            raise RuntimeError("the proxy is closed")
        done: Future[object] = Future()
        self._commands.append((command, done))
        self._relay.wake()
        done.result(_TIMEOUT)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._relay.step()
                while self._commands:
                    command, done = self._commands.popleft()
                    try:
                        self._relay.settle()
                        command()
                        self._relay.settle()
                        self._publish()
                    except Exception as error:  # noqa: BLE001 - raised where the result is waited for
                        done.set_exception(error)
                    else:
                        done.set_result(None)
                self._publish()
        finally:
            self._relay.close()

    def _publish(self) -> None:
        counts = self._relay.counts()
        if counts != self._counts:
            with self._changed:
                self._counts = counts
                self._changed.notify_all()


def _look_up(host: str, port: int) -> tuple[tuple[Any, ...], socket.AddressFamily]:
    """Return address and family of a server; of several addresses the first of IPv4, if any."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return address, family


def _ways(direction: Directions) -> tuple[Direction, ...]:
    return ("up", "down") if direction == "both" else (direction,)
