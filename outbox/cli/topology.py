"""`outbox topology`: the exchange, and whether each known topic has a queue."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from outbox.cli import context, findings, text
from outbox.cli.findings import Finding, Verdict
from outbox.errors import OutboxError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox.cli.context import Context
    from outbox.settings import Settings
    from outbox.topology import Topology

_BLIND = "RabbitMQ tells its bindings through the management API only"
_SET_URL = "set BROKER_MANAGEMENT_URL=http://user:password@host:15672"


@click.group()
def topology() -> None:
    """The exchange, and whether each known topic has a queue.

    Known topics are those the app captures (flask outbox topology), else those of the messages seen lately.
    """


@topology.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def show(as_json: bool) -> None:
    """Show the exchange, its bindings and queues."""
    from outbox import topology as broker

    here = context.current()
    found = broker.read(here.settings)
    if found is None:
        raise OutboxError(f"{_BLIND}; {_SET_URL}")
    if as_json:
        text.say_json(_as_dict(found))
        return
    kind = f"durable {found.exchange_type}" if found.durable else str(found.exchange_type)
    text.say(f"exchange {found.exchange!r}: {kind if found.exchange_type else 'missing; run: outbox topology apply'}")
    if found.bindings:
        text.say()
        text.say(text.table(("TOPIC", "QUEUE", "TYPE", "MESSAGES", "CONSUMERS"), list(_rows(found)), right=("MESSAGES",)))
    elif found.exchange_type:
        text.say("No queue is bound; a service binds its own when it starts: outbox consumer run NAME")


def _rows(found: Topology) -> Iterator[tuple[str, ...]]:
    for binding in sorted(found.bindings, key=lambda item: (item.pattern, item.destination)):
        queue = found.queues.get(binding.destination)
        if queue is None:
            yield binding.pattern, f"exchange {binding.destination}", "", "", ""
        else:
            yield (
                binding.pattern,
                queue.name,
                queue.type,
                f"{queue.messages:,}",
                "?" if queue.consumers is None else str(queue.consumers),
            )


def _as_dict(found: Topology) -> dict[str, object]:
    return {
        "exchange": {"name": found.exchange, "type": found.exchange_type, "durable": found.durable},
        "bindings": [
            {"pattern": item.pattern, "destination": item.destination, "is_queue": item.is_queue} for item in found.bindings
        ],
        "queues": [dataclasses.asdict(item) for item in found.queues.values()],
    }


@topology.command()
def apply() -> None:
    """Create the exchange where it is missing.

    Queues are made by the services that own them, when they start: outbox consumer topology NAME --apply.
    """
    here = context.current()
    here.settings.require("BROKER_URL")
    url, exchange = str(here.settings.broker_url), here.settings.exchange
    if url.startswith("embedded:"):
        text.say(f"The embedded broker has every exchange; nothing is to be done for {exchange!r}.")
        return
    from outbox.consumer.provisioning import declare_exchange

    was_missing = declare_exchange(here.settings)
    text.say(f"The durable topic exchange {exchange!r} is there.")
    if names := _to_be_bound(here.settings, was_missing=was_missing):
        sentence = (
            f"Before messages flow {names} must be bound: the relay goes on as soon as one queue is, and past the others. "
            "Services that run bind within 30 seconds, at once if they saw that the exchange was gone. To be sure, stop the "
            "relay until `outbox consumer topology NAME --apply` was run for each."
        )
        text.say(text.wrapped(sentence, indent=""), error=True)


def _to_be_bound(settings: Settings, *, was_missing: bool) -> str:
    from outbox import topology as broker

    try:
        found = broker.read(settings)
    except OutboxError:
        found = None
    if found is not None:
        return ", ".join(found.unbound())
    return "the queues of services" if was_missing else ""


@topology.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Say whether each known topic has a queue; exit 1 unless all have.

    Without BROKER_MANAGEMENT_URL nobody knows what RabbitMQ has bound, and unknown is not fine.
    """
    found = list(examine(context.current()))
    findings.show(found, as_json=as_json)
    if any(item.verdict in (Verdict.FAIL, Verdict.UNKNOWN) for item in found):
        ctx.exit(1)


def examine(here: Context) -> Iterator[Finding]:
    """Yield what the broker lacks, and what it has. Raises OutboxError where it can't be asked."""
    from outbox import topology as broker

    topics, source = known_topics(here)
    found = broker.read(here.settings)
    if found is None:
        yield Finding("exchange", Verdict.UNKNOWN, _BLIND, _SET_URL)
        for topic in topics:
            yield Finding(topic, Verdict.UNKNOWN, "whether a queue is bound")
        return
    yield _exchange(found)
    for name in found.unbound():
        detail = f"queue {name} is bound to nothing: service {broker.service_of(name, found.exchange)!r} gets nothing"
        yield Finding("queue", Verdict.FAIL, detail, "outbox consumer topology NAME --apply, or outbox consumer retire NAME")
    if found.exchange_type is None:
        return
    if not topics:
        yield Finding("topics", Verdict.UNKNOWN, f"no topic is known: {source}", "flask --app … outbox topology check")
    for topic in topics:
        yield _topic(topic, found)
    for queue in found.queues.values():
        if queue.type == "classic":
            detail = f"queue {queue.name} is classic: it confirms before its messages are on disk"
            yield Finding("queue", Verdict.WARN, detail, "make it a quorum queue (x-queue-type=quorum)")
        elif not queue.durable:
            detail = f"queue {queue.name} is not durable: it and its messages are gone after a restart of the broker"
            yield Finding("queue", Verdict.WARN, detail, "make it a durable quorum queue")


def known_topics(here: Context) -> tuple[list[str], str]:
    """Return the topics to look for, and where they are from."""
    if here.topics is not None:
        return sorted(here.topics), "the app captures none"
    if here.settings.database_url is None:
        return [], "DATABASE_URL is not set and no app was loaded"
    from outbox.store import operating

    try:
        with here.reading() as connection:
            return operating.topics(connection), "no message was seen lately and no app was loaded"
    except OutboxError as error:
        return [], str(error)


def _exchange(found: Topology) -> Finding:
    if found.exchange_type is None:
        return Finding("exchange", Verdict.FAIL, f"there is no exchange {found.exchange!r}", "outbox topology apply")
    if found.exchange_type != "topic" or not found.durable:
        kind = f"{'durable' if found.durable else 'not durable'}, {found.exchange_type}"
        detail = f"{found.exchange!r} is {kind}; it must be durable and topic"
        return Finding("exchange", Verdict.FAIL, detail, "delete it, then: outbox topology apply")
    return Finding("exchange", Verdict.OK, f"{found.exchange!r} is a durable topic exchange")


def _topic(topic: str, found: Topology) -> Finding:
    reached = found.destinations(topic)
    queues = [item.destination for item in reached if item.is_queue]
    if queues:
        return Finding(topic, Verdict.OK, ", ".join(sorted(queues)))
    if reached:
        names = ", ".join(sorted(item.destination for item in reached))
        return Finding(topic, Verdict.UNKNOWN, f"it goes to exchange {names}; what is bound there is not looked into")
    detail = f"no queue on exchange {found.exchange!r} takes it; its messages wait"
    return Finding(topic, Verdict.FAIL, detail, "for the service that wants it: outbox consumer topology NAME --apply")
