"""Nothing is acknowledged before it is settled, and nothing that is settled stands in line for long."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from outbox.consumer.acks import _LINE_SECONDS, Acks, Receipt
from outbox.consumer.delivery import Arrival

_ARRIVAL = Arrival(body=b"", message=None)


class Clock:
    """A time that passes when it is told to."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def delivered(*tags: int, clock: Clock | None = None) -> Acks:
    acks = Acks(clock or Clock())
    for tag in tags:
        acks.delivered(tag, _ARRIVAL)
    return acks


def test_a_settled_delivery_behind_one_that_was_only_just_opened_waits() -> None:
    acks = delivered(1, 2, 3)
    acks.settled(2)
    acks.settled(3)
    assert acks.ready() == ([], [])
    assert len(acks.unsettled()) == 1
    acks.settled(1)
    assert acks.ready() == ([1, 2, 3], [])
    assert len(acks) == 0


def test_settled_deliveries_behind_one_that_stays_open_are_acknowledged_singly() -> None:
    clock = Clock()
    acks = delivered(*range(1, 8), clock=clock)
    for tag in (1, 5, 3, 6):
        acks.settled(tag)
    assert acks.ready() == ([1], [])
    clock.now += _LINE_SECONDS
    assert acks.ready() == ([], [3, 5, 6])
    acks.settled(7)
    assert acks.ready() == ([], [7])
    acks.delivered(8, _ARRIVAL)
    acks.settled(8)
    assert acks.ready() == ([], [8])
    acks.settled(2)
    assert acks.ready() == ([2], [])
    assert len(acks) == 1
    acks.settled(4)
    assert acks.ready() == ([4], [])
    assert len(acks) == 0


def test_the_patience_with_an_open_delivery_begins_when_it_becomes_the_first() -> None:
    clock = Clock()
    acks = delivered(1, 2, 3, clock=clock)
    clock.now += 10 * _LINE_SECONDS
    acks.settled(1)
    acks.settled(3)
    assert acks.ready() == ([1], [])
    assert acks.ready(all_of_them=True) == ([], [3])


def test_what_was_handed_out_for_acknowledgement_is_not_handed_out_again() -> None:
    acks = delivered(1, 2)
    acks.settled(1)
    assert acks.ready() == ([1], [])
    assert acks.ready() == ([], [])
    acks.settled(2)
    assert acks.ready() == ([2], [])


def test_a_receipt_of_an_ended_connection_settles_nothing_on_the_new_one() -> None:
    old, new = delivered(1), delivered(1)
    Receipt(old, 1).settled()
    assert new.ready(all_of_them=True) == ([], [])
    assert len(new.unsettled()) == 1


@given(st.permutations(range(1, 13)), st.data())
def test_every_tag_is_acknowledged_once_after_it_is_settled_and_together_only_what_has_nothing_open_before_it(
    order: list[int], data: Any
) -> None:
    clock = Clock()
    acks = delivered(*range(1, 13), clock=clock)
    settled: set[int] = set()
    acknowledged: list[int] = []
    for tag in order:
        acks.settled(tag)
        settled.add(tag)
        if data.draw(st.booleans()):
            clock.now += data.draw(st.sampled_from([0.0, _LINE_SECONDS / 2, _LINE_SECONDS]))
            together, singly = acks.ready()
            acknowledged += together + singly
            assert settled.issuperset(acknowledged)
            assert all(number in acknowledged for last in together[-1:] for number in range(1, last + 1))
            first_open = min(set(range(1, 13)) - settled, default=13)
            assert set(range(1, first_open)) <= set(acknowledged)
        assert len(acks.unsettled()) == 12 - len(settled)
    together, singly = acks.ready(all_of_them=True)
    assert sorted(acknowledged + together + singly) == list(range(1, 13))
