"""`outbox consumer parked …`: messages that a service gave up on, kept with their bytes until a person decides."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from outbox.cli import context, text
from outbox.cli.repairs import actor, confirm
from outbox.errors import OutboxError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy.engine import Engine

    from outbox.consumer import Service
    from outbox.consumer.operating import Detail, Entry
    from outbox.consumer.orders import Filter, Sweep

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
#: Messages after which a long order says how far it is.
_TELL_AFTER = 5_000
_json = click.option("--json", "as_json", is_flag=True, help="For machines.")
_name = click.argument("name")
_ids = click.argument("ids", metavar="[ID]...", nargs=-1)
_topic = click.option("--topic", help="Only messages of this topic.")
_key = click.option("--key", help="Only messages of this key.")
_reason = click.option("--parked-as", "reason", type=click.Choice(_REASONS), help="Only messages parked for this reason.")
_source = click.option("--source", help="The source of the message, where messages of several have its id.")
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
    from outbox.consumer import operating

    here = context.current()
    service = services.find(name)
    with services.opened(here, service, name) as engine:
        found = operating.parked_list(engine, service, _filter(state, reason, topic, key), limit=limit + 1)
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
@_source
@_json
def show(name: str, id_: str, source: str | None, as_json: bool) -> None:
    """Show one parked message: error, traceback, properties and body."""
    from outbox.cli import services
    from outbox.consumer import operating

    here = context.current()
    service = services.find(name)
    with services.opened(here, service, name) as engine:
        found = operating.parked_show(engine, service, id_, source)
    if as_json:
        rows = [_detail_dict(item) for item in found]
        text.say_json(rows[0] if len(rows) == 1 else rows)
        return
    text.say("\n\n".join("\n".join(_lines(item)) for item in found))


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Which messages were typed: ids, perhaps of one source, or all that wait for a person, as narrowed."""

    ids: tuple[str, ...]
    source: str | None
    all_: bool
    reason: str | None
    topic: str | None
    key: str | None

    def check(self) -> None:
        """Raise UsageError where it means nothing."""
        if bool(self.ids) == self.all_:
            raise click.UsageError("give either ids or --all (with --parked-as, --topic, --key)")
        if self.ids and any((self.reason, self.topic, self.key)):
            raise click.UsageError("--parked-as, --topic and --key go with --all; an id needs none")
        if self.all_ and self.source is not None:
            raise click.UsageError("--source goes with ids")

    def filter(self, **more: Any) -> Filter:
        """Return it for all messages."""
        return _filter("parked", self.reason, self.topic, self.key, **more)


@dataclass(frozen=True, slots=True)
class _Order:
    """What was asked: a verb, its past, and what it means."""

    verb: str
    done: str
    consequence: str
    service: Service
    these: Callable[[Engine, Sequence[str], str | None], list[str]]
    all_: Callable[[Engine, Filter, int], Sweep]


@parked.command()
@_name
@_ids
@_source
@_all
@_reason
@_topic
@_key
@_yes
def requeue(name: str, yes: bool, **chosen: Any) -> None:
    """Let the service try parked messages again.

    What waits behind them follows. Messages of topics that have no handler here are left as they are.
    """
    from outbox.cli import services
    from outbox.consumer import operating

    which = _Chosen(**chosen)
    which.check()
    service = services.find(name)

    def these(engine: Engine, ids: Sequence[str], source: str | None) -> list[str]:
        return operating.requeue(engine, service, ids, source=source, actor=actor())

    def all_(engine: Engine, wanted: Filter, last: int) -> Sweep:
        return operating.requeue_all(engine, service, wanted, last=last, actor=actor())

    consequence = "The service tries them again; what waits behind them follows."
    order = _Order("requeue", "Requeued", consequence, service, these, all_)
    with services.opened(context.current(), service, name) as engine:
        if which.all_:
            _leave_unhandled(engine, service, which)
            _all_of_them(engine, order, which.filter(topics=service.topics), yes)
        else:
            _these(engine, order, which, yes, refuse=partial(_without_handler, service))


