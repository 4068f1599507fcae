"""Random filters: nothing but a condition or a `FilterError`, and the rows that Python finds too.

The rounds of the gate are few; ``PGSTRUCTURED_FILTER_ROUNDS=200000`` is for a night.
"""

from __future__ import annotations

import datetime as dt
import operator as operators
import os
import random
import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import sql

from pgstructured.errors import FilterError, InvalidIdentifierError
from pgstructured.store._filter import compile_columns, compile_order_by, compile_where

ROUNDS = int(os.environ.get("PGSTRUCTURED_FILTER_ROUNDS", "4000"))
SEED = int(os.environ.get("PGSTRUCTURED_FILTER_SEED", "0"))

# All that a condition may be made of: names in quotes, placeholders, these words.
CONDITION = re.compile(
    r'(?:"[A-Za-z_][A-Za-z0-9_]{0,62}"|%s(?:::interval)?|now\(\)|NOT|AND|OR|IS|NULL|IN|LIKE|ILIKE'
    r"|BETWEEN|ANY|ALL|TRUE|FALSE|=|<>|<=|>=|<|>|\(|\)|,|\+|-|[ ])*"
)
ORDER = re.compile(r'"[A-Za-z_][A-Za-z0-9_]{0,62}"(?: ASC| DESC)?(?: NULLS FIRST| NULLS LAST)?')
BINDINGS: dict[str, object] = {
    "none": None,
    "int": 5,
    "text": "'; DROP TABLE t; -- %s",
    "nul": "a\0b",
    "half": "\ud800",
    "list": [1, 2],
    "nulls": [1, None],
    "empty": (),
    "set": {"a", "b"},
    "deep": {"a": [{"b": 1.5}, "x"], "c": None},
    "delta": dt.timedelta(days=1),
    "bytes": b"x",
    "object": object(),
    "huge": 10**5000,
}
PIECES = [
    *("a", "b", "order", "NOT", "not", "and", "AND", "or", "in", "IN", "is", "null", "like"),
    *("ILIKE", "between", "true", "false", "now", "now()", "now ( )", "interval", "x" * 64),
    *("=", "==", "!=", "<>", "<", "<=", ">", ">=", "(", ")", ",", "+", "-", "()", "((", "))"),
    *("1", "-1", "1.5", ".5", "5.", "1e3", "1e999999", "1e99999999999", "1.2.3", "007"),
    *("9" * 30, "9" * 5000, "0x10", "1_000", "+", "\u0663"),
    *(
        "'x'",
        '"x"',
        "''",
        "'a''b'",
        "'a\\'b'",
        "'",
        '"',
        "'\\",
        "\\",
        "'é東京'",
        "'%s'",
        "'7 days'",
    ),
    *("${int}", "$int", "${none}", "${text}", "'${text}'", "'$text'", "${nul}", "'${nul}'"),
    *("${half}", "'${half}'", "${list}", "${nulls}", "${empty}", "${set}", "${deep.a.0.b}"),
    *("${deep.a.9}", "${deep.c}", "${deep}", "${delta}", "'${delta}'", "${bytes}", "${object}"),
    *("${huge}", "'${huge}'", "${unknown}", "'$unknown'", "${", "$", "'${'", "$$", "${}", "${a b}"),
    *(";", "--", "/*", "*/", "%", "%s", "%(x)s", "#", "\0", "\ud800", "\n", "\t", "\u00a0", "é"),
    *("desc", "asc", "nulls", "first", "last"),
]
VALID = [
    "a = 5 and b like 'x%' or not (c is not null and d in (1, 2.5, ${int}))",
    "t between now() - interval '7 days' and now() and u = '${deep.a.0.b}'",
    "a in ${list} or b not in ${empty} or c != ${none}",
]
SLOTS = (
    ["", "", "not", "( "],
    ["a", "order", "not", "in"],
    ["=", "!=", "<", "like", "in", "not in", "is not"],
    [piece for piece in PIECES if piece[0] in "'\"$1-.0" or piece in {"null", "now()", "true"}],
    ["", "", "", ")", "+ interval '1 day'"],
)


