"""What leaves, in which order, and what becomes of what does not: each answer of the broker, on both databases."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox import tables
from outbox.message import Message
from outbox.relay.broker import Cause, Outcome
from outbox.store import relaying
from tests.integration.relay.stage import Stage
from tests.kit.builders import message, write, write_message, write_pending

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


def keyed(key: str = "a", topic: str = "x", body: bytes = b"1") -> Message:
    return message(topic, key, body)


class Moods:
    """A broker's script: topics and messages it does not take at the moment."""

    def __init__(self) -> None:
        self.by_topic: dict[str, Outcome | None] = {}
        self.by_body: dict[bytes, Outcome | None] = {}

    def __call__(self, each: Message) -> Outcome | None:
        return self.by_body.get(each.body, self.by_topic.get(each.topic, Outcome.CONFIRMED))


# --- all is well ---


def test_committed_messages_are_published_once_in_order_within_their_keys_and_their_rows_are_gone(engine: Engine) -> None:
    stage = Stage(engine)
    keys = ["a", "b", "c", None]
    written = [message("x", random.Random(n).choice(keys)) for n in range(200)]
    stage.write(*written)
    stage.run_dry()
    assert {each.id for each in stage.delivered()} == {each.id for each in written}
    assert len(stage.delivered()) == 200
    for key in ("a", "b", "c"):
        assert stage.sequences(key) == list(range(1, len(stage.sequences(key)) + 1))
    assert stage.published_total() == 200
    assert {receipt.relay for receipt in stage.receipts()} == {stage.relay.id}
    stage.turn(40)
    assert stage.relay.forwarder.lanes.idle
    assert stage.relay.forwarder.lanes.known() == []  # nothing is remembered for ever


def test_where_the_broker_takes_whole_batches_one_key_needs_few_of_them(engine: Engine) -> None:
    stage = Stage(engine, whole_batches=True)
    stage.write(*(message("t", "a") for _ in range(100)))
    stage.run_dry()
    assert stage.sequences("a") == list(range(1, 101))
    # The first alone, as on every new connection, and then up to what is loaded of a key.
    assert [len(batch) for batch in stage.broker.batches][:2] == [1, 99]


def test_a_message_arrives_as_it_was_stored(engine: Engine) -> None:
    stage = Stage(engine)
    one = message("session.modified", "event:1", '{"title":"Grüße"}'.encode())
    stage.write(one)
    stage.run_dry()
    (got,) = stage.delivered()
    assert (got.id, got.topic, got.key, got.sequence, got.body) == (one.id, one.topic, one.key, 1, one.body)
    assert (got.source, got.content_type, got.created_at) == (one.source, one.content_type, one.created_at)


def test_one_message_of_a_key_is_unconfirmed_at_a_time_and_keys_run_in_parallel(engine: Engine) -> None:
    stage = Stage(engine, lambda _: None)
    stage.write(*(keyed(key) for _ in range(3) for key in ("a", "b", "c")), message(), message())
    stage.broker.script = lambda each: Outcome.CONFIRMED if not stage.delivered() else None  # the first goes alone
    stage.until(lambda: len(stage.broker.flying) == 5)
    stage.turn(5)
    assert sorted(each.key or "-" for each in stage.broker.flying) == ["-", "-", "a", "b", "c"]


def test_the_window_bounds_what_is_unconfirmed(engine: Engine) -> None:
    stage = Stage(engine, lambda _: Outcome.CONFIRMED if not stage.delivered() else None, window=7, batch_size=3)
    stage.write(*(message() for _ in range(50)))
    stage.turn(50)
    assert len(stage.broker.flying) == 6  # the rest of the window is for other topics
    stage.write(*(message("another") for _ in range(50)))
    stage.turn(50)
    assert len(stage.broker.flying) == 7
    stage.broker.script = lambda _: Outcome.CONFIRMED
    for each in stage.broker.flying:
        stage.broker.answer(each)
    stage.run_dry()
    assert len(stage.delivered()) == 100


def test_one_hot_key_does_not_keep_the_others_waiting(engine: Engine) -> None:
    stage = Stage(engine, batch_size=20, window=20)
    with engine.begin() as connection:
        write(connection, *(keyed("hot") for _ in range(150)))
        write(connection, *(keyed(f"cold-{n}") for n in range(20)))
    stage.until(lambda: sum(each.key != "hot" for each in stage.delivered()) == 20)
    assert sum(each.key == "hot" for each in stage.delivered()) < 60
    stage.run_dry()
    assert stage.sequences("hot") == list(range(1, 151))


def test_nothing_is_sent_before_it_is_due(engine: Engine) -> None:
    stage = Stage(engine)
    stage.write(message(), available_in=3600.0)
    stage.turn(60)
    assert stage.broker.sent == []
    stage.make_due()
    stage.run_dry()


