"""What a service needs of the broker: its queue, the bindings of its topics, and the queue of what the broker gave up on.

```text
 exchange «openevent» (topic) ── session.modified ──► queue «openevent.exports»
                                                            │ after 1,000 deliveries
 exchange «openevent.dead» (direct) ◄───────────────────────┘
         └── openevent.exports ──► queue «openevent.exports.dead» ──► read back by the service into its parking
```

Every service makes at start what is missing, and binds, which is idempotent. What is there it only looks at: the exchange is
the publisher's, and whoever may not configure it can still consume. On the embedded broker the same names are declared, and
what only RabbitMQ knows is ignored there.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from outbox.consumer.amqp_errors import AccessRefused, AMQPError, NotFound, PreconditionFailed
from outbox.errors import BrokerError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

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


def declare(open_channel: Callable[[], Any], topology: Topology) -> None:
    """Make what is missing of exchanges and queues, and bind; what is there needs no more than the right to use it.

    Raises ConfigurationError or BrokerError for what waiting won't mend.
    """
    with advised(topology):
        for queue in (topology.dead, topology.main):  # nothing may be given up on before there is a place for it
            declare_exchange(open_channel, queue.exchange, queue.exchange_type)
            declare_queue(open_channel, queue)
            with _opened(open_channel) as channel:
                bind(channel, queue)


def declare_exchange(open_channel: Callable[[], Any], name: str, type_: str = "topic") -> None:
    """Make a durable exchange unless there is one of that name: it is the publisher's, and what it is like is up to him."""
    if has_exchange(open_channel, name, type_):
        return
    try:
        with _opened(open_channel) as channel:
            make_exchange(channel, name, type_)
    except Refused as error:
        if type_ == "topic":
            text = f"{error}; let a user who has it make the exchange (outbox topology apply)"
            raise Refused(text, vhost=error.vhost, user=error.user) from error
        raise


def has_exchange(open_channel: Callable[[], Any], name: str, type_: str = "topic") -> bool:
    """Say whether there is an exchange of that name."""
    try:
        with _opened(open_channel) as channel:
            channel.exchange_declare(name, type_, passive=True, durable=True, auto_delete=False)
    except NotFound:
        return False
    return True


def make_exchange(channel: Any, name: str, type_: str = "topic") -> None:
    """Declare a durable exchange. Raises ConfigurationError where one of that name is of another kind."""
    remedy = f"it must be a durable {type_} exchange; delete it, or choose another OUTBOX_EXCHANGE"
    with explained(f"exchange {name!r}", {"exchange": "configure"}, remedy):
        channel.exchange_declare(name, type_, durable=True, auto_delete=False)


def declare_queue(open_channel: Callable[[], Any], queue: Queue) -> bool:
    """Make *queue*, or compare the one that is there; return False where we have no right to compare it.

    Raises ConfigurationError where one of that name has other arguments.
    """
    is_there = exists(open_channel, queue.name)
    remedy = "let its messages be applied, delete it (outbox consumer retire), and start the service again to make it anew"
    try:
        with (
            explained(f"queue {queue.name!r}", {"queue": "configure", "exchange": "write"}, remedy),
            _opened(open_channel) as channel,
        ):
            channel.queue_declare(queue.name, durable=True, auto_delete=False, arguments=dict(queue.arguments))
    except Refused:
        if not is_there:
            raise
        return False
    return True


def bind(channel: Any, queue: Queue) -> None:
    """Bind *queue* to its topics; doing so again changes nothing. Raises NotFound when queue or exchange are gone."""
    rights = {"queue": "write", "exchange": "read"}
    with explained(f"binding queue {queue.name!r} to exchange {queue.exchange!r}", rights):
        for routing_key in queue.routing_keys:
            channel.queue_bind(queue.name, queue.exchange, routing_key)


def bind_again(open_channel: Callable[[], Any], topology: Topology) -> None:
    """Make bindings of a running service that may be gone; never the exchange, which others need too. Raises as `bind`."""
    with _opened(open_channel) as channel:
        bind(channel, topology.main)
    declare_exchange(open_channel, topology.dead.exchange, topology.dead.exchange_type)
    with _opened(open_channel) as channel:
        bind(channel, topology.dead)


