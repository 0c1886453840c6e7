"""The kombu transport of the embedded broker: as much of AMQP as a `kombu.Consumer` with `on_message` uses.

Not one of kombu's virtual transports: those remove a message when they read it and put unacknowledged ones back as copies,
routed again, at the end. Here a message stays in its row until it is acknowledged, and a queue has one owner
(`outbox.embedded.ownership`), which makes every queue one with a single active consumer: others wait for their turn.

A channel belongs to one thread at a time. Closing a connection, dropping it (`collect`) and dying come to the same: the
next owner gets everything unacknowledged first, in order. What is not supported is refused, not ignored.
"""

from __future__ import annotations

import itertools
import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import amqp
from amqp.exceptions import (
    AMQPNotImplementedError,
    ConsumerCancelled,
    NotAllowed,
    NotFound,
    PreconditionFailed,
    RecoverableConnectionError,
)
from kombu.message import Message as KombuMessage
from kombu.transport import base

from outbox.embedded.file import BrokerFileUnavailable
from outbox.embedded.ownership import OwnershipLost
from outbox.embedded.queues import NoSuchQueue, Queues, queue_number
from outbox.embedded.subscription import Subscription

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from outbox.embedded.ownership import Delivery

#: How often an idle connection looks at the file: soon after a message, then less and less often.
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.001, 0.025
#: How old a look at the file may be while messages flow.
_FLOW_SECONDS = 0.005


class Message(KombuMessage):
    """A received message; `body` holds the bytes that were published."""

    def __init__(self, channel: Channel, tag: int, consumer_tag: str, delivery: Delivery) -> None:
        properties = json.loads(delivery.properties)
        headers = properties.pop("headers", None) or {}
        if delivery.returns:
            headers["x-delivery-count"] = delivery.returns
        super().__init__(  # type: ignore[no-untyped-call]
            body=delivery.body,
            delivery_tag=tag,
            content_type=properties.get("content_type"),
            content_encoding=properties.get("content_encoding"),
            delivery_info={
                "consumer_tag": consumer_tag,
                "delivery_tag": tag,
                "redelivered": delivery.returns > 0,
                "exchange": delivery.exchange,
                "routing_key": delivery.topic,
            },
            properties=properties,
            channel=channel,
        )
        # Not through the constructor, which expands the body when there is a header named "compression".
        self.headers = headers


class QueueDeclared(NamedTuple):
    """The answer to `queue_declare`, as py-amqp gives it."""

    queue: str
    message_count: int
    consumer_count: int


