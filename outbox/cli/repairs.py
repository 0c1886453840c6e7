"""`outbox requeue` and `outbox discard`: act on messages that the relay does not send. They ask first."""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from outbox.cli import context, text
from outbox.cli.failures import Failure
from outbox.cli.messages import message_id
from outbox.errors import OutboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from sqlalchemy.engine import Connection

    from outbox.cli.context import Context
    from outbox.store.operating import Entry, Filter

    Act = Callable[[Connection, list[int]], list[UUID]]

_ACTIONABLE = ("dead", "unroutable", "retrying")
_SHOWN = 10
_WHY_NOT = {
    "pending": "is pending: the relay sends it by itself",
    "published": "was published: nothing of it waits here",
    "discarded": "was discarded: its key went on without it",
}

_ids = click.argument("ids", metavar="[ID]...", nargs=-1, type=message_id)
_state = click.option("--state", type=click.Choice(_ACTIONABLE), help="Instead of ids: all messages in this state.")
_topic = click.option("--topic", help="With --state: only of this topic.")
_key = click.option("--key", help="With --state: only of this key.")
_yes = click.option("--yes", is_flag=True, help="Do not ask.")


@dataclass(frozen=True, slots=True)
class _Order:
    """What was asked: a verb, its past, and what it means."""

    verb: str
    done: str
    consequence: str
    act: Act


@click.command()
@_ids
@_state
@_topic
@_key
@_yes
def requeue(ids: tuple[UUID, ...], state: str | None, topic: str | None, key: str | None, yes: bool) -> None:
    """Let dead or unroutable messages be sent again.

    The relay tries them now, their attempts counted anew. They keep their place: later messages of their key go out after them.
    """
    from outbox.store import operating

    def act(connection: Connection, rows: list[int]) -> list[UUID]:
        return operating.requeue(connection, rows, actor=actor())

    order = _Order("requeue", "Requeued", "The relay tries them again at once.", act)
    _run(order, ids, state, topic, key, yes)


@click.command()
@_ids
@_state
@_topic
@_key
@click.option("--reason", required=True, help="Why; kept with the message.")
@_yes
def discard(ids: tuple[UUID, ...], state: str | None, topic: str | None, key: str | None, reason: str, yes: bool) -> None:
    """Never send dead or unroutable messages.

    Later messages of their keys go on without them. They stay in the tables: `outbox list --state discarded`. A message that
    the relay is sending at this moment may still arrive, before those behind it; the command says how many these may be.
    """
    from outbox.store import operating

    if not reason.strip():
        raise click.BadParameter("say why", param_hint="--reason")

    flying: list[int] = []

    def act(connection: Connection, rows: list[int]) -> list[UUID]:
        flying.append(operating.perhaps_flying(connection, rows))
        return operating.discard(connection, rows, actor=actor(), reason=reason)

    order = _Order("discard", "Discarded", "They are never sent; later messages of their keys go on without them.", act)
    _run(order, ids, state, topic, key, yes)
    if sum(flying):
        some = text.amount(sum(flying), "message")
        fate = "what the broker still confirms is published, and not in: outbox list --state discarded"
        text.say(f"{some} of these may be on the way at this moment; {fate}", error=True)


def actor() -> str:
    """Return who types: user@host, for the audit rows."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def confirm(yes: bool) -> None:
    """Ask, unless *yes*. Ends the command with 1 when the answer is no, and when nobody is there to answer."""
    if yes:
        return
    try:
        agreed = click.confirm("Go on?", err=True)
    except click.Abort:
        text.say(error=True)  # the question is still open on its line
        raise Failure("nobody confirmed and nothing was changed; say --yes") from None
    if not agreed:
        text.say("Nothing was changed.", error=True)
        click.get_current_context().exit(1)


def _run(order: _Order, ids: tuple[UUID, ...], state: str | None, topic: str | None, key: str | None, yes: bool) -> None:
    if bool(ids) == bool(state):
        raise click.UsageError("give either ids or --state (with --topic, --key)")
    if ids and (topic is not None or key is not None):
        raise click.UsageError("--topic and --key go with --state; an id needs neither")
    from outbox.store.operating import Filter

    here = context.current()
    context.announce(here)
    if ids:
        _these(here, order, ids, yes)
    else:
        _all(here, order, Filter(state=state, topic=topic, key=key), yes)


def _these(here: Context, order: _Order, ids: tuple[UUID, ...], yes: bool) -> None:
    from outbox.store import operating

    with here.reading() as connection:
        found = operating.find(connection, ids)
    refused = [f"message {entry.id} {_WHY_NOT[entry.state]}" for entry in found if entry.state in _WHY_NOT]
    if refused:
        raise OutboxError("\n".join([*refused, f"nothing was changed; {order.verb} takes {', '.join(_ACTIONABLE)} messages"]))
    _announce(order, text.amount(len(found), "message"), found)
    confirm(yes)
    changed: list[UUID] = []
    for start in range(0, len(found), operating.CHUNK):
        with here.writing() as connection:
            changed += order.act(connection, [entry.row for entry in found[start : start + operating.CHUNK]])
    _report(order, len(changed), len(found))


def _all(here: Context, order: _Order, which: Filter, yes: bool) -> None:
    from outbox.store import operating

    with here.reading() as connection:
        expected = operating.count(connection, which)
        sample = operating.entries(connection, which, limit=_SHOWN)
    if not expected:
        text.say(f"No {which.state} message{_limits(which)}: nothing to {order.verb}.")
        return
    _announce(order, text.amount(expected, f"{which.state} message") + _limits(which), sample, expected)
    confirm(yes)
    done, after = 0, 0
    while True:
        with here.writing() as connection:
            chunk = operating.matching(connection, which, after=after)
            if not chunk:
                break
            done += len(order.act(connection, [row for _, row in chunk]))
        after = chunk[-1][0]  # upwards only: what the relay sets aside again meanwhile is not met twice
    _report(order, done, expected)


def _limits(which: Filter) -> str:
    topic = f" of topic {which.topic!r}" if which.topic is not None else ""
    return topic + (f" of key {which.key!r}" if which.key is not None else "")


def _announce(order: _Order, what: str, sample: Sequence[Entry], total: int | None = None) -> None:
    text.say(f"This would {order.verb} {what}. {order.consequence}", error=True)
    head = ("ID", "STATE", "TOPIC", "KEY", "LAST ERROR")
    rows = [(str(item.id), item.state, item.topic, item.key or "", item.last_error or "") for item in sample[:_SHOWN]]
    text.say(text.table(head, rows), error=True)
    more = (len(sample) if total is None else total) - len(rows)
    if more > 0:
        text.say(text.dim(f"and {more:,} more"), error=True)


def _report(order: _Order, done: int, expected: int) -> None:
    rest = expected - done
    moved = f" {rest:,} had moved on meanwhile." if rest > 0 else ""
    text.say(f"{order.done} {text.amount(done, 'message')}.{moved}")
