"""Virtual time on asyncio and trio."""

from __future__ import annotations

import math
import selectors
from typing import TYPE_CHECKING, Any, Literal, Protocol, final

if TYPE_CHECKING:
    import asyncio


_BACKENDS = ("asyncio", "trio")


class _Clock(Protocol):
    def time(self) -> float: ...

    def advance(self, seconds: float) -> None: ...

    def options(self) -> dict[str, Any]: ...


@final
class VirtualClock:
    """Time that only a test moves, or that jumps over the waits when nobody can run.

    Give `backend` as the ``anyio_backend`` of a test, or unpack it for
    `anyio.run`. A clock is for one run of one event loop at a time, which may do
    real I/O all the while.

    Args:
        backend_name: ``asyncio`` or ``trio``. uvloop keeps its own time.
        autojump: seconds of real time after which, when no task could run and no
            I/O came, time jumps to the next deadline. None never jumps: only
            `advance` moves it (and `anyio.wait_all_tasks_blocked`, which sleeps on
            asyncio, never returns there). 0 jumps at once, and is for tests without I/O: a
            query under way looks like idleness. With a server, give it the time to
            answer, such as 0.05.

    Raises:
        ValueError: it is another backend, or ``autojump`` is negative.
    """

    def __init__(
        self, backend_name: Literal["asyncio", "trio"], *, autojump: float | None = 0.0
    ) -> None:
        if backend_name not in _BACKENDS:
            names = " or ".join(map(repr, _BACKENDS))
            raise ValueError(f"a virtual clock is for {names}, not {backend_name!r}")
        threshold = math.inf if autojump is None else autojump
        if not threshold >= 0:
            raise ValueError(f"autojump must be 0 or more seconds, not {autojump}")
        self._backend_name = backend_name
        self._clock: _Clock = (
            _AsyncioClock(threshold) if backend_name == "asyncio" else _TrioClock(threshold)
        )

    @property
    def backend(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the backend, as AnyIO's ``anyio_backend`` fixture has them."""
        return self._backend_name, self._clock.options()

    def time(self) -> float:
        """Return its time in seconds: what `anyio.current_time` says under it."""
        return self._clock.time()

    def advance(self, seconds: float) -> None:
        """Move time forward; from a task that runs under it.

        What has become due runs at the caller's next checkpoint.

        Args:
            seconds: how far; not negative.

        Raises:
            ValueError: it is negative, or not finite.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"time can't go backwards, nor to its end: {seconds}")
        self._clock.advance(seconds)


def virtual_backend(
    backend_name: Literal["asyncio", "trio"], *, autojump: float | None = 0.0
) -> tuple[str, dict[str, Any]]:
    """Return a value for ``anyio_backend`` whose clock is virtual; see `VirtualClock`."""
    return VirtualClock(backend_name, autojump=autojump).backend


class _AsyncioClock:
    """The time of an event loop whose selector moves it instead of waiting."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds

    def options(self) -> dict[str, Any]:
        return {"loop_factory": self._new_loop}

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        import asyncio  # noqa: PLC0415 - not wanted on trio

        loop = asyncio.SelectorEventLoop(_Selector(self, self._threshold))
        # An attribute of this one loop, which looks its time up there.
        setattr(loop, "time", self.time)  # noqa: B010 - type checkers refuse an assignment
        return loop


class _Selector(selectors.DefaultSelector):
    """A selector that gives I/O a moment of real time, and then moves the clock."""

    def __init__(self, clock: _AsyncioClock, threshold: float) -> None:
        super().__init__()
        self._clock = clock
        self._threshold = threshold

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(None if math.isinf(self._threshold) else self._threshold)
        if not ready:
            self._clock.advance(timeout)
        return ready


class _TrioClock:
    """trio's own `MockClock`."""

    def __init__(self, threshold: float) -> None:
        from trio.testing import MockClock  # noqa: PLC0415 - not wanted on asyncio

        self._mock = MockClock(autojump_threshold=threshold)

    def time(self) -> float:
        return self._mock.current_time()

    def advance(self, seconds: float) -> None:
        self._mock.jump(seconds)

    def options(self) -> dict[str, Any]:
        return {"clock": self._mock}
