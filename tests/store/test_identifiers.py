"""Names: what can be one, and what an error says of what can't."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

from pgstructured.errors import InvalidIdentifierError
from pgstructured.store._filter import compile_columns
from pgstructured.store._identifiers import identifier


@pytest.mark.parametrize("name", ["a", "_", "_1", "Mixed", "select", "not", "x" * 63])
def test_a_plain_name_is_quoted(name):
    assert identifier(name, kind="column").as_string() == f'"{name}"'


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "is empty"),
        ("a\0", "NUL"),
        ("x" * 64, "longer than 63 bytes"),
        ("1a", "letters, digits and underscores"),
        ("a b", "letters, digits and underscores"),
        ("a\n", "letters, digits and underscores"),
        ('a"; DROP TABLE t; --', "letters, digits and underscores"),
        ("a.b", "letters, digits and underscores"),
        ("a%s", "letters, digits and underscores"),
        ("größe", "letters, digits and underscores"),
        ("а", "letters, digits and underscores"),  # noqa: RUF001 - Cyrillic
        ("\ud800", "letters, digits and underscores"),
        (None, "NoneType"),
        (b"a", "bytes"),
        (5, "int"),
    ],
)
def test_anything_else_is_refused_by_kind_and_name(name, why):
    with pytest.raises(InvalidIdentifierError, match=why) as caught:
        identifier(name, kind="table")
    assert str(caught.value).startswith(f"table name {name!r} ")
    assert isinstance(caught.value, ValueError)


def test_of_a_long_name_the_error_shows_the_beginning():
    with pytest.raises(InvalidIdentifierError) as caught:
        identifier("x" * 100_000, kind="column")
    assert len(str(caught.value)) < 150


def test_longest_and_reserved_names_are_the_servers_names(pg_dsn):
    with psycopg.connect(pg_dsn) as conn:
        names = ["x" * 63, "select", "Mixed", "_"]
        columns = sql.SQL(" int, ").join([identifier(name, kind="column") for name in names])
        conn.execute(sql.SQL("CREATE TABLE t ({} int)").format(columns))
        cursor = conn.execute(sql.SQL("SELECT {} FROM t").format(compile_columns(names)))
        assert [column.name for column in cursor.description or ()] == names
