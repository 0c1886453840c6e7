from __future__ import annotations

import math
from itertools import pairwise

import pytest

from outbox.relay.order.read_position import Position, Span


def read(
    position: Position,
    now: float,
    *,
    last: int | None = None,
    end: int | None = None,
    took: float = 0.001,
    revisit: int | None = None,
) -> int:
    span = position.next(now, revisit)
    position.returned(span, last, end, began=now, ended=now + took)
    return span.after


def test_the_first_read_is_from_the_start() -> None:
    assert Position().next(0.0, None).after == 0


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
        full_read = position.next(now, None).after == 0
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
    starts = {position.next(3.01, None).after, position.next(3.02, None).after}
    assert starts == {2000}


def test_a_revisit_starts_where_rows_were_passed_over_or_below() -> None:
    position = Position()
    read(position, 0.0, last=1000)
    read(position, 2.0, last=2000)
    assert position.next(2.002, 40).after == 40
    assert read(position, 2.003, revisit=1500) == 1500
    assert read(position, 2.003, revisit=None) == 2000


def test_a_read_from_the_start_that_somebody_waits_for_is_due_as_soon_as_its_cost_allows() -> None:
    position = Position()
    read(position, 0.0, took=0.1)
    assert position.full_wanted_at == math.inf
    position.want_full()
    assert position.full_wanted_at == pytest.approx(1.0)


def test_a_read_that_ends_early_is_gone_on_from_there() -> None:
    position = Position()
    read(position, 0.0, last=1000)
    read(position, 2.0, last=2000, end=1800)
    assert read(position, 2.001) == 1800


def test_reads_from_the_start_go_on_page_by_page_until_they_reach_where_reads_have_come_and_begin_anew() -> None:
    position = Position()
    read(position, 0.0, last=10_000)
    starts = []
    for n in range(1, 9):
        after = position.next(n, None).after
        starts.append(after)
        read(position, n, end=min(after + 3000, 10_000))  # full of what must wait
        assert read(position, n + 0.0001) == 10_000  # the next read goes ahead, each time
    assert starts == [0, 3000, 6000, 9000, 0, 3000, 6000, 9000]


def test_a_round_of_reads_from_the_start_is_finished_though_nobody_waits_for_it() -> None:
    position = Position()
    read(position, 0.0, last=10_000)
    read(position, 1.0, end=3000, took=0.1)
    assert position.full_wanted_at == pytest.approx(2.0)
    read(position, 1.1)
    read(position, 2.1, took=0.1)
    assert position.full_wanted_at == math.inf


def test_who_waits_for_a_read_from_the_start_during_a_round_gets_the_next_one() -> None:
    position = Position()
    read(position, 0.0, last=10_000)
    read(position, 1.0, end=3000)
    position.want_full()  # it may be below 3000
    read(position, 1.1)
    assert read(position, 2.0) == 3000
    assert position.full_wanted_at < math.inf


def test_reads_from_the_floor_reach_what_is_ahead_of_it_in_pages() -> None:
    position = Position()
    read(position, 0.0, last=100)
    read(position, 2.0, last=10_000)  # nothing is at the start
    position.returned(Span(0), None, None, began=2.0, ended=2.001)
    assert [read(position, 2.01, end=3000), read(position, 2.01), read(position, 2.02, end=6000)] == [100, 10_000, 3000]


def test_every_second_read_is_far_ahead_until_the_others_have_come_there() -> None:
    position = Position()
    read(position, 0.0, end=2000)
    position.scout_from(7000)
    starts = []
    for n in range(5):
        starts.append(read(position, 0.001, last=9000 if n == 0 else None))  # the scout finds something once
        if position.scouting:
            starts.append(read(position, 0.001, end=4000 + 2000 * n))
    assert starts == [7000, 2000, 9000, 4000, 9000, 6000, 9000, 8000, 10_000]
    assert not position.scouting


def test_who_has_nearly_come_to_the_newest_sends_no_scout() -> None:
    position = Position()
    read(position, 0.0, end=2000)
    position.scout_from(1500)
    assert not position.scouting


def test_where_dead_rows_make_pages_long_they_go_over_fewer_ids_and_over_more_again_later() -> None:
    position = Position()
    read(position, 0.0, last=1_000_000)

    def round_from_start(now: float, *, took_each: float) -> list[int]:
        """Read from the start to the end; return over how many ids each page went."""
        pages = []
        while True:
            span = position.next(now, None)
            upto = 1_000_000 if span.upto is None else span.upto
            took = took_each * (upto - span.after)
            position.returned(span, None, span.upto, began=now, ended=now + took)
            now += took * 10 + 0.001
            if span.sweeps_all:
                pages.append(upto - span.after)
                if span.upto is None:
                    return pages

    assert round_from_start(10.0, took_each=1e-6) == [1_000_000]  # a second: once
    assert max(round_from_start(100.0, took_each=1e-6)) <= 40_000
    assert max(round_from_start(200.0, took_each=1e-6)) <= 40_000
    for n in range(10):  # the old snapshot is gone, and the dead rows with it
        pages = round_from_start(300.0 + 100 * n, took_each=1e-10)
    assert pages == [1_000_000]
