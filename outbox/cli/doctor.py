"""`outbox doctor`: try everything that must work, and say what does not."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from outbox.cli import context, findings, server_settings, text
from outbox.cli.findings import Finding, Verdict
from outbox.errors import OutboxError, SchemaError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from sqlalchemy.engine import Connection

    from outbox.cli.context import Context
    from outbox.relay.broker import Broker, BrokerState
    from outbox.settings import Settings

_WIDE = 20
#: How long a broker may take to let us in or to say why not.
_BROKER_SECONDS = 10.0
#: Due times and ages are compared across hosts; more than this is seen in them.
_SKEW_SECONDS = 1.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Try everything, and say what does not work.

    Settings, database, tables, relay, broker, topology, the services of ./consumers and (under flask) signals; exit 1 when
    something fails.
    """
    found = []
    for item in examine():
        found.append(item)
        if not as_json:
            text.say(findings.line(item, _WIDE))
    if as_json:
        text.say_json(findings.as_dicts(found))
    else:
        text.say("\n" + _summary(found))
    if findings.count(found, Verdict.FAIL):
        ctx.exit(1)


def _summary(found: list[Finding]) -> str:
    counts = ((verdict, findings.count(found, verdict)) for verdict in (Verdict.FAIL, Verdict.WARN, Verdict.UNKNOWN))
    named = [f"{number} {verdict.value}" for verdict, number in counts if number]
    return ", ".join(named) if named else "All is well."


def examine() -> Iterator[Finding]:
    """Yield the finding of each check, in the order in which they depend on each other."""
    try:
        here = context.current()
        here.settings.require("DATABASE_URL", "BROKER_URL") if here.app_engine is None else here.settings.require("BROKER_URL")
    except OutboxError as error:
        yield Finding("settings", Verdict.FAIL, str(error), "outbox config")
        return
    yield Finding("settings", Verdict.OK, f"{len(here.settings.origins)} set, the others at their defaults")
    yield from _database(here)
    usable = yield from _broker(here)
    if usable:
        yield from _topology(here)
        yield from _services(here)
    yield from _signals(here)


# --- the database -------------------------------------------------------------------------------------------------------


def _database(here: Context) -> Iterator[Finding]:
    try:
        here.place.require_file()
        with here.place.naming(), here.engine.connect() as plain:
            connection = plain.execution_options(outbox_read_only=True)
            context.prepare_transaction(connection)
            yield Finding("database", Verdict.OK, f"{_version(connection)}: {here.place}")
            yield from _durability(connection)
            if connection.dialect.name == "postgresql":
                yield from server_settings.examine(connection)
            yield _clock(connection)
            yield from _tables(connection)
    except OutboxError as error:
        yield Finding("database", Verdict.FAIL, str(error))


def _version(connection: Connection) -> str:
    numbers = ".".join(str(part) for part in connection.dialect.server_version_info or ())
    return f"{connection.dialect.name} {numbers}"


def _durability(connection: Connection) -> Iterator[Finding]:
    """What it acknowledges must survive a crash: the promise rests on that."""
    name = connection.dialect.name
    if name == "sqlite":
        yield from _sqlite(connection)
    elif name == "postgresql":
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            if connection.exec_driver_sql(f"SHOW {setting}").scalar() == "off":
                detail = f"{setting}=off: a commit that was acknowledged can be gone after a crash, and its message with it"
                yield Finding("durability", Verdict.WARN, detail, f"ALTER SYSTEM SET {setting} = on; SELECT pg_reload_conf()")


def _sqlite(connection: Connection) -> Iterator[Finding]:
    import sqlite3

    journal = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())
    synchronous = int(connection.exec_driver_sql("PRAGMA synchronous").scalar() or 0)
    if synchronous < 2:
        detail = f"synchronous={synchronous}: a commit that was acknowledged can be gone after a power cut"
        yield Finding(
            "durability", Verdict.WARN, detail, "PRAGMA synchronous=FULL on every connection: outbox.database.prepare"
        )
    elif journal == "wal" and sqlite3.sqlite_version_info < (3, 51, 3):
        detail = f"WAL on SQLite {sqlite3.sqlite_version}: two processes that checkpoint at once can lose a commit"
        yield Finding("durability", Verdict.WARN, detail, "PRAGMA journal_mode=DELETE, or SQLite 3.51.3")
    else:
        yield Finding("durability", Verdict.OK, f"journal_mode={journal}, synchronous=FULL")


def _clock(connection: Connection) -> Finding:
    from outbox.store.clock import database_now

    before = time.monotonic()
    theirs = database_now(connection)
    uncertain = time.monotonic() - before
    skew = abs((datetime.now(UTC) - theirs).total_seconds())
    if skew - uncertain <= _SKEW_SECONDS:
        return Finding("clock", Verdict.OK, f"within {text.age(max(skew, 0.1))} of the database's")
    return Finding("clock", Verdict.WARN, f"{text.age(skew)} away from the database's", "let NTP set both")


