"""Nothing is acknowledged before everything up to it is settled, whatever order the workers finish in."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from outbox.consumer.acks import Acks, Receipt
from outbox.consumer.arrival import Arrival

_ARRIVAL = Arrival(body=b"", message=None)


def delivered(*tags: int) -> Acks:
    acks = Acks()
    for tag in tags:
        acks.delivered(tag, _ARRIVAL)
    return acks


def test_a_settled_delivery_behind_an_unsettled_one_waits() -> None:
    acks = delivered(1, 2, 3)
    acks.settled(2)
    acks.settled(3)
    assert acks.ready() == []
    assert len(acks.unsettled()) == 1
    acks.settled(1)
    assert acks.ready() == [1, 2, 3]
    assert len(acks) == 0


def test_what_was_handed_out_for_acknowledgement_is_not_handed_out_again() -> None:
    acks = delivered(1, 2)
    acks.settled(1)
    assert acks.ready() == [1]
    assert acks.ready() == []
    acks.settled(2)
    assert acks.ready() == [2]


def test_a_receipt_of_an_ended_connection_settles_nothing_on_the_new_one() -> None:
    old, new = delivered(1), delivered(1)
    Receipt(old, 1).settled()
    assert new.ready() == []
    assert len(new.unsettled()) == 1


@given(st.permutations(range(1, 13)), st.data())
def test_the_tags_ready_are_always_the_longest_settled_prefix(order: list[int], data: Any) -> None:
    acks = delivered(*range(1, 13))
    settled: set[int] = set()
    acknowledged: list[int] = []
    for tag in order:
        acks.settled(tag)
        settled.add(tag)
        if data.draw(st.booleans()):
            acknowledged += acks.ready()
            expected = next((number for number in range(1, 14) if number not in settled), 14) - 1
            assert acknowledged == list(range(1, expected + 1))
    acknowledged += acks.ready()
    assert acknowledged == list(range(1, 13))