# --- commits in another order than ids ---


def late(engine: Engine, below: int, each: Message, sequence: int) -> None:
    """Commit a row with an id that was drawn long ago."""
    with engine.begin() as connection:
        write_pending(connection, write_message(connection, each, sequence), each, sequence, id=below)


def overtake(stage: Stage) -> list[int | None]:
    """Have the second message of a key read before the first, whose transaction committed later; return the arrivals."""
    with stage.engine.begin() as connection:
        first, second, other = keyed(), keyed(), message()
        row = write_message(connection, other, None)
        write_pending(connection, row, other, None, id=1000)
    stage.until(lambda: len(stage.delivered()) == 1)
    stage.turn(1, seconds=5.0)
    stage.turn(2, seconds=0.0)  # a read from the start has just been made, and the floor is at 1000
    stage.relay.wake()
    late(stage.engine, 500, first, 1)
    late(stage.engine, 1001, second, 2)
    stage.turn(1, seconds=0.0)
    stage.run_dry()
    return stage.sequences("a")


def test_a_message_that_was_committed_late_below_what_was_read_is_delivered_first_of_its_key(engine: Engine) -> None:
    assert overtake(Stage(engine)) == [1, 2]


def test_it_is_the_query_by_key_that_keeps_the_order(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaying, "predecessors", lambda _connection, ids: dict.fromkeys(ids, relaying.Ahead.NOTHING))
    assert overtake(Stage(engine)) == [2, 1]


def test_an_open_transaction_delays_nobody_and_its_messages_leave_in_order_when_it_commits(postgres: Engine) -> None:
    stage = Stage(postgres)
    with postgres.connect() as slow, slow.begin():
        write(slow, keyed("slow"), keyed("slow"))
        stage.write(*(keyed("quick") for _ in range(100)))
        stage.until(lambda: len(stage.delivered()) == 100)
        stage.turn(100)
        assert stage.sequences("slow") == []
    stage.write(keyed("slow"))
    stage.run_dry()
    assert stage.sequences("slow") == [1, 2, 3]


# --- returned ---


def test_a_message_no_queue_takes_waits_and_holds_its_key_within_its_topic_only(engine: Engine) -> None:
    moods = Moods()
    moods.by_topic["x"] = Outcome.RETURNED
    stage = Stage(engine, moods)
    stage.write(keyed("a", "x"), keyed("a", "x"), keyed("a", "y"), keyed("b", "y"))
    stage.until(lambda: len(stage.delivered()) == 2)
    stage.turn(20)
    assert [(each.key, each.topic) for each in stage.delivered()] == [("b", "y"), ("a", "y")]
    assert stage.states() == ["unroutable", "pending"]
    (first, _) = stage.rows()
    assert (first.attempts, "no queue on exchange 'openevent' takes 'x'" in first.error) == (1, True)
    assert stage.published_total() == 2


def test_unroutable_messages_leave_by_themselves_in_sequence_when_a_queue_is_bound(engine: Engine) -> None:
    moods = Moods()
    moods.by_topic["x"] = Outcome.RETURNED
    stage = Stage(engine, moods)
    stage.write(*(keyed(key, "x") for _ in range(4) for key in ("a", "b", "c")), message("x"))
    stage.until(lambda: stage.states().count("unroutable") == 4)
    moods.by_topic.clear()
    stage.clock.now += 5.0
    stage.make_due()
    stage.run_dry()
    for key in ("a", "b", "c"):
        assert stage.sequences(key) == [1, 2, 3, 4]
    assert len(stage.delivered()) == 13


def test_a_topic_nobody_listens_to_is_asked_with_one_message_every_few_seconds(engine: Engine) -> None:
    moods = Moods()
    moods.by_topic["x"] = Outcome.RETURNED
    stage = Stage(engine, moods)
    stage.write(*(message("x") for _ in range(100)))
    stage.until(lambda: stage.states() == ["unroutable"] * 100)
    assert len(stage.broker.sent) == 100
    for _ in range(4):
        stage.make_due()
        stage.turn(50, seconds=0.1)
    assert 103 <= len(stage.broker.sent) <= 105


def test_where_nobody_listening_is_fine_a_returned_message_is_done(engine: Engine) -> None:
    moods = Moods()
    moods.by_topic["x"] = Outcome.RETURNED
    stage = Stage(engine, moods)
    stage.write(keyed("a", "x"), keyed("a", "x"), unheard="drop")
    stage.run_dry()
    assert [each.sequence for each in stage.broker.sent] == [1, 2]
    assert stage.published_total() == 2


# --- nacked ---


