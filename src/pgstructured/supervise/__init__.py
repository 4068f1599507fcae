"""Keeping something connected: attempts, backoff, generations, outages."""

from pgstructured._util import publish

from ._supervise import (
    GaveUp as GaveUp,
    Supervision as Supervision,
    heals as heals,
    supervise as supervise,
)

__all__ = ("GaveUp", "Supervision", "heals", "supervise")

publish(__name__, globals())
