"""The filter language: what each filter becomes, and what is sent beside it."""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
from collections import defaultdict
from decimal import Decimal
from uuid import UUID

import pytest

from pgstructured.store._filter import compile_where
from pgstructured.store._filter_parser import MAX_CONDITIONS, MAX_DEPTH, MAX_LENGTH


class Mood(enum.Enum):
    OK = 1


class Level(enum.IntEnum):
    HIGH = 3


class Colour(enum.StrEnum):
    RED = "r"


AWARE = dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC)
NUMBER_UUID = UUID(int=1)
OBJECT = object()
BINDINGS: dict[str, object] = {
    "one": 1,
    "text": "it's",
    "none": None,
    "numbers": [1, 2],
    "pair": (1, "x"),
    "empty": [],
    "wild": "50%_\\",
    "mood": Mood.OK,
    "level": Level.HIGH,
    "colour": Colour.RED,
    "yes": True,
    "float": 1.5,
    "decimal": Decimal("1.50"),
    "uuid": NUMBER_UUID,
    "date": dt.date(2026, 1, 31),
    "aware": AWARE,
    "time": dt.time(12, 30),
    "address": ipaddress.ip_address("::1"),
    "network": ipaddress.ip_network("10.0.0.0/8"),
    "huge": 10**5000,
    "delta": dt.timedelta(days=1),
    "user": {"id": 7, "tags": ["a", "b"], "none": None, "0": "zero"},
    "object": OBJECT,
}


@pytest.mark.parametrize(
    ("source", "text", "parameters"),
    [
        # what seed filters could say
        ("a = 'x'", '"a" = %s', ("x",)),
        ("a == 'x'", '"a" = %s', ("x",)),
        ("a != 'x'", '"a" <> %s', ("x",)),
        ("a <> 'x'", '"a" <> %s', ("x",)),
        ("a>1", '"a" > %s', (1,)),
        ("a >= 1", '"a" >= %s', (1,)),
        ("a < 1", '"a" < %s', (1,)),
        ("a<=-1", '"a" <= %s', (-1,)),
        ("a like 'x%'", '"a" LIKE %s', ("x%",)),
        ('a = "x"', '"a" = %s', ("x",)),
        ("a = 5and b=6", '("a" = %s AND "b" = %s)', ("5", "6")),
        ("a = TRUE or b = false", '("a" = %s OR "b" = %s)', ("true", "false")),
        ("a = NULL and b != null", '("a" IS NULL AND "b" IS NOT NULL)', ()),
        ("a = now()", '"a" = now()', ()),
        ("a > NOW ( ) - interval '7 days'", '"a" > now() - %s::interval', ("7 day",)),
        ('a > now()+INTERVAL "1Month"', '"a" > now() + %s::interval', ("1 month",)),
        ("a < now() - interval '4294967295 seconds'", None, ("4294967295 second",)),
        (r"a = 'it\'s \\ \"x\" \n'", '"a" = %s', ('it\'s \\ "x" n',)),
        # columns are by position, and Mixed case is kept
        ("Order = 1 and SELECT = 2", '("Order" = %s AND "SELECT" = %s)', ("1", "2")),
        ("and = 1 and or = 2 or like = 3", None, ("1", "2", "3")),
        ("null = 1 and true != 2 and now > 3", None, ("1", "2", 3)),
        # and what they could not
        ('a = \'it\'\'s\' and b = "say ""x"""', None, ("it's", 'say "x"')),
        ("a = '\"\"' and b = \"''\"", None, ('""', "''")),
        ("a = ''", '"a" = %s', ("",)),
        ("a = 'a\nb'", '"a" = %s', ("a\nb",)),
        ("a = 'José 東京 %s %(x)s'", '"a" = %s', ("José 東京 %s %(x)s",)),
        ("a not like 'x'", '"a" NOT LIKE %s', ("x",)),
        ("a ILIKE 'x' or a not ilike 'y'", '("a" ILIKE %s OR "a" NOT ILIKE %s)', ("x", "y")),
        ("a is null or a IS NOT NULL", '("a" IS NULL OR "a" IS NOT NULL)', ()),
        ("a between 1 and 'x' and b = 2", None, (1, "x", "2")),
        ("a not between ${one} and now()", '"a" NOT BETWEEN %s AND now()', (1,)),
        ("a in (1, 'x', true, now())", '"a" IN (%s, %s, %s, now())', ("1", "x", "true")),
        ("a NOT IN (1)", '"a" NOT IN (%s)', ("1",)),
        ("a in ()", '("a" IS NULL AND FALSE)', ()),
        ("a not in ( )", '("a" IS NULL OR TRUE)', ()),
        # precedence
        ("a=1 or b=1 and c=1", '("a" = %s OR ("b" = %s AND "c" = %s))', ("1", "1", "1")),
        ("(a=1 or b=1) and c=1", '(("a" = %s OR "b" = %s) AND "c" = %s)', ("1", "1", "1")),
        ("not a=1 and b=1", '((NOT "a" = %s) AND "b" = %s)', ("1", "1")),
        ("not (a=1 and b=1)", '(NOT ("a" = %s AND "b" = %s))', ("1", "1")),
        ("not not a=1", '(NOT (NOT "a" = %s))', ("1",)),
        ("((a=1))", '"a" = %s', ("1",)),
        # NOT, or a column of that name
        ("not = 1", '"not" = %s', ("1",)),
        ("not like 'x'", '"not" LIKE %s', ("x",)),
        ("not like like 'x'", '(NOT "like" LIKE %s)', ("x",)),
        ("not like = 'x'", '(NOT "like" = %s)', ("x",)),
        ("not in (1)", '"not" IN (%s)', ("1",)),
        ("not in ${numbers}", '"not" = ANY(%s)', ([1, 2],)),
        ("not in = 1", '(NOT "in" = %s)', ("1",)),
        ("not in in (1)", '(NOT "in" IN (%s))', ("1",)),
        ("not between 1 and 2", '"not" BETWEEN %s AND %s', (1, 2)),
        ("not between now() and true", '"not" BETWEEN now() AND %s', ("true",)),
        ("not between between 1 and 2", '(NOT "between" BETWEEN %s AND %s)', (1, 2)),
        ("not is null", '"not" IS NULL', ()),
        ("not is not null", '"not" IS NOT NULL', ()),
        ("not is = 1", '(NOT "is" = %s)', ("1",)),
        ("not is is null", '(NOT "is" IS NULL)', ()),
        ("not is not in (1)", '(NOT "is" NOT IN (%s))', ("1",)),
        ("not not in (1)", '(NOT "not" IN (%s))', ("1",)),
        ("not not = 1", '(NOT "not" = %s)', ("1",)),
        ("not(a = 1)", '(NOT "a" = %s)', ("1",)),
    ],
)
def test_filters(source, text, parameters):
    where = compile_where(source, BINDINGS)
    assert where.condition is not None
    assert where.condition.as_string() == where.text
    assert text in {None, where.text}
    assert where.parameters == parameters
    assert [type(value) for value in where.parameters] == [type(value) for value in parameters]


