"""Connections for many tasks: borrowed for a block, never lost, replaced when they die."""

from pgstructured._util import publish

from ._borrowing import Loan as Loan
from ._lending_sessions import (
    direct_conninfo as direct_conninfo,
    lend_session as lend_session,
    session_conninfo as session_conninfo,
    session_pooler as session_pooler,
    session_required as session_required,
)
from ._open import open_pool as open_pool
from ._options import ConnectionHook as ConnectionHook
from ._pool import Pool as Pool
from ._statistics import PoolStatistics as PoolStatistics

__all__ = ("ConnectionHook", "Pool", "PoolStatistics", "open_pool")

publish(__name__, globals())
