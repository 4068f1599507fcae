"""Cursors as values: their text, and what snapshots say."""

from __future__ import annotations

import copy
import pickle
import random
import string

import pytest

from pgstructured._util import create
from pgstructured.log import Cursor, EventId
from pgstructured.log._cursors import CursorParts, Reach, Snapshot, parts_of

BEGINNING = Cursor.beginning()
TEXTS = (
    "beginning",
    "77.b0",
    "77.b3",
    "77.100-0~0",
    "77.100-20-0_7_19~4711",
    "77.100-20-7~4711.130-0~5000.4800",
    "77.b3.130-5-1_4~5000.0",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_round_trips(text):
    cursor = Cursor.parse(text)
    assert str(cursor) == text
    assert repr(cursor) == f"<Cursor {text}>"
    assert cursor == Cursor.parse(text)
    assert len({cursor, Cursor.parse(str(cursor))}) == 1
    assert pickle.loads(pickle.dumps(cursor)) == cursor
    assert copy.deepcopy(cursor) == cursor
    assert set(text) <= set(string.ascii_letters + string.digits + "-._~")  # as URLs allow


def test_cursors_differ():
    assert len({Cursor.parse(text) for text in TEXTS}) == len(TEXTS)
    assert Cursor.parse("77.b0") != BEGINNING
    assert BEGINNING != "beginning"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "77",
        "77.",
        "Beginning",
        "beginning ",
        " 77.b0",
        "77.b0\n",
        "77.b",
        "077.b0",
        "-1.b0",
        "77.100~1",
        "77.100-0",
        "77.0-5~1",  # no transaction is 0
        "77.100-20-~1",
        "77.100-20-7_7~1",  # twice
        "77.100-20-7_5~1",  # not in order
        "77.100-20-20~1",  # beyond the end
        "77.100-0-0~1",
        "77.100-20~1.130-0~2",  # a page without its place
        "77.100-20~1.130-0~2.",
        "77.100-20~1.b0.5",
        "77.100-20~1.130-0~2.5.5",
        "77.100-20~" + "9" * 19,  # no int8
        "\u0667\u0667.b0",  # digits of another script
        "77.b0" + "x" * 1000,
        "\0",
    ],
)
def test_what_is_no_cursors_text(text):
    with pytest.raises(ValueError, match="not the text of an event log's cursor") as caught:
        Cursor.parse(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", [None, 7, b"77.b0", BEGINNING])
def test_what_is_no_text(text):
    with pytest.raises(TypeError, match="must be a str"):
        Cursor.parse(text)


def test_any_text_is_a_cursor_or_a_value_error():
    lots = random.Random(5)
    alphabet = "0123456789b-_.~ \né"
    good = 0
    for _ in range(5000):
        text = list(lots.choice(TEXTS))
        for _ in range(lots.randrange(4)):
            text[lots.randrange(len(text))] = lots.choice(alphabet)
        try:
            cursor = Cursor.parse("".join(text))
        except ValueError:
            continue
        good += 1
        assert str(cursor) == "".join(text)
    assert good > 100


def test_any_cursor_has_a_text():
    lots = random.Random(6)

    def some_reach():
        xmin = lots.randrange(1, 2**55)
        span = lots.randrange(60)
        running = sorted(lots.sample(range(span), lots.randrange(span + 1)))
        snapshot = Snapshot(xmin, xmin + span, tuple(xmin + each for each in running))
        assert Snapshot.parse(str(snapshot)) == snapshot
        return Reach(snapshot, EventId(lots.randrange(2**55)))

    for _ in range(300):
        parts = CursorParts(
            lots.randrange(2**40),
            seen=some_reach(),
            window=some_reach(),
            after=EventId(lots.randrange(2**55)),
        )
        cursor = create(Cursor, parts)
        assert parts_of(Cursor.parse(str(cursor))) == parts


def test_making_one_by_hand():
    with pytest.raises(TypeError, match="no public constructor"):
        Cursor(CursorParts(None))


def test_snapshots_are_in_the_order_of_time():
    """As the server takes them while transactions begin and end."""
    lots = random.Random(7)
    ended, following = set(range(1, 10)), 10
    running: set[int] = set()
    taken = []
    for _ in range(200):
        if running and lots.random() < 0.5:
            xid = lots.choice(sorted(running))
            running.discard(xid)
            ended.add(xid)
        else:
            running.add(following)
            following += 1
        xmax = max(ended) + 1
        below = tuple(sorted(xid for xid in running if xid < xmax))
        taken.append((Snapshot(min((*below, xmax)), xmax, below), set(ended)))
    for one, seen_by_one in taken:
        for other, seen_by_other in taken:
            assert one.covers(other) == (seen_by_one >= seen_by_other)


def test_a_transaction_of_ones_own():
    snapshot = Snapshot(5, 10, (5, 8))
    assert snapshot.without(7) == Snapshot(5, 10, (5, 7, 8))
    assert snapshot.without(8) == snapshot
    assert snapshot.without(10) == snapshot
