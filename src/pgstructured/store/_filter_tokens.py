"""The words of a filter: names, values, operators, and where each of them stands.

What is no word at all becomes a token too, ``BAD``, which says what is wrong. So the first thing
that is wrong is the one that is reported, be it a letter or the grammar.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, auto
from typing import Final

from ._filter_tree import Number, Reference, Text


class Kind(Enum):
    """What sort of word."""

    WORD = auto()
    TEXT = auto()
    NUMBER = auto()
    REFERENCE = auto()
    COMPARISON = auto()
    OPEN = auto()
    CLOSE = auto()
    COMMA = auto()
    SIGN = auto()
    END = auto()
    BAD = auto()


@dataclass(frozen=True, slots=True)
class Token:
    """One word of a filter."""

    kind: Kind
    position: int
    text: str = ""
    """As it is written; of a ``BAD`` one, what is wrong."""
    value: Text | Number | Reference | None = None
    """Of a value, what it is."""

    @property
    def word(self) -> str:
        """The word in capitals, if it is one, else ``""``."""
        return self.text.upper() if self.kind is Kind.WORD else ""


# What the server has for `numeric`: so many digits before the point and behind it.
_MAX_WHOLE_DIGITS: Final = 131_072
_MAX_SCALE: Final = 16_383
_MAX_EXPONENT: Final = 8  # characters
_NO_NUMERIC: Final = "a number that Postgres does not have"

_NAME: Final = r"[A-Za-z_][A-Za-z0-9_]*"
_REFERENCE: Final = rf"\$(?:(?P<name>{_NAME})|\{{\s*(?P<path>{_NAME}(?:\.[A-Za-z0-9_]+)*)\s*\}})"
_TOKEN: Final = re.compile(
    rf"""
    \s*+
    (?:
        (?P<word> {_NAME} )
    |   (?P<number> [+-]? \.?[0-9][0-9.]* (?: [eE] [+-]? [0-9]+ )? )
    |   (?P<text> ' (?: [^'\\] | \\. | '' )*+ ' | " (?: [^"\\] | \\. | "" )*+ " )
    |   (?P<reference> {_REFERENCE} )
    |   (?P<comparison> <> | <= | >= | != | == | = | < | > )
    |   (?P<open> \( ) | (?P<close> \) ) | (?P<comma> , ) | (?P<sign> [+-] )
    |   (?P<end> \Z )
    |   (?P<bad> . )
    )
    """,
    re.VERBOSE | re.DOTALL,
)
_PIECE: Final = re.compile(
    rf"\\(?P<escaped>.)|(?P<quote>''|\"\")|{_REFERENCE}|(?P<broken>\$\{{)|[^\\$'\"]+|.", re.DOTALL
)
_UNSENDABLE: Final = re.compile("[\0\ud800-\udfff]")
_KINDS: Final = {
    "word": Kind.WORD,
    "reference": Kind.REFERENCE,
    "comparison": Kind.COMPARISON,
    "open": Kind.OPEN,
    "close": Kind.CLOSE,
    "comma": Kind.COMMA,
    "sign": Kind.SIGN,
    "end": Kind.END,
}
_HINTS: Final = {
    "'": "a string that begins here does not end",
    '"': "a string that begins here does not end",
    "$": "expected a binding's name after $, as in ${name}",
    "%": "unexpected '%': a value stands in quotes, or is a binding, ${name}",
    ";": "unexpected ';': a filter is one condition",
    "!": "unexpected '!': not equal is !=, and a condition is negated by NOT",
}


def tokens_of(source: str) -> list[Token]:
    """Return the words of `source` in order, ``END`` behind them."""
    return [_token(source, found) for found in _TOKEN.finditer(source)]


def is_sendable(text: str) -> bool:
    """Return whether Postgres can be given `text`: no NUL, no half of a surrogate pair."""
    return _UNSENDABLE.search(text) is None


def _token(source: str, found: re.Match[str]) -> Token:
    group = str(found.lastgroup)
    start = found.start(group)
    if found["number"] is not None:
        return _number(found["number"], start)
    if found["text"] is not None:
        return _text(source, start, found.end())
    if found["reference"] is not None:
        start = found.start("reference")
        return Token(Kind.REFERENCE, start, found["reference"], _reference(found, start))
    if found["bad"] is not None:
        character = found["bad"]
        return Token(Kind.BAD, start, _HINTS.get(character, f"unexpected {character!r}"))
    return Token(_KINDS[group], start, found[group])


def _reference(found: re.Match[str], position: int) -> Reference:
    return Reference(tuple((found["name"] or found["path"]).split(".")), position)


def _number(text: str, position: int) -> Token:
    mantissa, _, exponent = text.lower().partition("e")
    if mantissa.count(".") > 1:
        return Token(Kind.BAD, position, "not a number: there is more than one point in it")
    # First of all a short exponent, so that nothing here can fail or take long.
    if len(exponent) > _MAX_EXPONENT:
        return Token(Kind.BAD, position, _NO_NUMERIC)
    scale = len(mantissa.partition(".")[2]) - int(exponent or "0")
    value = Decimal(text)
    if value.adjusted() >= _MAX_WHOLE_DIGITS or scale > _MAX_SCALE:
        return Token(Kind.BAD, position, _NO_NUMERIC)
    whole = "." not in mantissa and not exponent
    fits = -(2**63) <= value < 2**63
    number = Number(text.lstrip("+"), int(value) if whole and fits else value)
    return Token(Kind.NUMBER, position, text, number)


def _text(source: str, start: int, end: int) -> Token:
    """Take a string apart: a backslash takes the next character as it is, two quotes are one."""
    bad = _UNSENDABLE.search(source, start, end)
    if bad is not None:
        return Token(Kind.BAD, bad.start(), "a character that Postgres has no text with")
    quote = source[start]
    pieces: list[str | Reference] = []
    plain = ""
    for found in _PIECE.finditer(source, start + 1, end - 1):
        if found["broken"] is not None:
            return Token(Kind.BAD, found.start(), r"expected ${name} here; a dollar sign is \$")
        if found["name"] is None and found["path"] is None:
            doubled = found["quote"] == 2 * quote
            plain += quote if doubled else found["escaped"] or found[0]
            continue
        if plain:
            pieces.append(plain)
            plain = ""
        pieces.append(_reference(found, found.start()))
    if plain or not pieces:
        pieces.append(plain)
    return Token(Kind.TEXT, start, source[start:end], Text(tuple(pieces), start))
