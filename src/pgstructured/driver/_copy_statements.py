"""What a COPY statement says, as far as it has to be known before it is sent.

Whoever asks for a COPY in gets a COPY in or an error, and nothing has been run then. So
the statement is looked at here first: one statement, a COPY, in the right direction, and
with the client, not with a file of the server's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import psycopg
from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.abc import QueryNoTemplate

Direction = Literal["FROM", "TO"]

# As Postgres' scan.l has it: everything beyond ASCII is a letter.
_TOKEN: Final = re.compile(
    r"""
    (?P<space> [ \t\n\r\f\v]+ | --[^\n\r]* )
    | (?P<comment> /\* )
    | (?: [eE]'(?:[^'\\]|\\.)*' | (?:[uU]&|[bBxXnN])?'[^']*' | (?:[uU]&)?"[^"]*"
        | \$(?P<tag>(?:[A-Za-z_\x80-\U0010ffff][0-9A-Za-z_\x80-\U0010ffff]*)?)\$.*?\$(?P=tag)\$ )
    | [A-Za-z_\x80-\U0010ffff][0-9A-Za-z_\x80-\U0010ffff$]*
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT: Final = re.compile(r"/\*|\*/")

_SPECIAL: Final = frozenset(
    {"CSV", "DELIMITER", "DELIMITERS", "NULL", "HEADER", "ENCODING", "QUOTE", "ESCAPE", "DEFAULT"}
)
"""Options that make a COPY something else than Postgres' own text or binary format."""


class CopyStatement(NamedTuple):
    """A COPY between the server and us."""

    text: str
    """The statement."""
    is_plain: bool
    """Whether its data are in Postgres' own text or binary format, so that it can be said
    what a row is."""


def read_copy(
    statement: QueryNoTemplate, conn: psycopg.AsyncConnection[Any], direction: Direction
) -> CopyStatement:
    """Look at a COPY statement.

    Raises:
        psycopg.ProgrammingError: if it is none, not only one, one in the other direction, or
            one with a file or program of the server's.
    """
    text = _text(statement, conn)
    words = _read_words(text)
    end = "STDIN" if direction == "FROM" else "STDOUT"
    if words[:1] != ["COPY"]:
        raise psycopg.ProgrammingError(
            f"not a COPY statement: COPY ... {direction} {end} is needed"
        )
    at = next((i for i, word in enumerate(words) if word in {"FROM", "TO"}), len(words))
    # Postgres takes either word in either direction.
    if words[at : at + 1] != [direction] or words[at + 1 : at + 2] not in (["STDIN"], ["STDOUT"]):
        raise psycopg.ProgrammingError(f"another kind of COPY: {direction} {end} is needed")
    options = words[at + 2 :]
    if ";" in options:
        raise psycopg.ProgrammingError("several statements: COPY has to be the only one")
    if "WHERE" in options:
        options = options[: options.index("WHERE")]
    # FORMAT 'csv' is as good as FORMAT csv.
    is_plain = _SPECIAL.isdisjoint(option.strip("'") for option in options)
    return CopyStatement(text, is_plain)


def _text(statement: QueryNoTemplate, conn: psycopg.AsyncConnection[Any]) -> str:
    if isinstance(statement, sql.Composable):
        return statement.as_string(conn)
    if isinstance(statement, bytes):
        return statement.decode(conn.info.encoding)
    return statement


def _read_words(text: str) -> list[str]:
    """Return the tokens outside of parentheses up to the direction, and all that come after it.

    In capitals, and in quotes if they are quoted. The last is a ``;`` if something follows it.
    """
    words: list[str] = []
    depth = 0
    is_behind = is_over = False
    for part in _read_tokens(text):
        if is_over:
            return [*words, ";"]
        if part == "(":
            depth += 1
        elif part == ")":
            depth -= 1
        elif part == ";":
            is_over = True
        elif is_behind or depth == 0:
            words.append(part.upper())
            is_behind = is_behind or words[-1] in {"FROM", "TO"}
    return words


def _read_tokens(text: str) -> Iterator[str]:
    at = 0
    while (match := _TOKEN.match(text, at)) is not None:
        at = match.end()
        if match["comment"]:
            at = _skip_comment(text, at)
        elif not match["space"]:
            yield match[0]


def _skip_comment(text: str, at: int) -> int:
    depth = 1
    while depth and (match := _COMMENT.search(text, at)) is not None:
        depth += 1 if match[0] == "/*" else -1
        at = match.end()
    return at if depth == 0 else len(text)
