"""What an operator does with a service's queues: show, make, check, and take them away for good."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outbox import topology as brokers
from outbox.consumer import topology
from outbox.consumer.amqp_errors import AMQPError, NotFound
from outbox.consumer.link import Link, shown
from outbox.errors import ConfigurationError, OutboxError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox.consumer.service import Service
    from outbox.consumer.topology import Topology
    from outbox.settings import Settings


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a check; *ok* is None where nobody can tell."""

    ok: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Retired:
    """What `retire` took away: queues, and how many messages each still held."""

    queues: dict[str, int]


def show(service: Service, settings: Settings) -> Topology:
    """Return what *service* needs of the broker, without asking it."""
    return topology.of(service, settings.exchange)


def declare_exchange(settings: Settings) -> None:
    """Make the exchange that every service binds its queue to; doing so again changes nothing. Raises as `apply`."""
    with _channels(settings) as link:
        topology.make_exchange(link.new_channel(), settings.exchange)


def apply(service: Service, settings: Settings) -> Topology:
    """Declare exchange, queues and bindings, as the service does when it starts; doing so again changes nothing.

    Raises ConfigurationError and BrokerError for what waiting would not mend, Unavailable where no broker answers.
    """
    wanted = show(service, settings)
    with _channels(settings) as link:
        topology.declare(link.new_channel, wanted)
    return wanted


def check(service: Service, settings: Settings) -> list[Finding]:
    """Return whether the broker has what *service* needs; changes nothing. Raises as `apply`."""
    wanted = show(service, settings)
    with _channels(settings) as link:
        findings = [_check_queue(link, queue, service.typed) for queue in (wanted.main, wanted.dead)]
    return findings + _check_bindings(wanted, settings)


def _check_queue(link: Link, queue: topology.Queue, typed: str) -> Finding:
    try:
        waiting = topology.backlog(link.new_channel(), queue.name)
        compared = topology.declare_queue(link.new_channel, queue)  # it exists: nothing is made, only compared
    except NotFound:
        return Finding(False, f"queue {queue.name!r} does not exist; outbox consumer topology {typed} --apply, or start it")
    except ConfigurationError as error:
        return Finding(False, str(error))
    state = "is as it should be" if compared else "is there (whether as it should be, the user may not ask)"
    return Finding(True, f"queue {queue.name!r} {state}; {waiting} messages wait in it")


def _check_bindings(wanted: Topology, settings: Settings) -> list[Finding]:
    found = brokers.read(settings)
    queue, topics = wanted.main.name, wanted.main.routing_keys
    if found is None:
        return [Finding(None, f"bindings of {queue!r}: unknown; set BROKER_MANAGEMENT_URL to see them")]
    bound = {binding.pattern for binding in found.bindings if binding.is_queue and binding.destination == queue}
    missing = [
        Finding(False, f"topic {topic!r} does not reach {queue!r}; start the service, it binds its topics")
        for topic in topics
        if topic not in bound
    ]
    stale = [
        Finding(False, f"{queue!r} is bound to {pattern!r}, which has no handler: such messages are parked; unbind it")
        for pattern in sorted(bound - set(topics))
    ]
    return missing + stale or [Finding(True, f"{queue!r} is bound to {', '.join(topics)}")]


def retire(service: Service, settings: Settings, *, force: bool = False) -> Retired:
    """Delete the queues of *service*, for good: from now on nothing is kept for it. Its tables stay.

    Raises OutboxError, having changed nothing, while somebody consumes them, or while messages are in them and *force* is
    not given. Raises as `apply`.
    """
    wanted = show(service, settings)
    with _channels(settings) as link:
        there = [queue for queue in (wanted.main, wanted.dead) if topology.exists(link.new_channel, queue.name)]
        for queue in there:
            if consumers := topology.consumers(link.new_channel(), queue.name):
                raise OutboxError(f"queue {queue.name!r} has {consumers} consumers; stop the service first")
        if wanted.main in there:  # so that nothing comes while we look
            topology.unbind(link.new_channel(), wanted.main, wanted.main.routing_keys)
        holding = {queue.name: topology.backlog(link.new_channel(), queue.name) for queue in there}
        if any(holding.values()) and not force:
            topology.declare(link.new_channel, wanted)
            held = ", ".join(f"{name!r} holds {count}" for name, count in holding.items() if count)
            raise OutboxError(f"{held} messages; apply them (outbox consumer run {service.typed} --drain), or force it")
        channel = link.new_channel()
        for queue in there:
            channel.queue_delete(queue.name)
    return Retired(holding)


@contextmanager
def _channels(settings: Settings) -> Iterator[Link]:
    settings.require("BROKER_URL")
    url = str(settings.broker_url)
    try:
        link = Link(url)
    except (OSError, AMQPError) as error:
        raise Unavailable(f"{shown(url)}: {_words(error)}; start the broker or correct BROKER_URL") from error
    try:
        yield link
    except (OSError, AMQPError) as error:
        raise Unavailable(f"{shown(url)}: the connection was lost: {_words(error)}") from error
    finally:
        link.drop()


def _words(error: Any) -> str:
    return str(getattr(error, "reply_text", None) or getattr(error, "strerror", None) or error)