def _tables(connection: Connection) -> Iterator[Finding]:
    from outbox import migrations
    from outbox.cli.advice import advice, is_live
    from outbox.store.status import overview

    try:
        migrations.check(connection)
    except SchemaError as error:
        yield Finding("tables", Verdict.FAIL, str(error))
        return
    yield Finding("tables", Verdict.OK, f"version {len(migrations.OUTBOX.steps)}")
    found = overview(connection)
    live = [relay for relay in found.relays if is_live(relay)]
    if live:
        names = ", ".join(f"{relay.id} ({relay.state}, {text.amount(relay.shards, 'shard')})" for relay in live)
        yield Finding("relay", Verdict.OK, names)
    else:
        yield Finding("relay", Verdict.FAIL, "none was seen lately: nothing is sent", "outbox relay")
    sentence = advice(found) if live else None
    waiting = f"{text.amount(found.pending, 'message')} waiting, {found.unroutable:,} unroutable, {found.dead:,} dead"
    yield Finding("messages", Verdict.WARN if sentence else Verdict.OK, sentence or waiting)


# --- the broker ---------------------------------------------------------------------------------------------------------


def _broker(here: Context) -> Generator[Finding, None, bool]:
    from outbox.relay import open_broker

    settings = here.settings
    logging.getLogger("outbox.relay").addHandler(logging.NullHandler())  # what it says of the broker stands in the finding
    try:
        _require_broker_file(settings)
        broker = open_broker(settings)
        broker.start()
        try:
            state = _settled(broker)
        finally:
            broker.stop(1.0)
    except OutboxError as error:
        yield Finding("broker", Verdict.FAIL, str(error))
        return False
    if not state.connected:
        # A refusal says itself what is to be changed.
        yield Finding("broker", Verdict.FAIL, state.detail, "" if state.refused else "start the broker or correct BROKER_URL")
    elif state.blocked:
        yield Finding("broker", Verdict.WARN, state.detail)
    else:
        from outbox.process.masking import shown

        yield Finding("broker", Verdict.OK, f"{shown(str(settings.broker_url))}, exchange {settings.exchange!r}")
    return state.connected


def _require_broker_file(settings: Settings) -> None:
    """Looking must not make the embedded broker's file."""
    if str(settings.broker_url).startswith("embedded:"):
        from outbox import topology

        topology.read(settings)


def _settled(broker: Broker) -> BrokerState:
    """Return the broker's state once it is in, or has said why not."""
    first, deadline = broker.state(), time.monotonic() + _BROKER_SECONDS
    state = first
    while not state.connected and state.detail == first.detail and time.monotonic() < deadline:
        broker.answers(0.1)
        state = broker.state()
    return state


def _topology(here: Context) -> Iterator[Finding]:
    from outbox.cli import topology

    try:
        yield from topology.examine(here)
    except OutboxError as error:
        yield Finding("topology", Verdict.FAIL, str(error))


def _services(here: Context) -> Iterator[Finding]:
    """The queues of the services that can be imported here, against what the broker has."""
    from outbox.cli import services

    for name in services.all_names():
        try:
            yield from _service(here, name)
        except OutboxError as error:
            yield Finding("service", Verdict.UNKNOWN, str(error))


def _service(here: Context, name: str) -> Iterator[Finding]:
    from outbox.cli import services
    from outbox.consumer import provisioning

    service = services.find(name)
    if not provisioning.is_deployed(service, here.settings):
        detail = f"{name}: it has no queue, nothing is kept for it"
        yield Finding("service", Verdict.WARN, detail, f"outbox consumer topology {name} --apply, or start it")
        return
    for item in provisioning.check(service, here.settings):
        yield Finding("service", {True: Verdict.OK, False: Verdict.FAIL, None: Verdict.UNKNOWN}[item.ok], item.text)


# --- the app ------------------------------------------------------------------------------------------------------------


def _signals(here: Context) -> Iterator[Finding]:
    """Whether each captured signal is still captured: whoever disconnects all receivers disconnects that one too."""
    from outbox.capture.signals import captures

    for signal, capture in here.captures:
        if capture not in captures(signal):
            detail = f"{capture.signal_name} is no longer captured as {capture.topic!r}: it was disconnected; nothing is stored"
            yield Finding("signal", Verdict.FAIL, detail, "disconnect single receivers, and capture after that")
            continue
        others = len(list(signal.receivers_for(None)))
        also = f", and {text.amount(others, 'other receiver')}" if others else ""
        yield Finding("signal", Verdict.OK, f"{capture.signal_name} is captured as {capture.topic!r}{also}")
