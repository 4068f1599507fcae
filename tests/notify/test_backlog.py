"""The buffer: exact counts, gaps where the losses were, for every policy."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings, strategies as st

from pgstructured.notify import Gap, Notification
from pgstructured.notify._backlog import Backlog, Overflow


def numbered(start: int, count: int, generation: int = 1) -> list[Notification[Any]]:
    return [
        Notification(channel="c", payload=str(start + i), generation=generation)
        for i in range(count)
    ]


def told(items) -> list[Any]:
    return [
        int(item.payload)
        if isinstance(item, Notification)
        else (item.reason, item.generation, item.lost, item.outage)
        for item in items
    ]


def drain(backlog: Backlog) -> list[Any]:
    items = []
    while (item := backlog.take()) is not None:
        items.append(item)
    assert not backlog
    return told(items)


def test_oldest_are_dropped_and_the_gap_comes_first() -> None:
    backlog = Backlog(3, "drop_oldest", keeps_marks=True)
    backlog.offer(numbered(0, 2))
    backlog.offer(numbered(2, 3))
    assert drain(backlog) == [("lagged", 1, 2, None), 2, 3, 4]
    backlog.offer(numbered(5, 10))
    assert backlog.take_many(2, with_gaps=True) == [
        Gap(reason="lagged", generation=1, lost=7),
        numbered(12, 1)[0],
    ]
    backlog.offer(numbered(15, 2))
    assert drain(backlog) == [("lagged", 1, 1, None), 14, 15, 16]
    backlog.close()


def test_a_gap_is_of_the_generation_of_what_is_missing_there() -> None:
    backlog = Backlog(3, "drop_oldest", keeps_marks=True)
    backlog.offer(numbered(0, 3))
    backlog.mark_reconnected(2, 1.0)
    backlog.offer(numbered(3, 1, 2))
    assert drain(backlog) == [("lagged", 1, 1, None), 1, 2, ("reconnected", 2, None, 1.0), 3]
    backlog.offer(numbered(4, 3, 2))
    backlog.mark_reconnected(3, 1.0)
    backlog.offer(numbered(7, 5, 3))
    assert drain(backlog) == [("reconnected", 3, None, 1.0), 9, 10, 11]
    backlog.close()


def test_newest_are_dropped_and_the_gap_comes_last() -> None:
    backlog = Backlog(3, "drop_newest", keeps_marks=True)
    backlog.offer(numbered(0, 2))
    backlog.offer(numbered(2, 3))
    backlog.offer(numbered(5, 1))
    assert told([backlog.take()]) == [0]
    backlog.offer(numbered(6, 1))
    assert drain(backlog) == [1, 2, ("lagged", 1, 3, None), 6]
    backlog.close()


def test_latest_keeps_one_and_makes_no_lag_gap() -> None:
    backlog = Backlog(100, "latest", keeps_marks=True)
    backlog.offer(numbered(0, 5))
    backlog.mark_reconnected(2, 0.5)
    backlog.offer(numbered(5, 2))
    assert drain(backlog) == [("reconnected", 2, None, 0.5), 6]
    assert (backlog.offered, backlog.lost) == (7, 6)
    backlog.close()


def test_close_keeps_what_fits() -> None:
    backlog = Backlog(3, "close", keeps_marks=True)
    assert backlog.offer(numbered(0, 3))
    assert not backlog.offer(numbered(3, 2))
    assert drain(backlog) == [0, 1, 2]
    assert backlog.lost == 2
    backlog.close()
    backlog = Backlog(3, "close", keeps_marks=True)
    assert not backlog.offer(numbered(0, 5))
    assert drain(backlog) == [0, 1, 2]
    backlog.close()


def test_adjacent_gaps_merge() -> None:
    backlog = Backlog(2, "drop_oldest", keeps_marks=True)
    backlog.mark_reconnected(2, 1.0)
    backlog.mark_reconnected(3, 0.5)
    backlog.offer(numbered(0, 1))
    backlog.mark_reconnected(4, 0.25)
    assert drain(backlog) == [("reconnected", 3, None, 1.5), 0, ("reconnected", 4, None, 0.25)]
    # What lies between two gaps is dropped: they become one.
    backlog.offer(numbered(1, 2))
    backlog.mark_reconnected(5, 1.0)
    backlog.offer(numbered(3, 2))
    assert drain(backlog) == [("reconnected", 5, None, 1.0), 3, 4]
    backlog.mark_reconnected(6, 1.0)
    backlog.mark_subscribed(6)
    assert drain(backlog) == [("reconnected", 6, None, 1.0)]
    backlog.close()


def test_without_gaps_counts_stay_exact() -> None:
    policies: list[Overflow] = ["drop_oldest", "drop_newest"]
    for overflow in policies:
        backlog = Backlog(2, overflow, keeps_marks=False)
        backlog.offer(numbered(0, 5))
        backlog.mark_reconnected(2, 1.0)
        backlog.mark_subscribed(2)
        assert drain(backlog) == ([3, 4] if overflow == "drop_oldest" else [0, 1])
        assert backlog.lost == 3
        backlog.close()


def test_many_end_before_a_gap_that_is_to_be_raised() -> None:
    backlog = Backlog(9, "drop_oldest", keeps_marks=True)
    backlog.offer(numbered(0, 2))
    backlog.mark_reconnected(2, 1.0)
    backlog.offer(numbered(2, 2))
    assert told(backlog.take_many(9, with_gaps=False)) == [0, 1]
    assert backlog.take_many(9, with_gaps=False) == []
    assert told([backlog.take()]) == [("reconnected", 2, None, 1.0)]
    assert told(backlog.take_many(9, with_gaps=False)) == [2, 3]
    backlog.close()


def test_clearing_forgets_everything() -> None:
    backlog = Backlog(2, "drop_newest", keeps_marks=True)
    backlog.offer(numbered(0, 5))
    backlog.clear()
    assert not backlog
    assert (backlog.depth, backlog.offered, backlog.lost) == (0, 0, 0)
    backlog.offer(numbered(5, 1))
    assert drain(backlog) == [5]
    backlog.offer(numbered(6, 5))
    backlog.close()
    assert not backlog
    assert backlog.offered - backlog.lost - backlog.depth == 1


def test_the_run_of_all_is_never_changed() -> None:
    """Subscribers share one list."""
    run = numbered(0, 4)
    backlogs = [Backlog(2, "drop_oldest", keeps_marks=True), Backlog(9, "latest", keeps_marks=True)]
    for backlog in backlogs:
        backlog.offer(run)
        backlog.take()
        backlog.close()
    assert told(run) == [0, 1, 2, 3]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(1, 12)),
        st.tuples(st.just("take"), st.integers(1, 6)),
        st.tuples(st.just("many"), st.integers(1, 12)),
        st.tuples(st.just("reconnect"), st.just(0)),
    ),
    max_size=60,
)


@given(
    st.integers(1, 9), st.sampled_from(["drop_oldest", "drop_newest", "latest", "ignoring"]), steps
)
@settings(max_examples=300, deadline=None)
def test_received_and_lost_make_all(capacity, policy, plan) -> None:
    """Order is kept, nothing comes twice, and each gap counts what is missing there."""
    overflow: Overflow = "drop_oldest" if policy == "ignoring" else policy

    backlog = Backlog(capacity, overflow, keeps_marks=policy != "ignoring")
    published = reconnects = 0
    seen: list[Any] = []
    generations: list[int] = []

    def note(items) -> None:
        items = list(items)
        seen.extend(told(items))
        generations.extend(item.generation for item in items)

    for step, count in plan:
        if step == "offer":
            backlog.offer(numbered(published, count, reconnects))
            published += count
        elif step == "reconnect":
            reconnects += 1
            backlog.mark_reconnected(reconnects, 1.0)
        elif step == "many":
            note(backlog.take_many(count, with_gaps=True))
        else:
            note(item for _ in range(count) if (item := backlog.take()) is not None)
        assert backlog.depth <= (1 if policy == "latest" else capacity)
        assert backlog._send.statistics().current_buffer_used <= 2 * capacity + 1
    note(iter(backlog.take, None))
    assert not backlog
    assert backlog.depth == 0
    assert generations == sorted(generations)
    numbers = [item for item in seen if isinstance(item, int)]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + backlog.lost == backlog.offered == published
    outages = sum(item[3] or 0.0 for item in seen if not isinstance(item, int))
    assert outages == (reconnects if policy != "ignoring" else 0)
    expected = 0
    gaps: list[Any] = []  # several in a row where one was taken before the next came
    for item in [*seen, published]:
        if not isinstance(item, int):
            gaps.append(item)
            continue
        missing = item - expected
        if policy in ("drop_oldest", "drop_newest"):
            if all(gap[0] == "lagged" for gap in gaps):
                assert missing == sum(gap[2] for gap in gaps)
        else:
            assert all(gap[0] == "reconnected" for gap in gaps)
        expected = item + 1
        gaps.clear()
    backlog.close()
