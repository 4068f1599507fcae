"""The proxy's sockets, driven by one thread."""

from __future__ import annotations

import errno
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from ._lane import Direction, Lane, Way
from ._ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterable

_HOST = "127.0.0.1"
_CHUNK = 1 << 18
_LINGER_RESET = struct.pack("ii", 1, 0)
_LISTEN_ATTEMPTS = 100


@final
@dataclass(frozen=True, slots=True)
class Counts:
    """What tests wait for."""

    open: int
    accepted: int
    held: int


@final
class _Link:
    """One client's connection and its counterpart to the server."""

    __slots__ = ("client", "is_connected", "lanes", "server")

    def __init__(self, client: socket.socket, ways: dict[Direction, Way]) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.is_connected = False
        self.lanes: dict[Direction, Lane] = {name: Lane(way) for name, way in ways.items()}

    def source(self, name: Direction) -> socket.socket | None:
        """Return the socket that a lane is read from."""
        return self.client if name == "up" else self.server

    def target(self, name: Direction) -> socket.socket | None:
        """Return the socket that a lane is written to."""
        return self.server if name == "up" else self.client

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets there are."""
        return [self.client] if self.server is None else [self.client, self.server]


@final
class Relay:
    """All connections of a proxy. Used by its thread only, but for `wake` and `port`."""

    def __init__(
        self, upstream: tuple[Any, ...], family: socket.AddressFamily = socket.AF_INET
    ) -> None:
        self.ways: dict[Direction, Way] = {"up": Way(), "down": Way()}
        self._family = family
        self._upstream = upstream
        self._selector = selectors.DefaultSelector()
        self._links: list[_Link] = []
        self._accepted = 0
        self._listener: socket.socket | None = None
        self._waking, self._woken = socket.socketpair()
        self._waking_lock = threading.Lock()
        self._is_closed = False
        for end in (self._waking, self._woken):
            end.settimeout(0)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self.port = 0
        attempts = _LISTEN_ATTEMPTS
        while self._listener is None:
            attempts -= 1
            self.port = free_port(_HOST)
            try:
                self.listen()
            except OSError:
                # Taken since it was found free: another one.
                if not attempts:
                    self.close()
                    raise

    def wake(self) -> None:
        """End the present wait of `step`; from any thread.

        What it is to wake for may be done by then, and may have been to close.
        """
        with self._waking_lock:
            if self._is_closed:
                return
            try:
                self._waking.send(b"\0")
            except BlockingIOError:  # pragma: no cover - needs thousands of calls in one step
                return  # enough wake-ups are under way

    def counts(self) -> Counts:
        """Return what there is."""
        lanes = [lane for link in self._links for lane in link.lanes.values()]
        held = sum(len(lane.held or b"") for lane in lanes)
        return Counts(len(self._links), self._accepted, held)

    # ---------------------------------------------------------------- commands

    def listen(self) -> None:
        """Accept connections."""
        if self._listener is not None:
            return
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((_HOST, self.port))
            listener.listen(128)
            listener.settimeout(0)
        except OSError:
            listener.close()
            raise
        self._selector.register(listener, selectors.EVENT_READ)
        self._listener = listener

    def refuse(self) -> None:
        """Refuse connections."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def reset(self) -> None:
        """Reset all connections."""
        for link in list(self._links):
            self._reset(link)

    def half_close(self, names: Iterable[Direction]) -> None:
        """Send what may be sent in these directions, then end them."""
        for link in list(self._links):
            for name in names:
                self._send(link, name)
                if link in self._links and (name == "down" or link.is_connected):
                    self._shut(link, name)
                else:
                    link.lanes[name].finish("fin")

    def set_frozen(self, names: Iterable[Direction], *, frozen: bool) -> None:
        """Freeze or thaw."""
        for name in names:
            self.ways[name].frozen = frozen

    def set_delay(self, names: Iterable[Direction], seconds: float) -> None:
        """Delay what comes from now on."""
        for name in names:
            self.ways[name].delay = seconds

    def set_rate(self, names: Iterable[Direction], rate: float | None) -> None:
        """Limit the rate."""
        for name in names:
            self.ways[name].rate = rate

    def release(self, names: Iterable[Direction]) -> None:
        """Release what is held."""
        for name in names:
            self.ways[name].hooks.clear()
            self._flush(name)

    # ---------------------------------------------------------------- the loop

    def step(self) -> None:
        """Wait for something to do, and do it."""
        timeout = self._register()
        for key, events in self._selector.select(timeout):
            if key.fileobj is self._woken:
                self._woken.recv(4096)
            elif key.fileobj is self._listener:
                self._accept()
            else:
                self._handle(key.data, key.fileobj, events)
        self.settle()

    def settle(self) -> None:
        """Do what can be done without waiting."""
        self._accept()
        for name, way in self.ways.items():
            if way.merged:
                self._flush(name)
        for link in list(self._links):
            if link.server is None and not self.ways["up"].frozen:
                self._connect(link)
            for name in link.lanes:
                self._send(link, name)
            self._end(link)

    def close(self) -> None:
        """Reset all connections and close everything."""
        self.refuse()
        self.reset()
        self._selector.close()
        with self._waking_lock:
            self._is_closed = True
            self._waking.close()
            self._woken.close()

    def _flush(self, name: Direction) -> None:
        self.ways[name].merged = False
        for link in self._links:
            link.lanes[name].release(time.monotonic())

    def _register(self) -> float | None:
        """Tell the selector what matters now; return the seconds until a timer is due."""
        now = time.monotonic()
        due = float("inf")
        for link in self._links:
            wanted = dict.fromkeys(link.sockets, 0)
            for name, lane in link.lanes.items():
                source, target = link.source(name), link.target(name)
                if source is not None and lane.wants_more and (link.is_connected or name == "up"):
                    wanted[source] |= selectors.EVENT_READ
                if target is not None and (target is link.client or link.is_connected):
                    wait = lane.wait(now)
                    if wait <= 0:
                        wanted[target] |= selectors.EVENT_WRITE
                    due = min(due, wait or due)
            if link.server is not None and not link.is_connected:
                wanted[link.server] = selectors.EVENT_WRITE
            for end, events in wanted.items():
                self._watch(end, events, link)
        return None if due == float("inf") else due

    def _watch(self, end: socket.socket, events: int, link: _Link) -> None:
        key = self._selector.get_map().get(end)
        if key is None and events:
            self._selector.register(end, events, link)
        elif key is not None and not events:
            self._selector.unregister(end)
        elif key is not None and key.events != events:
            self._selector.modify(end, events, link)

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            _prepare(client)
            self._accepted += 1
            self._links.append(_Link(client, self.ways))

    def _connect(self, link: _Link) -> None:
        link.server = socket.socket(self._family)
        _prepare(link.server)
        if link.server.connect_ex(self._upstream) not in {0, errno.EINPROGRESS}:
            _fail(link)

    def _handle(self, link: _Link, end: object, events: int) -> None:
        server = link.server
        if server is not None and end is server and not link.is_connected:
            if server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                _fail(link)
            link.is_connected = True
        elif events & selectors.EVENT_READ:
            self._receive(link, "up" if end is link.client else "down")

    def _receive(self, link: _Link, name: Direction) -> None:
        source, lane = link.source(name), link.lanes[name]
        assert source is not None
        try:
            data = source.recv(_CHUNK)
        except BlockingIOError:  # pragma: no cover - the kernel had called it readable
            return
        except OSError:
            lane.finish("rst")
            return
        if data:
            lane.receive(data, time.monotonic())
        else:
            lane.finish("fin")

    def _send(self, link: _Link, name: Direction) -> None:
        target, lane = link.target(name), link.lanes[name]
        if target is None or link not in self._links:
            return
        if target is link.server and not link.is_connected:
            return
        while data := lane.ready(time.monotonic()):
            try:
                count = target.send(data)
            except BlockingIOError:
                return
            except OSError:
                self._reset(link)
                return
            lane.sent(count, time.monotonic())

    def _end(self, link: _Link) -> None:
        """Pass on the ends that have come."""
        if link not in self._links:
            return
        for name, lane in link.lanes.items():
            if lane.end is None or not lane.is_drained:
                continue
            if lane.end == "rst":
                self._reset(link)
                return
            self._shut(link, name)
        is_over = all(lane.is_shut and lane.end is not None for lane in link.lanes.values())
        if is_over and link in self._links:  # shutting one way may have reset both
            self._forget(link)

    def _shut(self, link: _Link, name: Direction) -> None:
        lane, target = link.lanes[name], link.target(name)
        if lane.is_shut or target is None:
            return
        lane.shut()
        try:
            target.shutdown(socket.SHUT_WR)
        except OSError:
            self._reset(link)

    def _reset(self, link: _Link) -> None:
        if link not in self._links:
            return
        for end in link.sockets:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self._forget(link)

    def _forget(self, link: _Link) -> None:
        for end in link.sockets:
            self._watch(end, 0, link)
            end.close()
        self._links.remove(link)


def _prepare(end: socket.socket) -> None:
    end.settimeout(0)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _fail(link: _Link) -> None:
    """Let the client know, as far as anything gets through to it, that there is no server."""
    link.is_connected = True
    link.lanes["down"].finish("rst")
