"""A copy of a running primary's data, as a base backup makes it.

The files are copied between ``pg_backup_start`` and ``pg_backup_stop``: that
needs no program beside the server, and works for every version alike.
Postgres manual, 26.3.3 (making a base backup using the low-level API).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, LiteralString

from ._storage import copy_tree

if TYPE_CHECKING:
    from pathlib import Path

    from ._account import Account
    from ._cluster import Cluster

FIRST_15 = 150000
"""The first server version of Postgres 15, as libpq counts."""

# Folders whose contents a backup leaves out, as pg_basebackup does. The log of changes comes from
# the primary, which keeps enough of it (wal_keep_size).
_EMPTY = (
    "pg_wal",
    "pg_replslot",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
)
_FILES = ("postmaster.pid", "postmaster.opts", "postgresql.auto.conf.tmp", "backup_label.old")
_CALLS: dict[bool, tuple[LiteralString, LiteralString]] = {
    True: (
        "select pg_backup_start('pgstructured', true)",
        "select labelfile from pg_backup_stop(false)",
    ),
    False: (  # before Postgres 15
        "select pg_start_backup('pgstructured', true, false)",
        "select labelfile from pg_stop_backup(false, false)",
    ),
}


def copy_primary(primary: Cluster, data: Path, account: Account) -> None:
    """Copy a running server's data so that a standby can start on it."""
    with primary.connect() as connection:
        start, stop = _CALLS[connection.info.server_version >= FIRST_15]
        connection.execute(start)
        copy_tree(primary.data_directory, data, account, leave_out=_is_left_out)
        row = connection.execute(stop).fetchone()
    assert row is not None
    for name, text in (("backup_label", str(row[0])), ("standby.signal", "")):
        (data / name).write_text(text, encoding="utf-8")
        account.own(data / name)
    (data / "pg_wal" / "archive_status").mkdir(mode=0o700)
    account.own(data / "pg_wal" / "archive_status")


def _is_left_out(path: str) -> bool:
    folder, _, rest = path.partition("/")
    is_temporary = "pgsql_tmp" in path or path.endswith("pg_internal.init")
    return path in _FILES or is_temporary or bool(rest and folder in _EMPTY)
