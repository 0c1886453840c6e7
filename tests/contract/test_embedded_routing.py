"""The embedded broker's topic patterns take what RabbitMQ's take."""

from __future__ import annotations

from itertools import product
from typing import Any

import amqp
import pytest
from kombu.connection import Connection

from outbox.embedded.routing import matches

PATTERNS = [".".join(words) for length in (1, 2, 3) for words in product(["a", "b", "*", "#"], repeat=length)]
PATTERNS += ["", "a..b", "*.*.*.*", "#.a.#.b", "a#", "*a"]
# RabbitMQ 4.3 refuses a binding with more of them.
PATTERNS = [pattern for pattern in PATTERNS if pattern.split(".").count("#") <= 2]
TOPICS = [".".join(words) for length in (1, 2, 3, 4) for words in product("ab", repeat=length)]
TOPICS += ["", "a..b", ".", "a.", ".b", "a.c.b", "aa", "A"]


@pytest.mark.timeout(60)
def test_every_pattern_takes_the_topics_that_it_takes_on_rabbitmq(broker_url: str) -> None:
    connection: Any = Connection(broker_url, transport_options={"confirm_publish": True})  # type: ignore[no-untyped-call]
    with connection, connection.default_channel as channel:
        channel.exchange_declare("words", "topic", durable=True, auto_delete=False)
        for number, pattern in enumerate(PATTERNS):
            channel.queue_declare(f"q{number}", exclusive=True)
            channel.queue_bind(f"q{number}", "words", pattern)
        for topic in TOPICS:
            channel.basic_publish(amqp.Message(b""), exchange="words", routing_key=topic)
        theirs = {pattern: _topics(channel, f"q{number}") for number, pattern in enumerate(PATTERNS)}
    assert {pattern: [topic for topic in TOPICS if matches(pattern, topic)] for pattern in PATTERNS} == theirs


def _topics(channel: Any, queue: str) -> list[str]:
    topics = []
    while (message := channel.basic_get(queue, no_ack=True)) is not None:
        topics.append(message.delivery_info["routing_key"])
    return topics
