from __future__ import annotations

from outbox.relay.broker import Outcome
from outbox.relay.order.topic_probes import Topics, Trouble
from outbox.store.relaying import Row
from outbox.tables import State


def row(id: int, topic: str = "x", state: State = State.PENDING, unheard: str = "hold") -> Row:
    return Row(id, id, 0, topic, None, None, 0, state.value, unheard)


def refusing(topics: Topics, now: float = 0.0) -> None:
    changed = [topics.answered(row(id), Outcome.NACKED, now) for id in range(1, 6)]
    assert changed == [False, False, False, False, True]


def closed(topics: Topics, now: float, loaded: set[int] | None = None) -> tuple[list[str], list[str]]:
    return topics.closed(now, (loaded or set()).__contains__)


def test_as_long_as_some_messages_of_a_topic_pass_it_is_not_in_trouble() -> None:
    topics = Topics(unheard_seconds=5.0)
    for id in range(100):
        assert not topics.answered(row(id), Outcome.CONFIRMED if id % 5 == 4 else Outcome.NACKED, 0.0)
    assert not topics.troubled


def test_a_topic_that_refuses_everything_is_closed_and_what_is_loaded_of_it_unloaded() -> None:
    topics = Topics(unheard_seconds=5.0)
    refusing(topics)
    assert closed(topics, 0.0) == (["x"], [])
    assert topics.stopped(row(9))
    assert not topics.stopped(row(9, "y"))


def asked(topics: Topics, id: int, now: float, state: State = State.PENDING) -> None:
    """Load the row *id* and have it ask."""
    assert topics.admit(row(id, state=state), now)
    assert topics.asks(row(id, state=state), now)


def test_a_refusing_topic_is_asked_with_one_message_at_a_time_ever_more_rarely() -> None:
    topics = Topics(unheard_seconds=5.0)
    refusing(topics)
    now, pauses = 0.0, []
    for probe in range(10, 18):
        began = now
        while closed(topics, now) != ([], []):
            now += 0.5
        pauses.append(now - began)
        asked(topics, probe, now)
        assert not topics.admit(row(probe + 100), now)
        assert not topics.asks(row(probe + 100), now)
        assert not topics.stopped(row(probe))
        assert closed(topics, now, {probe}) == (["x"], [])
        assert not topics.answered(row(probe), Outcome.NACKED, now)
    assert pauses[0] == 1.0
    assert pauses == sorted(pauses)
    assert max(pauses) == 30.0


def test_the_first_row_that_may_go_asks_not_the_first_that_was_loaded() -> None:
    topics = Topics(unheard_seconds=5.0)
    refusing(topics)
    assert [topics.admit(row(id), 2.0) for id in (10, 11, 12)] == [True, True, True]
    assert all(topics.gated(row(id)) for id in (10, 11, 12))
    assert topics.asks(row(11), 2.0)  # 10 waits behind another message of its key
    assert not topics.asks(row(12), 2.0)
    assert [topics.stopped(row(id)) for id in (10, 11, 12)] == [True, False, True]


def test_only_a_few_rows_are_loaded_to_find_one_that_may_go_and_others_when_those_were_dropped() -> None:
    topics = Topics(unheard_seconds=5.0)
    refusing(topics)
    admitted = [id for id in range(10, 500) if topics.admit(row(id), 2.0)]
    assert admitted == list(range(10, 60))
    assert closed(topics, 2.0, set(admitted)) == (["x"], [])
    assert closed(topics, 2.0, set(admitted[1:])) == ([], [])
    assert topics.admit(row(700), 2.0)


def test_a_probe_that_passes_opens_the_topic() -> None:
    topics = Topics(unheard_seconds=5.0)
    refusing(topics)
    asked(topics, 10, 2.0)
    assert topics.answered(row(10), Outcome.CONFIRMED, 2.0)
    assert closed(topics, 2.0) == ([], [])
    assert not topics.stopped(row(11))
    assert not topics.gated(row(11))
    assert not topics.troubled


def test_a_probe_that_left_the_memory_unasked_does_not_close_its_topic_for_ever() -> None:
    topics = Topics(unheard_seconds=5.0)
    refusing(topics)
    asked(topics, 10, 2.0)
    assert closed(topics, 2.0, {10}) == (["x"], [])
    assert not topics.admit(row(11), 2.0)
    assert closed(topics, 2.0) == ([], [])
    assert topics.admit(row(11), 2.0)


def test_a_probe_that_is_lost_with_its_connection_lets_another_row_ask_soon() -> None:
    topics = Topics(unheard_seconds=5.0)
    refusing(topics)
    asked(topics, 10, 2.0)
    topics.lost(row(10), 2.0)
    assert closed(topics, 2.5) == (["x"], [])
    assert topics.admit(row(10), 3.0)
    assert topics.asks(row(10), 3.0)  # it is the only one
    topics.lost(row(10), 3.0)
    assert [topics.admit(row(id), 4.0) for id in (10, 11)] == [True, True]
    assert not topics.asks(row(10), 4.0)
    assert topics.asks(row(11), 4.0)


