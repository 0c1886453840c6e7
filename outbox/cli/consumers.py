"""`outbox consumer …`: run and look after services."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from outbox.cli import context, findings, text
from outbox.cli.findings import Finding, Verdict
from outbox.cli.parked import parked
from outbox.cli.processes import prepare_process
from outbox.cli.repairs import confirm
from outbox.errors import ConfigurationError, OutboxError

if TYPE_CHECKING:
    from outbox.consumer import provisioning
    from outbox.consumer.operating import Status
    from outbox.consumer.topology import Queue

_json = click.option("--json", "as_json", is_flag=True, help="For machines.")


@click.group()
def consumer() -> None:
    """Run and look after services.

    NAME is a bare name (exports means consumers.exports:service) or module:attribute; the working directory is on the
    import path.
    """


consumer.add_command(parked)


@consumer.command()
@click.argument("name")
@click.option("--drain", is_flag=True, help="Until the queue is empty, then stop.")
@click.option("--http-port", metavar="PORT", help="Serve /livez, /readyz and /metrics on this port (or HOST:PORT).")
@click.pass_context
def run(ctx: click.Context, name: str, drain: bool, http_port: str | None) -> None:
    """Receive the messages of a service and apply each once.

    Runs until SIGTERM or Ctrl-C, which let it finish the transaction in hand.
    """
    here = prepare_process({"OUTBOX_HTTP_PORT": http_port})
    here.settings.require("CONSUMER_DATABASE_URL", "BROKER_URL")
    from outbox.cli import services

    service = services.find(name)
    place = services.place(here, service, name)
    if not str(here.settings.broker_url).startswith("embedded:"):  # only the embedded mode makes its files by itself
        place.require_file()
    from outbox.consumer import runtime

    with place.naming():
        ctx.exit(runtime.run(service, here.settings, drain=drain))


@consumer.command()
@click.argument("name")
def migrate(name: str) -> None:
    """Create or upgrade the tables of a service.

    Inbox, parking and the service's own, in the service's database.
    """
    from outbox.cli import services
    from outbox.consumer import operating

    here = context.current()
    here.settings.require("CONSUMER_DATABASE_URL")
    service = services.find(name)
    place = services.place(here, service, name)
    engine = operating.open_engine(service, here.settings)
    try:
        with place.naming():
            steps = operating.migrate(service, engine)
    finally:
        engine.dispose()
    done = f"were made in {text.amount(steps, 'step')}" if steps else "are there already"
    text.say(f"The tables of service {service.name!r} {done}: {place}")


# --- status -------------------------------------------------------------------------------------------------------------


@consumer.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@_json
def status(names: tuple[str, ...], as_json: bool) -> None:
    """Show what services applied, and what is parked.

    Without a name: all services of the package `consumers` here. --json is one object for one name, else a list.
    """
    from outbox.cli import services
    from outbox.consumer import operating

    here = context.current()
    here.settings.require("CONSUMER_DATABASE_URL")
    wanted = names or tuple(services.all_names())
    if not wanted:
        raise ConfigurationError("there is no service in ./consumers; name one: outbox consumer status shop.mail:service")
    found, missing, typed = [], [], {}
    for name in wanted:
        service = services.find(name)
        typed[service.name] = name
        try:
            with services.opened(here, service, name) as engine:
                found.append(operating.status(engine, service))
        except OutboxError as error:
            if names:
                raise
            missing.append(str(error))  # one service that was never migrated must not hide the others
    if as_json:
        rows = [dataclasses.asdict(item) for item in found]
        text.say_json(rows[0] if len(names) == 1 else rows)
    elif found:
        head = ("SERVICE", "STATE", "APPLIED", "DUPLICATES", "LATE", "GAPS", "PARKED", "HELD KEYS", "LAG")
        text.say(text.table(head, [_cells(item) for item in found], right=head[2:]))
        for item in found:
            advise(item, typed[item.service])
    if missing:
        raise OutboxError("\n".join(missing))


def _cells(item: Status) -> tuple[str, ...]:
    counts = (item.applied_total, item.duplicates_total, item.late_total, item.gaps_total, item.parked, item.held_keys)
    lag = "—" if item.lag_seconds is None else text.age(item.lag_seconds)
    return (item.service, "running" if item.running else "stopped", *(f"{count:,}" for count in counts), lag)


def advise(item: Status, typed: str) -> None:
    """Print what is stuck in the service that was *typed* so, and what to do."""
    mark = click.style("! ", fg="yellow", bold=True)
    if item.waiting_for_a_person:
        need = "needs" if item.waiting_for_a_person == 1 else "need"
        waits = f"{text.amount(item.waiting_for_a_person, 'parked message')} of {item.service!r} {need} a person"
        sentence = f"{waits}: outbox consumer parked list {typed}"
        text.say("\n" + mark + text.wrapped(sentence, indent="  "))
    if not item.running:
        sentence = f"service {item.service!r} is not running: outbox consumer run {typed}"
        text.say("\n" + mark + text.wrapped(sentence, indent="  "))
    elif not any(process["connected"] for process in item.processes):
        sentence = f"service {item.service!r} has no connection to the broker and goes on by itself once it has: outbox doctor"
        text.say("\n" + mark + text.wrapped(sentence, indent="  "))


# --- queues -------------------------------------------------------------------------------------------------------------


@consumer.command()
@click.argument("name")
@click.option("--apply", "apply_", is_flag=True, help="Declare exchange, queues and bindings, as the service does at start.")
@click.option("--prune", is_flag=True, help="With --apply: unbind the queue from topics that have no handler any more.")
@click.option("--check", is_flag=True, help="Compare with what the broker has; exit 1 unless all is there.")
@_json
@click.pass_context
def topology(ctx: click.Context, name: str, apply_: bool, prune: bool, check: bool, as_json: bool) -> None:
    """Show, declare or check the queues of a service."""
    if apply_ and check:
        raise click.UsageError("--apply and --check exclude each other")
    if prune and not apply_:
        raise click.UsageError("--prune goes with --apply")
    from outbox.cli import services
    from outbox.consumer import provisioning

    here = context.current()
    service = services.find(name)
    if check:
        found = [_finding(item) for item in provisioning.check(service, here.settings)]
        findings.show(found, as_json=as_json)
        ctx.exit(0 if all(item.verdict is Verdict.OK for item in found) else 1)
    wanted = (provisioning.apply if apply_ else provisioning.show)(service, here.settings)
    unbound = provisioning.prune(service, here.settings) if prune else []
    both = (wanted.main, wanted.dead)
    if as_json:
        text.say_json([_queue_dict(queue) for queue in both])
        return
    if apply_:
        text.say("Declared:")
    rows = [(queue.name, queue.exchange, key) for queue in both for key in queue.routing_keys]
    text.say(text.table(("QUEUE", "EXCHANGE", "TOPIC"), rows))
    if prune:
        text.say(f"Unbound from: {', '.join(unbound)}" if unbound else "No topic was bound without a handler.")


def _queue_dict(queue: Queue) -> dict[str, Any]:
    return {
        "name": queue.name,
        "exchange": queue.exchange,
        "exchange_type": queue.exchange_type,
        "topics": list(queue.routing_keys),
        "arguments": dict(queue.arguments),
    }


def _finding(item: provisioning.Finding) -> Finding:
    return Finding("queue", {True: Verdict.OK, False: Verdict.FAIL, None: Verdict.UNKNOWN}[item.ok], item.text)


@consumer.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Also when messages are waiting in the queues: they are lost to this service.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def retire(name: str, force: bool, yes: bool) -> None:
    """Delete the queues of a service for good.

    From now on nothing is kept for it. Its tables stay.
    """
    from outbox.cli import services
    from outbox.consumer import provisioning

    here = context.current()
    service = services.find(name)
    wanted = provisioning.show(service, here.settings)
    also = ", with every message in them" if force else ", unless messages are in them"
    text.say(f"This would delete the queues {wanted.main.name!r} and {wanted.dead.name!r}{also}.", error=True)
    confirm(yes)
    gone = provisioning.retire(service, here.settings, force=force)
    if not gone.queues:
        text.say(f"Service {service.name!r} has no queues.")
    for queue, held in gone.queues.items():
        text.say(f"Deleted queue {queue!r}" + (f" with {text.amount(held, 'message')}." if held else "."))