def test_a_nacked_message_is_retried_and_its_key_waits_for_it(engine: Engine) -> None:
    moods = Moods()
    moods.by_body[b"bad"] = Outcome.NACKED
    stage = Stage(engine, moods, max_attempts=3)
    stage.write(keyed("a"), keyed("a", body=b"bad"), keyed("a"), keyed("b"))
    stage.until(lambda: len(stage.delivered()) == 2 and "retrying" in stage.states())
    for _ in range(12):
        stage.make_due()
        stage.turn(10, seconds=1.0)
        stage.record()  # else the pause of the last try begins only after the row was made due
    assert stage.states() == ["retrying", "pending"]
    assert stage.rows()[0].attempts == 0
    assert len(stage.broker.sent) > 6  # a message of its own fault would be dead after three
    assert stage.sequences("a") == [1]
    moods.by_body.clear()
    stage.make_due()
    stage.run_dry()
    assert stage.sequences("a") == [1, 2, 3]


def test_a_topic_that_refuses_everything_is_asked_with_one_message_at_a_time_and_others_go_on(engine: Engine) -> None:
    moods = Moods()
    moods.by_topic["full"] = Outcome.NACKED
    stage = Stage(engine, moods, window=10, batch_size=10)
    stage.write(*(keyed(f"k{n}", "full") for n in range(200)), *(message("y") for _ in range(20)))
    stage.until(lambda: len(stage.delivered()) == 20)
    stage.turn(100, seconds=0.1)
    assert sum(each.topic == "full" for each in stage.broker.sent) < 30
    moods.by_topic.clear()
    stage.clock.now += 60.0
    stage.make_due()
    stage.run_dry()
    assert len(stage.delivered()) == 220


# --- refused ---


def test_a_message_the_broker_refuses_is_dead_after_its_attempts_and_holds_its_key_until_a_person_decides(
    engine: Engine,
) -> None:
    moods = Moods()
    moods.by_body[b"bad"] = Outcome.REFUSED
    stage = Stage(engine, moods, max_attempts=3)
    stage.write(keyed("a"), keyed("a", body=b"bad"), keyed("a"), keyed("b"))
    for _ in range(3):
        stage.turn(30)
        stage.make_due()
    stage.turn(60)
    assert stage.states() == ["dead", "pending"]
    assert stage.rows()[0].attempts == 3
    assert [each.body for each in stage.broker.sent].count(b"bad") == 3
    assert stage.sequences("a") == [1]
    with engine.begin() as connection:
        connection.execute(sa.update(tables.pending).where(tables.pending.c.state == "dead").values(state="discarded"))
    stage.until(lambda: stage.states() == ["discarded"])
    assert stage.sequences("a") == [1, 3]


@pytest.mark.parametrize("broken", [{"topic": "a*b"}, None], ids=["can be no message", "is gone"])
def test_a_row_whose_stored_message_is_broken_is_dead_alone_and_never_sent(
    engine: Engine, broken: dict[str, str] | None
) -> None:
    stage = Stage(engine, max_attempts=1)
    bad, good = keyed("a"), keyed("b")
    stage.write(bad, good)
    with engine.begin() as connection:
        row = tables.message.c.message_id == bad.id
        if broken is None:
            connection.execute(sa.delete(tables.message).where(row))
        else:
            connection.execute(sa.update(tables.message).where(row).values(**broken))
    stage.until(lambda: stage.states() == ["dead"])
    assert [each.id for each in stage.broker.sent] == [good.id]
    assert ("is gone" if broken is None else "a*b") in stage.rows()[0].error


# --- lost ---


def test_lost_messages_go_out_again_in_order_without_a_trace_in_the_database(engine: Engine) -> None:
    stage = Stage(engine, lambda _: Outcome.CONFIRMED if not stage.delivered() else None)
    stage.write(*(keyed(key) for _ in range(3) for key in ("a", "b")))
    stage.until(lambda: len(stage.broker.flying) == 2)
    stage.broker.disconnect()
    stage.turn(10)
    assert stage.states() == ["pending"] * 5
    assert all(row.attempts == 0 for row in stage.rows())
    stage.broker.connect()
    stage.broker.script = lambda _: Outcome.CONFIRMED
    stage.run_dry()
    assert stage.sequences("a") == stage.sequences("b") == [1, 2, 3]


def test_after_a_loss_the_first_message_goes_alone(engine: Engine) -> None:
    stage = Stage(engine)
    stage.broker.script = lambda _: None
    stage.write(*(message() for _ in range(10)))
    stage.turn(5)
    assert len(stage.broker.flying) == 1
    stage.broker.answer(stage.broker.flying[0])
    stage.turn(2)
    assert len(stage.broker.flying) == 9
    stage.broker.disconnect()
    stage.broker.connect()
    stage.turn(5)
    assert len(stage.broker.flying) == 1


