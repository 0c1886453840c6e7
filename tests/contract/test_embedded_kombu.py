"""A kombu consumer sees the same on the embedded broker as on RabbitMQ (a quorum queue with a single active consumer)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import amqp.exceptions
import pytest
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.messaging import Consumer

from outbox.embedded import connection as embedded_connection
from outbox.embedded.queues import Publication, Queues

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


EXCHANGE = "conference"
QUEUE = "conference.exports"
SOON = 0.2  # seconds in which nothing may happen
LONG = 10.0


class Broker(Protocol):
    """One of the two."""

    def connect(self) -> Any: ...
    def publish(self, topic: str, body: bytes, headers: dict[str, Any] | None = None) -> None: ...
    def close(self) -> None: ...


class Consume(Protocol):
    """The type of the fixture `consume`."""

    def __call__(self, prefetch: int = 10, queues: tuple[str, ...] = (QUEUE,)) -> Client: ...


class Embedded:
    def __init__(self, url: str) -> None:
        self._url = url
        self._queues = Queues(url.removeprefix("embedded:///"))

    def connect(self) -> Any:
        return embedded_connection(self._url)

    def publish(self, topic: str, body: bytes, headers: dict[str, Any] | None = None) -> None:
        properties = {"content_type": "application/json", "message_id": "m-1", "headers": headers or {}}
        self._queues.publish(EXCHANGE, [Publication(topic=topic, body=body, properties=properties)])

    def close(self) -> None:
        self._queues.close()


class Rabbit:
    def __init__(self, url: str) -> None:
        self._url = url
        self._publisher = self.connect()

    def connect(self) -> Any:
        return Connection(self._url, transport_options={"confirm_publish": True})  # type: ignore[no-untyped-call]

    def publish(self, topic: str, body: bytes, headers: dict[str, Any] | None = None) -> None:
        message = amqp.Message(body, content_type="application/json", message_id="m-1", application_headers=headers or {})
        self._publisher.default_channel.basic_publish(message, exchange=EXCHANGE, routing_key=topic)

    def close(self) -> None:
        self._publisher.close()


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    if request.param == "embedded":
        made: Broker = Embedded(f"embedded:///{tmp_path / 'broker.db'}")
    else:
        made = Rabbit(request.getfixturevalue("broker_url"))
    with made.connect() as connection:
        _queue(QUEUE)(connection).declare()
    yield made
    made.close()


def _queue(name: str, pattern: str = "#") -> Any:
    exchange = Exchange(EXCHANGE, type="topic", durable=True)  # type: ignore[no-untyped-call]
    arguments = {"x-queue-type": "quorum", "x-single-active-consumer": True, "x-delivery-limit": 1000}
    return Queue(name, exchange, routing_key=pattern, durable=True, queue_arguments=arguments)  # type: ignore[no-untyped-call]


class Client:
    """A consumer and what it got."""

    def __init__(self, connection: Any, prefetch: int, queues: list[Any]) -> None:
        self.connection = connection
        self.channel = connection.default_channel
        self.got: list[Any] = []
        self._read = 0
        consumer: Any = Consumer(  # type: ignore[no-untyped-call]
            self.channel,
            queues,
            on_message=self.got.append,
            prefetch_count=prefetch,
            auto_declare=False,
            tag_prefix=str(id(self)),
        )
        consumer.consume()
        self.cancel = consumer.cancel

    def receive(self, count: int) -> list[bytes]:
        """The bodies of the next *count* messages."""
        began, self._read = self._read, self._read + count
        while len(self.got) < self._read:  # py-amqp delivers also while it waits for an answer
            self.connection.drain_events(timeout=LONG)
        return [message.body for message in self.got[began : self._read]]

    def receives_nothing(self) -> bool:
        try:
            self.connection.drain_events(timeout=SOON)
        except TimeoutError:
            return True
        return False

    def settle(self, tag: int) -> None:
        """Acknowledge up to *tag*, and stay for the broker's objection."""
        self.channel.basic_ack(tag, multiple=True)
        self.connection.drain_events(timeout=LONG)

    def drop(self) -> None:
        """End the connection without a word to the broker."""
        self.connection.collect()


@pytest.fixture
def consume(broker: Broker) -> Iterator[Consume]:
    """Start a consumer on a connection of its own."""
    with ExitStack() as stack:

        def start(prefetch: int = 10, queues: tuple[str, ...] = (QUEUE,)) -> Client:
            client = Client(broker.connect(), prefetch, [_queue(name) for name in queues])
            stack.callback(client.drop)
            return client

        yield start


