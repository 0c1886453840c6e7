"""Every answer belongs to the message whose delivery tag it names, and to no other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outbox.relay.broker import Answer, Outcome
from outbox.relay.rabbitmq.confirms import Confirms, Flight, Unexpected


def sent(*tokens: int) -> Confirms:
    confirms = Confirms()
    for token in tokens:
        confirms.sent(Flight(token, f"id-{token}", "x", size=100, sent_at=1.0))
    return confirms


def outcomes(answers: list[Answer]) -> dict[int, Outcome]:
    return {answer.token: answer.outcome for answer in answers}


def test_an_ack_confirms_the_message_of_its_tag() -> None:
    confirms = sent(70, 80, 90)
    assert confirms.acked(2, multiple=False, now=1.5) == [Answer(80, Outcome.CONFIRMED, "", 0.5)]
    assert len(confirms) == 2


def test_a_multiple_ack_confirms_everything_up_to_its_tag_that_had_no_answer() -> None:
    confirms = sent(70, 80, 90, 100)
    confirms.nacked(2, multiple=False, now=1)
    assert outcomes(confirms.acked(3, multiple=True, now=1)) == {70: Outcome.CONFIRMED, 90: Outcome.CONFIRMED}
    assert outcomes(confirms.nacked(4, multiple=True, now=1)) == {100: Outcome.NACKED}


def test_acks_come_in_any_order() -> None:
    confirms = sent(70, 80, 90)
    answers = [confirms.acked(tag, multiple=False, now=1)[0].token for tag in (3, 1, 2)]
    assert answers == [90, 70, 80]


def test_the_ack_after_a_return_means_that_nobody_has_the_message() -> None:
    confirms = sent(70, 80)
    confirms.returned("id-80", "312 NO_ROUTE")
    assert len(confirms) == 2
    assert confirms.acked(2, multiple=True, now=1) == [
        Answer(70, Outcome.CONFIRMED, "", 0.0),
        Answer(80, Outcome.RETURNED, "312 NO_ROUTE", 0.0),
    ]


@pytest.mark.parametrize("tag", [0, 4, 2**63])
@pytest.mark.parametrize("multiple", [True, False])
@pytest.mark.parametrize("kind", ["acked", "nacked"])
def test_an_answer_to_a_tag_that_was_never_sent_is_unexpected(kind: str, multiple: bool, tag: int) -> None:
    confirms = sent(70, 80, 90)
    with pytest.raises(Unexpected, match=f"delivery tag {tag}, which was never sent"):
        getattr(confirms, kind)(tag, multiple=multiple, now=1)
    assert len(confirms) == 3


@pytest.mark.parametrize("multiple", [True, False])
def test_a_second_answer_to_one_tag_is_unexpected(multiple: bool) -> None:
    confirms = sent(70, 80)
    confirms.acked(1, multiple=False, now=1)
    with pytest.raises(Unexpected, match="delivery tag 1, which was answered before"):
        confirms.acked(1, multiple=multiple, now=1)


def test_a_return_of_a_message_that_is_not_in_flight_is_unexpected() -> None:
    confirms = sent(70)
    with pytest.raises(Unexpected, match="a return of message id-80"):
        confirms.returned("id-80", "312 NO_ROUTE")
    with pytest.raises(Unexpected, match="a return of message None"):
        confirms.returned(None, "312 NO_ROUTE")


def test_a_return_after_its_ack_is_unexpected() -> None:
    confirms = sent(70)
    confirms.acked(1, multiple=False, now=1)
    with pytest.raises(Unexpected):
        confirms.returned("id-70", "312 NO_ROUTE")


def test_a_second_return_of_one_message_is_unexpected() -> None:
    confirms = sent(70)
    confirms.returned("id-70", "312 NO_ROUTE")
    with pytest.raises(Unexpected, match="a second return"):
        confirms.returned("id-70", "312 NO_ROUTE")


def test_one_message_id_cannot_be_in_flight_twice() -> None:
    confirms = sent(70)
    assert confirms.holds("id-70")
    with pytest.raises(ValueError, match="id-70 is in flight already"):
        confirms.sent(Flight(71, "id-70", "x", size=1, sent_at=0))
    confirms.acked(1, multiple=False, now=1)
    assert not confirms.holds("id-70")


def test_what_is_abandoned_is_named_in_the_order_it_was_sent_and_forgotten() -> None:
    confirms = sent(70, 80, 90)
    confirms.acked(2, multiple=False, now=1)
    assert confirms.bytes_in_flight == 200
    assert confirms.abandon() == [70, 90]
    assert (len(confirms), confirms.bytes_in_flight, confirms.abandon()) == (0, 0, [])


# --- topics that say nothing ---------------------------------------------------------------------------------------------


def flown(*flights: tuple[str, float]) -> Confirms:
    """A channel with messages of these topics, written at these times; their tokens count from 1, as their tags do."""
    confirms = Confirms()
    for token, (topic, sent_at) in enumerate(flights, 1):
        confirms.sent(Flight(token, f"id-{token}", topic, size=100, sent_at=sent_at))
    return confirms


def test_a_topic_is_overtaken_when_another_was_answered_while_it_was_overdue_already() -> None:
    confirms = flown(("s", 0.0), ("h", 0.1), ("s", 0.2), ("h", 3.0))
    assert confirms.overtaken(5.0, unanswered=5.0, by=1.0) == []
    confirms.acked(2, multiple=False, now=0.2)  # written a moment later, answered at once: both may have waited for the disk
    assert confirms.overtaken(5.0, unanswered=5.0, by=1.0) == []
    confirms.acked(4, multiple=False, now=3.1)
    assert confirms.overtaken(4.9, unanswered=5.0, by=1.0) == []
    assert confirms.overtaken(5.0, unanswered=5.0, by=1.0) == ["s"]


def test_a_broker_that_answers_nobody_names_no_topic() -> None:
    confirms = flown(("a", 0.0), ("b", 0.1), ("c", 0.2))
    assert confirms.overtaken(100.0, unanswered=5.0, by=1.0) == []


def test_answers_to_what_was_written_before_and_to_the_same_topic_are_no_evidence() -> None:
    confirms = flown(("h", 0.0), ("s", 0.1), ("s", 3.0))
    confirms.acked(1, multiple=False, now=3.0)
    confirms.acked(3, multiple=False, now=3.1)
    assert confirms.overtaken(100.0, unanswered=5.0, by=1.0) == []


def test_a_topic_that_was_answered_is_overdue_no_more() -> None:
    confirms = flown(("s", 0.0), ("h", 3.0), ("s", 4.0))
    confirms.acked(2, multiple=False, now=3.1)
    confirms.acked(1, multiple=False, now=4.9)
    assert confirms.overtaken(5.0, unanswered=5.0, by=1.0) == []


def test_what_was_given_up_is_waited_for_no_more_and_its_late_answer_still_counts() -> None:
    confirms = flown(("s", 0.0), ("h", 0.1), ("s", 0.2))
    assert confirms.give_up("s") == [1, 3]
    assert (len(confirms), confirms.bytes_in_flight, confirms.give_up("s")) == (1, 100, [])
    assert confirms.overtaken(100.0, unanswered=5.0, by=0.0) == []
    assert confirms.holds("id-1")
    assert confirms.given_up() == {"s"}
    assert outcomes(confirms.acked(3, multiple=True, now=60.0)) == dict.fromkeys((1, 2, 3), Outcome.CONFIRMED)
    assert (len(confirms), confirms.bytes_in_flight, confirms.abandon()) == (0, 0, [])


def fill(confirms: Confirms, topic: str, first: int, sent_at: float = 0.0) -> int:
    """Write as many messages of *topic* as there is room for; return how many."""
    written = 0
    while confirms.room_for(topic):
        token = first + written
        confirms.sent(Flight(token, f"id-{token}", topic, size=1, sent_at=sent_at))
        written += 1
    return written


def test_a_topic_gets_more_room_from_its_quick_answers_alone() -> None:
    confirms, last, rooms = Confirms(), 0, []
    for _ in range(6):
        last += fill(confirms, "x", last + 1)
        rooms.append(len(confirms))
        confirms.acked(last, multiple=True, now=0.01)
    assert rooms == [24, 48, 96, 160, 160, 160]


def test_a_topic_that_is_not_alone_leaves_others_what_the_broker_still_reads_when_it_falls_silent() -> None:
    confirms, last, rooms = Confirms(), 0, []
    for number in range(6):
        confirms.sent(Flight(-number, f"other-{number}", "y", size=1, sent_at=0.0))
        last += 1
        written = fill(confirms, "x", last + 1)
        rooms.append(written)
        confirms.acked(last + written, multiple=True, now=0.01)
        last += written
    assert rooms == [24, 48, 96, 128, 128, 128]


def test_what_a_topic_had_for_itself_it_has_no_more_when_another_one_comes() -> None:
    confirms, last = Confirms(), 0
    for _ in range(5):
        last += fill(confirms, "x", last + 1)
        confirms.acked(last, multiple=True, now=0.01)
    last += fill(confirms, "x", last + 1)
    confirms.sent(Flight(0, "other", "y", size=1, sent_at=0.0))
    confirms.acked(last - 150, multiple=True, now=0.01)
    assert fill(confirms, "x", last + 1) == 0
    confirms.acked(last - 100, multiple=True, now=0.01)
    assert fill(confirms, "x", last + 1) == 28


def test_a_topic_without_answers_and_one_with_slow_ones_get_no_more_than_a_queue_bears() -> None:
    confirms = Confirms()
    assert fill(confirms, "x", 1) == 24
    assert confirms.room_for("y")
    confirms.acked(12, multiple=True, now=3.0)
    assert fill(confirms, "x", 25) == 12


def test_a_topic_that_had_much_room_and_became_slow_has_little_again() -> None:
    confirms = Confirms()
    last = fill(confirms, "x", 1)
    confirms.acked(last, multiple=True, now=0.01)
    last += fill(confirms, "x", last + 1)
    assert len(confirms) == 48
    confirms.acked(last, multiple=True, now=9.0)
    assert fill(confirms, "x", last + 1) == 24


@dataclass
class Told:
    """What a model broker knows about one publish."""

    token: int
    message_id: str
    topic: str
    returned: bool = False
    answered: bool = False
    given_up: bool = False


class AnyAnswers(RuleBasedStateMachine):
    """The tracker against a list that is searched from the beginning each time."""

    def __init__(self) -> None:
        super().__init__()
        self.confirms = Confirms()
        self.model: list[Told] = []

    def open_tags(self) -> list[int]:
        return [number for number, told in enumerate(self.model, 1) if not told.answered]

    @rule(ids=st.lists(st.integers(0, 20), max_size=5))
    def send(self, ids: list[int]) -> None:
        for number in ids:
            message_id = f"id-{number}"
            in_flight = any(told.message_id == message_id and not told.answered for told in self.model)
            assert self.confirms.holds(message_id) == in_flight
            if not in_flight:
                topic = f"topic-{number % 3}"
                self.model.append(Told(1000 + len(self.model), message_id, topic))
                self.confirms.sent(Flight(self.model[-1].token, message_id, topic, size=10, sent_at=0))

    @precondition(lambda self: self.open_tags())
    @rule(data=st.data(), multiple=st.booleans(), refuse=st.booleans())
    def answer(self, data: st.DataObject, multiple: bool, refuse: bool) -> None:
        tag = data.draw(st.sampled_from(self.open_tags()))
        expected: dict[int, Outcome] = {}
        for number in [n for n in self.open_tags() if n <= tag] if multiple else [tag]:
            told = self.model[number - 1]
            told.answered = True
            outcome = Outcome.RETURNED if told.returned else Outcome.CONFIRMED
            expected[told.token] = Outcome.NACKED if refuse else outcome
        answers = (self.confirms.nacked if refuse else self.confirms.acked)(tag, multiple=multiple, now=1)
        assert outcomes(answers) == expected
        assert len(answers) == len(expected)

    @rule(number=st.integers(0, 20))
    def give_back(self, number: int) -> None:
        message_id = f"id-{number}"
        found = [told for told in self.model if told.message_id == message_id and not told.answered and not told.returned]
        if found:
            self.confirms.returned(message_id, "312 NO_ROUTE")
            found[0].returned = True
        else:
            with pytest.raises(Unexpected):
                self.confirms.returned(message_id, "312 NO_ROUTE")

    @rule(tag=st.integers(0, 60), multiple=st.booleans())
    def answer_what_was_not_asked(self, tag: int, multiple: bool) -> None:
        if tag not in self.open_tags():
            with pytest.raises(Unexpected):
                self.confirms.acked(tag, multiple=multiple, now=1)

    @rule(number=st.integers(0, 2))
    def give_up(self, number: int) -> None:
        topic = f"topic-{number}"
        left = [told for told in self.model if told.topic == topic and not told.answered and not told.given_up]
        assert self.confirms.give_up(topic) == [told.token for told in left]
        for told in left:
            told.given_up = True

    @invariant()
    def as_many_in_flight(self) -> None:
        waited_for = [told for told in self.model if not told.answered and not told.given_up]
        assert len(self.confirms) == len(waited_for)
        assert self.confirms.bytes_in_flight == 10 * len(waited_for)
        for topic in ("topic-0", "topic-1", "topic-2"):
            assert self.confirms.waits_for(topic) == sum(told.topic == topic for told in waited_for)

    def teardown(self) -> None:
        assert self.confirms.abandon() == [self.model[tag - 1].token for tag in self.open_tags()]


TestAnyAnswers = AnyAnswers.TestCase
TestAnyAnswers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
