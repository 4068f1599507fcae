"""The names of a log: its tables', and its channel's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from psycopg import sql

if TYPE_CHECKING:
    from typing import LiteralString

_IDENTIFIER_BYTES: Final = 63
"""What an identifier may have; PostgreSQL's ``NAMEDATALEN`` less one."""
_LONGEST_SUFFIX: Final = "_trimmed"
_CHANNEL_PREFIX: Final = "pgstructured_log:"


@final
@dataclass(frozen=True, slots=True)
class Names:
    """What a log's things are called.

    Raises:
        ValueError: if the server would refuse a name, or cut it to another one.
    """

    table: str
    schema: str | None

    def __post_init__(self) -> None:
        _check("table", self.table, _IDENTIFIER_BYTES - len(_LONGEST_SUFFIX))
        if "." in self.table:
            raise ValueError(f"table {self.table!r} has a dot in it; the schema goes in schema=")
        if self.schema is not None:
            _check("schema", self.schema, _IDENTIFIER_BYTES)

    @property
    def channel(self) -> str:
        """The channel on which followers are woken; at most 63 bytes."""
        name = _CHANNEL_PREFIX + str(self)
        if len(name.encode()) <= _IDENTIFIER_BYTES:
            return name
        return _CHANNEL_PREFIX + hashlib.blake2b(str(self).encode(), digest_size=20).hexdigest()

    def __str__(self) -> str:
        return self.table if self.schema is None else f"{self.schema}.{self.table}"

    def qualified(self, suffix: str = "") -> str:
        """Return one of its tables as SQL writes it."""
        return self._identifier(self.table + suffix, self.schema).as_string()

    def fill(self, statement: LiteralString) -> LiteralString:
        """Return a statement, to be run with parameters, with its tables filled in."""
        # The text is looked through for places of parameters, names as well.
        table = self.table.replace("%", "%%")
        schema = None if self.schema is None else self.schema.replace("%", "%%")
        tables: dict[str, sql.Composable] = {
            "index": sql.Identifier(table + "_xid"),
            "events": self._identifier(table, schema),
            "state": self._identifier(table + "_state", schema),
            "trimmed": self._identifier(table + "_trimmed", schema),
            "cursors": self._identifier(table + "_cursor", schema),
            "named": sql.Literal(self._identifier(table, schema).as_string()),
        }
        # It is one: names are quoted, and nothing else is put in.
        return sql.SQL(statement).format(**tables).as_string()  # pyright: ignore[reportReturnType]

    @staticmethod
    def _identifier(table: str, schema: str | None) -> sql.Identifier:
        return sql.Identifier(table) if schema is None else sql.Identifier(schema, table)


def _check(what: str, name: str, limit: int) -> None:
    given: Any = name
    if not isinstance(given, str):
        raise TypeError(f"{what} must be a str, not {type(given).__name__}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} {name!r} is no valid text") from None
    if not 0 < size <= limit or "\0" in name:
        raise ValueError(f"{what} must have 1 to {limit} bytes and no NUL, not {name!r}")
