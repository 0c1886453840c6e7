from __future__ import annotations

from typing import Any

import pytest

from outbox.relay.order.item import Item
from outbox.relay.order.lanes import Lanes
from outbox.store.relaying import Ahead, Row


def row(id: int, key: str | None = None, sequence: int | None = None, topic: str = "t", state: str = "pending") -> Row:
    return Row(id, id, 0, topic, key, sequence, 0, state, "hold")


def item(of: Row, size: int = 1) -> Item:
    return Item(of, None, size, epoch=1)


def lanes(window: int = 10, window_bytes: int = 1_000_000, rows_per_key: int = 100, **more: Any) -> Lanes:
    return Lanes(window=window, window_bytes=window_bytes, rows_per_key=rows_per_key, **more)


def load(into: Lanes, *rows: Row, size: int = 1, after: int = 0, end: int | None = None) -> list[int]:
    """Read *rows*: choose, load, and answer the query by key with "nothing earlier"."""
    reading = into.read_began(after)
    into.read_returned(reading)
    chosen = into.choose(rows)
    into.load([item(each, size) for each in chosen])
    into.read_ended(reading, end)
    asked = into.unproven()
    into.prove(asked, dict.fromkeys(asked, Ahead.NOTHING))
    return [each.id for each in chosen]


def take(of: Lanes, limit: int | None = None) -> list[int]:
    return [each.row.id for each in of.take(lambda _: True, limit)]


def flying(of: Lanes, id: int) -> Item:
    return next(each for each in of.flights() if each.row.id == id)


def test_messages_without_a_key_fill_the_window_in_order_of_their_ids() -> None:
    held = lanes(window=3)
    load(held, row(1), row(2), row(3), row(4))
    assert take(held) == [1, 2, 3]
    assert take(held) == []
    held.done(flying(held, 2))
    assert take(held) == [4]


def test_one_message_of_a_key_is_in_flight_and_the_next_starts_when_it_is_delivered() -> None:
    held = lanes()
    load(held, row(1, "a", 1), row(2, "a", 2), row(3, "b", 1))
    assert take(held) == [1, 3]
    held.done(flying(held, 1))
    assert take(held) == [2]


def test_where_batches_are_whole_neighbours_of_a_key_fly_together_and_the_next_wait_for_all_of_them() -> None:
    held = lanes(window=6, neighbours=True)
    load(held, *(row(n, "a", n) for n in range(1, 5)), row(5, "b", 1), row(6, "a", 5))
    assert take(held) == [1, 2, 3, 4, 6]
    held.done(flying(held, 1))
    assert take(held) == [5]
    load(held, row(7, "a", 6))
    for id in (2, 3, 4):
        held.done(flying(held, id))
        assert take(held) == []
    held.done(flying(held, 6))
    assert take(held) == [7]


def test_what_was_held_or_leaves_a_number_out_flies_with_no_neighbour() -> None:
    held = lanes(neighbours=True)
    load(held, row(1, "a", 1, state="retrying"), row(2, "a", 2), row(3, "a", 4))
    assert take(held) == [1]
    held.done(flying(held, 1))
    assert take(held) == [2]
    held.done(flying(held, 2))
    assert held.unproven() == [3]
    load(held, row(4, "b", 1), row(5, "b", 2, state="retrying"), row(6, "b", 3))
    assert take(held) == [3, 4]
    held.done(flying(held, 4))
    assert take(held) == [5]


def test_neighbours_keep_to_the_bytes_of_the_window() -> None:
    held = lanes(window_bytes=10, neighbours=True)
    load(held, row(1, "a", 1), row(2, "a", 2), row(3, "a", 3), size=5)
    assert take(held) == [1, 2]


def test_neighbours_go_again_together_when_their_batch_is_lost_and_not_at_all_when_one_was_refused() -> None:
    held = lanes(neighbours=True)
    load(held, row(1, "a", 1), row(2, "a", 2), row(3, "a", 3))
    assert take(held) == [1, 2, 3]
    for id in (1, 2, 3):
        held.again(flying(held, id))
    assert take(held) == [1, 2, 3]
    held.done(flying(held, 1))
    held.hold(flying(held, 2))
    held.again(flying(held, 3))
    assert take(held) == []
    assert held.loaded == 0


