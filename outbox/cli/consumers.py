"""`outbox consumer …`: run and look after services."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from outbox.cli import context, text
from outbox.cli.context import Place
from outbox.cli.processes import prepare_process
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Engine

    from outbox.cli.context import Context
    from outbox.consumer import Service
    from outbox.consumer.operate import Status

_json = click.option("--json", "as_json", is_flag=True, help="For machines.")


@click.group()
def consumer() -> None:
    """Run and look after services.

    NAME is a bare name (exports means consumers.exports:service) or module:attribute; the working directory is on the
    import path.
    """


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
    place = _place(here, service, name)
    if not str(here.settings.broker_url).startswith("embedded:"):  # only the embedded mode makes its files by itself
        place.require_file()
    from outbox.consumer import worker

    with place.naming():
        ctx.exit(worker.run(service, here.settings, drain=drain))


@consumer.command()
@click.argument("name")
def migrate(name: str) -> None:
    """Create or upgrade inbox and parking, and create the service's own tables, in the service's database."""
    from outbox.cli import services
    from outbox.consumer import operate

    here = context.current()
    here.settings.require("CONSUMER_DATABASE_URL")
    service = services.find(name)
    place = _place(here, service, name)
    engine = operate.open_engine(service, here.settings)
    try:
        with place.naming():
            steps = operate.migrate(service, engine)
    finally:
        engine.dispose()
    done = f"were made in {text.amount(steps, 'step')}" if steps else "are there already"
    text.say(f"The tables of service {service.name!r} {done}: {place}")


# --- status -------------------------------------------------------------------------------------------------------------


@consumer.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@_json
def status(names: tuple[str, ...], as_json: bool) -> None:
    """Show what services have applied, what is parked, and how far behind they are.

    Without a name: all services of the package `consumers` here. --json is one object for one name, else a list.
    """
    from outbox.cli import services
    from outbox.consumer import operate

    here = context.current()
    here.settings.require("CONSUMER_DATABASE_URL")
    wanted = names or tuple(services.all_names())
    if not wanted:
        raise ConfigurationError("there is no service in ./consumers; name one: outbox consumer status shop.mail:service")
    found = []
    for name in wanted:
        service = services.find(name)
        with opened(here, service, name) as engine:
            found.append(operate.status(engine, service))
    if as_json:
        rows = [dataclasses.asdict(item) for item in found]
        text.say_json(rows[0] if len(names) == 1 else rows)
        return
    head = ("SERVICE", "STATE", "APPLIED", "DUPLICATES", "LATE", "GAPS", "PARKED", "HELD KEYS", "LAG")
    text.say(text.table(head, [_cells(item) for item in found], right=head[2:]))
    for item in found:
        _advise(item)


def _cells(item: Status) -> tuple[str, ...]:
    counts = (item.applied_total, item.duplicates_total, item.late_total, item.gaps_total, item.parked, item.held_keys)
    lag = "—" if item.lag_seconds is None else text.age(item.lag_seconds)
    return (item.service, "running" if item.running else "stopped", *(f"{count:,}" for count in counts), lag)


def _advise(item: Status) -> None:
    mark = click.style("! ", fg="yellow", bold=True)
    if item.waiting_for_a_person:
        waits = f"{text.amount(item.waiting_for_a_person, 'parked message')} of {item.service!r} need a person"
        sentence = f"{waits}: outbox consumer parked list {item.service}"
        text.say("\n" + mark + text.wrapped(sentence, indent="  "))
    if not item.running:
        sentence = f"service {item.service!r} is not running: outbox consumer run {item.service}"
        text.say("\n" + mark + text.wrapped(sentence, indent="  "))


@contextmanager
def opened(here: Context, service: Service, name: str) -> Iterator[Engine]:
    """The service's engine, on tables of the right version; database errors inside name CONSUMER_DATABASE_URL."""
    from outbox.consumer import operate

    place = _place(here, service, name)
    place.require_file()
    engine = operate.open_engine(service, here.settings)
    try:
        with place.naming():
            operate.check(service, engine)
            yield engine
    finally:
        engine.dispose()


def _place(here: Context, service: Service, name: str) -> Place:
    from sqlalchemy import make_url

    url = make_url(str(here.settings.consumer_database_url).replace("{service}", service.name))
    return Place("CONSUMER_DATABASE_URL", url, f"outbox consumer migrate {name}")