def random_text(rng: random.Random) -> str:
    choice = rng.random()
    if choice < 0.3:
        return rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randrange(12)))
    if choice < 0.6:
        text = list(rng.choice(VALID))
        for _ in range(rng.randrange(4)):
            place = rng.randrange(len(text))
            text[place : place + rng.randrange(3)] = rng.choice(PIECES)
        return "".join(text)
    if choice < 0.8:
        parts = [" ".join(map(rng.choice, SLOTS)) for _ in range(rng.randrange(1, 4))]
        return rng.choice([" and ", " OR ", "\nand not "]).join(parts)
    return "".join(chr(rng.randrange(rng.choice([128, 0x3000, 0x110000]))) for _ in range(12))


def check_fault(error: FilterError, source: str) -> None:
    assert error.position is not None
    assert 0 <= error.position <= len(source)
    lines = str(error).split("\n")
    assert len(lines) == 3
    assert lines[2].strip() == "^"
    for value in ("DROP TABLE", "1.5", "e" * 20):
        assert value not in lines[0]


def test_any_text_is_a_condition_without_values_in_it_or_a_filter_error():
    rng = random.Random(SEED)
    conditions = 0
    for _ in range(ROUNDS):
        source = random_text(rng)
        try:
            where = compile_where(source, BINDINGS)
        except FilterError as error:
            check_fault(error, source)
            continue
        if where.condition is None:
            assert not source.strip()
            continue
        conditions += 1
        text = where.condition.as_string(None)
        assert text == where.text
        assert CONDITION.fullmatch(text)
        assert text.count("%s") == len(where.parameters)
        # The same again, with what was kept of the first time.
        again = compile_where(source, BINDINGS)
        assert (again.text, again.parameters) == (where.text, where.parameters)
    assert conditions > ROUNDS / 15


def test_any_order_and_any_columns_are_names_or_an_error_of_theirs():
    rng = random.Random(SEED)
    for _ in range(ROUNDS):
        source = random_text(rng)
        try:
            order = compile_order_by(source)
        except FilterError as error:
            check_fault(error, source)
        else:
            terms = [] if order is None else order.as_string(None).split(", ")
            assert all(ORDER.fullmatch(term) for term in terms)
        try:
            columns = compile_columns(source)
        except InvalidIdentifierError:
            pass
        else:
            assert all(ORDER.fullmatch(name) for name in columns.as_string(None).split(", "))


def simple_filter(rng: random.Random) -> str:
    """Write a filter by the simple, flat grammar that this language has to keep to."""
    names = ["a", "_", "Zip9", "and", "OR", "not", "like", "null", "now", "true", "interval", "in"]
    symbols = ["=", "==", "!=", "<>", ">", ">=", "<", "<="]
    texts = ["'x'", '"x"', "''", r"'it\'s \"x\" \\ \n'", "'a\"b'", "'José 東京 %;--'", "'\n'"]
    numbers = ["5", "-5", "007", "1.5", "-1.", "9223372036854775808", "0.1000"]
    units = [
        f"{rng.choice(['1', '7', '4294967295'])} {unit}" for unit in ("day", "MONTHS", "second")
    ]

    def condition() -> str:
        name = rng.choice(names)
        kind = rng.random()
        if kind < 0.2:
            return f"{name} {rng.choice(['LIKE', 'like', 'Like'])} {rng.choice(texts)}"
        symbol, gap = rng.choice(symbols), rng.choice(["", " ", "\n"])
        if kind < 0.3:
            null = rng.choice(["NULL", "null"])
            return f"{name}{gap}{rng.choice(symbols[:4])}{gap}{null}"
        if kind < 0.5:
            sign = rng.choice([" - ", "+", "-"])
            offset = rng.choice(["", f"{sign}interval '{rng.choice(units)}'"])
            return f"{name}{gap}{symbol}{gap}{rng.choice(['now()', 'NOW ( )'])}{offset}"
        value = rng.choice([*texts, *numbers, "TRUE", "false"])
        return f"{name}{gap}{symbol}{gap}{value}"

    text = condition()
    for _ in range(rng.randrange(4)):
        text += f" {rng.choice(['and', 'AND', 'or', 'Or'])} {condition()}"
    return text