class Channel(base.StdChannel):
    """Consumers, their delivery tags, and the declarations that kombu's entities ask for."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection: Connection | None = connection
        self.channel_id = number
        self._queues = connection.queues
        self._prefetch = 0
        self.subscriptions: dict[str, Subscription] = {}
        self._tags = itertools.count(1)
        self._unacknowledged: dict[int, tuple[Subscription, int]] = {}  # delivery tag → consumer and message, by tag

    @property
    def is_open(self) -> bool:
        """False after `close`, also the connection's."""
        return self.connection is not None

    # --- declarations -------------------------------------------------------------------------------------------------

    def exchange_declare(self, exchange: str, type: str = "topic", *, auto_delete: bool = False, **_: Any) -> None:
        """Accept a direct or topic exchange: every exchange exists."""
        if type not in ("direct", "topic"):
            raise AMQPNotImplementedError(
                f"exchange {exchange!r}: the embedded broker has topic and direct exchanges, not {type}"
            )
        _refuse(f"exchange {exchange!r}", auto_delete=auto_delete)

    def queue_declare(
        self, queue: str, *, passive: bool = False, exclusive: bool = False, auto_delete: bool = False, **_: Any
    ) -> QueueDeclared:
        """Create *queue*, or with *passive* only look. Arguments such as `x-queue-type` mean nothing here and are ignored."""
        _refuse(f"queue {queue!r}", exclusive=exclusive, auto_delete=auto_delete, nameless=not queue)
        with self._translated():
            if not passive:
                self._queues.declare_queue(queue)
            depth = self._queues.depth(queue)
            return QueueDeclared(queue, depth.ready + self._undelivered(queue), int(depth.consumed))

    def _undelivered(self, queue: str) -> int:
        """Return what waits in this connection: nobody has been given it, although the file says so."""
        if self.connection is None:
            return 0
        with self._queues.file.reading() as rows:
            number = queue_number(rows, queue)
        every = (held for channel in self.connection.channels.values() for held in channel.subscriptions.values())
        return sum(subscription.undelivered(number) for subscription in every)

    def queue_bind(self, queue: str, exchange: str, routing_key: str = "", **_: Any) -> None:
        """Bind *queue* to *exchange*; *routing_key* may hold `*` and `#`."""
        with self._translated():
            self._queues.bind(queue, routing_key, exchange=exchange)

    def queue_unbind(self, queue: str, exchange: str, routing_key: str = "", **_: Any) -> None:
        """Remove a binding."""
        with self._translated():
            self._queues.unbind(queue, routing_key, exchange=exchange)

    def queue_purge(self, queue: str, **_: Any) -> int:
        """Remove the messages nobody holds; return how many."""
        with self._translated():
            return self._queues.purge(queue)

    def queue_delete(self, queue: str, *, if_unused: bool = False, if_empty: bool = False, **_: Any) -> int:
        """Remove *queue* and its messages; return how many these were."""
        with self._translated():
            depth = self._queues.depth(queue)
            if (if_unused and depth.consumed) or (if_empty and depth.ready + depth.leased):
                raise PreconditionFailed(f"queue {queue!r} is in use or not empty")
            return self._queues.delete_queue(queue)

    # --- consuming ----------------------------------------------------------------------------------------------------

    def basic_qos(self, prefetch_size: int, prefetch_count: int, apply_global: bool) -> None:
        """Let each consumer that starts from now on hold *prefetch_count* messages at most."""
        _refuse("basic_qos", prefetch_size=bool(prefetch_size), apply_global=apply_global)
        self._prefetch = prefetch_count

    def basic_consume(
        self, queue: str, consumer_tag: str, callback: Callable[[Message], object], *, no_ack: bool = False, **_: Any
    ) -> str:
        """Consume *queue* as soon as its present owner is gone; *callback* is called from `drain_events`."""
        # A message that is gone when it is handed over is lost when the handler fails.
        _refuse(f"consumer of queue {queue!r}", no_ack=bool(no_ack))
        if consumer_tag in self.subscriptions:
            raise NotAllowed(f"consumer tag {consumer_tag!r} is in use on this channel")
        with self._translated(), self._queues.file.reading() as rows:
            number = queue_number(rows, queue)
            subscription = Subscription(self._queues.file, consumer_tag, number, self._prefetch, callback)
        self.subscriptions[consumer_tag] = subscription
        return consumer_tag

    def basic_cancel(self, consumer_tag: str, **_: Any) -> None:
        """Deliver nothing more to this consumer; what it holds can still be acknowledged."""
        subscription = self.subscriptions.pop(consumer_tag, None)
        if subscription is not None:
            subscription.cancel()

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """Remove a delivered message, or *multiple*: all up to this tag (0: all). Durable when it returns."""
        with self._translated():
            self._acknowledge(self._named(delivery_tag, multiple))

    def ack_each(self, delivery_tags: list[int]) -> None:
        """Remove these messages and no others, those of a queue in one transaction: what AMQP needs as many acks for."""
        with self._translated():
            self._acknowledge([tag for each in delivery_tags for tag in self._named(each, multiple=False)])

    def _acknowledge(self, delivery_tags: list[int]) -> None:
        by_subscription: dict[Subscription, list[int]] = {}
        for tag in delivery_tags:
            subscription, number = self._unacknowledged.pop(tag)
            by_subscription.setdefault(subscription, []).append(number)
        for subscription, numbers in by_subscription.items():
            subscription.acknowledge(numbers)

    def basic_reject(self, delivery_tag: int, requeue: bool) -> None:
        """Deliver a message again (*requeue*), or remove it: there are no dead-letter exchanges here."""
        with self._translated():
            (tag,) = self._named(delivery_tag, multiple=False)
            subscription, number = self._unacknowledged.pop(tag)
            if requeue:
                subscription.give_back(number)
            else:
                subscription.acknowledge([number])

    def _named(self, delivery_tag: int, multiple: bool) -> list[int]:
        """Return the delivery tags that a settlement names; one that is not outstanding closes the channel, as in RabbitMQ."""
        if multiple and delivery_tag == 0:
            return list(self._unacknowledged)
        if delivery_tag not in self._unacknowledged:
            self.close()  # whoever settles what he does not have may have settled the wrong message before
            raise PreconditionFailed(f"unknown delivery tag {delivery_tag}")
        return [tag for tag in self._unacknowledged if tag <= delivery_tag] if multiple else [delivery_tag]

    def deliver_one(self, version: int) -> bool:
        """Give the next message, as of the file's *version*, to its consumer's callback; False when there is none."""
        for subscription in list(self.subscriptions.values()):
            with self._translated():
                delivery = subscription.next(version)
            if delivery is not None:
                # The next turn begins with the consumers after this one: a full queue must not starve the others.
                self.subscriptions[subscription.tag] = self.subscriptions.pop(subscription.tag)
                tag = next(self._tags)
                self._unacknowledged[tag] = (subscription, delivery.id)
                subscription.callback(Message(self, tag, subscription.tag, delivery))
                return True
        return False

    def close(self) -> None:
        """Give up all consumers; their queues go to the next ones. Doing so again changes nothing."""
        for subscription in {*self.subscriptions.values(), *(held for held, _ in self._unacknowledged.values())}:
            subscription.close()
        self.subscriptions.clear()
        self._unacknowledged.clear()
        if self.connection is not None:
            self.connection.channels.pop(self.channel_id, None)
            self.connection = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise what AMQP clients expect. After a failure the connection is useless: its owner is to drop it and reconnect."""
        if self.connection is None:
            raise RecoverableConnectionError("the channel is closed")
        try:
            yield
        except NoSuchQueue as error:
            raise NotFound(str(error)) from error
        except OwnershipLost as error:
            self.close()
            raise ConsumerCancelled(str(error)) from error
        except BrokerFileUnavailable as error:
            self.connection.close()
            raise RecoverableConnectionError(str(error)) from error


class Connection:
    """What kombu calls the connection: the open file and its channels."""

    def __init__(self, client: Any, queues: Queues) -> None:
        self.client = client
        self.queues = queues
        self.channels: dict[int, Channel] = {}
        self.connected = True
        self._version, self._version_until = 0, 0.0  # the file's data version, and how long it may serve
        self._pause = _FIRST_PAUSE_SECONDS  # kept from call to call: callers wait in short slices
        self._numbers = itertools.count(1)

    def channel(self) -> Channel:
        """Open another channel."""
        channel = Channel(self, next(self._numbers))
        self.channels[channel.channel_id] = channel
        return channel

    def drain_events(self, timeout: float | None = None) -> None:
        """Deliver one message to its callback; raise TimeoutError when none came for *timeout* seconds (None: no limit)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._deliver_one():
            remaining = _LAST_PAUSE_SECONDS if deadline is None else deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("no message")
            time.sleep(min(self._pause, remaining))
            self._pause = min(self._pause * 1.5, _LAST_PAUSE_SECONDS)
        self._pause = _FIRST_PAUSE_SECONDS

    def _deliver_one(self) -> bool:
        if not self.connected:
            raise RecoverableConnectionError("the connection is closed")
        # While messages flow, consumers without any need not look at the file at every one of the others'.
        if time.monotonic() < self._version_until and self._deliver_as_of(self._version):
            return True
        try:
            self._version = self.queues.file.data_version()  # before the look: what commits after it is for the next one
        except BrokerFileUnavailable as error:
            self.close()
            raise RecoverableConnectionError(str(error)) from error
        self._version_until = time.monotonic() + _FLOW_SECONDS
        return self._deliver_as_of(self._version)

    def _deliver_as_of(self, version: int) -> bool:
        for channel in list(self.channels.values()):
            # Behind the others from now on: a channel with much to deliver must not starve them.
            self.channels[channel.channel_id] = self.channels.pop(channel.channel_id)
            if channel.deliver_one(version):
                return True
        return False

    def close(self) -> None:
        """Close the channels and the file; doing so again changes nothing."""
        self.connected = False
        for channel in list(self.channels.values()):
            channel.close()
        self.queues.close()


