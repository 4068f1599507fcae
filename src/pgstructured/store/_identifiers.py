"""Names of tables, schemas and columns: one rule for all, and always quoted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from psycopg import sql

from pgstructured.errors import InvalidIdentifierError

if TYPE_CHECKING:
    from typing import Final

NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAX_BYTES: Final = 63  # NAMEDATALEN - 1: the server cuts a longer name off, and means another one
_SHOWN: Final = 80


def identifier(name: str, *, kind: str) -> sql.Identifier:
    """Return `name`, quoted; what is no plain name is refused.

    Plain are ASCII letters, digits and underscores, no digit first, 63 at most. It is quoted, so
    case matters and SQL's own words are names like others.

    Args:
        name: The name of one thing, without its schema.
        kind: What it names, for the error: ``"table"``, ``"column"``.

    Raises:
        InvalidIdentifierError: It is no plain name.
    """
    why = problem_of(name)
    if why is None:
        return sql.Identifier(name)
    shown = repr(name)
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    raise InvalidIdentifierError(f"{kind} name {shown} {why}")


def problem_of(name: object) -> str | None:
    """Return why `name` is no plain name, or None if it is one."""
    if not isinstance(name, str):
        return f"is a {type(name).__name__}, and names are str"
    if not name:
        return "is empty"
    if "\0" in name:
        return "has a NUL character in it"
    if NAME.fullmatch(name) is None:
        return "is not made of ASCII letters, digits and underscores, with no digit first"
    if len(name) > MAX_BYTES:
        return f"is longer than {MAX_BYTES} bytes"
    return None


def check_type(what: str, value: object, *types: type) -> None:
    """Refuse a value that is none of these types, before it is taken for something else."""
    if not isinstance(value, types):
        expected = " or ".join(kind.__name__ for kind in types)
        raise TypeError(f"{what}: expected {expected}, not {type(value).__name__}")
