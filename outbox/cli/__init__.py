"""The commands of an operator: `outbox …`, and the same group as `flask outbox …`.

Each command imports what it runs when it runs: `outbox --help` loads no database and no broker client.
"""

from __future__ import annotations

import click

import outbox
from outbox.cli import configuration, consumers, doctor, messages, processes, repairs, status, topology
from outbox.cli.failures import Group

COMMANDS: tuple[click.Command, ...] = (
    processes.migrate,
    processes.relay,
    status.status,
    messages.list_,
    messages.show,
    messages.tail,
    repairs.requeue,
    repairs.discard,
    topology.topology,
    doctor.doctor,
    configuration.config,
    consumers.consumer,
)


class _InOrder(Group):
    """Lists its commands in the order in which an operator meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names in the order they were added."""
        return list(self.commands)


@click.group(name="outbox", cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(outbox.__version__, prog_name="outbox")
def group() -> None:
    """A signal sent is a message delivered, if and only if the transaction commits.

    Settings come from the environment (DATABASE_URL, BROKER_URL, …): `outbox config` shows them, `outbox doctor` tries
    them. Exit codes: 0 fine, 1 failed, 2 wrong usage, 3 threshold exceeded, 75 a server can't be reached, try later.
    """


for _command in COMMANDS:
    group.add_command(_command)


def main() -> None:
    """Run the command that was typed; the entry point of the script `outbox`."""
    group(prog_name="outbox")
