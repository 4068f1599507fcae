"""Filters on a real server: types, three-valued logic, patterns, and values that mean harm."""

from __future__ import annotations

import datetime as dt
import enum
from decimal import Decimal
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from pgstructured.store._filter import compile_where

SOME_UUID = UUID("12345678-1234-5678-1234-567812345678")
MALICE = [
    "'; DROP TABLE t; --",
    '"; DROP TABLE t; --',
    "x' OR '1'='1",
    "\\'; DROP TABLE t; --",
    "$$; DROP TABLE t; $$",
    "%s %(x)s %% %",
    "${text} $text",
    "/* */ -- ;",
    ") OR (1=1",
    "\u2019; DROP TABLE t; --",
    "a\nb\tc",
    "NULL",
    "now()",
]


class Mood(enum.Enum):
    sad = 1
    ok = 2


class Found:
    """Which rows a filter finds, by their ids."""

    def __init__(self, conn):
        self.conn = conn

    def __call__(self, where, **bindings):
        compiled = compile_where(where, bindings)
        query = sql.SQL("SELECT id FROM t WHERE {} ORDER BY id").format(compiled.condition)
        return [number for (number,) in self.conn.execute(query, compiled.parameters)]


@pytest.fixture
def found(pg_dsn):
    with psycopg.connect(pg_dsn, autocommit=True) as conn:
        yield Found(conn)


TYPES = """
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE TABLE t (
    id int, i2 int2, i4 int4, i8 int8, n numeric, f4 float4, f8 float8, t text, v varchar(9),
    b bool, u uuid, d date, ts timestamp, tz timestamptz, ti time, iv interval, j jsonb, m mood,
    ip inet, by bytea, ta text[]
);
INSERT INTO t VALUES (
    1, 5, 5, 5, 5, 5, 5, '5', '5', true, '12345678-1234-5678-1234-567812345678', '2026-01-31',
    '2026-01-31 12:00', '2026-01-31 12:00Z', '12:00', '5 days', '5', 'ok', '10.0.0.1', '5',
    '{a,b}'
);
INSERT INTO t (id) VALUES (2)
"""
LITERALS = {
    "5": "i2 i4 i8 n f4 f8 t v j",
    "'5'": "i2 i4 i8 n f4 f8 t v j by",
    "5.0": "i2 i4 i8 n f4 f8",
    "0.5e1": "i2 i4 i8 n f4 f8",
    "true": "b",
    "'yes'": "b",
    f"'{SOME_UUID}'": "u",
    f"'{str(SOME_UUID).upper()}'": "u",
    "'2026-01-31'": "d",
    "'2026-01-31 12:00'": "ts",
    "'2026-01-31T14:00:00+02:00'": "tz",
    "'12:00'": "ti",
    "'5 days'": "iv",
    "'ok'": "m",
    "'10.0.0.1'": "ip",
    "'{a,b}'": "ta",
}
BOUND: list[tuple[object, str]] = [
    (5, "i2 i4 i8 n f4 f8"),
    (5.0, "i2 i4 i8 n f4 f8"),
    (Decimal(5), "i2 i4 i8 n f4 f8"),
    ("5", "i2 i4 i8 n f4 f8 t v j by"),
    (True, "b"),
    (SOME_UUID, "u"),
    (str(SOME_UUID), "u"),
    (dt.date(2026, 1, 31), "d"),
    (dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC), "tz"),
    (dt.datetime(2026, 1, 31, 12), "ts"),  # noqa: DTZ001 - without a zone on purpose
    (dt.time(12), "ti"),
    (dt.timedelta(days=5), "iv"),
    (Jsonb(5), "j"),
    (Mood.ok, "m"),
    ("ok", "m"),
    (b"5", "by"),
    (["a", "b"], "ta"),
]


def test_literals_and_bindings_are_equal_to_columns_of_many_types(found):
    found.conn.execute(TYPES)
    for literal, columns in LITERALS.items():
        for column in columns.split():
            assert found(f"{column} = {literal}") == [1], (column, literal)
            assert found(f"{column} != {literal}") == [], (column, literal)
            assert found(f"not {column} = {literal}") == [], (column, literal)
            assert found(f"{column} in ({literal}, {literal})") == [1], (column, literal)
            assert found(f"{column} not in ({literal})") == [], (column, literal)
    for value, columns in BOUND:
        for column in columns.split():
            assert found(f"{column} = ${{x}}", x=value) == [1], (column, value)
            assert found(f"{column} between ${{x}} and $x", x=value) == [1], (column, value)
            assert found(f"{column} in ${{x}}", x=[value]) == [1], (column, value)
            assert found(f"{column} not in ${{x}}", x=(value, value)) == [], (column, value)
            if not isinstance(value, list):  # which stands for its items
                assert found(f"{column} in (${{x}}, ${{x}})", x=value) == [1], (column, value)
            assert found(f"{column} in ${{x}}", x=[]) == []
            assert found(f"{column} not in ${{x}}", x=[]) == [1, 2]
    assert found("ta = ${x}", x=["a", "b"]) == [1]
    assert found("u = '${x}' and i8 = '${y}' and b = '$z'", x=SOME_UUID, y=5, z=True) == [1]


