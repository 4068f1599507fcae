"""Real servers, faults and virtual time: what this library, and its users, test with.

Its pytest plugin is part of every pytest run where the package is installed, so
nothing is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._assertions import assert_cancellable as assert_cancellable
    from ._binaries import (
        ServerBinaries as ServerBinaries,
        find_server_binaries as find_server_binaries,
    )
    from ._bouncer import PgBouncer as PgBouncer, find_pgbouncer as find_pgbouncer
    from ._clock import VirtualClock as VirtualClock, virtual_backend as virtual_backend
    from ._cluster import (
        Cluster as Cluster,
        ServerLock as ServerLock,
        ServerSession as ServerSession,
    )
    from ._errors import (
        PgBouncerNotFoundError as PgBouncerNotFoundError,
        ServerError as ServerError,
        ServerFailedError as ServerFailedError,
        ServerNotFoundError as ServerNotFoundError,
    )
    from ._proxy import FaultProxy as FaultProxy
    from ._sequencer import Sequencer as Sequencer

__all__ = (
    "Cluster",
    "FaultProxy",
    "PgBouncer",
    "PgBouncerNotFoundError",
    "Sequencer",
    "ServerBinaries",
    "ServerError",
    "ServerFailedError",
    "ServerLock",
    "ServerNotFoundError",
    "ServerSession",
    "VirtualClock",
    "assert_cancellable",
    "find_pgbouncer",
    "find_server_binaries",
    "virtual_backend",
)

_HOMES = {
    "Cluster": "_cluster",
    "FaultProxy": "_proxy",
    "PgBouncer": "_bouncer",
    "PgBouncerNotFoundError": "_errors",
    "Sequencer": "_sequencer",
    "ServerBinaries": "_binaries",
    "ServerError": "_errors",
    "ServerFailedError": "_errors",
    "ServerLock": "_cluster",
    "ServerNotFoundError": "_errors",
    "ServerSession": "_cluster",
    "VirtualClock": "_clock",
    "assert_cancellable": "_assertions",
    "find_pgbouncer": "_bouncer",
    "find_server_binaries": "_binaries",
    "virtual_backend": "_clock",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{home}", __name__), name)
    value.__module__ = __name__  # where tracebacks, documentation and pickle find it
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