@pytest.mark.parametrize("cause", [Cause.CLOSED, Cause.MESSAGE])
def test_one_message_that_kills_every_connection_is_found_and_it_alone_counts(engine: Engine, cause: Cause) -> None:
    stage = Stage(engine, max_attempts=2)

    def script(each: Message) -> Outcome | None:
        return (
            None if each.body == b"poison" or any(one.body == b"poison" for one in stage.broker.flying) else Outcome.CONFIRMED
        )

    stage.broker.script = script
    stage.write(*(keyed(f"k{n % 30}", body=b"poison" if n == 40 else b"1") for n in range(100)))
    losses = 0
    for _ in range(400):
        stage.turn()
        if any(each.body == b"poison" for each in stage.broker.flying):
            stage.broker.disconnect(cause=cause)
            stage.broker.connect()
            losses += 1
        stage.make_due()
        if "dead" in stage.states():
            break
    stage.turn(50)
    assert losses < 25
    dead = [row for row in stage.rows() if row.state == "dead"]
    assert [(row.key, row.sequence) for row in dead] == [("k10", 2)]
    assert all(row.attempts == 0 for row in stage.rows() if row.state != "dead")
    assert {row.key for row in stage.rows()} == {"k10"}
    assert len(stage.delivered()) == 98  # all but the culprit and the one behind it


@pytest.mark.parametrize("cause", [Cause.SILENCE, Cause.BLOCKED, Cause.OURS])
def test_a_deadline_of_our_own_is_held_against_no_message_however_often_it_passes(engine: Engine, cause: Cause) -> None:
    stage = Stage(engine, max_attempts=1)
    stage.broker.script = lambda each: Outcome.CONFIRMED if each.topic == "y" else None
    stage.write(keyed("a"), keyed("a"))
    for _ in range(12):  # one is sent alone and gets no answer, others pass: as a message that kills connections would do
        stage.write(message("y"), message("y"))
        stage.turn(8)
        stage.broker.disconnect(cause=cause)
        stage.broker.connect()
        stage.make_due()
    stage.turn(8)
    assert set(stage.states()) <= {"pending", "retrying"}  # the topic may be said to be silent; nobody is dead
    assert [row.attempts for row in stage.rows()] == [0] * len(stage.rows())


def test_a_broker_that_is_blocked_or_away_is_sent_nothing(engine: Engine) -> None:
    stage = Stage(engine)
    stage.broker.block()
    stage.write(message(), message())
    stage.turn(20)
    assert stage.broker.sent == []
    stage.broker.block(False)
    stage.broker.disconnect()
    stage.turn(20)
    assert stage.broker.sent == []
    stage.broker.connect()
    stage.run_dry()


# --- anything at all ---


@pytest.mark.parametrize("seed", range(3))
def test_in_any_weather_every_message_arrives_once_confirmed_and_each_key_in_order(engine: Engine, seed: int) -> None:
    chance = random.Random(seed)
    weights = {Outcome.CONFIRMED: 12, Outcome.RETURNED: 2, Outcome.NACKED: 2, Outcome.LOST: 1, None: 3}
    storm = True

    def script(_: Message) -> Outcome | None:
        return chance.choices(list(weights), list(weights.values()))[0] if storm else Outcome.CONFIRMED

    stage = Stage(engine, script, window=20, batch_size=15)
    written: list[Message] = []
    for _ in range(40):
        batch = [message(chance.choice("xy"), chance.choice(["a", "b", "c", None])) for _ in range(chance.randint(0, 8))]
        stage.write(*batch)
        written += batch
        stage.turn(chance.randint(1, 6), seconds=chance.choice([0.0, 0.02, 0.5]))
        for flying in stage.broker.flying:
            if chance.random() < 0.7:
                stage.broker.answer(flying, chance.choice([Outcome.CONFIRMED, Outcome.NACKED]))
        if chance.random() < 0.3:
            stage.make_due()
            stage.clock.now += 6.0
    storm = False
    for flying in stage.broker.flying:
        stage.broker.answer(flying)
    for _ in range(200):
        stage.make_due()
        stage.turn(5, seconds=1.0)
        if not stage.rows():
            break
    assert stage.rows() == []
    assert sorted(each.id for each in stage.delivered()) == sorted(each.id for each in written)
    for key in ("a", "b", "c"):
        for topic in ("x", "y"):
            arrived = [each.sequence for each in stage.delivered() if (each.key, each.topic) == (key, topic)]
            assert arrived == sorted(arrived, key=lambda sequence: sequence or 0)
    assert stage.published_total() == len(written)