def unbind(channel: Any, queue: Queue, routing_keys: Iterable[str]) -> None:
    """Let nothing more with *routing_keys* come into *queue*."""
    with explained(f"unbinding queue {queue.name!r}", {"queue": "write", "exchange": "read"}):
        for routing_key in routing_keys:
            channel.queue_unbind(queue.name, queue.exchange, routing_key)


def consume(channel: Any, queue: Queue, callback: Callable[[Any], None]) -> None:
    """Let what comes into *queue* be delivered to *callback*; its consumer tag is its name."""
    with explained(f"consuming queue {queue.name!r}", {"queue": "read"}):
        channel.basic_consume(queue=queue.name, consumer_tag=queue.name, no_ack=False, callback=callback)


def backlog(channel: Any, queue: str) -> int:
    """Return how many messages of *queue* nobody has been given; raises amqp's NotFound when there is no such queue."""
    return int(channel.queue_declare(queue, passive=True, auto_delete=False)[1])


def consumers(channel: Any, queue: str) -> int:
    """Return how many consume *queue*, active or waiting for their turn."""
    return int(channel.queue_declare(queue, passive=True, auto_delete=False)[2])


def exists(open_channel: Callable[[], Any], queue: str) -> bool:
    """Say whether *queue* is there."""
    try:
        with _opened(open_channel) as channel:
            backlog(channel, queue)
    except NotFound:
        return False
    return True


@contextmanager
def _opened(open_channel: Callable[[], Any]) -> Iterator[Any]:
    """A channel for what may fail: on RabbitMQ an error ends the channel it happened on."""
    channel = open_channel()
    try:
        yield channel
    finally:
        with contextlib.suppress(AMQPError, OSError):
            channel.close()


# --- what the broker refuses ---------------------------------------------------------------------------------------------

_REFUSED = re.compile(r"access to (exchange|queue) '(.*)' in vhost '(.*)' refused for user '(.*)'")


class Refused(BrokerError):
    """The broker's user lacks a right; waiting does not bring it."""

    def __init__(self, text: str, *, vhost: str = "", user: str = "") -> None:
        super().__init__(text)
        self.vhost = vhost
        self.user = user


@contextmanager
def explained(what: str, rights: Mapping[str, str], remedy: str = "") -> Iterator[None]:
    """Raise ConfigurationError, with *remedy*, for *what* is there and is another, Refused for what we may not do.

    *rights* are those that it needs of a queue and of an exchange: old brokers do not say which one is missing.
    """
    try:
        yield
    except PreconditionFailed as error:
        raise ConfigurationError(f"{what} exists and is not what is needed: {_said(error)}; {remedy}") from error
    except AccessRefused as error:
        if "exclusive" in _said(error):  # another program's consumer has the queue for itself: that ends
            raise
        raise _refused(what, rights, _said(error)) from error


def _refused(what: str, rights: Mapping[str, str], said: str) -> Refused:
    match = _REFUSED.search(said)
    if match is None or match[1] not in rights:
        return Refused(f"{what}: the broker refuses it: {said}")
    kind, name, vhost, user = match.groups()
    lacks = f"user {user!r} lacks the right to {rights[kind]} {kind} {name!r} in virtual host {vhost!r}"
    return Refused(f"{what}: {lacks}", vhost=vhost, user=user)


@contextmanager
def advised(topology: Topology) -> Iterator[None]:
    """Add to what is refused the command with which an administrator gives all that a service needs."""
    try:
        yield
    except Refused as error:
        if not error.user:
            raise
        vhost, user = shlex.quote(error.vhost), shlex.quote(error.user)
        patterns = " ".join(shlex.quote(pattern) for pattern in least_rights(topology))
        command = f"rabbitmqctl set_permissions -p {vhost} {user} {patterns}"
        raise Refused(f"{error}; all that the service needs is given by: {command}") from error


def least_rights(topology: Topology) -> tuple[str, str, str]:
    """Return which names a service must be allowed to configure, to write and to read, as RabbitMQ's patterns."""
    own = "|".join(re.escape(name) for name in (topology.main.name, topology.dead.name, topology.dead.exchange))
    return f"^({own})$", f"^({own})$", f"^({own}|{re.escape(topology.main.exchange)})$"


def _said(error: Exception) -> str:
    return str(getattr(error, "reply_text", None) or error)
