"""Rows as JSON, from what a real server sends."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import json
import math
import types
from decimal import Decimal

import psycopg
import pytest
from psycopg.rows import dict_row, namedtuple_row, scalar_row
from psycopg.types.enum import EnumInfo, register_enum
from psycopg.types.range import Range

from pgstructured.store._jsonable import to_jsonable

VALUES: list[tuple[str, object]] = [
    ("true", True),
    ("5::int2", 5),
    ("5", 5),
    ("9223372036854775807", 9223372036854775807),
    ("1.5::float4", 1.5),
    ("0.1::float8", 0.1),
    ("'NaN'::float8", None),
    ("'Infinity'::float8", None),
    ("'-Infinity'::float4", None),
    ("12345678901234567890.1234567890123456789", "12345678901234567890.1234567890123456789"),
    ("1.50", "1.50"),
    ("-0.0000000000", "0.0000000000"),
    ("1e20::numeric", "100000000000000000000"),
    ("'NaN'::numeric", None),
    ("'x é 東京'::text", "x é 東京"),
    ("'x'::varchar", "x"),
    ("'x'::char(3)", "x  "),
    ("'x'::name", "x"),
    ("'x'::\"char\"", "x"),
    ("''", ""),
    ("'12345678-1234-5678-1234-567812345678'::uuid", "12345678-1234-5678-1234-567812345678"),
    ("'2026-01-31'::date", "2026-01-31"),
    ("'0001-01-01'::date", "0001-01-01"),
    ("'2026-01-31 12:00'::timestamp", "2026-01-31T12:00:00"),
    ("'2026-01-31 12:00:00.5'::timestamp", "2026-01-31T12:00:00.500000"),
    ("'2026-01-31 12:00Z'::timestamptz", "2026-01-31T12:00:00Z"),
    ("'2026-01-31 12:00:00.000001+05:30'::timestamptz", "2026-01-31T06:30:00.000001Z"),
    ("'12:00'::time", "12:00:00"),
    ("'12:00:00.25'::time", "12:00:00.250000"),
    ("'12:00+02'::timetz", "12:00:00+02:00"),
    ("'1 day 02:03:04.5'::interval", "P1DT2H3M4.5S"),
    ("'0'::interval", "PT0S"),
    ("'\\x00ff'::bytea", "AP8="),
    ("''::bytea", ""),
    ('\'{"a": [1.5, null, {"b": true}]}\'::json', {"a": [1.5, None, {"b": True}]}),
    ("'[1, \"x\"]'::jsonb", [1, "x"]),
    ("'null'::jsonb", None),
    ("'1e400'::json", None),
    ("'10.0.0.1'::inet", "10.0.0.1"),
    ("'10.0.0.1/8'::inet", "10.0.0.1/8"),
    ("'10.0.0.0/8'::cidr", "10.0.0.0/8"),
    ("'::1'::inet", "::1"),
    ("'2001:db8::/32'::cidr", "2001:db8::/32"),
    ("'2001:db8::1/32'::inet", "2001:db8::1/32"),
    ("'{1,2,NULL}'::int[]", [1, 2, None]),
    ("'{{1.5,2},{NaN,4}}'::numeric[]", [["1.5", "2"], [None, "4"]]),
    ("'{}'::text[]", []),
    ("array['2026-01-31 12:00Z'::timestamptz]", ["2026-01-31T12:00:00Z"]),
    ("array['Infinity'::float8]", [None]),
    ("'[1,5)'::int4range", {"lower": 1, "upper": 5, "bounds": "[)"}),
    ("'(1.5,)'::numrange", {"lower": "1.5", "upper": None, "bounds": "()"}),
    ("'empty'::int8range", {"lower": None, "upper": None, "bounds": "empty"}),
    (
        "'[2026-01-01,2026-02-01)'::daterange",
        {"lower": "2026-01-01", "upper": "2026-02-01", "bounds": "[)"},
    ),
    (
        "'{[1,3),[5,9)}'::int4multirange",
        [{"lower": 1, "upper": 3, "bounds": "[)"}, {"lower": 5, "upper": 9, "bounds": "[)"}],
    ),
    ("'{}'::int4multirange", []),
    ("row(1, 'x')", ["1", "x"]),
    ("'(1,2)'::point", "(1,2)"),
    ("'$.a'::jsonpath", '$."a"'),
    ("b'101'", "101"),
    ("'a b'::tsvector", "'a' 'b'"),
    ("'08:00:2b:01:02:03'::macaddr", "08:00:2b:01:02:03"),
    ("5::oid", 5),
    ("'0/1'::pg_lsn", "0/1"),
    ("null", None),
    ("null::int", None),
]
# Python's JSON writes what JSON does not have, unless told not to.
STRICT = json.JSONEncoder(allow_nan=False)


@pytest.mark.parametrize("binary", [False, True])
def test_what_a_server_sends(pg_dsn, binary):
    with psycopg.connect(pg_dsn, options="-c TimeZone=America/New_York") as conn:
        for expression, expected in VALUES:
            if binary and expression.startswith("row"):
                continue  # whose fields have types in this form, and are ints
            query = f"SELECT {expression} AS c".encode()
            try:
                row = conn.cursor(row_factory=dict_row).execute(query, binary=binary).fetchone()
            except psycopg.Error as error:
                pytest.fail(f"{expression}: {error}")
            assert row is not None
            jsonable = to_jsonable(row)
            if binary and isinstance(row["c"], bytes) and not expression.endswith("bytea"):
                # psycopg has no loader for it in this form, and says so by giving bytes.
                assert isinstance(jsonable["c"], str)
                continue
            assert jsonable == {"c": expected}, expression
            assert type(jsonable["c"]) is type(expected), expression
            assert json.loads(STRICT.encode(jsonable)) == jsonable, expression


def test_rows_of_any_shape(pg_dsn):
    query = "SELECT 1 AS a, 1.50 AS b, array[1.5, null] AS c"
    with psycopg.connect(pg_dsn) as conn:
        assert to_jsonable(conn.execute(query).fetchone()) == [1, "1.50", ["1.5", None]]
        assert to_jsonable(conn.execute(query).fetchall()) == [[1, "1.50", ["1.5", None]]]
        for factory, expected in (
            (dict_row, {"a": 1, "b": "1.50", "c": ["1.5", None]}),
            (namedtuple_row, [1, "1.50", ["1.5", None]]),
            (scalar_row, 1),
        ):
            row = conn.cursor(row_factory=factory).execute(query).fetchone()
            assert to_jsonable(row) == expected


def test_enums(pg_dsn):
    with psycopg.connect(pg_dsn) as conn:
        conn.execute("CREATE TYPE mood AS ENUM ('sad', 'ok')")
        assert to_jsonable(conn.execute("SELECT 'ok'::mood").fetchone()) == ["ok"]
        info = EnumInfo.fetch(conn, "mood")
        assert info is not None
        register_enum(info, conn, Mood)
        assert to_jsonable(conn.execute("SELECT '{ok,sad}'::mood[]").fetchone()) == [["ok", "sad"]]


def test_a_time_zone_and_the_end_of_time(pg_dsn):
    with psycopg.connect(pg_dsn, options="-c TimeZone=America/New_York") as conn:
        # It is the year 10000 in UTC already, for which neither Python nor RFC 3339 has a date.
        row = conn.execute("SELECT '9999-12-31 23:00'::timestamptz").fetchone()
        assert to_jsonable(row) == ["9999-12-31T23:00:00-05:00"]
        row = conn.execute("SELECT '1850-01-01 00:00Z'::timestamptz").fetchone()
        assert to_jsonable(row) == ["1850-01-01T00:00:00Z"]


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        (dt.timedelta(days=3), "P3D"),
        (dt.timedelta(seconds=1), "PT1S"),
        (dt.timedelta(microseconds=1), "PT0.000001S"),
        (dt.timedelta(minutes=1, microseconds=500_000), "PT1M0.5S"),
        (dt.timedelta(hours=36), "P1DT12H"),
        (dt.timedelta(days=-1, hours=-2), "P-1DT-2H"),
        (dt.timedelta(microseconds=-1), "PT-0.000001S"),
        (dt.timedelta.max, "P999999999DT23H59M59.999999S"),
        (dt.timedelta.min, "P-999999999D"),
    ],
)
def test_intervals_are_what_postgres_reads(pg_dsn, delta, expected):
    assert to_jsonable(delta) == expected
    if abs(delta) < dt.timedelta(days=1000):
        with psycopg.connect(pg_dsn) as conn:
            assert conn.execute("SELECT %s::interval", [expected]).fetchone() == (delta,)


EAST = dt.timezone(dt.timedelta(hours=5))


class Mood(enum.Enum):
    sad = 1
    ok = 2


class Colour(enum.StrEnum):
    RED = "r"


class Level(enum.IntEnum):
    HIGH = 3


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Colour.RED, "r"),
        (Level.HIGH, 3),
        (Text("x"), "x"),
        (types.MappingProxyType({"a": Decimal(1)}), {"a": "1"}),
        (collections.OrderedDict(a=(1, 2)), {"a": [1, 2]}),
        (bytearray(b"\xff"), "/w=="),
        (memoryview(b"\xff"), "/w=="),
        (memoryview(b"\xff\x00")[::2], "/w=="),
        (Decimal("1E+3"), "1000"),
        (Decimal("-1E-3"), "-0.001"),
        (Decimal("1E+999999"), "1E+999999"),
        (Decimal("sNaN"), None),
        (Decimal("-Infinity"), None),
        (dt.datetime(2026, 1, 31, tzinfo=EAST), "2026-01-30T19:00:00Z"),
        (dt.datetime.min.replace(tzinfo=EAST), "0001-01-01T00:00:00+05:00"),
        (Range("a", "b", "[]"), {"lower": "a", "upper": "b", "bounds": "[]"}),
        ({}, {}),
        ((), []),
        (math.inf, None),
    ],
)
def test_what_python_has_besides(value, expected):
    jsonable = to_jsonable(value)
    assert jsonable == expected
    assert type(jsonable) is type(expected)
    assert json.loads(STRICT.encode(jsonable)) == jsonable


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1, "b": object()}, "column b: no JSON for a value of type builtins.object"),
        (
            {"a": {"x": [1, 1j]}},
            r"column a\['x'\]\[1\]: no JSON for a value of type builtins.complex",
        ),
        ([{"a": {1}}], r"item 0\['a'\]: no JSON for a value of type builtins.set"),
        ((1, 1j), "item 1: no JSON for a value of type builtins.complex"),
        (object(), "no JSON for a value of type builtins.object"),
        ({"a": {5: 1}}, "column a: a key of type int, where JSON has strings"),
        ({5: 1}, "a key of type int, where JSON has strings"),
        (
            {"r": Range(1j, None)},
            r"column r\['lower'\]: no JSON for a value of type builtins.complex",
        ),
        (Decimal, "no JSON for a value of type builtins.type"),
    ],
)
def test_an_unknown_type_is_named_and_so_is_its_column(row, message):
    with pytest.raises(TypeError, match=f"^{message}$") as caught:
        to_jsonable(row)
    assert caught.value.__suppress_context__


def test_the_row_is_left_as_it_was():
    row = {"a": [Decimal(1)], "b": {"c": b"x"}}
    to_jsonable(row)
    assert row == {"a": [Decimal(1)], "b": {"c": b"x"}}
