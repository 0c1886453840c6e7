"""`outbox consumer …`: run and look after services."""

from __future__ import annotations

import click

from outbox.cli.processes import prepare_process


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
    from outbox.consumer import worker

    ctx.exit(worker.run(service, here.settings, drain=drain))
