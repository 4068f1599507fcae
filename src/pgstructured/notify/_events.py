"""What a subscription yields: notifications, and gaps where some were missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar, cast, final

from pgstructured.errors import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

GapReason = Literal["subscribed", "reconnected", "lagged"]
"""Why there is a gap; see `Gap.reason`."""

RawNotification: TypeAlias = tuple[bytes, int, bytes]
"""Channel, process id and payload, as libpq gives them (psycopg's ``PGnotify``)."""


@final
class Origin(NamedTuple):  # a tuple: made for each read, and a third of what a dataclass costs
    """What the notifications of one channel in one read from the socket have in common."""

    channel: str
    decode: Callable[[str], Any] | None
    generation: int
    received_at: float


@final
class Notification(Generic[T]):
    """One notification; an immutable value, shared by all subscribers of its channel.

    Subscriptions make them. A program makes its own only to test what it does with them.

    Args:
        channel: Name of the channel.
        payload: What was sent with it.
        pid: Process id of the server session that sent it.
        generation: Generation of the bus it came through.
        received_at: Event-loop time of its arrival.
        decode: Makes ``value`` of the payload; without, the payload is the value.
    """

    # Two objects of which one is shared: a hundred bytes less to fill per notification than
    # six fields, and no decoding of what nobody looks at.
    __slots__ = ("_origin", "_raw", "_value")
    __match_args__ = ("channel", "payload", "pid", "generation", "received_at")

    _origin: Origin
    _raw: RawNotification
    _value: T

    def __init__(
        self,
        channel: str,
        payload: str = "",
        pid: int = 0,
        generation: int = 0,
        received_at: float = 0.0,
        *,
        decode: Callable[[str], T] | None = None,
    ) -> None:
        self._origin = Origin(channel, decode, generation, received_at)
        self._raw = (
            channel.encode(errors="surrogateescape"),
            pid,
            payload.encode(errors="surrogateescape"),
        )

    @property
    def channel(self) -> str:
        """Name of the channel."""
        return self._origin.channel

    @property
    def payload(self) -> str:
        """What was sent with it; empty if nothing was.

        Bytes that are no UTF-8, which only an SQL_ASCII database can send, become
        surrogates (``surrogateescape``).
        """
        try:
            return self._raw[2].decode()
        except UnicodeDecodeError:
            return self._raw[2].decode(errors="surrogateescape")

    @property
    def pid(self) -> int:
        """Process id of the server session that sent it."""
        return self._raw[1]

    @property
    def generation(self) -> int:
        """Generation of the bus through which it came."""
        return self._origin.generation

    @property
    def received_at(self) -> float:
        """Event-loop time (`anyio.current_time`) at which it was read from the socket."""
        return self._origin.received_at

    @property
    def value(self) -> T:
        """The payload as its `Channel` decodes it; decoded once, when first asked for.

        Raises:
            DecodeError: if it can't be decoded, each time.
        """
        decode = self._origin.decode
        if decode is None:
            return cast("T", self.payload)
        try:
            return self._value
        except AttributeError:  # not asked for before
            pass
        try:
            value: T = decode(self.payload)
        except Exception as exc:
            raise DecodeError(
                f"a payload on channel {self.channel!r} could not be decoded: {exc}",
                notification=self,
            ) from exc
        self._value = value
        return value

    def __repr__(self) -> str:
        return (
            f"Notification(channel={self.channel!r}, payload={self.payload!r}, pid={self.pid},"
            f" generation={self.generation}, received_at={self.received_at})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Notification):
            return NotImplemented
        return self._raw == other._raw and self._origin == other._origin

    def __hash__(self) -> int:
        return hash((self._raw, self._origin))


_new: Callable[[Any], Notification[Any]] = object.__new__


def make_run(raws: Sequence[RawNotification], origin: Origin) -> list[Notification[Any]]:
    """Return the notifications of one channel in one read.

    The hot path: filling the slots here costs half of what a call of ``__init__`` would.
    """
    run: list[Notification[Any]] = []
    append = run.append
    for raw in raws:
        notification = _new(Notification)
        notification._raw = raw  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        notification._origin = origin  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        append(notification)
    return run


@final
@dataclass(frozen=True, slots=True)
class Gap:
    """Here a subscriber may have missed notifications; what it keeps in step, it should re-read.

    Adjacent gaps merge: into the stronger reason (reconnected, subscribed, lagged), the newest
    generation, the sum of what was lost, and the sum of the outages.
    """

    reason: GapReason
    """``subscribed`` (the stream begins here), ``reconnected`` (the bus was without a server
    session), ``lagged`` (this subscriber was too slow for its buffer)."""
    generation: int
    """Generation of the bus that it belongs to: ``lagged``, that of the last notification that is
    missing here. Generations never go back in a stream."""
    lost: int | None = None
    """How many notifications were missed: exact for ``lagged``, None where nobody can know."""
    outage: float | None = None
    """For ``reconnected``: seconds from the last sign of life to live again."""
