"""Delivering what is in line: batch by batch, in order, at least once.

A batch stays in flight until the server has confirmed it. Where that does not happen
(the session is lost, or the server says that it can't now) it is sent again, before
anything else; then some of it may arrive twice. What the server will never take is found
by halving the batch, told, and left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import anyio
import psycopg

from pgstructured._util import Backoff
from pgstructured.observe import emit
from pgstructured.supervise import Supervision, supervise

if TYPE_CHECKING:
    from ._publisher_carriers import Carrier, Send
    from ._publisher_queue import PublisherQueue

_BACKOFF: Final = Backoff(initial=0.1, maximum=5.0, reset_after=10.0)
_DATA: Final = "22"


@final
class Delivery:
    """See the module's text."""

    def __init__(self, carrier: Carrier, queue: PublisherQueue) -> None:
        self._carrier = carrier
        self._queue = queue
        self._supervision = Supervision()
        self._is_sending = False
        # Its owner may be cancelled, and then still wants to flush.
        self._scope = anyio.CancelScope(shield=True)
        self.batches: int = 0
        """How many were confirmed."""
        self.retries: int = 0
        """How often one was not, and had to be sent again."""
        self.trouble: BaseException | None = None
        """What has gone wrong since a batch was confirmed."""

    @property
    def last_error(self) -> BaseException | None:
        """What has gone wrong last, if anything has."""
        return self._supervision.last_error

    async def run(self) -> None:
        """Deliver until `stop`.

        Raises:
            Exception: what another attempt would not heal, while the queue is open.

        Cancellation:
            Shielded until `stop`.
        """
        with self._scope:
            try:
                await supervise(
                    self._serve,
                    what="publisher",
                    backoff=_BACKOFF,
                    is_transient=self._carrier.heals,
                    supervision=self._supervision,
                )
            except Exception as exc:
                # Whoever flushes or leaves is told by the queue; nobody else is there by then.
                self._queue.fail(exc)
                if not self._queue.is_closed:
                    raise

    def stop(self) -> None:
        """End it, whatever it is at."""
        self._scope.cancel()

    async def _serve(self, supervision: Supervision) -> None:
        self._is_sending = False
        try:
            await self._carrier.carry(self._deliver, supervision.declare_live)
        except Exception as exc:
            self.trouble = exc
            if self._is_sending and self._carrier.heals(exc):
                self.retries += 1
                emit("publisher.retried", count=len(self._queue.in_flight), error=exc)
            raise

    async def _deliver(self, send: Send) -> None:
        queue = self._queue
        size = 0
        while True:
            await queue.fill()
            size = size or len(queue.in_flight)
            batch = queue.in_flight.head(size)
            began = anyio.current_time()
            self._is_sending = True
            try:
                await send(batch)
            except psycopg.Error as exc:
                if not (exc.sqlstate or "").startswith(_DATA):
                    raise
                if size > 1:
                    size //= 2
                    continue
                emit("publisher.refused", channel=batch.names[0], error=exc)
                queue.refuse(exc)
            else:
                self.batches += 1
                self.trouble = None
                self._supervision.failures = 0  # whatever goes wrong next is something new
                emit("publisher.sent", count=size, took=anyio.current_time() - began)
                queue.confirm(size)
            self._is_sending = False
            size = 0
