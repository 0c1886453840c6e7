"""`outbox consumer parked …`: messages that a service gave up on, kept with their bytes until a person decides."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import click

from outbox.cli import context, text
from outbox.cli.repairs import actor, confirm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy.engine import Engine

    from outbox.consumer import Service
    from outbox.consumer.operating import Detail, Entry

_STATES = ("parked", "behind", "due", "discarded")
_REASONS = (
    "failed",
    "rejected",
    "later",
    "incomplete",
    "no handler",
    "undecodable",
    "late",
    "behind",
    "crashed",
    "dead-lettered",
)
_SHOWN = 10
_json = click.option("--json", "as_json", is_flag=True, help="For machines.")
_name = click.argument("name")
_ids = click.argument("ids", metavar="[ID]...", nargs=-1)
_topic = click.option("--topic", help="Only messages of this topic.")
_key = click.option("--key", help="Only messages of this key.")
_reason = click.option("--parked-as", "reason", type=click.Choice(_REASONS), help="Only messages parked for this reason.")
_all = click.option("--all", "all_", is_flag=True, help="Instead of ids: all that wait for a person, as narrowed below.")
_yes = click.option("--yes", is_flag=True, help="Do not ask.")


@click.group()
def parked() -> None:
    """Messages that a service gave up on.

    They are kept with their bytes until a person decides; later messages of their keys wait behind them.
    """


@parked.command(name="list")
@_name
@click.option("--state", type=click.Choice(_STATES), help="Only messages in this state; without it all but discarded ones.")
@_reason
@_topic
@_key
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@_json
def list_(
    name: str, state: str | None, reason: str | None, topic: str | None, key: str | None, limit: int, as_json: bool
) -> None:
    """List parked messages in the order they came."""
    from outbox.cli import services

    here = context.current()
    service = services.find(name)
    with services.opened(here, service, name) as engine:
        found = _select(engine, service, state, reason, topic, key, limit + 1)
    more, found = len(found) > limit, found[:limit]
    if as_json:
        text.say_json([as_dict(entry) for entry in found])
    elif not found:
        text.say("No message is parked." if state is None else "No message.")
    else:
        text.say(_table(found))
        if more:
            text.say(text.dim("There are more: raise --limit"), error=True)


@parked.command()
@_name
@click.argument("id_", metavar="ID")
@_json
def show(name: str, id_: str, as_json: bool) -> None:
    """Show one parked message: error, traceback, properties and body."""
    from outbox.cli import services
    from outbox.consumer import operating

    here = context.current()
    service = services.find(name)
    with services.opened(here, service, name) as engine:
        found = operating.parked_show(engine, service, id_)
    if as_json:
        rows = [_detail_dict(item) for item in found]
        text.say_json(rows[0] if len(rows) == 1 else rows)
        return
    text.say("\n\n".join("\n".join(_lines(item)) for item in found))


@parked.command()
@_name
@_ids
@_all
@_reason
@_topic
@_key
@_yes
def requeue(
    name: str, ids: tuple[str, ...], all_: bool, reason: str | None, topic: str | None, key: str | None, yes: bool
) -> None:
    """Let the service try parked messages again.

    What waits behind them follows.
    """
    from outbox.consumer import operating

    def act(engine: Engine, service: Service, chosen: Sequence[str]) -> list[str]:
        return operating.requeue(engine, service, chosen, actor=actor())

    consequence = "The service tries them again; what waits behind them follows."
    _run("requeue", consequence, act, name, ids, all_, (reason, topic, key), yes)


@parked.command()
@_name
@_ids
@_all
@_reason
@_topic
@_key
@click.option("--reason", "why", required=True, help="Why; kept with the message.")
@_yes
def discard(
    name: str, ids: tuple[str, ...], all_: bool, reason: str | None, topic: str | None, key: str | None, why: str, yes: bool
) -> None:
    """Never apply parked messages.

    What waits behind them goes on.
    """
    from outbox.consumer import operating

    if not why.strip():
        raise click.BadParameter("say why", param_hint="--reason")

    def act(engine: Engine, service: Service, chosen: Sequence[str]) -> list[str]:
        return operating.discard(engine, service, chosen, actor=actor(), reason=why)

    consequence = "They are never applied; what waits behind them goes on."
    _run("discard", consequence, act, name, ids, all_, (reason, topic, key), yes)


def _run(
    verb: str,
    consequence: str,
    act: Callable[[Engine, Service, Sequence[str]], list[str]],
    name: str,
    ids: tuple[str, ...],
    all_: bool,
    narrowed: tuple[str | None, str | None, str | None],
    yes: bool,
) -> None:
    if bool(ids) == all_:
        raise click.UsageError("give either ids or --all (with --parked-as, --topic, --key)")
    if ids and any(narrowed):
        raise click.UsageError("--parked-as, --topic and --key go with --all; an id needs none")
    from outbox.cli import services
    from outbox.consumer import operating

    here = context.current()
    service = services.find(name)
    with services.opened(here, service, name) as engine:
        if all_:
            found = _select(engine, service, "parked", *narrowed, limit=10_000)
        else:
            found = [item.entry for id_ in dict.fromkeys(ids) for item in operating.parked_show(engine, service, id_)]
        if not found:
            text.say(f"No parked message waits for a person: nothing to {verb}.")
            return
        text.say(f"This would {verb} {text.amount(len(found), 'message')} of {service.name!r}. {consequence}", error=True)
        text.say(_table(found[:_SHOWN]), error=True)
        if len(found) > _SHOWN:
            text.say(text.dim(f"and {len(found) - _SHOWN:,} more"), error=True)
        confirm(yes)
        done = act(engine, service, [entry.id for entry in found])
    text.say(f"{verb.capitalize()}{'d' if verb.endswith('e') else 'ed'} {text.amount(len(done), 'message')}.")


def _select(
    engine: Engine,
    service: Service,
    state: str | None,
    reason: str | None,
    topic: str | None,
    key: str | None,
    limit: int,
) -> list[Entry]:
    from outbox.consumer import operating
    from outbox.consumer.tables import Reason, State

    which = operating.Filter(
        state=None if state is None else State(state),
        reason=None if reason is None else Reason(reason),
        topic=topic,
        key=key,
    )
    return operating.parked_list(engine, service, which, limit=limit)


# --- showing ------------------------------------------------------------------------------------------------------------


def _table(found: Sequence[Entry]) -> str:
    head = ("ID", "STATE", "REASON", "TOPIC", "KEY", "ATTEMPTS", "PARKED", "ERROR")
    rows = [
        (
            entry.id,
            entry.state,
            entry.reason,
            entry.topic,
            entry.key or "",
            str(entry.attempts) if entry.attempts else "",
            text.moment(entry.parked_at),
            entry.error or "",
        )
        for entry in found
    ]
    return text.table(head, rows, right=("ATTEMPTS",))


def as_dict(entry: Entry) -> dict[str, Any]:
    """Return *entry* under the names that `--json` promises."""
    return {
        "id": entry.id,
        "source": entry.source,
        "topic": entry.topic,
        "key": entry.key,
        "sequence": entry.sequence,
        "state": entry.state,
        "reason": entry.reason,
        "attempts": entry.attempts,
        "last_error": entry.error,
        "created_at": entry.created_at,
        "parked_at": entry.parked_at,
        "due_at": entry.due_at,
    }


def _detail_dict(found: Detail) -> dict[str, Any]:
    return {
        **as_dict(found.entry),
        "behind": found.behind,
        "held_by": found.held_by,
        "acted_at": found.acted_at,
        "actor": found.actor,
        "note": found.note,
        "traceback": found.detail,
        "properties": found.properties,
        "body": _body(found.body),
    }


def _body(body: bytes) -> Any:
    """The event where it is one, else its bytes in base64: parked messages may hold anything."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return {"base64": base64.b64encode(body).decode()}


