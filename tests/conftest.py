"""What every test shares: the backend matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

    import anyio


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


class CancelAt:
    """Awaits something, and cancels a scope where it suspends for the n-th time (from 0)."""

    def __init__(self, coroutine: Any, scope: anyio.CancelScope, number: int) -> None:
        self.coroutine = coroutine
        self.scope = scope
        self.number = number
        self.count = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        inner = self.coroutine.__await__()
        step, argument = inner.send, None
        while True:
            try:
                waits_for = step(argument)
            except StopIteration as stop:
                return stop.value
            if self.count == self.number:
                self.scope.cancel()
            self.count += 1
            try:
                step, argument = inner.send, (yield waits_for)
            except BaseException as exc:  # noqa: BLE001 - passed on
                step, argument = inner.throw, exc


@pytest.fixture
def cancel_at() -> Any:
    """`CancelAt`, for tests that cancel at every await there is."""
    return CancelAt