@pytest.mark.parametrize(
    ("number", "equal", "ordered"),
    [
        ("5", "5", 5),
        ("-5", "-5", -5),
        ("+5", "5", 5),
        ("007", "007", 7),
        ("2147483647", "2147483647", 2147483647),
        ("2147483648", 2147483648, 2147483648),
        ("-2147483649", -2147483649, -2147483649),
        ("9223372036854775807", 2**63 - 1, 2**63 - 1),
        ("9223372036854775808", Decimal(2**63), Decimal(2**63)),
        ("9" * 5000, Decimal("9" * 5000), Decimal("9" * 5000)),
        ("1.50", Decimal("1.50"), Decimal("1.50")),
        ("5.", Decimal(5), Decimal(5)),
        (".5", Decimal("0.5"), Decimal("0.5")),
        ("1e3", Decimal("1e3"), Decimal("1e3")),
        ("-1.5E-3", Decimal("-0.0015"), Decimal("-0.0015")),
        ("0.1000000000000000000000000001", *[Decimal("0.1000000000000000000000000001")] * 2),
        ("1e131071", Decimal("1e131071"), Decimal("1e131071")),
        ("1e-16383", Decimal("1e-16383"), Decimal("1e-16383")),
    ],
)
def test_numbers_are_what_is_written_to_the_last_digit(number, equal, ordered):
    for operator, expected in (("=", equal), ("!=", equal), ("<", ordered)):
        (value,) = compile_where(f"a {operator} {number}").parameters
        assert (type(value), value) == (type(expected), expected)
        if isinstance(value, Decimal):
            assert value.as_tuple() == expected.as_tuple()
    assert compile_where(f"a in ({number})").parameters == (equal,)
    assert compile_where(f"a between {number} and {number}").parameters == (ordered, ordered)