def test_numbers_are_compared_by_value_whatever_the_column(found):
    found.conn.execute(TYPES)
    for column in ("i2", "i4", "i8", "n", "f4", "f8"):
        assert found(f"{column} > 4.9 and {column} < 5.1 and {column} >= 5") == [1]
        assert found(f"{column} < 99999999999999999999999999999.5") == [1]
        assert found(f"{column} = 99999999999") == []
        assert found(f"{column} = 5.5 or {column} = 1e30") == []
        assert found(f"{column} between -99999999999 and 5.0") == [1]
        assert found(f"{column} in (5, 5.5, 99999999999, ${{x}})", x=5.25) == [1]
    assert found("i2 < 40000 and i4 < 3000000000") == [1]


def test_an_array_of_integers_is_of_the_columns_type(found):
    """psycopg makes a ``smallint[]`` of small ones, to which no other array is equal."""
    found.conn.execute("CREATE TABLE t (id int, a2 int2[], a4 int[], a8 int8[], an numeric[])")
    for number, text in enumerate(("{1,2}", "{}", "{{1,NULL},{3,4}}", None)):
        found.conn.execute("INSERT INTO t VALUES (%s, %s, %s, %s, %s)", [number, *[text] * 4])
    for column in ("a2", "a4", "a8", "an"):
        assert found(f"{column} = ${{x}}", x=[1, 2]) == [0]
        assert found(f"{column} != ${{x}}", x=[1, 2]) == [1, 2]
        assert found(f"{column} > ${{x}} and {column} <= ${{y}}", x=[], y=[1, 2]) == [0]
        assert found(f"{column} in ${{x}}", x=[[1, 2], []]) == [0, 1]
        assert found(f"{column} = ${{x}}", x=[[1, None], [3, 4]]) == [2]
    assert found("an = ${x}", x=[10**5000]) == []
    endless: list[object] = [1]
    endless.append(endless)
    with pytest.raises(psycopg.DataError):
        found("a4 = ${x}", x=endless)


def test_digits_are_not_lost(found):
    found.conn.execute("CREATE TABLE t (id int, n numeric, i int8)")
    exact = "12345678901234567890.1234567890123456789"
    found.conn.execute(f"INSERT INTO t VALUES (1, {exact}, 9007199254740993)".encode())
    assert found(f"n = {exact} and i = 9007199254740993") == [1]
    assert found(f"n > {exact[:-1]}8 and n < {exact}1") == [1]
    assert found("i = 9007199254740992 or i < 9007199254740993") == []
    assert found("n = ${x}", x=Decimal(exact)) == [1]


def test_an_integer_is_not_ordered_as_text(found):
    # '10' comes before '5', so what would be found is not what is meant; better to say so.
    found.conn.execute("CREATE TABLE t (id int, t text)")
    assert found("t = 5 or t in (5, 6) or t != 7") == []
    with pytest.raises(psycopg.errors.UndefinedFunction):
        found("t > 5")
    assert found("t > '5'") == []


def test_leading_zeros_are_of_a_text(found):
    found.conn.execute("CREATE TABLE t (id int, zip text, i int)")
    found.conn.execute("INSERT INTO t VALUES (1, '02134', 2134)")
    assert found("zip = 02134 and i = 02134") == [1]
    assert found("zip = 2134") == []


