"""What the relay may rely on, whichever broker it talks to: RabbitMQ, the embedded one, or the tests' double."""

from __future__ import annotations

import threading
from contextlib import closing
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol, cast

import pika
import pytest
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.messaging import Consumer

from outbox import embedded
from outbox.embedded.queues import Queues
from outbox.embedded.urls import path_of
from outbox.message import Message, cloud_event
from outbox.relay.broker import Broker, Outcome, Outgoing
from outbox.relay.embedded import EmbeddedBroker
from outbox.relay.rabbitmq import RabbitBroker
from tests.kit.builders import message
from tests.kit.fakes import FakeBroker
from tests.kit.outgoing import answered, batch, connected
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kombu.message import Message as KombuMessage

_EXCHANGE = "openevent"
_QUEUE = "openevent.tap"


class Stage(Protocol):
    """A broker with the exchange `openevent` and one queue, bound to nothing at first."""

    def client(self) -> Broker:
        """Return a new client of it, not started."""

    def bind(self, pattern: str) -> None:
        """Let topics like *pattern* into the queue."""

    def unbind(self, pattern: str) -> None:
        """Do so no more."""

    def take(self, at_least: int) -> list[bytes]:
        """Wait for *at_least* messages in the queue, remove all there are and return their bodies in order."""


class RabbitStage:
    def __init__(self, url: str) -> None:
        self._url = url
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self._channel = self._connection.channel()
        self._channel.exchange_declare(_EXCHANGE, "topic", durable=True)
        self._channel.queue_declare(_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})

    def client(self) -> Broker:
        return RabbitBroker(self._url, exchange=_EXCHANGE)

    def bind(self, pattern: str) -> None:
        self._channel.queue_bind(_QUEUE, _EXCHANGE, pattern)

    def unbind(self, pattern: str) -> None:
        self._channel.queue_unbind(_QUEUE, _EXCHANGE, pattern)

    def take(self, at_least: int) -> list[bytes]:
        return _consumed(Connection(self._url), at_least)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._connection.close()


class EmbeddedStage:
    def __init__(self, folder: Path) -> None:
        self._url = f"embedded:///{folder}/broker.db"
        self._queues = Queues(path_of(self._url))
        self._queues.declare_queue(_QUEUE)

    def client(self) -> Broker:
        return EmbeddedBroker(self._url, exchange=_EXCHANGE)

    def bind(self, pattern: str) -> None:
        self._queues.bind(_QUEUE, pattern, exchange=_EXCHANGE)

    def unbind(self, pattern: str) -> None:
        self._queues.unbind(_QUEUE, pattern, exchange=_EXCHANGE)

    def take(self, at_least: int) -> list[bytes]:
        return _consumed(embedded.connection(self._url), at_least)

    def close(self) -> None:
        self._queues.close()


class FakeStage:
    def __init__(self) -> None:
        self._patterns: set[str] = set()
        self._fake = FakeBroker(self._route)

    def _route(self, sent: Message) -> Outcome:
        try:
            cloud_event(sent)
        except TypeError:
            return Outcome.REFUSED
        return Outcome.CONFIRMED if any(fnmatchcase(sent.topic, each) for each in self._patterns) else Outcome.RETURNED

    def client(self) -> Broker:
        return self._fake

    def bind(self, pattern: str) -> None:
        self._patterns.add(pattern)

    def unbind(self, pattern: str) -> None:
        self._patterns.discard(pattern)

    def take(self, at_least: int) -> list[bytes]:
        bodies = [cloud_event(each) for each in self._fake.delivered]
        self._fake.delivered.clear()
        assert len(bodies) >= at_least
        return bodies


def _consumed(connection: Connection, at_least: int) -> list[bytes]:
    bodies: list[bytes] = []

    def keep(received: KombuMessage) -> None:
        bodies.append(received.body if isinstance(received.body, bytes) else bytes(received.body))
        received.ack()  # type: ignore[no-untyped-call]

    def quiet() -> bool:
        try:
            connection.drain_events(timeout=0.2)  # type: ignore[no-untyped-call]
        except TimeoutError:
            return len(bodies) >= at_least
        return False

    queue = Queue(_QUEUE, no_declare=True)  # type: ignore[no-untyped-call]
    with connection, Consumer(connection, [queue], on_message=keep, auto_declare=False):  # type: ignore[no-untyped-call]
        eventually(quiet, what=f"{at_least} messages in the queue", interval=0.0)
    return bodies


