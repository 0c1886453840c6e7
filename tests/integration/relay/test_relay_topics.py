"""Topics that refuse, are silent or heard by nobody: each stops only what it must, and nobody pays for another's trouble."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox.relay.broker import Cause, Outcome
from tests.integration.relay.stage import Stage
from tests.kit.builders import message

if TYPE_CHECKING:
    import pytest
    from sqlalchemy.engine import Engine

    from outbox.message import Message


class Queues:
    """A broker's script: what each topic's queue says; without a word it confirms."""

    def __init__(self, **outcomes: Outcome) -> None:
        self.outcomes: dict[str, Outcome] = dict(outcomes)

    def __call__(self, each: Message) -> Outcome:
        return self.outcomes.get(each.topic, Outcome.CONFIRMED)

    def heal(self, *topics: str) -> None:
        for topic in topics:
            del self.outcomes[topic]


def pass_time(stage: Stage, seconds: float) -> None:
    """Let much time pass: all rows are due, turns are as many as it takes."""
    for _ in range(int(seconds)):
        stage.make_due()
        stage.turn(2, seconds=0.5)


def topics(messages: list[Message]) -> list[str]:
    return [each.topic for each in messages]


def said(caplog: pytest.LogCaptureFixture, prefix: str = "topic.") -> list[str]:
    events = [getattr(record, "outbox_event", "") for record in caplog.records]
    return [event for event in events if event.startswith(prefix)]


# --- silent ---------------------------------------------------------------------------------------------------------------


def test_a_silent_topic_stops_only_itself_and_after_the_outage_all_arrives_in_order(engine: Engine) -> None:
    queues = Queues(s=Outcome.SILENT)
    stage = Stage(engine, queues, max_attempts=1, batch_size=20, window=50)
    stage.write(message("h"), *(message("s", f"key-{n % 3}") for n in range(30)))
    stage.turn(20)
    stage.write(*(message("h", f"other-{n}") for n in range(40)))
    stage.until(lambda: topics(stage.delivered()).count("h") == 41)
    pass_time(stage, 200)
    assert set(stage.states()) == {"retrying", "pending"}  # none is dead
    assert all(row.attempts == 0 for row in stage.rows())
    noted = [row for row in stage.rows() if row.state == "retrying"]
    assert {row.error for row in noted} == {
        "not confirmed: a queue of 's' is silent (without a majority?), while others answer"
    }
    # What was in flight when it fell silent is given up, and then it is asked with single messages.
    assert topics(stage.broker.probes) == ["s"] * len(stage.broker.probes)
    assert topics(stage.broker.sent).count("s") == 3 + len(stage.broker.probes)
    assert 5 < len(stage.broker.probes) < 30
    queues.heal("s")
    pass_time(stage, 60)
    assert stage.rows() == []
    for key in ("key-0", "key-1", "key-2"):
        arrived = [each.sequence for each in stage.delivered() if (each.topic, each.key) == ("s", key)]
        assert arrived == list(range(1, 11))


def test_one_confirm_of_a_silent_topic_frees_all_that_waits_of_it(sqlite: Engine) -> None:
    queues = Queues(s=Outcome.SILENT)
    stage = Stage(sqlite, queues)
    stage.write(message("h"), *(message("s") for _ in range(50)))
    pass_time(stage, 10)
    assert topics(stage.delivered()) == ["h"]
    probes = len(stage.broker.probes)
    queues.heal("s")
    pass_time(stage, 20)
    assert stage.rows() == []
    assert len(stage.broker.probes) == probes + 1


def test_what_was_given_up_and_is_confirmed_after_all_is_not_sent_again(sqlite: Engine) -> None:
    queues = Queues(s=Outcome.SILENT)
    stage = Stage(sqlite, queues)
    first, second = message("s", "key"), message("s", "key")
    stage.write(message("h"), first, second)
    stage.until(lambda: "retrying" in stage.states())
    queues.heal("s")
    stage.broker.answer(stage.broker.flying[0])
    stage.turn(20)
    stage.run_dry()
    assert topics(stage.broker.sent) == ["h", "s", "s"]
    assert stage.sequences("key") == [1, 2]
    assert stage.published_total() == 3


def test_a_late_confirm_of_what_was_given_up_counts_even_before_it_was_noted(sqlite: Engine) -> None:
    stage = Stage(sqlite, Queues(s=Outcome.SILENT))
    stage.write(message("h"), message("s", "key"))
    stage.until(lambda: len(stage.broker.flying) == 1)
    stage.broker.answer(stage.broker.flying[0])
    stage.run_dry()
    assert topics(stage.broker.sent) == ["h", "s"]


def test_what_was_given_up_and_is_lost_at_last_is_asked_about_like_the_others(sqlite: Engine) -> None:
    queues = Queues(s=Outcome.SILENT)
    stage = Stage(sqlite, queues)
    stage.write(message("h"), *(message("s", f"key-{n}") for n in range(5)))
    stage.until(lambda: "retrying" in stage.states())
    stage.broker.disconnect(cause=Cause.SILENCE)
    stage.broker.connect()
    queues.heal("s")
    pass_time(stage, 10)
    assert stage.rows() == []
    assert sorted(topics(stage.delivered())) == ["h"] + ["s"] * 5


def test_after_a_loss_a_message_without_an_answer_keeps_other_topics_waiting_for_a_moment_only(sqlite: Engine) -> None:
    stage = Stage(sqlite, lambda each: None if each.topic == "s" else Outcome.CONFIRMED)
    stage.write(message("s"), message("s"), message("h"), message("h"))
    stage.turn(5)
    assert topics(stage.broker.sent) == ["s"]
    stage.turn(60)
    assert topics(stage.delivered()) == ["h", "h"]


def test_a_topic_that_keeps_a_whole_new_connection_silent_is_found_by_who_was_unanswered_first(sqlite: Engine) -> None:
    """As on RabbitMQ: a channel that is new to a quorum queue without a majority waits for it, and answers nobody."""
    stage = Stage(sqlite, max_attempts=1)

    def script(_: Message) -> Outcome | None:
        stuck = any(each.topic == "s" for each in stage.broker.flying)
        return None if stuck else Outcome.CONFIRMED

    stage.broker.script = script
    stage.write(*(message("s") for _ in range(5)), *(message("h") for _ in range(5)))
    stage.turn(5)
    assert topics(stage.broker.flying) == ["s"]
    stage.broker.disconnect(cause=Cause.SILENCE)
    stage.broker.connect()
    stage.turn(20)
    assert topics(stage.delivered()) == ["h"] * 5
    assert [row.state for row in stage.rows()] == ["retrying", "pending", "pending", "pending", "pending"]
    assert "is silent" in stage.rows()[0].error
    assert stage.rows()[0].attempts == 0


def test_a_broker_that_answers_nobody_names_no_topic(sqlite: Engine, caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(sqlite, lambda _: None)
    stage.write(*(message(topic) for topic in "abc" for _ in range(3)))
    for _ in range(6):
        stage.turn(70)
        stage.broker.disconnect(cause=Cause.SILENCE)
        stage.broker.connect()
    assert said(caplog) == []
    assert set(stage.states()) == {"pending"}
    stage.broker.script = lambda _: Outcome.CONFIRMED
    pass_time(stage, 30)
    assert stage.rows() == []


def test_a_probe_that_is_lost_with_its_connection_is_held_against_nobody(sqlite: Engine) -> None:
    queues = Queues(s=Outcome.SILENT)
    stage = Stage(sqlite, queues, max_attempts=1)
    stage.write(message("h"), *(message("s", f"key-{n}") for n in range(3)))
    stage.until(lambda: "retrying" in stage.states())
    stage.broker.disconnect(cause=Cause.OURS)
    stage.broker.connect()
    queues.outcomes["s"] = Outcome.LOST
    for _ in range(20):
        stage.write(message("h"))
        pass_time(stage, 3)
    assert set(stage.states()) <= {"retrying", "pending"}
    assert all(row.attempts == 0 for row in stage.rows())
    queues.heal("s")
    pass_time(stage, 30)
    assert stage.rows() == []


# --- refusing -------------------------------------------------------------------------------------------------------------


def test_a_probe_is_a_message_that_may_go_whichever_was_read_first(sqlite: Engine) -> None:
    """The first message of topic t waits behind one of v, which refuses too; others of t need not wait for that."""
    queues = Queues(v=Outcome.NACKED, t=Outcome.NACKED)
    stage = Stage(sqlite, queues)
    stage.write(*(message("v", f"v-{n}") for n in range(6)), *(message("t", f"t-{n}") for n in range(6)))
    pass_time(stage, 3)
    stage.write(*(message("v", f"before-{n}") for n in range(60)), message("v", "both"), message("t", "both"))
    stage.write(message("t", "free"))
    with sqlite.begin() as connection:  # all that was refused already is gone: of t only these two are left
        connection.exec_driver_sql("DELETE FROM outbox_pending WHERE state = 'retrying'")
    queues.heal("t")
    pass_time(stage, 60)
    assert [each.key for each in stage.delivered()] == ["free"]
    queues.heal("v")
    pass_time(stage, 60)
    assert stage.rows() == []
    assert stage.sequences("both") == [1, 2]


def test_refusing_topics_are_asked_apart_and_their_probes_keep_nobody_waiting(sqlite: Engine) -> None:
    queues = Queues(t=Outcome.NACKED)
    stage = Stage(sqlite, queues)
    stage.write(*(message("t") for _ in range(20)))
    pass_time(stage, 20)
    probed = len(stage.broker.probes)
    assert probed >= 3
    assert set(topics(stage.broker.probes)) == {"t"}
    stage.broker.script = lambda each: None if each.topic == "t" else Outcome.CONFIRMED
    pass_time(stage, 30)
    assert topics(stage.broker.flying) == ["t"]
    stage.broker.disconnect(cause=Cause.OURS)  # of the others nothing is in flight; the first of them goes alone
    stage.broker.connect()
    stage.write(*(message("h") for _ in range(5)))
    stage.turn(10)
    assert topics(stage.delivered()) == ["h"] * 5


# --- what is said ---------------------------------------------------------------------------------------------------------


def test_the_log_tells_once_that_a_topic_is_in_trouble_and_once_that_it_is_over(
    sqlite: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    queues = Queues(s=Outcome.SILENT, t=Outcome.NACKED, u=Outcome.RETURNED)
    stage = Stage(sqlite, queues)
    stage.write(message("h"), *(message(topic) for topic in "stu" for _ in range(10)))
    pass_time(stage, 60)
    assert sorted(said(caplog)) == ["topic.refusing", "topic.silent", "topic.unroutable"]
    queues.heal("s", "t", "u")
    pass_time(stage, 60)
    assert stage.rows() == []
    assert sorted(said(caplog)) == ["topic.refusing", "topic.silent", "topic.unroutable", *["topic.well"] * 3]
    over = [record for record in caplog.records if getattr(record, "outbox_event", "") == "topic.well"]
    assert all(record.levelname == "WARNING" for record in over)
    assert {record.outbox_fields["topic"] for record in over} == {"s", "t", "u"}  # type: ignore[attr-defined]
    assert all(record.outbox_fields["messages"] >= 5 for record in over)  # type: ignore[attr-defined]
