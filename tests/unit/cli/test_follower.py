"""Which rows `outbox tail` prints: each once, also those whose lower numbers appear after higher ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outbox.cli.messages import Follower


def _read(follower: Follower, rows: list[int]) -> list[int]:
    fresh = follower.unseen(rows)
    follower.seen(fresh)
    return fresh


def test_a_lower_row_that_commits_late_is_still_seen() -> None:
    follower = Follower(floor=0, patience=3)
    assert _read(follower, [1, 3]) == [1, 3]
    assert _read(follower, [1, 2, 3]) == [2]
    assert _read(follower, [1, 2, 3]) == []


def test_a_reading_that_failed_half_way_is_read_again() -> None:
    follower = Follower(floor=0, patience=3)
    assert follower.unseen([1, 2]) == [1, 2]  # then the connection is lost
    assert _read(follower, [1, 2]) == [1, 2]


def test_the_floor_follows_after_as_many_readings_as_it_has_patience() -> None:
    follower = Follower(floor=0, patience=2)
    _read(follower, [5])
    _read(follower, [5])
    assert follower.floor == 0
    _read(follower, [5])
    assert follower.floor == 5


@given(st.permutations(range(1, 30)), st.lists(st.integers(1, 5), min_size=1, max_size=10))
def test_every_row_that_appears_in_time_is_printed_once(order: list[int], sizes: list[int]) -> None:
    patience = 40
    follower = Follower(floor=0, patience=patience)
    committed: list[int] = []
    printed: list[int] = []
    remaining = list(order)
    while remaining:
        size = sizes[len(committed) % len(sizes)]
        committed += remaining[:size]
        del remaining[:size]
        printed += _read(follower, sorted(row for row in committed if row > follower.floor))
    assert sorted(printed) == sorted(order)
