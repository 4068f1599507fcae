"""Structured concurrency for Postgres, on asyncio, uvloop and trio."""

from ._util import Backoff as Backoff

__all__ = ("Backoff",)
