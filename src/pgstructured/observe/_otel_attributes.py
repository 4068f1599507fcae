"""Facts of events, as attributes of OpenTelemetry.

A fact is ``pgstructured.<room>.<fact>``, unless the semantic conventions have a name for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from opentelemetry.util.types import AttributeValue

    from ._events import Event

Facts: TypeAlias = "Mapping[str, Any]"

ERROR: Final = "error.type"
SYSTEM: Final[Mapping[str, AttributeValue]] = {"db.system.name": "postgresql"}

_CONVENTIONAL: Final = {
    "pool": "db.client.connection.pool.name",
    "sqlstate": "db.response.status_code",
    "table": "db.collection.name",
    "log": "db.collection.name",
    "error": ERROR,
    "publisher.count": "messaging.batch.message_count",
}

_OUTCOMES: Final = {
    "lock.acquired": "acquired",
    "lock.acquire_refused": "refused",
    "lock.acquire_timed_out": "timed_out",
    "lock.acquire_failed": "failed",
    "lock.released": "released",
    "lock.lost": "lost",
}


def facts_of(event: Event) -> Facts:
    """Return the facts of an event; where it is one end of several, ``outcome`` tells which."""
    outcome = _OUTCOMES.get(event.name)
    if outcome is None:
        return event.facts
    if outcome == "failed" and event.facts["error"] is None:
        outcome = "cancelled"
    return {**event.facts, "outcome": outcome}


def names_of(event_name: str, facts: Iterable[str]) -> dict[str, str]:
    """Return what facts of an event are called as attributes, by fact."""
    room = event_name.partition(".")[0]
    names: dict[str, str] = {}
    for fact in facts:
        own = f"{room}.{fact}"
        names[fact] = _CONVENTIONAL.get(own) or _CONVENTIONAL.get(fact) or f"pgstructured.{own}"
    return names


def attributes_of(
    facts: Facts, names: Mapping[str, str], constants: Mapping[str, AttributeValue]
) -> dict[str, AttributeValue]:
    """Return those facts that are known, under their names, and constants beside them."""
    attributes = dict(constants)
    for fact, name in names.items():
        value = facts.get(fact)
        if value is not None:
            attributes[name] = _attribute(value)
    return attributes


def type_of(error: BaseException) -> str:
    """Return what the conventions want in ``error.type``: the SQLSTATE, else the class."""
    sqlstate: str | None = getattr(error, "sqlstate", None)
    if sqlstate:
        return sqlstate
    kind = type(error)
    is_builtin = kind.__module__ == "builtins"
    return kind.__qualname__ if is_builtin else f"{kind.__module__}.{kind.__qualname__}"


def _attribute(value: object) -> AttributeValue:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, BaseException):
        return type_of(value)
    if isinstance(value, list | tuple):
        return [str(item) for item in cast("Iterable[object]", value)]
    return str(getattr(value, "name", None) or value)  # the key of a lock
