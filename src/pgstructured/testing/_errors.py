"""What this room raises."""

from __future__ import annotations

from pgstructured.errors import PgStructuredError


class ServerError(PgStructuredError):
    """Base class of what a test server raises; the message ends with its log, if it has one."""


class ServerNotFoundError(ServerError):
    """No usable Postgres binaries on this machine; the message says what to install."""


class ServerFailedError(ServerError):
    """A server process ended, or did not do what it was asked within its deadline."""


class PgBouncerNotFoundError(ServerError):
    """No PgBouncer binary on this machine; the message says what to install."""
