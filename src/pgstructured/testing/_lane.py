"""One direction of one proxied connection: what may be sent, and when. No I/O.

    receive ──hooks──> held ──release──> queue ──delay, rate, frozen──> ready

A `Way` is the state that all connections share in a direction.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal, final

Direction = Literal["up", "down"]
HookKind = Literal["hold", "cut", "merge"]
End = Literal["fin", "rst"]

_SLOT = 0.02
_BUFFER = 1 << 20


@final
@dataclass(frozen=True, slots=True)
class Hook:
    """Something to do when a pattern passes; it does it once."""

    kind: HookKind
    pattern: bytes


@final
@dataclass(slots=True)
class Way:
    """What is in force in one direction, for every connection."""

    frozen: bool = False
    delay: float = 0.0
    rate: float | None = None
    hooks: list[Hook] = field(default_factory=list[Hook])
    merged: bool = False
    """Set when a merge has found its pattern: every lane is to be released."""

    @property
    def is_merging(self) -> bool:
        """Whether everything is kept back until a pattern has come."""
        return any(hook.kind == "merge" for hook in self.hooks)


@final
class Lane:
    """The bytes of one connection in one direction."""

    __slots__ = ("_next_at", "_queue", "_queued", "_tail", "_way", "end", "held", "is_shut")

    def __init__(self, way: Way) -> None:
        self._way = way
        self._queue: deque[tuple[float, bytes]] = deque()
        self._queued = 0
        self._next_at = 0.0
        self._tail = b""
        self.held: bytearray | None = None
        """Bytes kept back, or None while nothing is."""
        self.end: End | None = None
        """What comes after the last byte, once that is known; nothing is received after it."""
        self.is_shut = False
        """Whether the end has been passed on; what still comes is dropped."""

    @property
    def wants_more(self) -> bool:
        """Whether its source is to be read."""
        return (
            not self._way.frozen
            and self.end is None
            and (self._queued < _BUFFER or self.held is not None)
        )

    @property
    def is_drained(self) -> bool:
        """Whether the end may be passed on now."""
        return not (self._queue or self.held or self._way.frozen)

    def receive(self, data: bytes, now: float) -> None:
        """Take what the source sent."""
        if self.is_shut:
            return
        if self.held is not None or self._way.is_merging:
            self.held = (self.held or bytearray()) + data
            self._look_for_merge()
            return
        for hook in self._way.hooks:
            seen = self._tail + data
            at = seen.find(hook.pattern)
            if at < 0:
                continue
            self._way.hooks.remove(hook)
            self._tail = b""
            if hook.kind == "hold":
                # A part of the pattern may have passed with earlier bytes.
                start = max(0, at - (len(seen) - len(data)))
                self._enqueue(data[:start], now)
                self.held = bytearray(data[start:])
            else:
                self._enqueue(data[: at + len(hook.pattern) - (len(seen) - len(data))], now)
                self.end = "rst"
            return
        longest = max((len(hook.pattern) for hook in self._way.hooks), default=1)
        self._tail = (self._tail + data)[-(longest - 1) :] if longest > 1 else b""
        self._enqueue(data, now)

    def release(self, now: float) -> None:
        """Let go what is held, as one piece."""
        held, self.held = self.held, None
        self._enqueue(bytes(held or b""), now)

    def shut(self) -> None:
        """Note that the end has been passed on; what is still here is dropped."""
        self.is_shut = True
        self.held = None
        self._queue.clear()
        self._queued = 0

    def finish(self, end: End) -> None:
        """Note that the source has ended."""
        self.end = self.end or end

    def ready(self, now: float) -> bytes:
        """Return what may be sent now."""
        if self._way.frozen or not self._queue or self.wait(now) > 0:
            return b""
        data = self._queue[0][1]
        rate = self._way.rate
        return data if rate is None else data[: max(1, int(rate * _SLOT))]

    def wait(self, now: float) -> float:
        """Return the seconds until something may be sent; infinite where it is not time."""
        if self._way.frozen or not self._queue:
            return float("inf")
        paced = self._next_at if self._way.rate is not None else 0.0
        return max(0.0, self._queue[0][0] - now, paced - now)

    def sent(self, count: int, now: float) -> None:
        """Note that so many bytes of what was ready have been sent."""
        due, data = self._queue.popleft()
        if count < len(data):
            self._queue.appendleft((due, data[count:]))
        self._queued -= count
        if self._way.rate is not None:
            self._next_at = max(now, self._next_at) + count / self._way.rate

    def _enqueue(self, data: bytes, now: float) -> None:
        if data:
            self._queue.append((now + self._way.delay, data))
            self._queued += len(data)

    def _look_for_merge(self) -> None:
        for hook in self._way.hooks:
            if hook.kind == "merge" and hook.pattern in (self.held or b""):
                self._way.hooks.remove(hook)
                self._way.merged = True
                return
