"""Messages that wait for a worker: a key in one pair of hands, in order; suspects alone."""

from __future__ import annotations

import threading
from collections import defaultdict
from math import inf
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from outbox.consumer.delivery import Arrival, read, slim
from outbox.consumer.key_lanes import Waiting
from outbox.message import cloud_event
from tests.kit.consuming import message
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence


def arrival(key: str | None, number: int, *, returns: int = 0) -> Arrival:
    body = cloud_event(message(number, key=key, sequence=number if key else None))
    return read(body, headers={"x-delivery-count": returns}, redelivered=returns > 0)


def filled(*arrivals: Arrival) -> Waiting:
    waiting = Waiting()
    for each in arrivals:
        waiting.add(each)
    return waiting


def taken(waiting: Waiting, limit: int) -> list[tuple[str | None, int]]:
    return named(waiting.take(limit) or [])


def named(batch: Sequence[Arrival]) -> list[tuple[str | None, int]]:
    return [(each.message.key, each.message.data["number"]) for each in batch if each.message]


def test_a_worker_gets_what_waits_up_to_its_limit() -> None:
    waiting = filled(arrival(None, 1), arrival("a", 2), arrival(None, 3))
    assert sorted(number for _, number in taken(waiting, 2)) == [1, 3]  # one lane after the other
    assert taken(waiting, 2) == [("a", 2)]


def test_a_key_in_one_workers_hands_waits_for_its_release() -> None:
    waiting = filled(arrival("a", 1), arrival("a", 2), arrival("b", 3))
    first = waiting.take(1)
    assert first is not None
    assert named(first) == [("a", 1)]
    assert taken(waiting, 10) == [("b", 3)]
    waiting.add(arrival("a", 4))
    waiting.release(first)
    assert taken(waiting, 10) == [("a", 2), ("a", 4)]


def test_messages_without_a_key_wait_for_nobody() -> None:
    waiting = filled(arrival(None, 1), arrival(None, 2))
    assert taken(waiting, 1) == [(None, 1)]
    assert taken(waiting, 1) == [(None, 2)]


def test_a_suspect_comes_alone() -> None:
    waiting = filled(
        arrival("a", 1), arrival("a", 2, returns=3), arrival("a", 3), arrival(None, 4, returns=7), arrival(None, 5)
    )
    batches = []
    while len(waiting):
        batch = waiting.take(10)
        assert batch is not None
        batches.append(named(batch))
        waiting.release(batch)
    assert [("a", 2)] in batches
    assert [(None, 4)] in batches
    assert sum(map(len, batches)) == 5


def test_a_worker_that_waits_is_woken_by_a_message_and_by_the_end() -> None:
    waiting, got = Waiting(), []

    def work() -> None:
        while (batch := waiting.take(5)) is not None:
            got.append(named(batch))
            waiting.release(batch)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    waiting.add(arrival("a", 1))
    eventually(lambda: got == [[("a", 1)]])
    waiting.close()
    thread.join(5)
    assert not thread.is_alive()


def test_what_a_lost_connection_had_delivered_is_forgotten_but_a_key_in_hand_stays_in_hand() -> None:
    waiting = filled(arrival("a", 1), arrival("a", 2), arrival("b", 3), arrival(None, 4))
    batch = waiting.take(1)
    assert batch is not None
    waiting.clear()
    assert len(waiting) == 0
    waiting.add(arrival("a", 1))  # delivered again, while a worker still has it
    waiting.add(arrival("b", 3))
    assert taken(waiting, 10) == [("b", 3)]
    waiting.release(batch)
    assert taken(waiting, 10) == [("a", 1)]


