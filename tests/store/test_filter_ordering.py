"""``ORDER BY`` and lists of columns."""

from __future__ import annotations

import pytest

from pgstructured.errors import FilterError, InvalidIdentifierError
from pgstructured.store._filter import compile_columns, compile_order_by


@pytest.mark.parametrize(
    ("order_by", "expected"),
    [
        ("a", '"a"'),
        ("a desc", '"a" DESC'),
        (
            " a ASC , b Desc nulls LAST,c nulls first ",
            '"a" ASC, "b" DESC NULLS LAST, "c" NULLS FIRST',
        ),
        ("desc desc, nulls nulls first, asc", '"desc" DESC, "nulls" NULLS FIRST, "asc"'),
        (["a desc", "b"], '"a" DESC, "b"'),
        (("a",), '"a"'),
    ],
)
def test_columns_with_directions(order_by, expected):
    compiled = compile_order_by(order_by)
    assert compiled is not None
    assert compiled.as_string() == expected


@pytest.mark.parametrize("order_by", [None, "", " \n", [], ()])
def test_no_order(order_by):
    assert compile_order_by(order_by) is None


@pytest.mark.parametrize(
    ("order_by", "position", "message"),
    [
        ("a,", 2, "expected a column"),
        ("a b", 2, "expected ASC, DESC, NULLS FIRST, NULLS LAST, a comma or the end"),
        ("a desc asc", 7, "a comma or the end"),
        ("a nulls", 7, "expected FIRST or LAST"),
        ("a; DROP TABLE t", 1, "unexpected ';'"),
        ("1", 0, "expected a column"),
        ("a, 'b'", 3, "expected a column"),
        ("a, lower(b)", 8, "a comma or the end"),
        ("x" * 64, 0, "63 bytes"),
        (["a", "b, c"], 1, "NULLS LAST, the end"),
        (["a", ""], 0, "expected a column"),
    ],
)
def test_anything_else_is_an_error_with_its_place(order_by, position, message):
    with pytest.raises(FilterError, match=message) as caught:
        compile_order_by(order_by)
    assert caught.value.position == position


@pytest.mark.parametrize("order_by", [["a", 5], [None], [b"a"]])
def test_terms_that_are_no_text(order_by):
    with pytest.raises(TypeError, match="order_by: expected str, not"):
        compile_order_by(order_by)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (None, "*"),
        (["a"], '"a"'),
        (("a", "B", "select"), '"a", "B", "select"'),
        ("a", '"a"'),
        (" a, b ", '"a", "b"'),
    ],
)
def test_columns(columns, expected):
    assert compile_columns(columns).as_string() == expected


@pytest.mark.parametrize(
    "columns", [[], "", ["a", "a"], "a, a", ["a b"], "*", ["count(*)"], [None]]
)
def test_what_are_no_columns(columns):
    with pytest.raises(InvalidIdentifierError):
        compile_columns(columns)