@pytest.fixture(params=[pytest.param("rabbitmq", marks=pytest.mark.rabbitmq), "embedded", "fake"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    if request.param == "fake":
        yield FakeStage()
    elif request.param == "embedded":
        with closing(EmbeddedStage(tmp_path)) as made:
            yield made
    else:
        with closing(RabbitStage(request.getfixturevalue("broker_url"))) as real:
            yield real


@pytest.fixture
def broker(stage: Stage) -> Iterator[Broker]:
    """A started, connected client."""
    client = stage.client()
    client.start()
    connected(client)
    yield client
    client.stop(5)


def test_messages_with_a_queue_are_confirmed_and_are_in_it_byte_for_byte_in_the_order_they_were_sent(
    stage: Stage, broker: Broker
) -> None:
    stage.bind("session.*")
    sent = [Outgoing(n, message(key=f"event:{n % 7}", sequence=n, body=b'"%d"' % n)) for n in range(1, 301)]
    sent.append(Outgoing(301, message("session.state_changed", body=b'"' + b"x" * 262_000 + b'"')))
    broker.send(sent[:100])
    broker.send(sent[100:])
    answers = answered(broker, 301)
    assert {answer.outcome for answer in answers.values()} == {Outcome.CONFIRMED}
    assert all(answer.seconds > 0 for answer in answers.values())
    taken = stage.take(301)
    for topic in {outgoing.message.topic for outgoing in sent}:  # one that waits for answers keeps no other topic waiting
        expected = [cloud_event(outgoing.message) for outgoing in sent if outgoing.message.topic == topic]
        assert [body for body in taken if body in set(expected)] == expected
    assert len(taken) == len(sent)


def test_a_topic_without_a_queue_is_returned_and_its_neighbours_are_confirmed(stage: Stage, broker: Broker) -> None:
    stage.bind("session.modified")
    sent = [Outgoing(n, message("session.modified" if n % 2 else "speaker.modified")) for n in range(40)]
    broker.send(sent)
    answers = answered(broker, 40)
    assert {token for token, answer in answers.items() if answer.outcome is Outcome.CONFIRMED} == set(range(1, 40, 2))
    assert {token for token, answer in answers.items() if answer.outcome is Outcome.RETURNED} == set(range(0, 40, 2))
    assert stage.take(20) == [cloud_event(outgoing.message) for outgoing in sent if outgoing.token % 2]


def test_a_removed_binding_returns_and_a_restored_one_confirms(stage: Stage, broker: Broker) -> None:
    outcomes = []
    for change in (stage.bind, stage.unbind, stage.bind):
        change("session.modified")
        broker.send(batch(1))
        outcomes.append(answered(broker, 1)[1].outcome)
    assert outcomes == [Outcome.CONFIRMED, Outcome.RETURNED, Outcome.CONFIRMED]


def test_a_message_that_cannot_be_encoded_is_refused_and_its_neighbours_are_confirmed(stage: Stage, broker: Broker) -> None:
    stage.bind("session.modified")
    broken = message(content_type="text/plain", body=cast("bytes", "no bytes"))
    sent = [Outgoing(1, message()), Outgoing(2, broken), Outgoing(3, message())]
    broker.send(sent)
    assert [answer.outcome for _, answer in sorted(answered(broker, 3).items())] == [
        Outcome.CONFIRMED,
        Outcome.REFUSED,
        Outcome.CONFIRMED,
    ]
    assert stage.take(2) == [cloud_event(sent[0].message), cloud_event(sent[2].message)]


def test_the_same_message_sent_twice_at_once_is_answered_twice(stage: Stage, broker: Broker) -> None:
    stage.bind("session.modified")
    replayed = message()
    broker.send([Outgoing(1, replayed), Outgoing(2, replayed), Outgoing(3, message())])
    assert {answer.outcome for answer in answered(broker, 3).values()} == {Outcome.CONFIRMED}
    assert stage.take(3)[:2] == [cloud_event(replayed)] * 2


def test_an_empty_batch_is_no_news(broker: Broker) -> None:
    broker.send([])
    broker.send(batch(1))
    assert answered(broker, 1).keys() == {1}


def test_before_the_start_and_after_the_stop_everything_is_lost_at_once_and_was_not_sent(stage: Stage) -> None:
    stage.bind("session.modified")
    client = stage.client()
    for moment in ("before", "after"):
        if moment == "after":
            client.start()
            connected(client)
            client.stop(5)
        assert not client.state().connected
        assert client.state().detail
        client.send(batch(1))
        answer = answered(client, 1, timeout=1)[1]
        assert answer.outcome is Outcome.NOT_SENT
        assert answer.detail
    assert stage.take(0) == []


def test_connected_it_has_nothing_to_complain_of(broker: Broker) -> None:
    state = broker.state()
    assert (state.connected, state.blocked, state.refused, state.detail) == (True, False, False, "")


def test_waiting_for_answers_ends_when_it_is_woken_also_from_another_thread(broker: Broker) -> None:
    waker = threading.Thread(target=broker.wake)
    waker.start()
    assert broker.answers(60) == []
    waker.join()


def test_stopped_in_the_middle_of_a_window_it_leaves_no_message_without_an_answer(stage: Stage, broker: Broker) -> None:
    stage.bind("session.modified")
    sent = batch(500)
    broker.send(sent)
    broker.stop(10)
    answers = answered(broker, 500, timeout=1)
    assert {answer.outcome for answer in answers.values()} <= {Outcome.CONFIRMED, Outcome.LOST, Outcome.NOT_SENT}
    assert broker.answers(0) == []
    confirmed = {cloud_event(outgoing.message) for outgoing in sent if answers[outgoing.token].outcome is Outcome.CONFIRMED}
    assert confirmed <= set(stage.take(len(confirmed)))