def test_nothing_is_handed_out_after_the_end() -> None:
    waiting = filled(arrival("a", 1))
    waiting.close()
    assert waiting.take(1) is None


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 4)), max_size=30),
    st.lists(st.integers(1, 5), min_size=60, max_size=60),
    st.data(),
)
def test_every_message_comes_once_and_those_of_a_key_in_order_and_never_in_two_hands(
    messages: list[tuple[str | None, int]], limits: list[int], data: Any
) -> None:
    waiting = Waiting()
    coming = [arrival(key, number, returns=returns) for number, (key, returns) in enumerate(messages, 1)]
    there: list[Arrival] = []
    hands: list[list[Arrival]] = []
    order: dict[str | None, list[int]] = defaultdict(list)
    for limit in limits:
        for _ in range(min(len(coming), data.draw(st.integers(0, 3)))):
            there.append(coming.pop(0))
            waiting.add(there[-1])
        busy = {each.key for hand in hands for each in hand} - {None}
        if any(each.key not in busy for each in there) and data.draw(st.booleans()):
            batch = waiting.take(limit) or []
            assert not busy & {each.key for each in batch}
            assert 1 <= len(batch) <= limit
            assert len(batch) == 1 or not any(each.suspect for each in batch)
            hands.append(batch)
            there = [each for each in there if each not in batch]
            for key, number in named(batch):
                order[key].append(number)
        elif hands:
            waiting.release(hands.pop(data.draw(st.integers(0, len(hands) - 1))))
    for each in coming:
        waiting.add(each)
    for hand in hands:
        waiting.release(hand)
    while len(waiting):
        batch = waiting.take(5) or []
        for key, number in named(batch):
            order[key].append(number)
        waiting.release(batch)
    assert sorted(number for numbers in order.values() for number in numbers) == list(range(1, len(messages) + 1))
    assert all(numbers == sorted(numbers) for numbers in order.values())


# --- what shares a batch -------------------------------------------------------------------------------------------------


def slow(seconds: dict[int, float], *arrivals: Arrival) -> Waiting:
    """Messages of which some take so many seconds, by their number."""
    waiting = Waiting(lambda each: seconds.get(each.message.data["number"], 0.0) if each.message else 0.0)
    for each in arrivals:
        waiting.add(each)
    return waiting


def batches(waiting: Waiting) -> list[list[int]]:
    found = []
    while len(waiting):
        batch = waiting.take(50) or []
        found.append([number for _, number in named(batch)])
        waiting.release(batch)
    return found


def test_a_batch_is_no_more_than_a_second_of_work() -> None:
    waiting = slow(dict.fromkeys(range(1, 11), 0.3), *(arrival(f"key:{number}", number) for number in range(1, 11)))
    assert batches(waiting) == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10]]


def test_what_may_take_long_comes_alone_and_the_rest_together() -> None:
    waiting = slow({3: 60.0, 5: inf}, *(arrival(f"key:{number}", number) for number in range(1, 8)))
    assert batches(waiting) == [[1, 2], [3], [4], [5], [6, 7]]


def test_messages_behind_a_slow_one_of_their_key_wait_for_its_release() -> None:
    waiting = slow({1: 60.0}, arrival("a", 1), arrival("a", 2), arrival("b", 3))
    first = waiting.take(50) or []
    assert named(first) == [("a", 1)]
    assert taken(waiting, 50) == [("b", 3)]
    waiting.release(first)
    assert taken(waiting, 50) == [("a", 2)]


def test_messages_without_a_key_take_turns_with_keys() -> None:
    waiting = slow(dict.fromkeys(range(1, 4), 1.0), *(arrival(None, number) for number in range(1, 4)), arrival("a", 4))
    assert batches(waiting) == [[1, 4], [2], [3]]


def test_each_of_several_slow_messages_without_a_key_wakes_another_worker() -> None:
    waiting = slow({1: inf, 2: inf}, arrival(None, 1), arrival(None, 2))
    got: list[list[tuple[str | None, int]]] = []
    workers = [threading.Thread(target=lambda: got.append(taken(waiting, 50)), daemon=True) for _ in range(2)]
    for each in workers:
        each.start()
    for each in workers:
        each.join(5)
    assert sorted(got) == [[(None, 1)], [(None, 2)]]


def test_a_batch_holds_no_more_than_a_mebibyte_of_bodies_but_at_least_one() -> None:
    def large(number: int, size: int) -> Arrival:
        body = b'{"number":%d,"text":"%s"}' % (number, b"x" * size)
        return slim(read(cloud_event(message(key=f"key:{number}", sequence=1, body=body))))

    waiting = filled(large(1, 2**21), *(large(number, 300_000) for number in range(2, 6)))
    found = []
    while len(waiting):
        found.append(waiting.take(50) or [])
    assert [[each.message.data["number"] for each in batch if each.message] for batch in found] == [[1], [2, 3, 4], [5]]
