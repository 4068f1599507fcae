"""Filters that are mappings, and what may be given for a filter at all."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from types import MappingProxyType
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from pgstructured.errors import FilterError, InvalidIdentifierError
from pgstructured.store._filter import compile_where

NAIVE = dt.datetime(2026, 1, 1)  # noqa: DTZ001 - without a zone on purpose
AWARE = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


@pytest.mark.parametrize("where", [None, "", " \n\t", {}])
def test_nothing_is_every_row(where):
    compiled = compile_where(where, None)
    assert (compiled.condition, compiled.parameters, compiled.text) == (None, (), None)


@pytest.mark.parametrize(
    ("where", "text", "parameters"),
    [
        ({"a": 1}, '("a" = %s)', (1,)),
        ({"a": 1, "Not": "x"}, '("a" = %s AND "Not" = %s)', (1, "x")),
        ({"a": None, "b": False}, '("a" IS NULL AND "b" = %s)', (False,)),
        ({"a": [1, 2]}, '("a" = ANY(%s))', ([1, 2],)),
        ({"a": ("x",)}, '("a" = ANY(%s))', (["x"],)),
        ({"a": {5}}, '("a" = ANY(%s))', ([5],)),
        ({"a": dict.fromkeys([5]).keys()}, '("a" = ANY(%s))', ([5],)),
        ({"a": []}, '(("a" IS NULL AND FALSE))', ()),
        ({"a": [1, "x"]}, '("a" IN (%s, %s))', (1, "x")),
        ({"a": [1, True]}, '("a" IN (%s, %s))', (1, True)),
        ({"a": [NAIVE, NAIVE]}, '("a" = ANY(%s))', ([NAIVE, NAIVE],)),
        ({"a": [NAIVE, AWARE]}, '("a" IN (%s, %s))', (NAIVE, AWARE)),
        ({"a": [[1], [2]]}, '("a" IN (%s, %s))', (["1"], ["2"])),
        ({"a": b"x"}, '("a" = %s)', (b"x",)),
        (MappingProxyType({"a": 1}), '("a" = %s)', (1,)),
    ],
)
def test_columns_are_equal_to_values(where, text, parameters):
    compiled = compile_where(where)
    assert compiled.condition is not None
    assert compiled.condition.as_string() == compiled.text == text
    assert compiled.parameters == parameters


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a": [1, None]}, "the value of column a has None in it"),
        ({"a": "x\0"}, "the value of column a has a character in it"),
        ({"a": ["x", "\ud800"]}, "the value of column a has a character in it"),
    ],
)
def test_values_that_nothing_is_equal_to(where, message):
    with pytest.raises(FilterError, match=message) as caught:
        compile_where(where)
    assert caught.value.position is None


@pytest.mark.parametrize("name", ["", "a b", 'a" = 1 OR "b', "a.b", "é", 5, None, "x" * 64])
def test_keys_that_are_no_names(name):
    with pytest.raises(InvalidIdentifierError, match="column name"):
        compile_where({name: 1})


def test_bindings_are_for_texts():
    with pytest.raises(FilterError, match="bindings go with a filter's text"):
        compile_where({"a": 1}, {"b": 2})
    assert compile_where({"a": 1}, {}).parameters == (1,)


@pytest.mark.parametrize("where", [5, b"a = 1", ["a"], True])
def test_what_is_no_filter(where):
    with pytest.raises(TypeError, match="where: expected str or Mapping or NoneType, not"):
        compile_where(where)


@pytest.mark.parametrize("bindings", ["a", [("a", 1)], 5])
def test_what_are_no_bindings(bindings):
    with pytest.raises(TypeError, match="bindings: expected Mapping or NoneType, not"):
        compile_where("a = 1", bindings)


def test_more_values_than_a_statement_has_room_for():
    many = [1, "x"] * 30_000  # two types: not an array
    assert len(compile_where({"a": many}).parameters) == 60_000
    with pytest.raises(FilterError, match="too many values: 60000 at most"):
        compile_where({"a": [*many, 1]})


def test_what_it_shows_of_itself_has_no_values():
    assert "secret" not in repr(compile_where({"a": "secret"}))


def test_on_a_server_values_of_any_type_find_their_rows(pg_dsn):
    row = {
        "i": 5,
        "n": Decimal("123456789012345678901234567890.123"),
        "t": "'; DROP TABLE t; --",
        "u": uuid4(),
        "d": dt.date(2026, 1, 31),
        "ts": AWARE,
        "by": b"\0\xff",
        "arr": ["a", "b"],
        "nothing": None,
    }
    columns = "i int, n numeric, t text, u uuid, d date, ts timestamptz, by bytea, arr text[]"
    with psycopg.connect(pg_dsn) as conn:
        conn.execute(f"CREATE TABLE t ({columns}, nothing text)".encode())
        conn.execute("INSERT INTO t VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)", [*row.values()])

        def count(where):
            compiled = compile_where(where)
            query = sql.SQL("SELECT count(*) FROM t WHERE {}").format(compiled.condition)
            (found,) = conn.execute(query, compiled.parameters).fetchone() or ()
            return found

        for name, value in row.items():
            if name != "arr":
                assert count({name: value}) == 1, name
            if value is not None:
                # Any one of these; also in an array of arrays.
                assert count({name: [value, value]}) == 1, name
                assert count({name: []}) == 0, name
        assert count({name: value for name, value in row.items() if name != "arr"}) == 1
        assert count({"u": str(row["u"]), "d": "2026-01-31", "i": "5"}) == 1
        assert count({"nothing": "x"}) == 0
