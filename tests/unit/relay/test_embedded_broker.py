from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from outbox.embedded.ownership import Ownership, QueueLock, lock_path
from outbox.embedded.queues import Queues, queue_number
from outbox.errors import ConfigurationError
from outbox.message import Message, cloud_event, new_id
from outbox.process.backoff import Backoff
from outbox.relay.broker import Outcome, Outgoing
from outbox.relay.embedded import EmbeddedBroker
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AT_ONCE = Backoff(base_seconds=0.001, maximum_seconds=0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.db"


@pytest.fixture
def queues(path: Path) -> Iterator[Queues]:
    with Queues(path) as opened:
        opened.declare_queue("exports")
        opened.bind("exports", "session.*", exchange="openevent")
        yield opened


@pytest.fixture
def broker(path: Path) -> Iterator[EmbeddedBroker]:
    broker = EmbeddedBroker(f"embedded:///{path}", exchange="openevent", reopen=AT_ONCE)
    yield broker
    broker.stop(1.0)


def _message(topic: str = "session.modified", **fields: Any) -> Message:
    created_at = datetime(2017, 3, 19, 12, 30, tzinfo=UTC)
    return Message(id=new_id(), source="/openevent", topic=topic, created_at=created_at, **{"body": b'{"id":1}', **fields})


def _batch(*topics: str) -> list[Outgoing]:
    return [Outgoing(token, _message(topic)) for token, topic in enumerate(topics)]


def _outcomes(broker: EmbeddedBroker) -> dict[int, Outcome]:
    return {answer.token: answer.outcome for answer in broker.answers(0)}


def _received(queues: Queues) -> list[Any]:
    with queues.file.reading() as connection:
        number = queue_number(connection, "exports")
    lock = QueueLock(lock_path(queues.file, number))
    assert lock.take()
    owner = Ownership.begin(queues.file, number, lock)
    try:
        return owner.take(1000)
    finally:
        owner.release()


def test_a_message_has_the_bytes_and_properties_that_it_has_on_rabbitmq(broker: EmbeddedBroker, queues: Queues) -> None:
    message = _message(key="event:1", sequence=7, headers={"traceparent": "00-ab-cd-01", "correlationid": "c-9"})
    broker.start()
    broker.send([Outgoing(1, message)])
    (delivery,) = _received(queues)
    assert delivery.body == cloud_event(message)
    assert (delivery.exchange, delivery.topic) == ("openevent", "session.modified")
    assert json.loads(delivery.properties) == {
        "content_type": "application/cloudevents+json; charset=utf-8",
        "delivery_mode": 2,
        "message_id": str(message.id),
        "timestamp": 1489926600,
        "type": "session.modified",
        "app_id": "outbox",
        "correlation_id": "c-9",
        "headers": {"partitionkey": "event:1", "traceparent": "00-ab-cd-01", "correlationid": "c-9"},
    }


def test_what_reached_a_queue_is_confirmed_and_what_reached_none_is_returned(broker: EmbeddedBroker, queues: Queues) -> None:
    broker.start()
    broker.send(_batch("session.modified", "speaker.modified", "session.created"))
    answers = broker.answers(0)
    assert [answer.outcome for answer in answers] == [Outcome.CONFIRMED, Outcome.RETURNED, Outcome.CONFIRMED]
    assert "no queue on exchange 'openevent'" in answers[1].detail
    assert all(answer.seconds > 0 for answer in answers)
    assert [delivery.topic for delivery in _received(queues)] == ["session.modified", "session.created"]


def test_nothing_is_answered_before_the_commit(broker: EmbeddedBroker, queues: Queues, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are there, the commit is not: a confirm now would be a lie if the process died."""
    seen: list[tuple[int, int]] = []

    def between(name: str) -> None:
        if name == "E1":  # inserted, not committed; R2 comes after the commit
            seen.append((queues.depth("exports").ready, len(broker.answers(0))))

    monkeypatch.setattr("outbox.process.failpoints.reached", between)
    broker.start()
    broker.send(_batch("session.modified"))
    assert seen == [(0, 0)]
    assert _outcomes(broker) == {0: Outcome.CONFIRMED}


def test_what_follows_a_refused_message_in_its_key_is_not_sent(
    broker: EmbeddedBroker, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(message: Message) -> bytes:
        if message.body == b"unfit":
            raise AssertionError
        return cloud_event(message)

    monkeypatch.setattr("outbox.relay.embedded.cloud_event", encode)
    broker.start()
    bodies = [("a", b"1"), ("a", b"unfit"), ("a", b"3"), ("b", b"4"), (None, b"unfit"), (None, b"6")]
    broker.send([Outgoing(token, _message(key=key, body=body)) for token, (key, body) in enumerate(bodies)])
    answers = {answer.token: answer for answer in broker.answers(0)}
    confirmed, refused, not_sent = Outcome.CONFIRMED, Outcome.REFUSED, Outcome.NOT_SENT
    assert [answers[token].outcome for token in range(6)] == [confirmed, refused, not_sent, confirmed, refused, confirmed]
    assert answers[2].detail == "an earlier message of its key was refused"
    assert queues.depth("exports").ready == 3


def test_a_message_that_cannot_be_encoded_is_refused_alone(
    broker: EmbeddedBroker, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(message: Message) -> bytes:
        if message.topic == "session.unfit":
            raise AssertionError("secret payload")
        return cloud_event(message)

    monkeypatch.setattr("outbox.relay.embedded.cloud_event", encode)
    broker.start()
    broker.send(_batch("session.modified", "session.unfit", "session.created"))
    answers = {answer.token: answer for answer in broker.answers(0)}
    assert [answers[token].outcome for token in range(3)] == [Outcome.CONFIRMED, Outcome.REFUSED, Outcome.CONFIRMED]
    assert answers[1].detail == "can't be encoded: AssertionError"


def test_before_the_start_everything_is_lost_at_once(broker: EmbeddedBroker) -> None:
    broker.send(_batch("session.modified"))
    (answer,) = broker.answers(10)
    assert answer.outcome is Outcome.NOT_SENT
    assert not broker.state().connected


def test_a_batch_that_meets_a_locked_file_is_lost_and_the_broker_recovers(
    path: Path, broker: EmbeddedBroker, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.embedded.file.BUSY_SECONDS", 0.02)
    broker.start()
    with queues.file.transaction():
        broker.send(_batch("session.modified", "speaker.modified"))
        assert _outcomes(broker) == {0: Outcome.NOT_SENT, 1: Outcome.NOT_SENT}
        assert not broker.state().connected
        assert "database is locked" in broker.state().detail
        assert not broker.state().refused
    assert broker.answers(10) == []  # returns as soon as the file is open again
    assert broker.state().connected
    broker.send(_batch("session.modified"))
    assert _outcomes(broker) == {0: Outcome.CONFIRMED}
    assert queues.depth("exports").ready == 1


def test_a_removed_file_confirms_nothing_and_its_successor_has_no_queues(
    path: Path, broker: EmbeddedBroker, queues: Queues
) -> None:
    broker.start()
    path.unlink()
    broker.send(_batch("session.modified"))
    (answer,) = broker.answers(0)
    assert (answer.outcome, "was removed or replaced" in answer.detail) == (Outcome.NOT_SENT, True)
    assert broker.answers(10) == []
    broker.send(_batch("session.modified"))
    assert _outcomes(broker) == {0: Outcome.RETURNED}


def test_a_file_that_cannot_be_used_is_refused_and_tried_again(path: Path, broker: EmbeddedBroker) -> None:
    path.write_bytes(b"no database" * 100)
    broker.start()
    assert broker.state().refused
    assert "file is not a database" in broker.state().detail
    broker.send(_batch("session.modified"))
    assert _outcomes(broker) == {0: Outcome.NOT_SENT}
    path.unlink()
    assert eventually(lambda: broker.answers(0.01) == [] and broker.state().connected)


def test_each_trouble_is_told_once_and_its_end_too(
    path: Path, broker: EmbeddedBroker, queues: Queues, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("outbox.embedded.file.BUSY_SECONDS", 0.01)
    broker.start()
    with queues.file.transaction():
        for _ in range(3):
            eventually(lambda: broker.answers(0.01) == [] and broker.state().connected)
            broker.send(_batch("session.modified"))
            broker.answers(0)
    eventually(lambda: broker.answers(0.01) == [] and broker.state().connected)
    broker.send(_batch("session.modified"))
    events = [getattr(record, "outbox_event", None) for record in caplog.records]
    assert events == ["broker.connected", "broker.lost", "broker.connected"]


def test_waiting_for_answers_ends_when_it_is_woken_or_time_is_up(broker: EmbeddedBroker, queues: Queues) -> None:
    broker.start()
    began = time.monotonic()
    assert broker.answers(0.05) == []
    assert 0.04 < time.monotonic() - began < 5
    waker = threading.Thread(target=broker.wake)
    waker.start()
    assert broker.answers(30) == []
    waker.join()
    assert time.monotonic() - began < 15


def test_a_stopped_broker_takes_nothing_and_stays_closed(broker: EmbeddedBroker, queues: Queues) -> None:
    broker.start()
    broker.stop(1.0)
    broker.stop(1.0)
    broker.send(_batch("session.modified"))
    assert _outcomes(broker) == {0: Outcome.NOT_SENT}
    assert broker.answers(0) == []
    assert not broker.state().connected


def test_a_url_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the embedded broker is a file"):
        EmbeddedBroker("amqp://user:password@host/vhost", exchange="openevent")