@parked.command()
@_name
@_ids
@_source
@_all
@_reason
@_topic
@_key
@click.option("--reason", "why", required=True, help="Why; kept with the message.")
@_yes
def discard(name: str, why: str, yes: bool, **chosen: Any) -> None:
    """Never apply parked messages.

    What waits behind them goes on.
    """
    from outbox.cli import services
    from outbox.consumer import operating

    if not why.strip():
        raise click.BadParameter("say why", param_hint="--reason")
    which = _Chosen(**chosen)
    which.check()
    service = services.find(name)

    def these(engine: Engine, ids: Sequence[str], source: str | None) -> list[str]:
        return operating.discard(engine, service, ids, source=source, actor=actor(), reason=why)

    def all_(engine: Engine, wanted: Filter, last: int) -> Sweep:
        return operating.discard_all(engine, service, wanted, last=last, actor=actor(), reason=why)

    consequence = "They are never applied; what waits behind them goes on."
    order = _Order("discard", "Discarded", consequence, service, these, all_)
    with services.opened(context.current(), service, name) as engine:
        if which.all_:
            _all_of_them(engine, order, which.filter(), yes)
        else:
            _these(engine, order, which, yes, refuse=lambda _: "")


def _these(engine: Engine, order: _Order, which: _Chosen, yes: bool, *, refuse: Callable[[Entry], str]) -> None:
    from outbox.consumer import operating

    ids = list(dict.fromkeys(which.ids))
    try:
        found = operating.parked_these(engine, order.service, ids, which.source)
        if refused := [why for entry in found if (why := refuse(entry))]:
            raise OutboxError("\n".join([*refused, "nothing was changed"]))
        _announce(order, found, len(found))
        confirm(yes)
        done = order.these(engine, ids, which.source)
    except operating.AmbiguousId as error:
        raise click.UsageError(f"{error}; say which with --source, one id at a time") from error
    text.say(f"{order.done} {text.amount(len(done), 'message')}.")


def _all_of_them(engine: Engine, order: _Order, which: Filter, yes: bool) -> None:
    from outbox.consumer import operating

    expected, last = operating.parked_count(engine, order.service, which)
    if not expected:
        text.say(f"No parked message waits for a person: nothing to {order.verb}.")
        return
    _announce(order, operating.parked_list(engine, order.service, which, limit=_SHOWN), expected)
    confirm(yes)
    sweep, done, said = order.all_(engine, which, last), 0, 0
    try:
        for number in sweep.run():
            done += number
            if done - said >= _TELL_AFTER:
                said = done
                text.say(text.dim(f"{done:,} of {expected:,}"), error=True)
    except BaseException:
        text.say(f"{order.done} {done:,} of {text.amount(expected, 'message')}; the others are as they were.", error=True)
        raise
    left = len(sweep.left)
    moved = expected - done - left
    rest = f" {moved:,} had moved on meanwhile." if moved > 0 else ""
    text.say(f"{order.done} {text.amount(done, 'message')}.{rest}")
    if left:
        are = f"{text.amount(left, 'message')} of keys that the service is handling now"
        raise Unavailable(f"{are} are as they were; the same command may reach them later")


def _leave_unhandled(engine: Engine, service: Service, which: _Chosen) -> None:
    """Say how many messages a requeue of all leaves, because this version has no handler for them."""
    from outbox.consumer import operating

    everything, _ = operating.parked_count(engine, service, which.filter())
    handled, _ = operating.parked_count(engine, service, which.filter(topics=service.topics))
    if left := everything - handled:
        text.say(f"{text.amount(left, 'message')} of topics that have no handler here: left as they are.", error=True)


def _without_handler(service: Service, entry: Entry) -> str:
    if entry.reason == "undecodable" or service.handler(entry.topic) is not None:
        return ""
    return f"message {entry.id}: service {service.name!r} has no handler for {entry.topic!r} here; use the version that has one"


def _announce(order: _Order, sample: Sequence[Entry], total: int) -> None:
    what = f"{text.amount(total, 'message')} of {order.service.name!r}"
    text.say(f"This would {order.verb} {what}. {order.consequence}", error=True)
    text.say(_table(sample[:_SHOWN]), error=True)
    if total > _SHOWN:
        text.say(text.dim(f"and {total - _SHOWN:,} more"), error=True)


def _filter(state: str | None, reason: str | None, topic: str | None, key: str | None, **more: Any) -> Filter:
    from outbox.consumer.orders import Filter
    from outbox.consumer.tables import Reason, State

    return Filter(
        state=None if state is None else State(state),
        reason=None if reason is None else Reason(reason),
        topic=topic,
        key=key,
        **more,
    )


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
