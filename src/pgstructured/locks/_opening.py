"""From a request to held locks, for the length of a block; the same for every source."""

from __future__ import annotations

import math
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from pgstructured.observe import emit

from ._block import Block
from ._grip import LockRequest
from ._held import HeldLock, check_ttl
from ._life import begin, conclude, leave
from ._releasing import abandon, unlock
from ._telling import tell_end

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from ._grip import Grip, LockSource
    from ._held import Held
    from ._keys import LockKey


def new_request(
    key: LockKey,
    *,
    shared: bool = False,
    acquire_timeout: float | None = None,
    is_try: bool = False,
    fenced: bool = False,
) -> LockRequest:
    """Return the request for a lock.

    Raises:
        ValueError: if a figure is out of range, or if it is to be shared and fenced.
    """
    given: Any = acquire_timeout
    if given is not None and not (isinstance(given, (int, float)) and 0 <= given < math.inf):
        raise ValueError(
            f"acquire_timeout must be None, 0 or a positive number, not {acquire_timeout!r}"
        )
    if shared and fenced:
        raise ValueError("a shared lock can't be fenced: its holders don't follow each other")
    return LockRequest(key, shared, acquire_timeout, is_try, fenced)


def open_held(
    source: LockSource,
    request: LockRequest,
    kind: Callable[..., Held],
    *,
    ttl: float | None = None,
) -> AbstractAsyncContextManager[Held | None]:
    """Return a block that takes a lock and holds it; see `pg_lock`.

    Args:
        source: Where to hold it.
        request: What is asked for.
        kind: `HeldLock`, or what extends it.
        ttl: Seconds after which it is lost, unless it is refreshed.

    Returns:
        A context manager that gives the lock; None after a refused try.

    Raises:
        ValueError: if ``ttl`` is not a positive number.
    """
    if ttl is not None:
        check_ttl(ttl)
    return Block(source, request, kind, ttl)


def never_none(
    opening: AbstractAsyncContextManager[Held | None],
) -> AbstractAsyncContextManager[Held]:
    """Return ``opening``, of a request that is no try, with the type that it then has."""
    return opening  # type: ignore[return-value] # no cast: that would be a call for every lock


@asynccontextmanager
async def open_held_many(
    source: LockSource, requests: Sequence[LockRequest], *, acquire_timeout: float | None
) -> AsyncGenerator[tuple[HeldLock, ...]]:
    """Take several locks, all or none, and hold them for the length of a block.

    Args:
        source: Where to hold them.
        requests: What is asked for, in the order in which to take them.
        acquire_timeout: Seconds for all of them together; None for as long as it takes.

    Yields:
        The locks, in the order of the requests.
    """
    began = anyio.current_time()
    body_scope = anyio.CancelScope()
    async with AsyncExitStack() as stack:
        grips: list[Grip] = []
        try:
            for request in requests:
                emit("lock.acquire_started", key=request.key, shared=request.shared)
                grips.append(await _take_next(source, request, stack, acquire_timeout, began))
        except BaseException:
            with anyio.CancelScope(shield=True):  # bounded by release_timeout, inside
                async with anyio.create_task_group() as tasks:
                    for request, grip in zip(requests, grips, strict=False):
                        tasks.start_soon(_give_back, source, request, grip)
            raise
        locks = [
            begin(
                HeldLock,
                grip,
                body_scope,
                request,
                None,
                began,
                source.release_timeout,
            )
            for request, grip in zip(requests, grips, strict=True)
        ]
        async with hold(locks, body_scope):
            yield tuple(locks)


@asynccontextmanager
async def hold(locks: Sequence[HeldLock], body_scope: anyio.CancelScope) -> AsyncGenerator[None]:
    """Run a block under locks that were granted, and release them at its end.

    What `Block` does, for several at once. Between `begin` and this nothing may be awaited.

    Args:
        locks: What `begin` has returned.
        body_scope: What it was given: the loss of any lock cancels it.

    Raises:
        LockLost: if one was lost before its release; the body's own error is the cause.

    Cancellation:
        Entering is no checkpoint. Leaving is shielded for at most ``release_timeout``. A
        cancellation from outside wins over `LockLost`.
    """
    body_error: Exception | None = None
    try:
        with body_scope:
            if body_scope.cancel_called:  # lost while others were waited for: it never begins
                await anyio.lowlevel.checkpoint_if_cancelled()
            yield
    except Exception as exc:  # noqa: BLE001 - raised below, as it is or as a cause
        body_error = exc
    finally:
        await leave(locks)  # noqa: ASYNC102 - shielded and bounded inside
    await conclude(locks, body_scope, body_error)
    if body_error is not None:
        raise body_error


async def _take_next(
    source: LockSource,
    request: LockRequest,
    stack: AsyncExitStack,
    acquire_timeout: float | None,
    began: float,
) -> Grip:
    if acquire_timeout:
        left = began + acquire_timeout - anyio.current_time()
        # Not 0: that would be one try.
        request = request._replace(acquire_timeout=max(left, 1e-6))
    try:
        grip = await stack.enter_async_context(source.take(request))
    except BaseException as exc:
        tell_end(request, began, exc)
        raise
    if grip is None:
        raise AssertionError("only a try gives None")  # pragma: no cover - for the types
    return grip


async def _give_back(source: LockSource, request: LockRequest, grip: Grip) -> None:
    _, failure = await unlock(grip, source.release_timeout)
    if failure is not None and not grip.has_ended:
        await abandon(grip, request.key, failure)
    elif failure is not None:
        grip.forget()
