"""Notes: names of keys in a comment at the end of a statement."""

from __future__ import annotations

import hmac

import psycopg
import pytest
from hypothesis import example, given, settings, strategies as st

from pgstructured.driver import open_session
from pgstructured.locks import LockKey
from pgstructured.locks._names import INTRO, MARKER, note, read_names

NASTY = [
    "nightly",
    'a"b\\c',
    "\\",
    '\\"',
    "line\nend\r\u2028\u0085 DROP TABLE x",
    "nul\0byte, escape \x1b, delete \x7f",
    "*/ /* -- ' $$ $1 %s",
    INTRO,
    INTRO + '"5": "evil"}',
    "café 漢字 😀",
    "\ud800 alone",
    "{}[],: ",
    "",
]
names = st.one_of(st.sampled_from(NASTY), st.text(max_size=60), st.text('\\"{}, -', max_size=20))
numbers = st.integers(-(2**63), 2**63 - 1)
halves = st.integers(-(2**31), 2**31 - 1)
keys = st.one_of(
    st.builds(lambda n, name: LockKey(as_bigint=n, name=name), numbers, names),
    st.builds(lambda a, b, name: LockKey(as_pair=(a, b), name=name), halves, halves, names),
)


def told(*given_keys):
    return {key: key.name for key in given_keys}


def test_its_shape():
    assert note([LockKey.named("nightly")]) == (
        ' -- pgstructured {"7749196658885172899": "nightly"}'
    )
    assert note([LockKey(as_bigint=-1, name="é"), LockKey(as_pair=(1, -2), name="b")]) == (
        ' -- pgstructured {"-1": "\\u00e9", "1,-2": "b"}'
    )


def test_without_names_there_is_none():
    assert note([]) == note([LockKey.bigint(1), LockKey.pair(1, 2), MARKER]) == ""
    assert note([LockKey.bigint(1), LockKey(as_bigint=2, name="b")]).count(":") == 1


def test_two_names_of_one_number():
    assert note([LockKey(as_bigint=1, name="a")]) != note([LockKey(as_bigint=1, name="b")])


def test_the_marker_is_derived_as_its_text_says():
    secret = hmac.digest(bytes(32), b"", "sha256")
    output = hmac.digest(secret, b"pgstructured marker v1\x01", "sha256")
    assert LockKey.bigint(int.from_bytes(output[:8], "little", signed=True)) == MARKER


def test_what_comes_first_is_told_first():
    many = [LockKey(as_bigint=n, name=f"name {n}") for n in range(200)]
    text = note(many)
    assert 850 < len(text) <= 900
    found = list(read_names(text).items())
    assert found == [(key, key.name) for key in many[: len(found)]]


@pytest.mark.parametrize("length", range(870, 900))
def test_a_name_too_long_to_be_told_hides_no_other(length):
    long, short = LockKey(as_bigint=1, name="x" * length), LockKey(as_bigint=2, name="b")
    text = note([long, short])
    assert len(text) <= 900
    assert read_names(text) in (told(long), told(short))
    # Only what could not have been told with all the room there is:
    assert (long in read_names(text)) == (len(INTRO) + len(f'"1": "{long.name}"' + "}") <= 898)


@settings(deadline=None)
@given(st.lists(keys, max_size=30, unique=True))
def test_it_can_be_read_back(some):
    text = note(some)
    assert text.isascii()
    assert len(text) <= 900
    assert text.isprintable()
    found = read_names(f"SELECT 1{text}")
    assert found == dict(list(told(*some).items())[: len(found)])
    assert found or not some
    # Behind whatever stands before it.
    assert read_names(f'SELECT \'{INTRO}"1": "x"\'{text}') == found or not some


@settings(max_examples=50, deadline=None)
@given(st.lists(keys, max_size=6, unique=True))
@example([LockKey(as_bigint=n, name=name) for n, name in enumerate(NASTY)])
def test_it_may_be_cut_anywhere(some):
    text = f"SELECT 1{note(some)}"
    whole = list(told(*some).items())
    for end in range(len(text) + 1):
        found = read_names(text[:end])
        assert list(found.items()) == whole[: len(found)]


@settings(deadline=None)
@given(st.one_of(st.text(), st.text('"\\{}:, -0123456789u').map(lambda text: INTRO + text)))
@example(INTRO + '"99999999999999999999": "x"')
@example(INTRO + '"9223372036854775808": "out of range", "1": "a"}')
@example(INTRO + '"1,9999999999": "x"')
@example(INTRO + '"1": "\\x"')
@example(INTRO + '"1": "a\nb"')
@example(INTRO + '"1": ' + "[" * 100_000)
@example(INTRO + '"1": "' + "\\" * 100_001)
@example("<insufficient privilege>")
def test_anything_can_be_read(text):
    for key, name in read_names(text).items():
        assert isinstance(key, LockKey)
        assert isinstance(name, str)


def test_what_is_wrong_hides_nothing_else():
    text = f'{INTRO}"9223372036854775808": "out of range", "1": "\\x", "2": "b"}}'
    assert read_names(text) == {LockKey.bigint(2): "b"}


async def test_the_server_takes_and_shows_it(pg_dsn, pg_cluster):
    some = [LockKey(as_bigint=n, name=name) for n, name in enumerate(NASTY)]
    async with open_session(pg_dsn) as session:
        for statement in ("SELECT 1", ""):
            for key in some:
                await session.execute(statement + note([key]))
                (shown,) = pg_cluster.sessions(pg_dsn)
                assert read_names(shown.query) == told(key)
            await session.execute(statement + note(some))
            (shown,) = pg_cluster.sessions(pg_dsn)
            assert read_names(shown.query) == told(*some)
        with pytest.raises(psycopg.errors.SyntaxError):  # the comment ends there, as ever
            await session.execute(f"SELECT 1{note(some)}\n)")
