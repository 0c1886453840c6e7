"""`outbox migrate` and `outbox relay`: make the tables, then empty them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import click

from outbox.cli import context, text

if TYPE_CHECKING:
    from outbox.cli.context import Context
    from outbox.settings import Settings


@click.command()
@click.option("--sql", is_flag=True, help="Print the statements for an empty database instead of running them.")
def migrate(sql: bool) -> None:
    """Create or upgrade the tables of the outbox."""
    from outbox import migrations

    here = context.current()
    if sql:
        text.say(migrations.sql(here.place.url.get_backend_name()), newline=False)
        return
    context.announce(here)
    with here.place.naming():
        steps = migrations.upgrade(here.engine)
    version = len(migrations.OUTBOX.steps)
    done = f"upgraded by {text.amount(steps, 'step')} to version {version}" if steps else f"are of version {version} already"
    text.say(f"The outbox tables {done}: {here.place}")


@click.command()
@click.option("--once", is_flag=True, help="One pass: send what can be sent, then stop.")
@click.option("--drain", is_flag=True, help="Until nothing more can be sent now, then stop.")
@click.option("--http-port", metavar="PORT", help="Serve /livez, /readyz and /metrics on this port (or HOST:PORT).")
@click.pass_context
def relay(ctx: click.Context, once: bool, drain: bool, http_port: str | None) -> None:
    """Publish committed messages to the broker.

    In order within each key. Runs until SIGTERM or Ctrl-C, which let it settle what is in flight; a second one ends it at once.
    """
    if once and drain:
        raise click.UsageError("--once and --drain exclude each other")
    here = prepare_process({"OUTBOX_HTTP_PORT": http_port})
    here.settings.require("BROKER_URL")
    # Only the embedded mode makes its files by itself; elsewhere a missing file is a wrong folder or a forgotten migrate.
    if not str(here.settings.broker_url).startswith("embedded:"):
        here.place.require_file()
    from outbox.relay import daemon

    ctx.exit(daemon.run(_with_url(here), once=once, drain=drain))


def _with_url(here: Context) -> Settings:
    """Under flask the app's engine says which database; the relay opens connections of its own to it."""
    from outbox import settings

    if here.app_engine is None:
        return here.settings
    return settings.override(here.settings, {"DATABASE_URL": here.app_engine.url.render_as_string(hide_password=False)})


def prepare_process(arguments: dict[str, object]) -> Context:
    """Return the context of a long-running command: with log lines, and failpoints armed if the environment says so."""
    if threading.current_thread() is threading.main_thread():
        # Until the runtime listens itself, after a second of imports: nothing was begun, so it ends as well as later.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from outbox.process import failpoints, logs

    # Before the settings are read, because reading them may warn.
    logs.configure(os.environ.get("OUTBOX_LOG_FORMAT", "console"))
    here = context.current(arguments)
    logs.configure(here.settings.log_format)
    failpoints.arm(os.environ)
    return here