def test_the_window_is_bounded_by_bytes_but_lets_one_larger_message_through_alone() -> None:
    held = lanes(window_bytes=10)
    load(held, row(1), row(2), row(3), size=6)
    assert take(held) == [1]
    held.done(flying(held, 1))
    assert take(held) == [2]
    held.done(flying(held, 2))
    held.done(flying(held, take(held)[0]))
    load(held, row(9), size=50)
    assert take(held) == [9]


def test_a_message_whose_predecessor_this_relay_did_not_deliver_waits_for_the_query_by_key() -> None:
    held = lanes()
    held.load([item(row(5, "a", 7))])
    assert held.unproven() == [5]
    assert take(held) == []
    held.prove([5], {5: Ahead.NOTHING})
    assert take(held) == [5]


def test_the_first_message_of_a_key_and_the_next_of_a_delivered_one_need_no_query() -> None:
    held = lanes()
    held.load([item(row(1, "a", 1))])
    assert held.unproven() == []
    held.done(flying(held, take(held)[0]))
    held.load([item(row(2, "a", 2))])
    assert held.unproven() == []
    assert take(held) == [2]


@pytest.mark.parametrize("waits", [{5: Ahead.WAITS}, {}], ids=["an earlier one is there", "it is gone"])
def test_a_message_that_must_wait_is_unloaded_with_its_followers_for_a_later_read(waits: dict[int, Ahead]) -> None:
    held = lanes()
    held.load([item(row(5, "a", 7)), item(row(6, "a", 8))])
    assert held.prove([5], waits)
    assert held.loaded == 0
    assert held.loaded_bytes == 0
    assert held.known() == []


def test_an_earlier_message_that_was_committed_late_goes_before_one_that_is_already_ready() -> None:
    held = lanes()
    load(held, row(5, "a", 2))
    load(held, row(4, "a", 1))
    assert take(held) == [4]
    held.done(flying(held, 4))
    assert take(held) == [5]


def test_a_lost_message_goes_out_again_before_its_followers() -> None:
    held = lanes()
    load(held, row(1, "a", 1), row(2, "a", 2), row(3))
    assert take(held) == [1, 3]
    held.again(flying(held, 1))
    held.again(flying(held, 3))
    assert held.flying == 0
    assert take(held) == [1, 3]


def test_an_undelivered_message_drops_its_loaded_followers_and_blocks_its_key() -> None:
    held = lanes()
    load(held, row(1, "a", 1), row(2, "a", 2), row(3, "b", 1))
    take(held)
    held.hold(flying(held, 1))
    assert held.loaded == 1
    assert load(held, row(2, "a", 2), row(4, "c", 1)) == [4]


def test_a_key_stays_blocked_until_a_read_that_began_after_the_commit_of_the_hold_has_returned() -> None:
    held = lanes()
    load(held, row(1, "a", 1))
    take(held)
    held.hold(flying(held, 1))
    early = held.read_began()
    held.settled([1])
    held.read_returned(early)  # its snapshot may be older than the hold
    assert held.choose([row(2, "a", 2)]) == []
    held.read_returned(held.read_began())
    assert [each.id for each in held.choose([row(1, "a", 1, state="retrying")])] == [1]


def test_an_id_is_forgotten_only_when_a_read_begun_after_its_delete_committed_has_returned() -> None:
    held = lanes()
    load(held, row(1))
    take(held)
    held.done(flying(held, 1))
    unsettled = held.read_began()
    held.read_returned(unsettled)
    early = held.read_began()
    held.settled([1])
    held.read_returned(early)
    assert held.choose([row(1)]) == []
    assert held.known() == [1]
    held.read_returned(held.read_began())
    assert held.known() == []


