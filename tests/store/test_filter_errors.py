"""What a filter that can't be understood says: what was expected, and where."""

from __future__ import annotations

import datetime as dt
import enum
import traceback

import pytest

from pgstructured.errors import FilterError, PgStructuredError, StoreError
from pgstructured.store._filter import compile_where
from pgstructured.store._filter_parser import MAX_CONDITIONS, MAX_DEPTH, MAX_LENGTH

SECRET = "s3cret"


class Mood(enum.Enum):
    S3CRET = SECRET


BINDINGS: dict[str, object] = {
    "none": None,
    "one": 1,
    "text": SECRET,
    "nul": f"{SECRET}\0",
    "half": f"{SECRET}\ud800",
    "nulls": [SECRET, None],
    "nuls": [f"{SECRET}\0"],
    "list": [SECRET],
    "dict": {SECRET: SECRET, "in": {"n": 1}},
    "bytes": SECRET.encode(),
    "mood": Mood.S3CRET,
    "delta": dt.timedelta(days=1),
    "end": f"{SECRET}\\",
}


@pytest.mark.parametrize(
    ("source", "position", "message"),
    [
        # letters
        ("a = 1; DROP TABLE t", 5, "unexpected ';'"),
        ("a = 5%", 5, "unexpected '%': a value stands in quotes, or is a binding"),
        ("a ! 5", 2, "unexpected '!'"),
        ("a # 5", 2, "unexpected '#'"),
        ("größe = 5", 2, "unexpected 'ö'"),
        ("a = \0", 4, r"unexpected '\\x00'"),
        ("a -- x", 2, "expected an operator"),
        ("a = 1 /* x */", 6, "unexpected '/'"),
        ("a.b = 1", 1, "unexpected '.'"),
        ('"a" = 1', 0, "expected a column"),
        ("a = 'x", 4, "a string that begins here does not end"),
        ("a = 'x\\'", 4, "a string that begins here does not end"),
        ("a = 'x''", 4, "a string that begins here does not end"),
        ('a = "x', 4, "a string that begins here does not end"),
        ("a = 'x\0'", 6, "Postgres has no text with"),
        ("a = '\ud800'", 5, "Postgres has no text with"),
        ("a = 1.2.3", 4, "more than one point"),
        ("a = 1e131072", 4, "a number that Postgres does not have"),
        ("a = 1e-16384", 4, "a number that Postgres does not have"),
        ("a = 1e999999999", 4, "a number that Postgres does not have"),
        ("a = ${", 4, "expected a binding's name after [$], as in [$]{name}"),
        ("a = ${}", 4, "expected a binding's name"),
        ("a = $5", 4, "expected a binding's name"),
        ("a = ${a..b}", 4, "expected a binding's name"),
        ("a = ${a-b}", 4, "expected a binding's name"),
        ("a = 'x ${'", 7, "a dollar sign is"),
        ("a = 'x ${a b}'", 7, "a dollar sign is"),
        # the first that is wrong is what is said
        ("a 5 = ;", 2, "expected an operator after the column"),
        # columns and conditions
        ("=", 0, "expected a column"),
        ("a = 1 and", 9, "expected a column"),
        ("a = 1 or or", 11, "expected an operator"),
        ("not", 3, "expected a column"),
        ("not 5", 4, "expected a column"),
        ("()", 1, "expected a column"),
        ("x" * 64 + " = 1", 0, "63 bytes"),
        ("a", 1, "expected an operator after the column"),
        ("a b", 2, "expected an operator after the column"),
        ("a and b = 1", 2, "expected an operator after the column"),
        ("a = 1 b", 6, "expected AND, OR or the end"),
        ("a = 1)", 5, "expected AND, OR or the end"),
        ("a = 1, b = 2", 5, "expected AND, OR or the end"),
        ("(a = 1", 6, "expected AND, OR or a closing parenthesis"),
        ("(a = 1, b = 2)", 6, "expected AND, OR or a closing parenthesis"),
        ("a not = 1", 6, "expected LIKE, ILIKE, IN or BETWEEN after NOT"),
        ("a not", 5, "expected LIKE, ILIKE, IN or BETWEEN after NOT"),
        ("a is 5", 5, "expected NULL"),
        ("a is not true", 9, "expected NULL"),
        # values
        ("a =", 3, "expected a value"),
        ("a = =", 4, "expected a value"),
        ("a = b", 4, "text stands in quotes"),
        ("a = lower('x')", 4, "text stands in quotes"),
        ("a = (select 1)", 4, "expected a value"),
        ("a > null", 4, "NULL is neither more nor less"),
        ("a like null", 7, "LIKE needs a pattern"),
        ("a like 5", 7, "LIKE needs a pattern"),
        ("a not ilike true", 12, "ILIKE needs a pattern"),
        ("a like now()", 7, "LIKE needs a pattern"),
        ("a like 'x\\\\'", 7, "a pattern can't end with a single backslash"),
        ("a between null and 1", 10, "NULL does not go with BETWEEN"),
        ("a between 1 and null", 16, "NULL does not go with BETWEEN"),
        ("a between 1, 2", 11, "expected AND and the upper bound"),
        ("a in 5", 5, "expected values in parentheses, or a binding that is a list"),
        ("a in (1", 7, "expected a comma or a closing parenthesis"),
        ("a in (1 2)", 8, "expected a comma or a closing parenthesis"),
        ("a in (1,)", 8, "expected a value"),
        ("a in (1, null)", 9, "NULL does not go with IN; say IS NULL beside it"),
        ("a not in (null)", 10, "NULL does not go with IN"),
        # time
        ("a > now", 7, "expected [(][)], as in now[(][)]"),
        ("a > now(1)", 8, "expected [)], as in now[(][)]"),
        ("a > now() - 5", 12, "expected interval"),
        ("a > now() - '7 days'", 12, "expected interval"),
        ("a > now() - interval 7", 21, "expected a length of time in quotes"),
        ("a > now() - interval ''", 21, "as in interval '7 days'"),
        ("a > now() - interval '7'", 21, "as in interval '7 days'"),
        ("a > now() - interval 'a day'", 21, "as in interval '7 days'"),
        ("a > now() - interval '-1 days'", 21, "as in interval '7 days'"),
        ("a > now() - interval '1.5 days'", 21, "as in interval '7 days'"),
        ("a > now() - interval '4294967296 days'", 21, "as in interval '7 days'"),
        ("a > now() - interval '1 fortnight'", 21, "as in interval '7 days'"),
        ("a > now() - interval '\u0661 day'", 21, "as in interval '7 days'"),
        # bindings
        ("a = ${unknown}", 4, "unknown binding unknown "),
        ("a = 'x $unknown'", 7, "unknown binding unknown "),
        ("a = ${dict.unknown.x}", 4, "unknown binding dict.unknown "),
        ("a = ${text.x}", 4, "unknown binding text.x "),
        ("a = ${list.1}", 4, "unknown binding list.1 "),
        ("a = ${list.x}", 4, "unknown binding list.x "),
        ("a = ${list.__class__}", 4, "unknown binding list.__class__ "),
        ("a = ${list." + "9" * 5000 + "}", 4, "unknown binding list.9"),
        ("a = ${nul}", 4, "binding nul has a character in it"),
        ("a = ${half}", 4, "binding half has a character in it"),
        ("a = 'x $nul'", 7, "binding nul has a character in it"),
        ("a = '$none'", 5, "binding none is None: it has no one text"),
        ("a = '$list'", 5, "binding list is of type list: it has no one text"),
        ("a = '$bytes'", 5, "binding bytes is of type bytes"),
        ("a = '$mood'", 5, "binding mood is of type Mood"),
        ("a = '${dict.in}'", 5, "binding dict.in is of type dict"),
        ("a > ${none}", 4, "binding none is None: > needs a value"),
        ("a between ${none} and 1", 10, "binding none is None: BETWEEN needs a value"),
        ("a like ${none}", 7, "binding none is None: LIKE needs text"),
        ("a like ${one}", 7, "binding one is of type int: LIKE needs text"),
        ("a ilike ${end}", 8, "a pattern can't end with a single backslash"),
        ("a in ${one}", 5, "binding one is of type int: IN needs a list, tuple or set"),
        ("a in ${text}", 5, "binding text is of type str: IN needs a list, tuple or set"),
        ("a in ${dict}", 5, "binding dict is of type dict: IN needs a list, tuple or set"),
        ("a in ${none}", 5, "binding none is None: IN needs a list, tuple or set"),
        ("a in (${none})", 6, "binding none is None: IN needs values"),
        ("a in (1, ${none})", 9, "binding none is None: IN needs values"),
        ("a in ${nulls}", 5, "binding nulls has None in it"),
        ("a in (1, ${nulls})", 9, "binding nulls has None in it"),
        ("a in ${nuls}", 5, "binding nuls has a character in it"),
        ("a > now() - ${text}", 12, "binding text is of type str: now[(][)] needs a timedelta"),
        ("a > now() - ${none}", 12, "binding none is None: now[(][)] needs a timedelta"),
        ("a > now() - interval '$text days'", 21, "as in interval '7 days'"),
        # limits
        (" and ".join(["a = 1"] * (MAX_CONDITIONS + 1)), 10 * MAX_CONDITIONS, "256 at most"),
        ("(" * (MAX_DEPTH + 1), MAX_DEPTH, "too deep: 50 open parentheses and NOTs at most"),
        ("(" * 100_000, MAX_DEPTH, "too deep"),
        ("not " * (MAX_DEPTH + 1) + "a = 1", 4 * MAX_DEPTH, "too deep"),
        (" " * (MAX_LENGTH + 1), MAX_LENGTH, "131072 characters at most"),
    ],
)
def test_an_error_says_what_was_expected_and_shows_where(source, position, message):
    with pytest.raises(FilterError, match=message) as caught:
        compile_where(source, BINDINGS)
    error = caught.value
    assert error.position == position
    assert isinstance(error, StoreError | ValueError | PgStructuredError)
    _, line, caret = str(error).split("\n")
    assert caret.strip() == "^"
    shown = line[caret.index("^") : caret.index("^") + 1]
    at = source[position : position + 1]
    assert shown == (at if at.isprintable() else " " if at.isspace() else "?")
    # Neither the error nor what led to it says what is bound.
    assert SECRET not in "".join(traceback.format_exception(error))


def test_the_whole_of_it():
    with pytest.raises(FilterError) as caught:
        compile_where("a = 1\nand b = c\nor d = 2")
    assert str(caught.value) == (
        "expected a value; text stands in quotes (line 2, column 9)\n  and b = c\n          ^"
    )
    assert caught.value.position == 14


def test_of_a_long_line_the_place_is_shown():
    with pytest.raises(FilterError) as caught:
        compile_where(f"a in ({', '.join(['1'] * 500)}, b) and c in ({', '.join(['1'] * 500)})")
    _, line, caret = str(caught.value).split("\n")
    assert len(line) < 100
    assert line.strip().startswith("...1, 1, 1,")
    assert line.endswith("...")
    assert line[caret.index("^")] == "b"


def test_the_caret_stands_under_the_place_whatever_is_before_it():
    with pytest.raises(FilterError) as caught:
        compile_where("a = '東京e\u0301' and\tb c = 1\x1b[31m")
    # Two columns each for what is wide, one for a tab, none for an accent.
    assert str(caught.value).split("\n")[1:] == [
        "  a = '東京e\u0301' and b c = 1?[31m",
        "  " + " " * len("a = 'xxxxe' and b ") + "^",
    ]