@pytest.mark.parametrize(
    ("source", "text", "parameters"),
    [
        ("a = ${one}", '"a" = %s', (1,)),
        ("a = $one", '"a" = %s', (1,)),
        ("a = ${ one }", '"a" = %s', (1,)),
        ("a > $uuid", '"a" > %s', (NUMBER_UUID,)),
        ("a = ${object}", '"a" = %s', (OBJECT,)),
        ("a = ${numbers}", '"a" = %s', (["1", "2"],)),
        ("a = ${none} and b != ${none}", '("a" IS NULL AND "b" IS NOT NULL)', ()),
        ("a = ${user.none}", '"a" IS NULL', ()),
        ("a = ${user.id}", '"a" = %s', (7,)),
        ("a = ${user.tags.1}", '"a" = %s', ("b",)),
        ("a = ${user.tags}", '"a" = %s', (["a", "b"],)),
        ("a = ${user.0}", '"a" = %s', ("zero",)),
        ("a in ${numbers}", '"a" = ANY(%s)', ([1, 2],)),
        ("a not in ${numbers}", '"a" <> ALL(%s)', ([1, 2],)),
        ("a in (${numbers})", '"a" = ANY(%s)', ([1, 2],)),
        ("a in ${pair}", '"a" IN (%s, %s)', (1, "x")),
        ("a not in ${pair}", '"a" NOT IN (%s, %s)', (1, "x")),
        ("a in ${empty}", '("a" IS NULL AND FALSE)', ()),
        ("a in (${empty}, ${empty})", '("a" IS NULL AND FALSE)', ()),
        ("a not in ${empty}", '("a" IS NULL OR TRUE)', ()),
        ("a in (${one}, 'x')", '"a" IN (%s, %s)', (1, "x")),
        ("a in (${one})", '"a" IN (%s)', (1,)),
        ("a in (0, ${numbers}, ${one})", '"a" IN (%s, %s, %s, %s)', ("0", 1, 2, 1)),
        ("a ilike ${text}", '"a" ILIKE %s', ("it's",)),
        ("a between ${one} and ${float}", '"a" BETWEEN %s AND %s', (1, 1.5)),
        ("a > now() - ${delta}", '"a" > now() - %s::interval', (dt.timedelta(days=1),)),
        ("a > now() - interval '${one} days'", '"a" > now() - %s::interval', ("1 day",)),
    ],
)
def test_a_binding_outside_of_quotes_keeps_its_type(source, text, parameters):
    where = compile_where(source, BINDINGS)
    assert where.text == text
    assert where.parameters == parameters
    assert [type(value) for value in where.parameters] == [type(value) for value in parameters]


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("'${one}'", "1"),
        ("'$one.'", "1."),
        ("'a $text b'", "a it's b"),
        ("'${user.tags.0}${user.id}'", "a7"),
        ('"$text"', "it's"),
        (r"'\$text \${text} US$ 5$ $5'", "$text ${text} US$ 5$ $5"),
        ("'$yes'", "true"),
        ("'$level'", "3"),
        ("'$colour'", "r"),
        ("'$float'", "1.5"),
        ("'$decimal'", "1.50"),
        ("'$uuid'", str(NUMBER_UUID)),
        ("'$date'", "2026-01-31"),
        ("'$aware'", "2026-01-31 12:00:00+00:00"),
        ("'$time'", "12:30:00"),
        ("'$address $network'", "::1 10.0.0.0/8"),
        ("'$huge'", "1" + "0" * 5000),
    ],
)
def test_a_binding_inside_of_quotes_is_text(source, value):
    assert compile_where(f"a = {source}", BINDINGS).parameters == (value,)


def test_what_is_bound_in_a_pattern_has_no_wildcards():
    assert compile_where("a like '${wild}%'", BINDINGS).parameters == (r"50\%\_\\%",)
    # Elsewhere it is what it is, and so is a pattern that is bound as a whole.
    assert compile_where("a = '${wild}%'", BINDINGS).parameters == ("50%_\\%",)
    assert compile_where("a like ${p}", {"p": r"50\%%"}).parameters == (r"50\%%",)


def test_bindings_are_looked_up_and_not_made():
    bindings: dict[str, object] = defaultdict(dict, {"inner": defaultdict(dict)})
    for source in ("a = ${x}", "a = ${inner.x}"):
        with pytest.raises(ValueError, match="unknown binding"):
            compile_where(source, bindings)
    assert dict(bindings) == {"inner": {}}


def test_limits_are_what_may_still_be():
    assert compile_where(" AND ".join(["a = 1"] * MAX_CONDITIONS)).parameters == ("1",) * 256
    deep = "(" * (MAX_DEPTH - 1) + "not a = 1" + ")" * (MAX_DEPTH - 1)
    assert compile_where(deep).text == '(NOT "a" = %s)'
    # Depth is what is open, not what there has been.
    assert compile_where(" or ".join(["not (a = 1)"] * 200)).text
    long = "x" * (MAX_LENGTH - len("a = ''"))
    assert compile_where(f"a = '{long}'").parameters == (long,)
    # Longer than what is kept, and more parts than are kept.
    assert len(compile_where(f"a in ({','.join('1' * 1000)})").parameters) == 1000


def test_a_kept_filter_is_not_its_first_bindings():
    source = "a = ${x} and b in ${y}"
    first = compile_where(source, {"x": 1, "y": [1]})
    second = compile_where(source, {"x": None, "y": []})
    third = compile_where(source, {"x": 2, "y": [3, 4]})
    assert (first.text, first.parameters) == ('("a" = %s AND "b" = ANY(%s))', (1, [1]))
    assert (second.text, second.parameters) == ('("a" IS NULL AND ("b" IS NULL AND FALSE))', ())
    assert (third.text, third.parameters) == (first.text, (2, [3, 4]))