def test_a_hot_key_does_not_fill_the_memory_and_is_read_on_when_half_of_it_is_sent() -> None:
    held = lanes(rows_per_key=4)
    hot = [row(n, "hot", n) for n in range(1, 11)]
    assert load(held, *hot, row(11)) == [1, 2, 3, 4, 11]
    assert held.read_began(after=11).keys.left_out == ["hot"]
    assert held.behind is None
    assert take(held) == [1, 11]
    held.done(flying(held, 1))
    assert take(held) == [2]
    assert held.behind == 4  # two of four are left: what is above id 4 was passed over
    assert held.read_began(after=4).keys.left_out == []
    assert load(held, *hot, after=4) == [5, 6]
    assert held.behind is None
    assert held.read_began(after=11).keys.left_out == ["hot"]


def test_rows_of_a_key_that_a_read_left_out_are_read_again_even_when_none_was_seen() -> None:
    held = lanes(rows_per_key=2)
    load(held, row(1, "hot", 1), row(2, "hot", 2))
    assert held.read_began(after=2).keys.left_out == ["hot"]
    take(held)
    assert held.behind == 2


def test_what_is_behind_is_read_on_page_by_page_until_reads_have_arrived() -> None:
    held = lanes(rows_per_key=2)
    load(held, row(1, "hot", 1), row(2, "hot", 2))
    take(held)
    load(held, after=2, end=5000)  # a page of what must wait
    assert held.behind == 5000
    assert held.read_began(after=90_000).keys.left_out == ["hot"]
    load(held, row(7000, "hot", 3), after=5000, end=9000)
    assert held.behind is None  # enough of it is loaded
    held.done(flying(held, 1))
    take(held)
    assert held.behind == 7000
    load(held, after=7000)
    assert held.behind is None
    assert held.read_began(after=90_000).keys.left_out == []


def test_a_read_that_failed_has_moved_nothing_on() -> None:
    held = lanes(rows_per_key=2)
    load(held, row(1, "hot", 1), row(2, "hot", 2))
    take(held)
    reading = held.read_began(after=2)
    held.read_returned(reading)
    held.choose([row(3, "hot", 3)])
    assert held.behind == 2


def test_a_topic_alone_fills_all_but_a_reserve_and_the_reserve_is_for_others() -> None:
    held = lanes(window=80, rows=160)
    slow = [row(n, topic="slow") for n in range(1, 301)]
    assert len(load(held, *slow)) == 120
    assert held.read_began(after=300).topics.left_out == ["slow"]
    assert len(take(held)) == 60
    assert load(held, *slow, row(301, topic="fresh")) == [301]
    assert take(held) == [301]


def test_when_four_topics_are_slow_there_is_room_for_a_fifth() -> None:
    held = lanes(window=1000, rows=2000)
    for number in range(4):
        load(held, *(row(1000 * number + n, topic=f"slow {number}") for n in range(1, 1000)))
        take(held)
    assert load(held, row(9001, topic="fresh")) == [9001]
    assert take(held) == [9001]


def test_the_rest_of_a_topic_is_read_on_where_it_was_passed_over_when_a_batch_of_it_fits() -> None:
    held = lanes(window=80, rows=160, batch_rows=20)
    rows = [row(n, topic="slow") for n in range(1, 301)]
    assert len(load(held, *rows)) == 120
    assert held.crowded
    for id in take(held)[:20]:
        assert held.behind is None
        held.done(flying(held, id))
    assert held.behind == 120
    assert not held.crowded
    assert load(held, *rows[120:], after=120) == list(range(121, 141))
    assert held.read_began(after=300).topics.left_out == ["slow"]


def test_large_messages_of_one_topic_leave_room_for_those_of_others() -> None:
    held = lanes(window_bytes=800, rows_bytes=1600)
    load(held, *(row(n, topic="large") for n in range(1, 13)), size=100)
    assert held.read_began(after=12).topics.left_out == ["large"]
    assert len(take(held)) == 6
    assert load(held, row(13, topic="small")) == [13]
    assert take(held) == [13]


