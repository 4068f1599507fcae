"""Scopes that own background tasks."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVarTuple, Unpack

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

Args = TypeVarTuple("Args")


@asynccontextmanager
async def open_background() -> AsyncGenerator[anyio.abc.TaskGroup]:
    """Own background tasks for the length of a block.

    Differs from a bare task group in two ways: leaving the block cancels what
    still runs in it, and a single cause comes out as itself, not in a group of
    one: the body's own error, or the one error of a background task (which
    cancels the body). Two independent causes stay a group.

    Yields:
        The task group to start background tasks in.

    Raises:
        RuntimeError: if asyncio's own cancellation of a background task has cut the body short,
            which would else end in silence.

    Cancellation:
        Entering is not a checkpoint. Leaving waits until every background task has ended.
    """
    body_error: Exception | None = None
    has_ended = False
    try:
        async with anyio.create_task_group() as tasks:
            try:
                yield tasks
            except Exception as exc:  # noqa: BLE001 - raised again below, outside the group
                body_error = exc
            has_ended = True
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        causes = group.exceptions if body_error is None else (body_error, *group.exceptions)
        if len(causes) == 1:
            raise causes[0] from causes[0].__cause__
        raise BaseExceptionGroup("several errors in one scope", causes) from None
    if body_error is not None:
        raise body_error
    if not has_ended:
        raise RuntimeError(
            "this block was cut short: somebody has cancelled a task that serves it (Task.cancel)"
        )


async def contained(run: Callable[[Unpack[Args]], Awaitable[object]], *args: *Args) -> None:
    """Run a background task that has task groups of its own.

    When such a task is cancelled AnyIO 4.16 takes what these have cancelled in it for
    cancellations of the task that owns the group around it. That one then forgets as many of
    asyncio's own: a `Task.cancel` or `asyncio.timeout` that comes while the block is left.

    Cancellation:
        As ``run``.
    """
    with anyio.CancelScope() as scope:
        try:
            await run(*args)
        finally:
            scope.shield = True  # a scope that is cancelled behind a shield keeps its count
            scope.cancel()
