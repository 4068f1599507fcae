"""Channels: their names, and how their payloads are made and read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, final

from pgstructured.errors import ChannelNameError, PayloadTooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
V = TypeVar("V")

NAME_BYTES: Final = 63
"""What an identifier may have; PostgreSQL's ``NAMEDATALEN`` less one."""
PAYLOAD_BYTES: Final = 7999
"""What a payload may have; PostgreSQL's ``NOTIFY_PAYLOAD_MAX_LENGTH`` less one."""


@final
@dataclass(frozen=True)  # without slots: with them ``Channel[Order](...)`` fails on Python 3.11
class Channel(Generic[T]):
    """A channel together with the way its payloads stand for values.

    Raises:
        ChannelNameError: if the name is empty, longer than 63 bytes, or has a NUL in it.
    """

    name: str
    """Its name on the server, exactly: nothing is folded to lower case."""
    decode: Callable[[str], T] | None = None
    """Makes a value of a payload; None where the payload is the value."""
    encode: Callable[[T], str] | None = None
    """Makes a payload of a value; None where the value is the payload."""

    def __post_init__(self) -> None:
        check_name(self.name)
        for option, function in (("decode", self.decode), ("encode", self.encode)):
            if function is not None and not callable(function):
                raise TypeError(f"{option} must be a function, not {function!r}")
        # Subscribers that decode alike share the values, so the bus looks them up by it.
        if getattr(self.decode, "__hash__", None) is None:
            raise TypeError(
                f"decode must be hashable, as functions are; {type(self.decode).__name__} is not"
            )

    @staticmethod
    def text(name: str) -> Channel[str]:
        """Return a channel whose values are its payloads."""
        return Channel(name)

    @staticmethod
    def json(name: str) -> Channel[Any]:
        """Return a channel whose values are any JSON values."""
        return Channel(name, decode=json.loads, encode=_dump_json)

    @staticmethod
    def of(
        name: str,
        kind: type[V],
        *,
        decode: Callable[[str], V] | None = None,
        encode: Callable[[V], str] | None = None,
    ) -> Channel[V]:
        """Return a channel whose values are objects of one type.

        A type that brings its own JSON is asked for it: pydantic's models
        (``model_validate_json`` and ``model_dump_json``) and msgspec's structs.

        Args:
            name: The channel's name.
            kind: The values' type.
            decode: Makes a value of a payload; needed where the type brings nothing.
            encode: Makes a payload of a value; needed for publishing there.

        Raises:
            TypeError: if ``kind`` brings no JSON of its own and ``decode`` is missing.
        """
        own_decode, own_encode = _own_json(kind)
        decode = decode or own_decode
        if decode is None:
            raise TypeError(
                f"{getattr(kind, '__name__', kind)} has no JSON of its own; pass decode=, and"
                " encode= to publish"
            )
        return Channel(name, decode=decode, encode=encode or own_encode or _refuse_to_encode)

    def payload_of(self, value: T) -> str:
        """Return the payload that stands for ``value``.

        Raises:
            TypeError: if that is no text.
        """
        payload: object = value if self.encode is None else self.encode(value)
        if not isinstance(payload, str):
            raise TypeError(
                f"a payload on channel {self.name!r} must be text, not {type(payload).__name__}"
            )
        return payload


def check_name(name: str) -> bytes:
    """Return a channel's name as the server reports it.

    Raises:
        ChannelNameError: if the server would refuse it, or cut it to another name.
    """
    given: Any = name
    if not isinstance(given, str):
        raise TypeError(f"a channel is a str or a Channel, not {type(given).__name__}")
    try:
        encoded = name.encode()
    except UnicodeEncodeError as exc:
        raise ChannelNameError(f"channel name {name!r} is no valid text") from exc
    if not encoded:
        raise ChannelNameError("a channel name must not be empty")
    if len(encoded) > NAME_BYTES:
        raise ChannelNameError(
            f"channel name {name!r} has {len(encoded)} bytes; at most {NAME_BYTES} are possible"
        )
    if b"\0" in encoded:
        raise ChannelNameError(f"channel name {name!r} must not have a NUL in it")
    return encoded


def check_payload(channel: str, payload: str) -> str:
    """Return ``payload`` if the server would take it.

    Raises:
        PayloadTooLargeError: if it is too long.
        ValueError: if it has a NUL in it, or is no valid text.
    """
    if "\0" in payload:
        raise ValueError(f"a payload on channel {channel!r} must not have a NUL in it")
    size = len(payload) if payload.isascii() else len(payload.encode())
    if size > PAYLOAD_BYTES:
        raise PayloadTooLargeError(
            f"a payload on channel {channel!r} has {size} bytes; at most {PAYLOAD_BYTES} are"
            " possible, so put the value in a table and send its key",
            size=size,
            limit=PAYLOAD_BYTES,
        )
    return payload


def quote_name(name: str) -> str:
    """Return ``name`` as an SQL identifier that is exactly this name."""
    return '"' + name.replace('"', '""') + '"'


def collapse(channels: Iterable[str | Channel[Any]]) -> dict[str, Channel[Any]]:
    """Return the channels by name, each once.

    Raises:
        ChannelNameError: if one has an impossible name.
        ValueError: if one is given twice, to be decoded differently.
    """
    collection: Any = channels
    if isinstance(collection, str) or not isinstance(collection, Iterable):
        raise TypeError(f"channels must be a collection of channels, as ({channels!r},)")
    chosen: dict[str, Channel[Any]] = {}
    for given in channels:
        channel: Channel[Any] = given if isinstance(given, Channel) else Channel(given)
        if chosen.setdefault(channel.name, channel).decode != channel.decode:
            raise ValueError(f"channel {channel.name!r} is given twice, to be decoded differently")
    return chosen


def _dump_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _own_json(
    kind: type[Any],
) -> tuple[Callable[[str], Any] | None, Callable[[Any], str] | None]:
    if hasattr(kind, "model_validate_json"):  # a pydantic model
        return kind.model_validate_json, kind.model_dump_json
    if hasattr(kind, "__struct_fields__"):  # a msgspec struct
        msgspec_json: Any = import_module("msgspec.json")  # it is in use, so it is there
        encode = msgspec_json.encode
        return msgspec_json.Decoder(kind).decode, lambda value: encode(value).decode()
    return None, None


def _refuse_to_encode(value: object) -> str:
    raise TypeError(f"this channel has no encode= for {type(value).__name__}")