def test_the_same_row_read_twice_is_loaded_once() -> None:
    held = lanes()
    assert load(held, row(1), row(2, "a", 1)) == [1, 2]
    assert load(held, row(1), row(2, "a", 1)) == []
    assert take(held) == [1, 2]
    assert load(held, row(1), row(2, "a", 1)) == []


def test_when_the_shards_are_lost_only_what_flies_is_kept_and_it_is_forgotten_when_nobody_knows() -> None:
    held = lanes()
    load(held, row(1, "a", 1), row(2, "a", 2), row(3))
    assert take(held, limit=1) == [1]
    held.abandon()
    assert held.known() == [1]
    assert load(held, row(2, "a", 2)) == [2]  # the shards came back, read anew
    held.forget(flying(held, 1))
    assert held.idle
    assert held.loaded_bytes == 0


def test_after_the_shards_were_lost_no_delivery_of_before_is_believed() -> None:
    held = lanes()
    load(held, row(1, "a", 1))
    take(held)
    held.done(flying(held, 1))
    held.abandon()
    held.load([item(row(2, "a", 2))])
    assert held.unproven() == [2]


def test_unloading_a_topic_takes_what_follows_in_the_lane_along_but_not_what_flies() -> None:
    held = lanes()
    load(held, row(1, "a", 1, "x"), row(2, "a", 2, "x"), row(3, "a", 3, "y"), row(4, None, None, "x"), row(5, None, None, "y"))
    assert take(held, limit=1) == [1]
    held.unload(lambda each: each.topic == "x")
    assert sorted(held.known()) == [1, 5]
    assert take(held) == [5]


def test_take_leaves_what_is_not_allowed_for_later() -> None:
    held = lanes()
    load(held, row(1), row(2))
    assert [each.row.id for each in held.take(lambda each: each.row.id == 2)] == [2]
    assert held.ready_ids() == held.ready_ids(among=[1, 2, 3]) == {1}
    assert take(held) == [1]


def test_what_a_delivered_message_held_is_read_again_as_soon_as_its_settling_is_committed() -> None:
    held = lanes()
    load(held, row(7, "a", 3, state="retrying"))
    held.done(flying(held, take(held)[0]))
    assert held.behind is None
    held.settled([7])
    assert held.behind == 7


def test_when_a_queue_is_bound_other_topics_stop_overtaking_what_waited_for_it() -> None:
    held = lanes()
    load(held, row(1, "a", 1, "x", state="unroutable"), row(3, "a", 3, "y"))  # 2 is of topic x, and waits behind 1
    assert take(held) == [1]
    held.done(flying(held, 1))
    assert take(held) == []
    assert held.choose([row(3, "a", 3, "y")]) == []
    held.settled([1])
    assert load(held, row(2, "a", 2, "x"), row(3, "a", 3, "y")) == [2, 3]
    assert take(held) == [2]


def test_a_message_that_went_past_an_unheard_one_says_nothing_about_the_next_of_its_key() -> None:
    """A person may requeue the unheard one, and then it goes first."""
    held = lanes()
    held.load([item(row(2, "a", 2, "y")), item(row(3, "a", 3, "y"))])
    assert held.unproven() == [2]
    held.prove([2], {2: Ahead.PASSABLE})
    take(held)
    held.done(flying(held, 2))
    assert held.unproven() == [3]
    held.prove([3], {3: Ahead.NOTHING})
    take(held)
    load(held, row(4, "a", 4, "y"))
    held.done(flying(held, 3))
    assert take(held) == [4]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_neighbour_that_arrived_without_the_one_before_it_says_nothing_about_the_next_of_its_key(
    order: tuple[int, int],
) -> None:
    held = lanes(neighbours=True)
    load(held, row(1, "a", 1, "x"), row(2, "a", 2, "y"))
    assert take(held) == [1, 2]
    for id_ in order:
        (held.hold if id_ == 1 else held.done)(flying(held, id_))
    held.settled([1, 2])
    held.read_returned(held.read_began())
    held.load([item(row(3, "a", 3, "y"))])
    assert held.unproven() == [3]
