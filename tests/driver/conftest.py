"""What the tests of connections, streams and COPY share."""

from __future__ import annotations

from types import coroutine
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from pgstructured.testing import Cluster


class Pauses:
    """Runs coroutines up to where they pause, so that they can be abandoned there."""

    class _Pause:
        def __await__(self) -> Generator[Any, Any, None]:
            yield self

    pause = _Pause

    @staticmethod
    @coroutine
    def run(paused: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        """Run ``paused`` until it awaits `pause`."""
        value = None
        while not isinstance(asked := paused.send(value), Pauses._Pause):
            value = yield asked


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def end_sessions(pg_cluster: Cluster, pg_dsn: str) -> Callable[[], None]:
    """Ends the sessions that can't have heard that we are gone."""

    def end() -> None:
        for session in pg_cluster.sessions(pg_dsn):
            pg_cluster.terminate_backend(session.pid)

    return end