def _publish(broker: Broker, count: int, start: int = 0) -> list[bytes]:
    bodies = [b"%d" % number for number in range(start, start + count)]
    for body in bodies:
        broker.publish("session.modified", body)
    return bodies


def test_a_message_arrives_with_its_bytes_properties_headers_and_delivery_info(broker: Broker, consume: Consume) -> None:
    broker.publish("session.modified", b'{"\xff', {"partitionkey": "event:1"})
    client = consume()
    assert client.receive(1) == [b'{"\xff']
    message = client.got[0]
    assert isinstance(message.body, bytes)
    assert message.headers == {"partitionkey": "event:1"}
    assert (message.properties["message_id"], message.content_type) == ("m-1", "application/json")
    assert message.delivery_info["routing_key"] == "session.modified"
    assert message.delivery_info["exchange"] == EXCHANGE
    assert message.delivery_info["redelivered"] is False
    assert "x-delivery-count" not in message.headers


def test_waiting_without_a_message_times_out(broker: Broker, consume: Consume) -> None:
    assert consume().receives_nothing()


def test_messages_arrive_in_the_order_in_which_they_were_published(broker: Broker, consume: Consume) -> None:
    bodies = _publish(broker, 30)
    client = consume(prefetch=100)
    assert client.receive(30) == bodies
    more = _publish(broker, 10, start=30)
    assert client.receive(10) == more


def test_no_more_messages_than_the_prefetch_are_delivered_before_an_acknowledgement(broker: Broker, consume: Consume) -> None:
    bodies = _publish(broker, 6)
    client = consume(prefetch=3)
    assert client.receive(3) == bodies[:3]
    assert client.receives_nothing()
    client.got[0].ack()
    assert client.receive(1) == bodies[3:4]
    assert client.receives_nothing()


def test_an_acknowledged_message_never_comes_back(broker: Broker, consume: Consume) -> None:
    bodies = _publish(broker, 3)
    first = consume()
    first.receive(3)
    first.got[1].ack()
    first.drop()
    second = consume()
    assert second.receive(2) == [bodies[0], bodies[2]]
    assert second.receives_nothing()


def test_acknowledging_multiple_settles_everything_up_to_the_tag_and_nothing_above(broker: Broker, consume: Consume) -> None:
    bodies = _publish(broker, 5)
    first = consume()
    first.receive(5)
    first.got[2].ack(multiple=True)
    first.drop()
    second = consume()
    assert second.receive(2) == bodies[3:]
    assert second.receives_nothing()


def test_an_unknown_delivery_tag_closes_the_channel(broker: Broker, consume: Consume) -> None:
    _publish(broker, 1)
    client = consume()
    client.receive(1)
    with pytest.raises(amqp.exceptions.PreconditionFailed):
        client.settle(77)


def test_a_message_acknowledged_twice_closes_the_channel(broker: Broker, consume: Consume) -> None:
    _publish(broker, 2)
    client = consume()
    client.receive(2)
    client.channel.basic_ack(1)
    with pytest.raises(amqp.exceptions.PreconditionFailed):
        client.settle(1)


def test_a_message_rejected_for_requeue_comes_again_and_is_marked(broker: Broker, consume: Consume) -> None:
    bodies = _publish(broker, 1)
    client = consume()
    client.receive(1)
    client.got[0].requeue()
    assert client.receive(1) == bodies
    again = client.got[1]
    assert again.delivery_info["redelivered"] is True
    assert again.headers["x-delivery-count"] == 1
    assert again.delivery_tag == 2


def test_a_rejected_message_is_gone(broker: Broker, consume: Consume) -> None:
    bodies = _publish(broker, 2)
    client = consume()
    client.receive(2)
    client.got[0].reject()
    client.drop()
    assert consume().receive(1) == bodies[1:]


def test_after_a_dropped_connection_the_unacknowledged_come_first_in_order_marked_and_counted(
    broker: Broker, consume: Consume
) -> None:
    # The same prefetch each time: RabbitMQ 3.10 puts what comes back behind what came back before and was not taken again.
    bodies = _publish(broker, 6)
    for earlier in range(3):
        client = consume(prefetch=4)
        assert client.receive(4) == bodies[:4]
        assert [message.delivery_info["redelivered"] for message in client.got] == [earlier > 0] * 4
        assert [message.headers.get("x-delivery-count", 0) for message in client.got] == [earlier] * 4
        client.drop()
    last = consume(prefetch=4)
    last.receive(4)
    last.got[3].ack(multiple=True)
    assert last.receive(2) == bodies[4:]
    assert [message.delivery_info["redelivered"] for message in last.got[4:]] == [False] * 2


