"""The block of one lock: taken on entering, let go on leaving; the same for every source.

A class and no generator, for it is the whole cost of a lock beside its two round trips:
a generator's frames are slower and larger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, final

import anyio

from pgstructured.observe import emit

from ._held import Held
from ._life import begin, conclude, leave, leave_well
from ._telling import tell_end

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from ._grip import Grip, LockRequest, LockSource


@final
class Block(Generic[Held]):
    """Takes a lock, and holds it until it is left.

    Args:
        source: Where to hold it.
        request: What is asked for.
        kind: `HeldLock`, or what extends it.
        ttl: Seconds after which it is lost, unless it is refreshed.
    """

    __slots__ = (
        "_held",
        "_is_entered",
        "_kind",
        "_request",
        "_scope",
        "_source",
        "_taking",
        "_ttl",
    )

    def __init__(
        self,
        source: LockSource,
        request: LockRequest,
        kind: Callable[..., Held],
        ttl: float | None,
    ) -> None:
        self._source = source
        self._request = request
        self._kind = kind
        self._ttl = ttl
        self._taking: AbstractAsyncContextManager[Grip | None] | None = None
        self._is_entered = False

    async def __aenter__(self) -> Held | None:
        """Take the lock; None after a refused try."""
        if self._is_entered:
            raise RuntimeError("a lock's block can be entered only once; make another")
        source, request = self._source, self._request
        self._is_entered = True
        began = source.now()
        ask = source.ask
        is_scoped = ask is None
        entering: Awaitable[Grip | None]
        if ask is None:
            self._taking = taking = source.take(request)
            entering = taking.__aenter__()
        else:
            entering = ask(request)  # which may be under way now
        emit("lock.acquire_started", key=request.key, shared=request.shared)
        self._scope = scope = source.create_scope()
        if not is_scoped:
            scope.__enter__()  # while the answer is on its way
        try:
            grip = await entering
        except BaseException as exc:
            if not is_scoped:
                scope.__exit__(type(exc), exc, exc.__traceback__)
            tell_end(request, began, exc)
            raise
        if grip is None:
            if not is_scoped:
                scope.__exit__(None, None, None)
            self._held = None
            tell_end(request, began)
            return None
        self._held = held = begin(
            self._kind, grip, scope, request, self._ttl, began, source.release_timeout
        )
        if is_scoped:
            scope.__enter__()
        # Lost already: the body never begins. Cheaper than to ask the scope if it is cancelled.
        if held._loss is not None:  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - as in `_life`
            try:
                await anyio.lowlevel.checkpoint_if_cancelled()
            except BaseException as exc:
                await self.__aexit__(type(exc), exc, exc.__traceback__)  # noqa: ASYNC102 - as below
                raise
        return held

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """Let it go, and raise what is to be raised.

        Every await is shielded and bounded inside, but for what a source's own block awaits.
        What is caught is raised again at the end, but for what the scope has caught.
        """
        held, error, is_over = self._held, exc, False
        if held is not None:
            if error is None:
                try:
                    is_over = await leave_well(held, self._scope)  # noqa: ASYNC102 - see above
                except BaseException as caught:  # noqa: BLE001, ASYNC103 - see above
                    error = caught
            if is_over:
                self._scope.__exit__(None, None, None)
            else:
                error = await self._end(held, error)  # noqa: ASYNC102 - see above
        is_settled = error is None
        if self._taking is not None:
            is_settled |= bool(await _leave_source(self._taking, error))  # noqa: ASYNC102 - see above
        if error is not None and error is not exc and not is_settled:
            raise error
        return is_settled

    async def _end(self, held: Held, error: BaseException | None) -> BaseException | None:
        """Leave the scope of the body, and let the lock go; return what the block ends with."""
        scope = self._scope
        try:
            if error is None:
                scope.__exit__(None, None, None)
            elif scope.__exit__(type(error), error, error.__traceback__):
                error = None
        except BaseException as exc:  # noqa: BLE001, ASYNC103 - returned, and raised in the end
            error = exc
        try:
            await leave((held,))
            if error is None or isinstance(error, Exception):
                await conclude((held,), scope, error)
        except BaseException as exc:  # noqa: BLE001, ASYNC103 - ditto
            error = exc
        return error


async def _leave_source(
    taking: AbstractAsyncContextManager[Grip | None], error: BaseException | None
) -> bool | None:
    """Leave the block of the source, whose end of the lock that is."""
    if error is None:
        return await taking.__aexit__(None, None, None)
    return await taking.__aexit__(type(error), error, error.__traceback__)
