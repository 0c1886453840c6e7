"""What an operator does with a service's queues: show, make, check, and take them away for good."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outbox import topology as brokers
from outbox.consumer import topology
from outbox.consumer.amqp_errors import AMQPError, NotFound
from outbox.consumer.link import Link, shown
from outbox.embedded.routing import matches
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


def declare_exchange(settings: Settings) -> bool:
    """Make the exchange that every service binds its queue to; return whether it was missing. Raises as `apply`."""
    with _channels(settings) as link:
        was_missing = not topology.has_exchange(link.new_channel, settings.exchange)
        topology.make_exchange(link.new_channel(), settings.exchange)  # one that is there is compared
    return was_missing


def apply(service: Service, settings: Settings) -> Topology:
    """Make what is missing of exchange, queues and bindings, as the service does at its start; again: changes nothing.

    Raises ConfigurationError and BrokerError for what waiting would not mend, Unavailable where no broker answers.
    """
    wanted = show(service, settings)
    with _channels(settings) as link:
        topology.declare(link.new_channel, wanted)
    return wanted


def prune(service: Service, settings: Settings) -> list[str]:
    """Unbind the queue of *service* from what it has no handler for; return the patterns. Raises as `apply`.

    Raises ConfigurationError where nobody can tell what is bound.
    """
    queue = show(service, settings).main
    settings.require("BROKER_URL")
    found = brokers.bound(settings, queue.name)
    if found is None:
        raise ConfigurationError("RabbitMQ tells its bindings through the management API only; set BROKER_MANAGEMENT_URL")
    others = sorted(found - set(queue.routing_keys))
    with _channels(settings) as link:
        topology.unbind(link.new_channel(), queue, others)
    return others


def check(service: Service, settings: Settings) -> list[Finding]:
    """Return whether the broker has what *service* needs; changes nothing. Raises as `apply`."""
    wanted = show(service, settings)
    with _channels(settings) as link:
        findings = [_check_queue(link, queue, service.typed) for queue in (wanted.main, wanted.dead)]
    return findings + _check_bindings(wanted, settings, service.typed)


def is_deployed(service: Service, settings: Settings) -> bool:
    """Say whether *service* has a queue: from then on something is kept for it. Raises as `apply`."""
    with _channels(settings) as link:
        return topology.exists(link.new_channel, show(service, settings).main.name)


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


def _check_bindings(wanted: Topology, settings: Settings, typed: str) -> list[Finding]:
    queue, topics = wanted.main.name, set(wanted.main.routing_keys)
    found = brokers.bound(settings, queue)
    if found is None:
        return [Finding(None, f"bindings of {queue!r}: unknown; set BROKER_MANAGEMENT_URL to see them")]
    command = f"outbox consumer topology {typed} --apply"
    missing = [
        Finding(False, f"topic {topic!r} does not reach {queue!r}; {command}")
        for topic in sorted(topics)
        if not any(matches(pattern, topic) for pattern in found)
    ]
    stale = [
        Finding(False, f"{queue!r} is bound to {pattern!r}, which has no handler: such messages are parked; {command} --prune")
        for pattern in sorted(found - topics)
    ]
    return missing + stale or [Finding(True, f"{queue!r} is bound to {', '.join(sorted(topics))}")]


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
