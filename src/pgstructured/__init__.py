"""Structured concurrency for Postgres, on asyncio, uvloop and trio."""
