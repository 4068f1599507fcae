"""Real servers, faults and virtual time: what this library, and its users, test with.

Its pytest plugin is part of every pytest run where the package is installed, so
nothing is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgstructured._util import lazy_door as _lazy_door

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

if not TYPE_CHECKING:  # to type checkers every name would be there
    __getattr__, __dir__ = _lazy_door(
        __name__,
        {
            "_assertions": ("assert_cancellable",),
            "_binaries": (
                "ServerBinaries",
                "find_server_binaries",
            ),
            "_bouncer": (
                "PgBouncer",
                "find_pgbouncer",
            ),
            "_clock": (
                "VirtualClock",
                "virtual_backend",
            ),
            "_cluster": (
                "Cluster",
                "ServerLock",
                "ServerSession",
            ),
            "_errors": (
                "PgBouncerNotFoundError",
                "ServerError",
                "ServerFailedError",
                "ServerNotFoundError",
            ),
            "_proxy": ("FaultProxy",),
            "_sequencer": ("Sequencer",),
        },
    )
