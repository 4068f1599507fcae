"""Postgres-free, I/O-free building blocks."""

from ._backoff import Backoff as Backoff
from ._classes import (
    NoPublicConstructor as NoPublicConstructor,
    create as create,
    publish as publish,
)
from ._doors import lazy_door as lazy_door
from ._scopes import contained as contained, open_background as open_background

__all__ = (
    "Backoff",
    "NoPublicConstructor",
    "contained",
    "create",
    "lazy_door",
    "open_background",
    "publish",
)