class Transport(base.Transport):
    """What `kombu.Connection(transport=…)` takes; the file is in `transport_options["path"]`."""

    can_parse_url = True  # kombu would look for host, port and password
    driver_type = "embedded"
    driver_name = "sqlite3"
    # The classes that py-amqp raises, so that a consumer has one set of handlers for both brokers.
    connection_errors = amqp.Connection.connection_errors
    channel_errors = amqp.Connection.channel_errors
    recoverable_connection_errors = amqp.Connection.recoverable_connection_errors
    recoverable_channel_errors = amqp.Connection.recoverable_channel_errors
    implements = base.Transport.implements.extend(exchange_type=frozenset({"direct", "topic"}))

    client: Any  # kombu's Connection

    def establish_connection(self) -> Connection:
        """Open the file. Raises BrokerFileError, or RecoverableConnectionError where trying again may help."""
        try:
            return Connection(self.client, Queues(self._path()))
        except BrokerFileUnavailable as error:
            raise RecoverableConnectionError(str(error)) from error

    def create_channel(self, connection: Connection) -> Channel:
        """Open a channel."""
        return connection.channel()

    def drain_events(self, connection: Connection, **kwargs: Any) -> None:
        """Deliver one message, see `Connection.drain_events`."""
        connection.drain_events(**kwargs)

    def verify_connection(self, connection: Connection) -> bool:
        """Say whether the connection is open."""
        return connection.connected

    def close_connection(self, connection: Connection) -> None:
        """Close the file and release its queues."""
        connection.close()

    def _collect(self, connection: Connection | None) -> None:
        """kombu's `Connection.collect`, which drops a connection without a word to the broker."""
        if connection is not None:
            connection.close()

    def as_uri(self, _uri: str, _include_password: bool = False, _mask: str = "") -> str:
        """Return the URL, for people; it holds no secret."""
        return f"embedded:///{self._path()}"

    def _path(self) -> str:
        return str(self.client.transport_options["path"])


def _refuse(what: str, **unsupported: bool) -> None:
    asked = [name for name, value in unsupported.items() if value]
    if asked:
        raise AMQPNotImplementedError(f"{what}: the embedded broker has no {', '.join(asked)}")
