from __future__ import annotations

import math
from itertools import pairwise

import pytest

from outbox.relay.position import Position


def read(position: Position, now: float, *, last: int | None = None, took: float = 0.001, revisit: int | None = None) -> int:
    after = position.next(now, revisit)
    position.returned(after, last, began=now, ended=now + took)
    return after


def test_the_first_read_is_from_the_start() -> None:
    assert Position().next(0.0, None) == 0


def test_reads_go_ahead_of_what_was_read_between_reads_from_the_start() -> None:
    position = Position()
    read(position, 10.0, last=500)
    read(position, 12.0, last=600)
    read(position, 14.0, last=900)  # the floor is 600 now
    starts = [read(position, 14.002 + n / 1000) for n in range(40)]
    assert set(starts) == {600, 900}
    assert starts.count(600) < starts.count(900)


@pytest.mark.parametrize(("took", "at_most_every"), [(0.0001, 0.1), (0.1, 1.0), (2.0, 20.0)])
def test_reads_from_the_start_are_frequent_when_cheap_and_take_a_tenth_of_the_time_when_not(
    took: float, at_most_every: float
) -> None:
    position = Position()
    now, full, spent = 0.0, [], 0.0
    while now < 30 * at_most_every:
        full_read = position.next(now, None) == 0
        cost = took if full_read else 0.0001
        read(position, now, last=int(now * 1000) + 1, took=cost)
        if full_read:
            full.append(now)
            spent += cost
        now += cost + 0.002
    pauses = [later - earlier for earlier, later in pairwise(full)]
    assert max(pauses) <= at_most_every + 0.01
    assert spent / now <= 0.11


def test_the_floor_is_where_reads_had_arrived_a_second_ago() -> None:
    position = Position()
    for n in range(1, 31):
        read(position, n / 10, last=n * 100, took=0.0)
    starts = {position.next(3.01, None), position.next(3.02, None)}
    assert starts == {2000}


def test_a_revisit_starts_where_rows_were_passed_over_or_below() -> None:
    position = Position()
    read(position, 0.0, last=1000)
    read(position, 2.0, last=2000)
    assert position.next(2.002, 40) == 40
    read(position, 2.003, revisit=1500)
    assert read(position, 2.003, revisit=None) == 2000


def test_a_read_from_the_start_that_somebody_waits_for_is_due_as_soon_as_its_cost_allows() -> None:
    position = Position()
    read(position, 0.0, took=0.1)
    assert position.full_wanted_at == math.inf
    position.want_full()
    assert position.full_wanted_at == pytest.approx(1.0)


def test_rows_that_did_not_fit_are_where_the_next_read_ahead_starts() -> None:
    position = Position()
    read(position, 0.0, last=1000)
    read(position, 2.0, last=2000)
    position.stop_before(1801)
    position.next(2.0011, None)
    assert read(position, 2.003) == 1800
