"""Telling how an acquire has ended that got no lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from pgstructured.errors import LockTimeout
from pgstructured.observe import emit

if TYPE_CHECKING:
    from ._grip import LockRequest


def tell_end(request: LockRequest, began: float, error: BaseException | None = None) -> None:
    """Tell how an acquire has ended that got no lock.

    Args:
        request: What was asked for.
        began: Event-loop time at which it began.
        error: What it raises; None for a try that was refused.
    """
    facts = {
        "key": request.key,
        "shared": request.shared,
        "waited": anyio.current_time() - began,
    }
    if error is None:
        emit("lock.acquire_refused", **facts)
    elif isinstance(error, LockTimeout):
        emit("lock.acquire_timed_out", **facts)
    else:
        is_error = isinstance(error, Exception)
        emit("lock.acquire_failed", error=error if is_error else None, **facts)
