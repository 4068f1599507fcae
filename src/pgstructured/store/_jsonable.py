"""Rows as JSON: what psycopg returns, as values that `json.dumps` takes.

Nothing is rounded. What JSON has no number for is text (``numeric``) or null (NaN, infinity).
"""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import math
from collections.abc import Mapping
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, cast, overload
from uuid import UUID

from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# More digits than Postgres has for a `numeric`, which writes all of them.
_MAX_EXPONENT: Final = 131_072


class _NoJsonError(Exception):
    """A value has no JSON; the way to it is put together on the way out."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.way: list[str | int] = []


@overload
def to_jsonable(row: Mapping[str, object]) -> dict[str, Any]: ...
@overload
def to_jsonable(row: list[Any] | tuple[Any, ...]) -> list[Any]: ...
@overload
def to_jsonable(row: object) -> Any: ...
def to_jsonable(row: object) -> Any:
    """Return a row, or any value that a column can have, as JSON has it.

    =============================  ==================================================
    Postgres                       JSON
    =============================  ==================================================
    bool, int, text and the like   as they are
    real, double precision         a number; NaN and infinity are null
    numeric                        a string with all its digits; NaN, infinity: null
    uuid, inet, cidr               a string
    timestamptz                    RFC 3339 in UTC: ``2026-01-31T12:00:00Z``
    timestamp, date, time, timetz  ISO 8601: ``2026-01-31T12:00:00``
    interval                       ISO 8601, as Postgres writes it: ``P1DT2H``
    bytea                          base64
    json, jsonb                    as they are
    enum                           its label
    array, composite               an array
    range                          ``{"lower": 1, "upper": 5, "bounds": "[)"}``
    multirange                     an array of ranges
    NULL                           null
    =============================  ==================================================

    Args:
        row: A row as a mapping or a tuple, a list of rows, or one value.

    Returns:
        Dicts, lists, strings, numbers, booleans and None; ``json.dumps(..., allow_nan=False)``
        takes it.

    Raises:
        TypeError: There is a value of another type in it; it names the column and the type.
    """
    try:
        return _converted(row)
    except _NoJsonError as error:
        raise TypeError(f"{_place(error.way)}{error.what}") from None


def _place(way: list[str | int]) -> str:
    if not way:
        return ""
    first, *inner = reversed(way)
    what = "column" if isinstance(first, str) else "item"
    return f"{what} {first}{''.join(f'[{part!r}]' for part in inner)}: "


def _converted(value: object) -> object:
    convert = _CONVERSIONS.get(type(value)) or _inherited(value)
    return convert(value)


def _inherited(value: object) -> Callable[[object], object]:
    for kind in type(value).__mro__:
        if kind in _CONVERSIONS:
            return _CONVERSIONS[kind]
    if isinstance(value, Mapping):
        return _CONVERSIONS[dict]
    kind = type(value)
    raise _NoJsonError(f"no JSON for a value of type {kind.__module__}.{kind.__qualname__}")


# ---------------------------------------------------------------- containers


def _mapping(value: Mapping[Any, object]) -> dict[str, object]:
    converted: dict[str, object] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise _NoJsonError(f"a key of type {type(key).__qualname__}, where JSON has strings")
        try:
            converted[key] = _converted(item)
        except _NoJsonError as error:
            error.way.append(key)
            raise
    return converted


def _sequence(value: Iterable[object]) -> list[object]:
    converted: list[object] = []
    for item in value:
        try:
            converted.append(_converted(item))
        except _NoJsonError as error:
            error.way.append(len(converted))
            raise
    return converted


def _range(value: Range[Any]) -> dict[str, object]:
    ends = {"lower": value.lower, "upper": value.upper}
    return {**_mapping(ends), "bounds": "empty" if value.isempty else value.bounds}


# ---------------------------------------------------------------- scalars


def _same(value: object) -> object:
    return value


def _float(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _decimal(value: Decimal) -> str | None:
    if not value.is_finite():
        return None
    # Without an exponent, as Postgres writes it; `Decimal` would make 0E-10 of ten zeros.
    return format(value, "f" if abs(value.adjusted()) <= _MAX_EXPONENT else "")


def _base64(value: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(value).decode("ascii")


def _datetime(value: dt.datetime) -> str:
    if value.utcoffset() is None:
        return value.replace(tzinfo=None).isoformat()
    try:
        value = value.astimezone(dt.UTC)
    except OverflowError:  # in another year than Python has; it is the same time where it is
        return value.isoformat()
    return f"{value.replace(tzinfo=None).isoformat()}Z"


def _date_or_time(value: dt.date | dt.time) -> str:
    return value.isoformat()


def _interval(value: dt.timedelta) -> str:
    """Write ISO 8601 with a sign for each part: Postgres reads no other way of being negative."""
    sign = "-" if value < dt.timedelta(0) else ""
    value = abs(value)
    minutes, seconds = divmod(value.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{value.microseconds:06}".rstrip("0").rstrip(".")
    days = f"{sign}{value.days}D" if value.days else ""
    time = "".join(
        f"{sign}{count}{unit}"
        for count, unit in (
            *((hours, "H"), (minutes, "M")),
            (f"{seconds}{fraction}" if seconds or fraction else 0, "S"),
        )
        if count
    )
    if not (days or time):
        return "PT0S"
    return f"P{days}{'T' if time else ''}{time}"


def _enum(value: Enum) -> str:
    return value.name


_CONVERSIONS: Final = cast(
    "dict[type, Callable[[object], object]]",
    {
        type(None): _same,
        bool: _same,
        int: int,
        str: str.__str__,
        float: _float,
        Decimal: _decimal,
        dict: _mapping,
        list: _sequence,
        tuple: _sequence,
        UUID: str,
        dt.datetime: _datetime,
        dt.date: _date_or_time,
        dt.time: _date_or_time,
        dt.timedelta: _interval,
        bytes: _base64,
        bytearray: _base64,
        memoryview: _base64,
        ipaddress.IPv4Address: str,
        ipaddress.IPv6Address: str,
        ipaddress.IPv4Network: str,
        ipaddress.IPv6Network: str,
        Range: _range,
        Multirange: _sequence,
        Enum: _enum,
    },
)
