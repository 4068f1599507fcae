"""Table stores: rows of one table, by filters that can carry nothing but values."""

from pgstructured._util import publish
from pgstructured.driver import (
    mask_conninfo as mask_conninfo,
    resolve_conninfo as resolve_conninfo,
)

from ._jsonable import to_jsonable as to_jsonable
from ._table import TableStore as TableStore

__all__ = ("TableStore", "mask_conninfo", "resolve_conninfo", "to_jsonable")

publish(__name__, {"TableStore": TableStore, "to_jsonable": to_jsonable})
