"""What a service needs of the broker: its queue, the bindings of its topics, and the queue of what the broker gave up on.

```text
 exchange «openevent» (topic) ── session.modified ──► queue «openevent.exports»
                                                            │ after 1,000 deliveries
 exchange «openevent.dead» (direct) ◄───────────────────────┘
         └── openevent.exports ──► queue «openevent.exports.dead» ──► read back by the service into its parking
```

Declaring is idempotent; every service does it at start. On the embedded broker the same names are declared, and what only
RabbitMQ knows is ignored there.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from outbox.consumer.amqp_errors import AccessRefused, NotFound, PreconditionFailed
from outbox.errors import BrokerError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from outbox.consumer.service import Service

#: Far above what restarts cost: each one returns what was prefetched, and a low limit would give up untouched messages.
DELIVERY_LIMIT = 1_000


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable quorum queue with one active consumer at a time, which is what keeps a key in order."""

    name: str
    exchange: str
    exchange_type: str
    routing_keys: tuple[str, ...]
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Topology:
    """The queues of one service."""

    main: Queue
    dead: Queue


def of(service: Service, exchange: str) -> Topology:
    """Return what *service* needs on *exchange*."""
    name, dead_exchange = f"{exchange}.{service.name}", f"{exchange}.dead"
    common = {"x-queue-type": "quorum", "x-single-active-consumer": True}
    giving_up = {
        "x-delivery-limit": DELIVERY_LIMIT,
        "x-dead-letter-exchange": dead_exchange,
        "x-dead-letter-routing-key": name,
        # At least once needs both: the strategy, and that a full queue refuses instead of dropping its head.
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    # The last stop: what is read back from here a thousand times in vain must not vanish, whatever the broker's default is.
    last_stop = {"x-delivery-limit": 1_000_000}
    return Topology(
        main=Queue(name, exchange, "topic", tuple(service.topics), MappingProxyType(common | giving_up)),
        dead=Queue(f"{name}.dead", dead_exchange, "direct", (name,), MappingProxyType(common | last_stop)),
    )


def declare(channel: Any, topology: Topology) -> None:
    """Declare exchanges, queues and bindings. Raises ConfigurationError or BrokerError for what waiting won't mend."""
    for queue in (topology.dead, topology.main):  # nothing may be given up on before there is a place for it
        declare_exchange(channel, queue.exchange, queue.exchange_type)
        declare_queue(channel, queue)
        for routing_key in queue.routing_keys:
            with explained(f"binding queue {queue.name!r} to exchange {queue.exchange!r}"):
                channel.queue_bind(queue.name, queue.exchange, routing_key)


def declare_exchange(channel: Any, name: str, type_: str = "topic") -> None:
    """Declare a durable exchange. Raises ConfigurationError where one of that name is of another kind."""
    remedy = f"it must be a durable {type_} exchange; delete it, or choose another OUTBOX_EXCHANGE"
    with explained(f"exchange {name!r}", remedy):
        channel.exchange_declare(name, type_, durable=True, auto_delete=False)


def declare_queue(channel: Any, queue: Queue) -> None:
    """Declare *queue* itself. Raises ConfigurationError where one of that name has other arguments."""
    remedy = "let its messages be applied, delete it (outbox consumer retire), and start the service again to make it anew"
    with explained(f"queue {queue.name!r}", remedy):
        channel.queue_declare(queue.name, durable=True, auto_delete=False, arguments=dict(queue.arguments))


def unbind(channel: Any, queue: Queue) -> None:
    """Let nothing more come into *queue*."""
    for routing_key in queue.routing_keys:
        channel.queue_unbind(queue.name, queue.exchange, routing_key)


@contextmanager
def explained(what: str, remedy: str = "") -> Iterator[None]:
    """Raise ConfigurationError, with *remedy*, for *what* is there and is another, BrokerError for what we may not do."""
    try:
        yield
    except PreconditionFailed as error:
        raise ConfigurationError(f"{what} exists and is not what is needed: {_said(error)}; {remedy}") from error
    except AccessRefused as error:
        if "exclusive" in _said(error):  # another program's consumer has the queue for itself: that ends
            raise
        raise BrokerError(f"{what}: the broker refuses it: {_said(error)}; give the user configure, write and read") from error


def backlog(channel: Any, queue: str) -> int:
    """Return how many messages of *queue* nobody has been given; raises amqp's NotFound when there is no such queue."""
    return int(channel.queue_declare(queue, passive=True, auto_delete=False)[1])


def consumers(channel: Any, queue: str) -> int:
    """Return how many consume *queue*, active or waiting for their turn."""
    return int(channel.queue_declare(queue, passive=True, auto_delete=False)[2])


def exists(channel: Any, queue: str) -> bool:
    """Say whether *queue* is there. On RabbitMQ a missing one costs the channel: use one for this alone."""
    try:
        backlog(channel, queue)
    except NotFound:
        return False
    return True


def _said(error: Exception) -> str:
    return str(getattr(error, "reply_text", None) or error)
