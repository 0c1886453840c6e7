"""A message of the relay looks the same to a kombu consumer, whichever broker carried it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from outbox.embedded import connection as embedded_connection
from outbox.relay.broker import Broker, Outcome, Outgoing
from outbox.relay.embedded import EmbeddedBroker
from outbox.relay.rabbitmq import RabbitBroker
from tests.kit.builders import message
from tests.kit.outgoing import answered, connected

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from outbox.message import Message

EXCHANGE, QUEUE = "openevent", "openevent.exports"


def test_the_relays_messages_arrive_with_the_same_bytes_properties_and_headers(broker_url: str, tmp_path: Path) -> None:
    at = datetime(2017, 3, 19, 12, 30, 15, 250_000, tzinfo=UTC)
    messages = [
        message(key="event:1", sequence=7, headers={"traceparent": "00-ab-cd-01", "correlationid": "c-9"}, created_at=at),
        message(key="Köln ✓", created_at=at),
        message(created_at=at),
        message(body=b"\x00\xff", content_type="application/octet-stream", created_at=at),
        message(body=b"", created_at=at),
    ]
    embedded_url = f"embedded:///{tmp_path / 'broker.db'}"
    theirs = _carried(
        messages,
        Connection(broker_url),  # type: ignore[no-untyped-call]
        RabbitBroker(broker_url, exchange=EXCHANGE),
    )
    ours = _carried(messages, embedded_connection(embedded_url), EmbeddedBroker(embedded_url, exchange=EXCHANGE))
    assert ours == theirs


def _carried(messages: Sequence[Message], connection: Any, broker: Broker) -> list[dict[str, Any]]:
    """Return what a consumer gets of *messages*."""
    got: list[dict[str, Any]] = []

    def keep(delivery: Any) -> None:
        # pyamqp hands raw messages to callbacks that did not come through kombu's Consumer.
        delivery = delivery.channel.message_to_python(delivery) if hasattr(delivery.channel, "message_to_python") else delivery
        properties = {name: value for name, value in delivery.properties.items() if name != "application_headers"}
        info = {name: delivery.delivery_info[name] for name in ("redelivered", "exchange", "routing_key", "delivery_tag")}
        got.append(
            {"body": delivery.body, "type": type(delivery.body), "headers": delivery.headers, **info, "properties": properties}
        )

    with connection, connection.channel() as channel:
        exchange = Exchange(EXCHANGE, type="topic", durable=True)  # type: ignore[no-untyped-call]
        queue: Any = Queue(QUEUE, exchange, "#", durable=True)  # type: ignore[no-untyped-call]
        queue(channel).declare()
        broker.start()
        connected(broker)
        broker.send([Outgoing(token, each) for token, each in enumerate(messages)])
        assert {answer.outcome for answer in answered(broker, len(messages)).values()} == {Outcome.CONFIRMED}
        broker.stop(5)
        channel.basic_consume(QUEUE, consumer_tag="tests", callback=keep)
        while len(got) < len(messages):
            connection.drain_events(timeout=10)
    return got