def test_an_untouched_message_is_not_marked_as_redelivered(broker: Broker, consume: Consume) -> None:
    _publish(broker, 3)
    first = consume(prefetch=2)
    first.receive(2)
    first.drop()
    second = consume()
    second.receive(3)
    assert second.got[2].delivery_info["redelivered"] is False
    assert "x-delivery-count" not in second.got[2].headers


def test_a_second_consumer_gets_nothing_while_the_first_one_lives_and_everything_in_order_after_it(
    broker: Broker, consume: Consume
) -> None:
    bodies = _publish(broker, 6)
    first, second = consume(prefetch=3), consume(prefetch=10)
    first.receive(3)
    assert second.receives_nothing()
    first.got[0].ack()
    assert first.receive(1) == bodies[3:4]
    assert second.receives_nothing()
    first.drop()
    assert second.receive(5) == bodies[1:]


def test_closing_a_channel_gives_its_messages_to_the_next_consumer_in_order(broker: Broker, consume: Consume) -> None:
    bodies = _publish(broker, 3)
    first = consume()
    first.receive(3)
    first.connection.close()
    assert consume().receive(3) == bodies


def test_acknowledging_after_the_connection_was_dropped_raises_a_connection_error(broker: Broker, consume: Consume) -> None:
    bodies = _publish(broker, 1)
    client = consume()
    client.receive(1)
    errors = client.connection.connection_errors
    client.drop()
    with pytest.raises(errors):
        client.got[0].ack()
    assert consume().receive(1) == bodies


def test_a_cancelled_consumer_gets_nothing_more_and_may_still_acknowledge(broker: Broker, consume: Consume) -> None:
    _publish(broker, 1)
    client = consume()
    client.receive(1)
    client.cancel()
    _publish(broker, 1, start=1)
    assert client.receives_nothing()
    client.got[0].ack()
    assert consume().receive(1) == [b"1"]


def test_one_connection_may_consume_several_queues(broker: Broker, consume: Consume) -> None:
    with broker.connect() as connection:
        _queue("conference.dead", "dead.letter")(connection).declare()
    broker.publish("dead.letter", b"in both")
    client = consume(queues=(QUEUE, "conference.dead"))
    assert client.receive(2) == [b"in both", b"in both"]
    client.got[1].ack(multiple=True)
    client.drop()
    assert consume(queues=(QUEUE, "conference.dead")).receives_nothing()


def test_a_consumer_of_a_deleted_queue_is_told(broker: Broker, consume: Consume) -> None:
    client = consume()
    assert client.receives_nothing()
    with broker.connect() as connection:
        connection.default_channel.queue_delete(QUEUE)
    with pytest.raises(amqp.exceptions.ConsumerCancelled):
        client.connection.drain_events(timeout=LONG)


def test_a_missing_queue_can_be_neither_looked_at_nor_consumed(broker: Broker) -> None:
    with broker.connect() as connection, pytest.raises(amqp.exceptions.NotFound):
        connection.default_channel.queue_declare("conference.nobody", passive=True)
    with broker.connect() as connection, pytest.raises(amqp.exceptions.NotFound):
        connection.default_channel.basic_consume("conference.nobody", consumer_tag="c", callback=print)


def test_a_queue_says_how_many_messages_wait(broker: Broker, consume: Consume) -> None:
    _publish(broker, 3)
    with broker.connect() as connection:
        channel = connection.default_channel
        assert channel.queue_declare(QUEUE, passive=True) == (QUEUE, 3, 0)
        client = consume(prefetch=2)
        client.receive(2)
        assert channel.queue_declare(QUEUE, passive=True) == (QUEUE, 1, 1)
        assert channel.queue_purge(QUEUE) == 1
        client.drop()
    assert consume().receive(2) == [b"0", b"1"]


def test_an_unbound_queue_gets_nothing_new(broker: Broker, consume: Consume) -> None:
    _publish(broker, 1)
    with broker.connect() as connection:
        connection.default_channel.queue_unbind(QUEUE, EXCHANGE, "#")
    _publish(broker, 1, start=1)
    client = consume()
    assert client.receive(1) == [b"0"]
    assert client.receives_nothing()
