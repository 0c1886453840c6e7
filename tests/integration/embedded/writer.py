"""A process that publishes COUNT messages of the key NAME, having declared the queue itself."""

from __future__ import annotations

import sys

from outbox.embedded import path_of
from outbox.embedded.queues import Queues
from outbox.relay.broker import Outcome, Outgoing
from outbox.relay.embedded import EmbeddedBroker
from tests.kit.builders import message

EXCHANGE, QUEUE = "openevent", "openevent.exports"
BATCH = 7


def main(url: str, name: str, count: int) -> None:
    with Queues(path_of(url)) as queues:
        queues.declare_queue(QUEUE)
        queues.bind(QUEUE, "session.*", exchange=EXCHANGE)
    broker = EmbeddedBroker(url, exchange=EXCHANGE)
    broker.start()
    for first in range(1, count + 1, BATCH):
        batch = [Outgoing(n, message(key=name, sequence=n)) for n in range(first, min(first + BATCH, count + 1))]
        broker.send(batch)
        assert {answer.outcome for answer in broker.answers(0)} == {Outcome.CONFIRMED}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