def test_a_probe_that_is_to_blame_itself_does_not_keep_its_topic_closed() -> None:
    topics = Topics(unheard_seconds=5.0)
    refusing(topics)
    asked(topics, 10, 2.0)
    assert not topics.answered(row(10), Outcome.REFUSED, 2.0)
    asked(topics, 11, 3.0)


def test_a_silent_topic_is_closed_at_once_and_its_probes_go_apart() -> None:
    topics = Topics(unheard_seconds=5.0)
    assert not topics.apart(row(1))
    assert topics.answered(row(1), Outcome.SILENT, 0.0)
    assert not topics.answered(row(2), Outcome.SILENT, 0.0)
    assert closed(topics, 0.0) == (["x"], [])
    assert topics.stopped(row(9))
    assert topics.apart(row(9))
    assert [(topic, gate.trouble, gate.messages) for topic, gate in topics.troubles().items()] == [("x", Trouble.SILENT, 2)]
    asked(topics, 1, 1.0)
    assert not topics.answered(row(1), Outcome.SILENT, 11.0)
    assert closed(topics, 12.9) == (["x"], [])
    asked(topics, 2, 13.0)
    assert topics.answered(row(2), Outcome.CONFIRMED, 13.0)
    assert not topics.troubled


def test_a_silent_topic_that_answers_with_a_refusal_or_a_return_is_silent_no_more() -> None:
    topics = Topics(unheard_seconds=5.0)
    topics.answered(row(1), Outcome.SILENT, 0.0)
    asked(topics, 1, 1.0)
    topics.answered(row(1), Outcome.NACKED, 1.0)
    assert topics.troubles()["x"].trouble is Trouble.REFUSING
    asked(topics, 2, 3.0)
    assert topics.answered(row(2), Outcome.RETURNED, 3.0)
    assert topics.troubles()["x"].trouble is Trouble.UNHEARD
    assert not topics.gated(row(3))


def test_without_a_second_connection_a_probe_takes_the_usual_way() -> None:
    topics = Topics(unheard_seconds=5.0)
    refusing(topics)
    asked(topics, 10, 2.0)
    topics.lost(row(10), 2.0, sent=False)
    assert not topics.apart(row(10))
    asked(topics, 10, 3.0)
    topics.answered(row(10), Outcome.NACKED, 3.0)
    assert not topics.apart(row(11))
    asked(topics, 11, 5.0)
    topics.lost(row(11), 5.0, sent=False)  # the usual way is not there either
    assert topics.apart(row(11))


def test_answers_to_what_was_in_flight_when_the_topic_closed_change_nothing() -> None:
    topics = Topics(unheard_seconds=5.0)
    refusing(topics)
    for id in range(20, 40):
        assert not topics.answered(row(id), Outcome.NACKED, 0.5)
    assert closed(topics, 1.0) == ([], [])


def test_a_topic_nobody_listens_to_is_asked_again_with_one_unroutable_message_every_few_seconds() -> None:
    topics = Topics(unheard_seconds=5.0)
    waiting = row(2, state=State.UNROUTABLE)
    assert topics.answered(row(1), Outcome.RETURNED, 0.0)
    assert closed(topics, 4.9) == ([], ["x"])
    assert not topics.admit(waiting, 4.9)
    assert closed(topics, 5.0) == ([], [])
    asked(topics, 2, 5.0, State.UNROUTABLE)
    assert not topics.apart(waiting)
    assert not topics.admit(row(3, state=State.UNROUTABLE), 5.0)
    assert not topics.answered(waiting, Outcome.RETURNED, 6.0)
    assert closed(topics, 10.9) == ([], ["x"])


def test_new_messages_of_a_topic_nobody_listens_to_still_go_out_once() -> None:
    topics = Topics(unheard_seconds=5.0)
    topics.answered(row(1), Outcome.RETURNED, 0.0)
    assert topics.admit(row(2), 0.0)
    assert not topics.stopped(row(2))


def test_any_confirm_of_the_topic_frees_its_unroutable_messages() -> None:
    topics = Topics(unheard_seconds=5.0)
    topics.answered(row(1), Outcome.RETURNED, 0.0)
    assert topics.answered(row(2), Outcome.CONFIRMED, 0.1)
    assert closed(topics, 0.1) == ([], [])


def test_a_message_of_which_nobody_needs_to_hear_says_nothing_about_its_topic() -> None:
    topics = Topics(unheard_seconds=5.0)
    assert not topics.answered(row(1, unheard="drop"), Outcome.RETURNED, 0.0)
    assert not topics.troubled
