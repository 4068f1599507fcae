"""Opening a bus: for the length of a block, or as a task of its own."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack

import anyio

from pgstructured._util import Backoff, contained, create, open_background
from pgstructured.driver import resolve_conninfo
from pgstructured.errors import BusUnavailableError
from pgstructured.pool import Pool, session_conninfo

from ._bus import NotifyBus
from ._channels import collapse
from ._link import Link
from ._options import BusOptions, find_target

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from anyio.abc import TaskStatus

    from pgstructured.driver import Conninfo

    from ._channels import Channel
    from ._options import InitialConnect

_DEFAULT_BACKOFF: Final = Backoff(initial=0.1, maximum=30.0, factor=2.0, reset_after=10.0)


@asynccontextmanager
async def open_notify_bus(
    conninfo: Conninfo | Pool,
    *,
    channels: Iterable[str | Channel[Any]] = (),
    initial_connect: InitialConnect = "fail",
    connect_timeout: float = 10.0,
    backoff: Backoff = _DEFAULT_BACKOFF,
    max_outage: float | None = None,
    heartbeat: float | None = 10.0,
    heartbeat_timeout: float = 5.0,
    verify_delivery: bool = True,
    unlisten_linger: float = 1.0,
    name: str | None = None,
) -> AsyncGenerator[NotifyBus]:
    """Listen to a server's notifications for the length of a block.

    One server session serves any number of channels and subscribers. When it is lost the bus
    gets another, listens to everything again, and tells every subscriber so by a
    ``Gap("reconnected")`` in its stream, before anything new.

    Args:
        conninfo: Where to connect, see `Conninfo`; a callable is asked at each attempt. Of
            several hosts the primary is taken, unless ``target_session_attrs`` says otherwise.
            A `Pool` stands for its ``direct_conninfo``, or for where it connects; no connection
            of its is used.
        channels: Channels to listen to from the beginning, subscribers or not.
        initial_connect: ``fail`` makes one attempt, over all hosts, and raises its error;
            ``retry`` tries again until it is live, or ``max_outage`` is over; ``background``
            enters the block at once and does the same meanwhile.
        connect_timeout: Seconds that one attempt may take, all hosts, LISTEN and probe together.
        backoff: How long to wait between attempts.
        max_outage: Seconds without a live moment, also before the first, after which the bus
            gives up; None for never.
        heartbeat: Seconds of silence after which the server is asked for a sign of life; None
            for never, so that a silent loss of the network goes unnoticed.
        heartbeat_timeout: Seconds it has for that; then the session is lost.
        verify_delivery: Send a notification to ourselves after each connect, so that a pooler
            that swallows LISTEN is found at once.
        unlisten_linger: Seconds to go on listening to a channel after its last subscriber
            has left; a new one finds it live.
        name: Shown in ``pg_stat_activity`` as ``pgstructured/notify/<name>``, unless the
            conninfo names an application.

    Yields:
        The bus; live, except with ``background``.

    Raises:
        ValueError: if an option is out of its range.
        ConninfoError: if the connection string can't be understood.
        ChannelNameError: if a name is impossible.
        psycopg.OperationalError: if the one attempt of ``fail`` fails; `NotPrimaryError` if
            the server is a standby.
        ListenRejectedError: if on the first connect the server refuses one of ``channels``.
        DeliveryError: if on the first connect the probe does not come back.
        BusUnavailableError: if it was not live for ``max_outage`` seconds; the block is
            cancelled.

    Cancellation:
        A cancelled entry leaves no session behind. Leaving takes no round trip, also when the
        server has stopped answering.
    """
    if isinstance(conninfo, Pool):
        conninfo = session_conninfo(conninfo)
    options = BusOptions(
        conninfo=conninfo,
        channels=frozenset(collapse(channels)),
        initial_connect=initial_connect,
        connect_timeout=connect_timeout,
        backoff=backoff,
        max_outage=max_outage,
        heartbeat=heartbeat,
        heartbeat_timeout=heartbeat_timeout,
        verify_delivery=verify_delivery,
        unlisten_linger=unlisten_linger,
        name=name,
    )
    if isinstance(conninfo, str):
        find_target(await resolve_conninfo(conninfo))  # a mistake here does not heal
    link = Link(options)
    async with open_background() as tasks:
        tasks.start_soon(contained, link.run, tasks.cancel_scope)
        bus = create(NotifyBus, link)
        try:
            if initial_connect == "background":
                await anyio.lowlevel.checkpoint()
            else:
                await bus.wait_live()
            yield bus
        except BusUnavailableError as exc:
            if not link.has_raised(exc):
                raise
            # The bus's own end, met in the block as well: it comes out of `Link.run` once.
        finally:
            link.close()


class NotifyBusOptions(TypedDict, total=False):
    """The options of `open_notify_bus`, for `run_notify_bus`."""

    channels: Iterable[str | Channel[Any]]
    initial_connect: InitialConnect
    connect_timeout: float
    backoff: Backoff
    max_outage: float | None
    heartbeat: float | None
    heartbeat_timeout: float
    verify_delivery: bool
    unlisten_linger: float
    name: str | None


async def run_notify_bus(
    conninfo: Conninfo | Pool,
    *,
    task_status: TaskStatus[NotifyBus] = anyio.TASK_STATUS_IGNORED,
    **options: Unpack[NotifyBusOptions],
) -> None:
    """Serve a bus until cancelled: `open_notify_bus` as a task.

    ``bus = await tasks.start(run_notify_bus, conninfo)`` gives the bus to a task group.

    Args:
        conninfo: As `open_notify_bus` takes it.
        task_status: Given the bus as soon as `open_notify_bus` would yield it.
        options: As `open_notify_bus` takes them.

    Raises:
        Exception: as `open_notify_bus`.

    Cancellation:
        A checkpoint; cancelling it closes the bus.
    """
    async with open_notify_bus(conninfo, **options) as bus:
        task_status.started(bus)
        await anyio.sleep_forever()