def test_three_valued_logic(found):
    found.conn.execute("CREATE TABLE t (id int, a int, b int)")
    found.conn.execute("INSERT INTO t VALUES (1, 1, 1), (2, 1, NULL), (3, NULL, 2), (4, 2, 2)")
    assert found("a = 1") == [1, 2]
    assert found("not a = 1") == found("a != 1") == [4]
    assert found("a = 1 or b = 2") == [1, 2, 3, 4]
    assert found("not (a = 1 and b = 1)") == [3, 4]
    assert found("a = null") == found("a is null") == found("a = ${x}", x=None) == [3]
    assert found("a != null") == found("not a is null") == found("a != ${x}", x=None) == [1, 2, 4]
    assert found("a in (1, 3) or a is null") == [1, 2, 3]
    assert found("a not in (1, 3)") == [4]
    assert found("a in () or a in ${x}", x=[]) == []
    assert found("a not in () and a not in ${x}", x=()) == [1, 2, 3, 4]
    # AND binds more than OR, NOT more than both.
    assert found("a = 2 or a = 1 and b = 1") == [1, 4]
    assert found("(a = 2 or a = 1) and b = 1") == [1]
    assert found("not a = 1 or b = 1") == [1, 4]


def test_patterns(found):
    found.conn.execute("CREATE TABLE t (id int, t text)")
    texts = ["100%", "100x", "a_b", "axb", "A\\B", None, ""]
    for number, text in enumerate(texts):
        found.conn.execute("INSERT INTO t VALUES (%s, %s)", [number, text])
    assert found("t like '100%'") == [0, 1]
    assert found(r"t like '100\\%'") == [0]  # the language takes one backslash, LIKE the other
    assert found("t not like '100%'") == [2, 3, 4, 6]
    assert found("t like 'a_b'") == [2, 3]
    assert found("t like '${x}'", x="a_b") == found("t = '$x'", x="a_b") == [2]
    assert found("t like '${x}%'", x="100%") == [0]
    assert found("t like ${x}", x="100%") == [0, 1]
    assert found("t ilike '$x%'", x="a\\") == [4]
    assert found("t ilike 'a%'") == [2, 3, 4]
    assert found("t not ilike 'a%' and not t like '1%'") == [6]
    assert found("t like ''") == [6]


def test_time(found):
    found.conn.execute("CREATE TABLE t (id int, d date, ts timestamp, tz timestamptz)")
    for number, days in enumerate((-40, -3, 3)):
        found.conn.execute(
            "INSERT INTO t SELECT %s, t::date, t::timestamp, t FROM (SELECT now() + %s) AS x(t)",
            [number, dt.timedelta(days=days)],
        )
    for column in ("d", "ts", "tz"):
        assert found(f"{column} > now() - interval '7 days'") == [1, 2]
        assert found(f"{column} < now()") == [0, 1]
        assert found(f"{column} > now() + interval '1 day 12 hours'") == [2]
        assert found(f"{column} between now() - interval '1 Week' and now()") == [1]
        assert found(f"{column} < now() - interval '1 month'") == [0]
        assert found(f"{column} > now() - ${{x}}", x=dt.timedelta(days=7)) == [1, 2]
        assert found(f"{column} > now() - interval '${{x}} days'", x=7) == [1, 2]
        assert found(f"{column} in (now(), '2020-01-01')") == []
    for unit in ("second", "minutes", "HOUR", "days", "week", "months", "year"):
        assert found(f"tz > now() + interval '2 {unit}'") in ([], [2])


def test_values_are_never_a_part_of_the_statement(found):
    found.conn.execute("CREATE TABLE t (id int, t text)")
    for number, value in enumerate(MALICE):
        found.conn.execute("INSERT INTO t VALUES (%s, %s)", [number, value])
    benign = compile_where("t = 'x' or t like 'x' or t in ('x', 'y')")
    for number, value in enumerate(MALICE):
        written = value.replace("\\", "\\\\").replace("$", "\\$").replace("'", "\\'")
        doubled = value.replace("\\", "\\\\").replace("$", "\\$").replace('"', '""')
        pattern = value.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        escaped = pattern.replace("\\", "\\\\").replace("$", "\\$").replace("'", "''")
        source = f"t = '{written}' or t like '{escaped}' or t in ('{written}', \"{doubled}\")"
        compiled = compile_where(source)
        assert compiled.condition == benign.condition
        assert compiled.condition is not None
        assert compiled.condition.as_string(None) == benign.text
        assert compiled.condition.as_string(found.conn) == benign.text
        assert compiled.parameters == (value, pattern, value, value)
        assert found(source) == [number]
        for where in ("t = ${x}", "t = '${x}'", "t like '$x'", "t in ${y}", "t in ('$x', 'y')"):
            assert found(where, x=value, y=[value]) == [number], where
        assert compile_where({"t": value}).text == '("t" = %s)'
    assert found.conn.execute("SELECT count(*) FROM t").fetchone() == (len(MALICE),)
