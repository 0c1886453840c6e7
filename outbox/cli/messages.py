"""`outbox list`, `show` and `tail`: look at messages."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections import deque
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from outbox.cli import context, text
from outbox.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox.cli.context import Context
    from outbox.store.operating import Detail, Entry

_STATES = ("pending", "retrying", "unroutable", "dead", "discarded", "published")
_CANONICAL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_NO_JSON = object()
#: `tail` looks again after this time, and for this many looks waits for rows with lower numbers.
_POLL_SECONDS = 0.5
_PATIENCE = 60
_MOST_ROWS = 100_000


def message_id(value: str) -> UUID:
    """Return the id; anything but a whole one is wrong usage."""
    if not _CANONICAL.fullmatch(value):
        raise click.BadParameter(f"{value!r} is no message id; ids are whole: 019ab6f0-5f4e-7c1d-9d3c-0a5b1c2d3e4f")
    return UUID(value)


# --- list ---------------------------------------------------------------------------------------------------------------


@click.command(name="list")
@click.option("--state", type=click.Choice(_STATES), help="Only messages in this state.")
@click.option("--topic", help="Only messages of this topic.")
@click.option("--key", help="Only messages of this key.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@click.option("--before", type=message_id, metavar="ID", help="Only messages older than this one: the next page.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def list_(state: str | None, topic: str | None, key: str | None, limit: int, before: UUID | None, as_json: bool) -> None:
    """List messages, newest first."""
    from outbox.store import operating

    here = context.current()
    context.announce(here, as_json=as_json)
    with here.reading() as connection:
        start = operating.find(connection, [before])[0].row if before else None
        which = operating.Filter(state=state, topic=topic, key=key)
        found = operating.entries(connection, which, limit=limit + 1, before=start)
    more, found = len(found) > limit, found[:limit]
    if as_json:
        text.say_json([as_dict(entry) for entry in found])
        return
    if not found:
        text.say("No message.")
        return
    head = ("ID", "STATE", "TOPIC", "KEY", "SEQUENCE", "ATTEMPTS", "CREATED", "LAST ERROR")
    text.say(text.table(head, [_cells(entry) for entry in found], right=("SEQUENCE", "ATTEMPTS")))
    if more:
        text.say(text.dim(f"There are more: add --before {found[-1].id}"), error=True)


def as_dict(entry: Entry) -> dict[str, Any]:
    """Return *entry* under the names that `--json` promises."""
    return {
        "id": str(entry.id),
        "topic": entry.topic,
        "key": entry.key,
        "sequence": entry.sequence,
        "state": entry.state,
        "attempts": entry.attempts,
        "last_error": entry.last_error,
        "created_at": entry.created_at,
        "available_at": entry.available_at,
    }


def _cells(entry: Entry) -> tuple[str, ...]:
    return (
        str(entry.id),
        entry.state,
        entry.topic,
        entry.key or "",
        "" if entry.sequence is None else str(entry.sequence),
        str(entry.attempts) if entry.attempts else "",
        text.moment(entry.created_at),
        entry.last_error or "",
    )


# --- show ---------------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("id_", metavar="ID", type=message_id)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def show(id_: UUID, as_json: bool) -> None:
    """Show one message and what became of it.

    Its body, headers, attempts and errors, what it waits for, when it was published and by whom.
    """
    from outbox.store import operating

    here = context.current()
    context.announce(here, as_json=as_json)
    with here.reading() as connection:
        found = operating.detail(connection, id_)
    if as_json:
        text.say_json(detail_dict(found))
    else:
        text.say("\n".join(_detail_lines(found)))


def detail_dict(found: Detail) -> dict[str, Any]:
    """Return *found* under the names that `--json` promises; a body that is no JSON as `data_base64`."""
    data = _decoded(found)
    body = {"data_base64": base64.b64encode(found.body).decode()} if data is _NO_JSON else {"data": data}
    return {
        **as_dict(found.entry),
        "source": found.entry.source,
        "content_type": found.content_type,
        "headers": found.headers,
        "published": [{"at": item.at, "relay": item.relay} for item in found.publications],
        "actions": [
            {"at": item.at, "actor": item.actor, "action": item.action, "reason": item.reason} for item in found.actions
        ],
        "held_by": as_dict(found.held_by) if found.held_by else None,
        **body,
    }


def _decoded(found: Detail) -> Any:
    if not found.body:
        return None
    try:
        return json.loads(found.body)
    except ValueError:
        return _NO_JSON


def _detail_lines(found: Detail) -> Iterator[str]:
    entry = found.entry
    yield click.style(str(entry.id), bold=True) + "  " + text.coloured(entry.state)
    yield ""
    yield from _facts(entry)
    for number, item in enumerate(found.publications):
        yield text.fact("published" if number == 0 else "again", f"{text.moment(item.at)} by {item.relay}")
    if entry.state == "published" and not found.publications:
        yield text.fact("published", "no receipt says when")
    if found.held_by:
        holder = found.held_by
        yield text.fact("waits for", f"{holder.id} ({holder.state}), an earlier message of its key")
    for action in found.actions:
        reason = f": {action.reason}" if action.reason else ""
        yield text.fact(action.action, f"{text.moment(action.at)} by {action.actor}{reason}")
    for name, value in sorted(found.headers.items()):
        yield text.fact("header", f"{name}={value}")
    yield ""
    yield _body(found)


def _facts(entry: Entry) -> Iterator[str]:
    yield text.fact("topic", entry.topic)
    if entry.key is not None:
        yield text.fact("key", f"{entry.key}, sequence {entry.sequence}")
    yield text.fact("source", entry.source)
    yield text.fact("created", text.moment(entry.created_at))
    if entry.attempts:
        yield text.fact("attempts", str(entry.attempts))
    if entry.last_error:
        yield text.fact("last error", entry.last_error)
    if entry.state in ("retrying", "unroutable"):
        yield text.fact("next try", text.moment(entry.available_at))


def _body(found: Detail) -> str:
    if not found.body:
        return text.dim("  (no data)")
    data = _decoded(found)
    if data is _NO_JSON:
        return text.dim(f"  ({len(found.body):,} bytes of {found.content_type}; --json shows them in base64)")
    shown = json.dumps(data, ensure_ascii=False, indent=2)
    return text.printable(shown)


# --- tail ---------------------------------------------------------------------------------------------------------------


class Follower:
    """Which rows are new, read again and again.

    Row numbers are drawn before commits, so a lower one may appear after a higher one: the floor follows only after
    `patience` readings. A transaction that writes its messages and stays open longer than that is not seen.
    """

    def __init__(self, floor: int, patience: int) -> None:
        self.floor = floor
        self._readings: deque[set[int]] = deque([set()] * patience, maxlen=patience)

    def unseen(self, rows: list[int]) -> list[int]:
        """Return those of *rows* (all above the floor) that no earlier reading held."""
        return [row for row in rows if not any(row in reading for reading in self._readings)]

    def seen(self, rows: list[int]) -> None:
        """One more reading, in which *rows* were new."""
        self.floor = max(self.floor, *self._readings[0], 0)
        self._readings.append(set(rows))


@click.command()
@click.option("--topic", help="Only messages of this topic.")
@click.option("--json", "as_json", is_flag=True, help="For machines: one object a line.")
def tail(topic: str | None, as_json: bool) -> None:
    """Print messages as they are committed, until Ctrl-C."""
    from outbox.store import operating

    here = context.current()
    context.announce(here, as_json=as_json)
    with here.reading() as connection:
        # A little back, and marked as read: transactions that are open now have drawn their numbers already.
        follower = Follower(max(0, operating.newest_row(connection) - 1000), patience=_PATIENCE)
        follower.seen(operating.rows_above(connection, follower.floor, topic, limit=_MOST_ROWS))
    pause = threading.Event()
    trouble = ""
    try:
        while True:
            try:
                entries = _look(here, follower, topic)
            except Unavailable as error:  # it goes on when the database is back
                if str(error) != trouble:
                    text.say(text.dim(str(error)), error=True)
                entries, trouble = [], str(error)
            else:
                trouble = ""
            for entry in entries:
                text.say_json(as_dict(entry), line=True) if as_json else text.say(_tail_line(entry))
            pause.wait(_POLL_SECONDS)
    except KeyboardInterrupt:
        return  # the way out of a command that has no end


def _look(here: Context, follower: Follower, topic: str | None) -> list[Entry]:
    from outbox.store import operating

    with here.reading() as connection:
        rows = follower.unseen(operating.rows_above(connection, follower.floor, topic, limit=_MOST_ROWS))
        entries = operating.by_rows(connection, rows)
    follower.seen(rows)
    return entries


def _tail_line(entry: Entry) -> str:
    order = f"  {text.one_line(entry.key)} #{entry.sequence}" if entry.key is not None else ""
    return f"{text.dim(text.moment(entry.created_at))}  {entry.id}  {entry.topic}{order}"
