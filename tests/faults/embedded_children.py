"""A publisher and a consumer on the embedded broker, for tests that kill them. Each line they write is one `write`.

`sent A B` before a batch of the numbers A to B is sent, `confirmed A B` after its last answer; `got N RETURNS` before a
delivery is looked at, `acked N …` after the acknowledgement returned. Each line begins with the process id.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.embedded import connection, path_of
from outbox.embedded.queues import Queues
from outbox.message import Message, received
from outbox.process import failpoints
from outbox.relay.broker import Outcome, Outgoing
from outbox.relay.embedded import EmbeddedBroker
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

EXCHANGE, QUEUE = "openevent", "openevent.exports"
KEYS = 5


class Log:
    """A file that several processes append to; the order of its lines is the order of what happened."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(self, *words: object) -> None:
        os.write(self._descriptor, (" ".join(map(str, (os.getpid(), *words))) + "\n").encode())

    def lines(self) -> Iterator[list[str]]:
        with open(self._path) as text:
            for line in text:
                yield line.split()


def message(number: int) -> Message:
    """The message with this number, from 1; the same whenever it is sent."""
    return Message(
        id=UUID(int=number),
        source="/tests",
        topic="session.modified",
        key=f"event:{number % KEYS}",
        sequence=(number - 1) // KEYS + 1,
        body=b'"%s"' % (b"x" * (number * 37 % 3000)),
        created_at=datetime.fromtimestamp(number, UTC),
    )


def publish(url: str, log: Log, last: int) -> None:
    """Send the messages up to *last* that no publisher has seen confirmed, in batches."""
    confirmed = max((int(line[3]) for line in log.lines() if line[1] == "confirmed"), default=0)
    broker = EmbeddedBroker(url, exchange=EXCHANGE)
    broker.start()
    queues = Queues(path_of(url))
    while confirmed < last:
        # Not ahead of the consumers by much: kills are to meet fresh messages, not a backlog.
        eventually(lambda: queues.depth(QUEUE).ready < 200, timeout=60, what="the consumers to keep up")
        numbers = range(confirmed + 1, min(confirmed + random.randint(1, 30), last) + 1)
        log.say("sent", numbers[0], numbers[-1])
        broker.send([Outgoing(number, message(number)) for number in numbers])
        outcomes = {answer.outcome for answer in broker.answers(0)}
        if outcomes == {Outcome.CONFIRMED}:
            log.say("confirmed", numbers[0], numbers[-1])
            confirmed = numbers[-1]
        elif outcomes != {Outcome.LOST}:
            raise AssertionError(outcomes)


def consume(url: str, log: Log, last: int) -> None:
    """Take and acknowledge messages for ever, or (*last* is not 0) until the queue is empty."""
    client: Any = connection(url)
    channel: Any = client.default_channel
    unacknowledged: list[int] = []
    tag = 0

    def take(delivery: Any) -> None:
        nonlocal tag
        tag = delivery.delivery_tag
        number = UUID(received(delivery.body).id).int
        log.say("got", number, delivery.headers.get("x-delivery-count", 0))
        unacknowledged.append(number)

    channel.basic_qos(0, 20, False)
    channel.basic_consume(QUEUE, consumer_tag="tests", callback=take)
    log.say("ready")
    while last == 0 or unacknowledged or channel.queue_declare(QUEUE, passive=True).message_count:
        with contextlib.suppress(TimeoutError):
            for _ in range(random.randint(1, 15)):
                client.drain_events(timeout=0.05)
        if unacknowledged:
            channel.basic_ack(tag, multiple=True)
            log.say("acked", *unacknowledged)
            unacknowledged.clear()


if __name__ == "__main__":
    failpoints.arm(os.environ)
    role, url, log, last = sys.argv[1:]
    {"publish": publish, "consume": consume}[role](url, Log(log), int(last))