def _lines(found: Detail) -> Iterator[str]:
    entry = found.entry
    yield click.style(entry.id, bold=True) + "  " + text.coloured(entry.state)
    yield ""
    yield text.fact("reason", entry.reason + (f": {entry.error}" if entry.error else ""))
    yield text.fact("topic", entry.topic)
    if entry.key is not None:
        yield text.fact("key", entry.key + ("" if entry.sequence is None else f", sequence {entry.sequence}"))
    yield text.fact("source", entry.source)
    if entry.created_at:
        yield text.fact("created", text.moment(entry.created_at))
    yield text.fact("parked", text.moment(entry.parked_at))
    if entry.attempts:
        yield text.fact("attempts", str(entry.attempts))
    if entry.due_at:
        yield text.fact("next try", text.moment(entry.due_at))
    if found.held_by:
        yield text.fact("waits for", f"{found.held_by}, an earlier message of its key")
    if found.behind:
        yield text.fact("behind it", text.amount(found.behind, "message"))
    if found.acted_at:
        note = f": {found.note}" if found.note else ""
        yield text.fact("acted on", f"{text.moment(found.acted_at)} by {found.actor}{note}")
    if found.detail:
        yield ""
        yield text.dim(text.printable(found.detail.rstrip()))
    yield ""
    yield text.printable(json.dumps(_body(found.body), ensure_ascii=False, indent=2))