def test_every_filter_of_the_simple_grammar_is_one():
    rng = random.Random(SEED)
    for _ in range(ROUNDS // 2):
        source = simple_filter(rng)
        where = compile_where(source)
        assert where.text is not None
        assert CONDITION.fullmatch(where.text)
        assert "NOT " not in where.text.replace("IS NOT NULL", ""), source


# ---------------------------------------------------------------- rows

NOW = dt.datetime.now(dt.UTC)
DAY = dt.timedelta(days=1)
INTEGERS = [None, -3, -1, 0, 1, 2, 5, 7, 100_000]
DECIMALS = [None, *map(Decimal, ("-1.25", "0", "0.5", "1.5", "2", "5", "123456789012345678901.5"))]
FLOATS = [None, -1.25, 0.0, 0.5, 1.5, 2.0, 5.0, 1e10]
TEXTS = [None, "", "a", "A", "ab", "a%", "a_b", "x\\y", "5", "05", "it's", 'q"q', "é東京", "a\nb"]
BOOLEANS = [None, True, False]
TIMES = [None, *(NOW + days * DAY for days in (-400, -40, -10, -3, 3, 10, 40))]
COLUMNS: dict[str, list[Any]] = {
    "i": INTEGERS,
    "n": DECIMALS,
    "f": FLOATS,
    "t": TEXTS,
    "b": BOOLEANS,
    "ts": TIMES,
    "not": INTEGERS,
    "in": INTEGERS,
    "and": TEXTS,
    "between": TEXTS,
}
DDL = """
CREATE TABLE t (
    id int PRIMARY KEY, i int, n numeric, f float8, t text COLLATE "C", b bool, ts timestamptz,
    "not" int, "in" int, "and" text COLLATE "C", "between" text COLLATE "C"
)
"""

OPERATORS: dict[str, Any] = {
    "=": operators.eq,
    "==": operators.eq,
    "!=": operators.ne,
    "<>": operators.ne,
    "<": operators.lt,
    "<=": operators.le,
    ">": operators.gt,
    ">=": operators.ge,
}
Row = dict[str, Any]
Truth = bool | None


def negation(value: Truth) -> Truth:
    return None if value is None else not value


def conjunction(values: list[Truth]) -> Truth:
    return False if False in values else None if None in values else True


def disjunction(values: list[Truth]) -> Truth:
    return negation(conjunction([negation(value) for value in values]))


def compared(operator: str, left: Any, right: Any) -> Truth:
    if left is None or right is None:
        return None
    if isinstance(left, float) or isinstance(right, float):
        left, right = float(left), float(right)
    return bool(OPERATORS[operator](left, right))


def matches(text: str, pattern: str) -> bool:
    """LIKE, by its definition."""
    if not pattern:
        return not text
    head, rest = pattern[0], pattern[1:]
    if head == "%":
        return any(matches(text[i:], rest) for i in range(len(text) + 1))
    if head == "\\":
        head, rest = rest[0], rest[1:]
    elif head == "_":
        return bool(text) and matches(text[1:], rest)
    return text[:1] == head and matches(text[1:], rest)


@dataclass
class Author:
    """Writes random filters that are right, and says which rows they mean."""

    rng: random.Random
    bindings: dict[str, object] = field(default_factory=dict)

    def filter(self, depth: int = 3) -> tuple[str, Any]:
        """Return text that can stand anywhere, and what it says of a row."""
        choice = self.rng.random()
        if depth == 0 or choice < 0.3:
            return self.condition()
        if choice < 0.5:
            text, truth = self.filter(depth - 1)
            return f"{self.word('not')} {self.enclosed(text)}", lambda row: negation(truth(row))
        parts = [self.filter(depth - 1) for _ in range(self.rng.choice([2, 2, 3]))]
        truths = [truth for _, truth in parts]
        if choice < 0.75:
            text = self.joined("and", parts)
            return f"({text})", lambda row: conjunction([truth(row) for truth in truths])
        text = self.joined("or", parts)
        return f"({text})", lambda row: disjunction([truth(row) for truth in truths])

    def flat(self) -> tuple[str, Any]:
        """AND and OR without parentheses: who binds more?"""
        groups = [
            [self.condition() for _ in range(self.rng.randrange(1, 4))]
            for _ in range(self.rng.randrange(1, 4))
        ]
        text = f" {self.word('or')} ".join(self.joined("and", group) for group in groups)
        return text, lambda row: disjunction(
            [conjunction([truth(row) for _, truth in group]) for group in groups]
        )

    def negated(self, column: str, negated: bool) -> str:
        """Write the NOT of an operator; as the column, if that is called so too: which is which?"""
        return f"{column if column == 'not' else self.word('not')} " if negated else ""

    def joined(self, word: str, parts: list[tuple[str, Any]]) -> str:
        return f"{self.space()}{self.word(word)} ".join(f"{text} " for text, _ in parts)

    def enclosed(self, text: str) -> str:
        return f"({self.space()}{text})" if self.rng.random() < 0.5 else text

    def word(self, word: str) -> str:
        return self.rng.choice([word, word.upper(), word.title()])

    def space(self) -> str:
        return self.rng.choice(["", " ", "\n\t"])

    def bind(self, value: object) -> str:
        name = f"v{len(self.bindings)}"
        if self.rng.random() < 0.3:
            self.bindings[name] = {"x": [value]}
            return f"${{{name}.x.0}}"
        self.bindings[name] = value
        return self.rng.choice([f"${name}", f"${{{name}}}"])

    def quoted(self, text: str, *, pattern: bool = False) -> str:
        """Write a string in one of the ways that there are."""
        if not pattern and self.rng.random() < 0.3:
            cut = self.rng.randrange(len(text) + 1)
            self.bindings[name := f"v{len(self.bindings)}"] = text[cut:]
            return f"'{self.escaped(text[:cut], chr(39))}${{{name}}}'"
        quote = self.rng.choice("'\"")
        return f"{quote}{self.escaped(text, quote)}{quote}"

    def escaped(self, text: str, quote: str) -> str:
        text = text.replace("\\", "\\\\").replace("$", "\\$")
        return text.replace(quote, self.rng.choice([f"\\{quote}", quote * 2]))

    def value(self, column: str, operator: str = "=") -> tuple[str, Any]:
        """Write a value that this column can be compared with, and return it too."""
        value = self.rng.choice(COLUMNS[column][1:])
        if COLUMNS[column] is TIMES:
            return self.time()
        if COLUMNS[column] is TEXTS and operator in {"=", "!="} and value == "5":
            return "5", value
        if COLUMNS[column] is TEXTS:
            return (self.bind if self.rng.random() < 0.4 else self.quoted)(value), value
        if self.rng.random() < 0.3:
            return self.bind(value), value
        if isinstance(value, bool):
            text = self.word(str(value).lower())
            return self.rng.choice([text, f"'{text}'"]), value
        return self.number(value)

    def number(self, value: Any) -> tuple[str, Any]:
        if isinstance(value, float):
            return self.rng.choice([repr(value), f"{value:e}", f"'{value}'"]), value
        if isinstance(value, Decimal):
            return self.rng.choice([str(value), f"{value:E}", f"'{value}'"]), value
        if self.rng.random() < 0.2:
            value = Decimal(value) + Decimal("0.5")
            return str(value), value
        if self.rng.random() < 0.1:
            return "99999999999", 99999999999
        sign = "-" if value < 0 else self.rng.choice(["", "+"])
        digits = str(abs(value))
        return sign + self.rng.choice([digits, f"0{digits}", f"{digits}.0", f"{digits}e0"]), value

    def time(self) -> tuple[str, Any]:
        count, unit, length = self.rng.choice(
            [(1, "day", DAY), (7, "days", 7 * DAY), (3, "weeks", 21 * DAY), (12, "HOURS", DAY / 2)]
        )
        sign = self.rng.choice("+-")
        value = NOW + (length if sign == "+" else -length)
        offset = self.rng.choice(
            [f"interval '{count} {unit}'", f'INTERVAL "{count}{unit}"', self.bind(length)]
        )
        return self.rng.choice(
            [
                (f"{self.word('now')}(){self.space()}{sign}{self.space()}{offset}", value),
                ("now()", NOW),
                (self.bind(value), value),
                (self.quoted(value.isoformat()), value),
            ]
        )

    def condition(self) -> tuple[str, Any]:
        column = self.rng.choice(list(COLUMNS))
        return self.rng.choice(
            [self.comparison, self.comparison, self.null, self.membership, self.range, self.like]
        )(column)

    def comparison(self, column: str) -> tuple[str, Any]:
        operator = self.rng.choice(["=", "==", "!=", "<>", "<", "<=", ">", ">="])
        equality = {"==": "=", "<>": "!="}.get(operator, operator)
        text, value = self.value(column, equality)
        text = f"{column}{self.space()}{operator}{self.space()}{text}"
        return text, lambda row: compared(operator, row[column], value)

    def null(self, column: str) -> tuple[str, Any]:
        negated = self.rng.random() < 0.5
        null = self.rng.choice([self.word("null"), self.bind(None)])
        text = self.rng.choice(
            [
                f"{column} {self.word('is')} {self.negated(column, negated)}null",
                f"{column} {'!=' if negated else '='} {null}",
            ]
        )
        return text, lambda row: (row[column] is None) != negated

    def membership(self, column: str) -> tuple[str, Any]:
        negated = self.rng.random() < 0.5
        operator = f"{self.negated(column, negated)}{self.word('in')}"
        if self.rng.random() < 0.4:
            values = self.rng.choices(COLUMNS[column][1:], k=self.rng.randrange(4))
            kind = self.rng.choice([list, tuple, set])
            text = self.enclosed(self.bind(kind(values)))
        else:
            written = [self.value(column) for _ in range(self.rng.randrange(4))]
            values = [value for _, value in written]
            texts = [text for text, _ in written]
            if self.rng.random() < 0.3:
                more = self.rng.choices(COLUMNS[column][1:], k=2)
                values += more
                texts.append(self.bind(more))
            text = f"({f'{self.space()},'.join(texts)})"

        def truth(row: Row) -> Truth:
            found = disjunction([compared("=", row[column], value) for value in values])
            return negation(found) if negated else found

        return f"{column} {operator} {text}", truth

    def range(self, column: str) -> tuple[str, Any]:
        negated = self.rng.random() < 0.5
        (low, lowest), (high, highest) = self.value(column, "<"), self.value(column, "<")
        operator = f"{self.negated(column, negated)}{self.word('between')}"

        def truth(row: Row) -> Truth:
            found = conjunction(
                [compared(">=", row[column], lowest), compared("<=", row[column], highest)]
            )
            return negation(found) if negated else found

        return f"{column} {operator} {low} {self.word('and')} {high}", truth

    def like(self, _: str) -> tuple[str, Any]:
        column = self.rng.choice(["t", "and", "between"])
        negated, folded = self.rng.random() < 0.5, self.rng.random() < 0.5
        pattern = "".join(
            self.rng.choices(["a", "b", "%", "_", "\\%", "\\_", "\\\\", "x", "東"], k=3)
        )
        text = self.quoted(pattern, pattern=True)
        if self.rng.random() < 0.3:
            text = self.bind(pattern)
        elif self.rng.random() < 0.3:  # what is bound in a pattern has no wildcards
            part = self.rng.choice(["a%", "_b", "\\", "a"])
            text = f"'{self.braced(part)}%'"
            pattern = re.sub(r"[\\%_]", r"\\\g<0>", part) + "%"
        operator = f"{self.negated(column, negated)}{'ilike' if folded else 'like'}"

        def truth(row: Row) -> Truth:
            value = row[column]
            if value is None:
                return None
            # The server folds only ASCII in this collation, and so there is nothing else here.
            return (
                matches(*((value.lower(), pattern.lower()) if folded else (value, pattern)))
                != negated
            )

        return f"{column} {operator} {text}", truth

    def braced(self, value: object) -> str:
        self.bindings[name := f"v{len(self.bindings)}"] = value
        return f"${{{name}}}"


@pytest.mark.slow
def test_random_filters_find_the_rows_that_they_mean(pg_dsn):
    rng = random.Random(SEED)
    rows: list[Row] = [
        {"id": number, **{column: rng.choice(values) for column, values in COLUMNS.items()}}
        for number in range(60)
    ]
    some = 0
    rounds = max(ROUNDS // 4, 1)
    with psycopg.connect(pg_dsn, autocommit=True) as conn:
        conn.execute(DDL)
        placeholders = sql.SQL(", ").join(sql.Placeholder() * len(rows[0]))
        insert = sql.SQL("INSERT INTO t VALUES ({})").format(placeholders)
        with conn.cursor() as cursor:
            cursor.executemany(insert, [list(row.values()) for row in rows])
        for _ in range(rounds):
            author = Author(rng)
            source, truth = author.flat() if rng.random() < 0.3 else author.filter()
            where = compile_where(source, author.bindings)
            assert where.condition is not None
            assert CONDITION.fullmatch(where.condition.as_string(None))
            query = sql.SQL("SELECT id FROM t WHERE {} ORDER BY id").format(where.condition)
            try:
                found = [number for (number,) in conn.execute(query, where.parameters)]
            except psycopg.Error as error:
                pytest.fail(f"{source}\n{author.bindings}\n{error}")
            assert found == [row["id"] for row in rows if truth(row)], source
            some += 0 < len(found) < len(rows)
    assert some > rounds / 3
