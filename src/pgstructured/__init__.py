"""Structured concurrency for Postgres, on asyncio, uvloop and trio.

The names that most programs need. Each room has more: `pgstructured.driver`,
`pgstructured.pool`, `pgstructured.locks`, `pgstructured.notify`, `pgstructured.log`,
`pgstructured.store`, `pgstructured.supervise`, `pgstructured.observe`, `pgstructured.testing`,
`pgstructured.errors`. Publishing is `pgstructured.notify.notify`: here that name is the room's.

Rooms are entered when a name is first used, for the pytest plugin makes every pytest
run where the package is installed import this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._util import lazy_door as _lazy_door

if TYPE_CHECKING:
    from ._util import (
        Backoff as Backoff,
    )
    from .driver import (
        Connection as Connection,
        ConnectionState as ConnectionState,
        connect as connect,
        open_connection as open_connection,
    )
    from .errors import (
        BusUnavailableError as BusUnavailableError,
        ConnectionLostError as ConnectionLostError,
        ConninfoError as ConninfoError,
        CursorExpiredError as CursorExpiredError,
        LockAlreadyHeldError as LockAlreadyHeldError,
        LockLost as LockLost,
        LockNotHeldError as LockNotHeldError,
        LockTimeout as LockTimeout,
        NotPrimaryError as NotPrimaryError,
        PgStructuredError as PgStructuredError,
        PoolClosedError as PoolClosedError,
        PoolTimeoutError as PoolTimeoutError,
        SessionRequiredError as SessionRequiredError,
        UndeliveredError as UndeliveredError,
    )
    from .locks import (
        HeldLock as HeldLock,
        LockKey as LockKey,
        Locks as Locks,
        open_locks as open_locks,
        pg_lock as pg_lock,
        pg_try_lock as pg_try_lock,
    )
    from .log import (
        EventLog as EventLog,
    )
    from .notify import (
        Channel as Channel,
        Gap as Gap,
        Notification as Notification,
        NotifyBus as NotifyBus,
        Publisher as Publisher,
        Subscription as Subscription,
        open_notify_bus as open_notify_bus,
        open_publisher as open_publisher,
        run_notify_bus as run_notify_bus,
    )
    from .pool import (
        Pool as Pool,
        open_pool as open_pool,
    )
    from .store import (
        TableStore as TableStore,
    )

__all__ = (
    "Backoff",
    "BusUnavailableError",
    "Channel",
    "Connection",
    "ConnectionLostError",
    "ConnectionState",
    "ConninfoError",
    "CursorExpiredError",
    "EventLog",
    "Gap",
    "HeldLock",
    "LockAlreadyHeldError",
    "LockKey",
    "LockLost",
    "LockNotHeldError",
    "LockTimeout",
    "Locks",
    "NotPrimaryError",
    "Notification",
    "NotifyBus",
    "PgStructuredError",
    "Pool",
    "PoolClosedError",
    "PoolTimeoutError",
    "Publisher",
    "SessionRequiredError",
    "Subscription",
    "TableStore",
    "UndeliveredError",
    "connect",
    "open_connection",
    "open_locks",
    "open_notify_bus",
    "open_pool",
    "open_publisher",
    "pg_lock",
    "pg_try_lock",
    "run_notify_bus",
)

if not TYPE_CHECKING:  # to type checkers every name would be there
    __getattr__, __dir__ = _lazy_door(
        __name__,
        {
            "_util": ("Backoff",),
            "driver": (
                "Connection",
                "ConnectionState",
                "connect",
                "open_connection",
            ),
            "errors": (
                "BusUnavailableError",
                "ConnectionLostError",
                "ConninfoError",
                "CursorExpiredError",
                "LockAlreadyHeldError",
                "LockLost",
                "LockNotHeldError",
                "LockTimeout",
                "NotPrimaryError",
                "PgStructuredError",
                "PoolClosedError",
                "PoolTimeoutError",
                "SessionRequiredError",
                "UndeliveredError",
            ),
            "locks": (
                "HeldLock",
                "LockKey",
                "Locks",
                "open_locks",
                "pg_lock",
                "pg_try_lock",
            ),
            "log": ("EventLog",),
            "notify": (
                "Channel",
                "Gap",
                "Notification",
                "NotifyBus",
                "Publisher",
                "Subscription",
                "open_notify_bus",
                "open_publisher",
                "run_notify_bus",
            ),
            "pool": (
                "Pool",
                "open_pool",
            ),
            "store": ("TableStore",),
        },
    )
