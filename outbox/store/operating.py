"""The statements of the commands that look at messages and act on them: list, show, tail, requeue, discard.

A message is *published* when no pending row is left of it. Receipts say when and by whom.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox import tables
from outbox.errors import OutboxError
from outbox.store import locks
from outbox.store.clock import database_now
from outbox.tables import HOLDING, State

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.engine import Connection

PUBLISHED = "published"
#: What `--state` takes.
STATES = (*(state.value for state in State), PUBLISHED)
#: The states that a person may change: the relay does not send these now.
ACTIONABLE = HOLDING
#: Messages changed in one transaction: short enough for the relay not to notice.
CHUNK = 500
#: What becomes due in this time counts as due: a relay may read it before a command has locked it.
_SOON = timedelta(seconds=1)

_message = tables.message.c
_pending = tables.pending.c
# The very text of the partial index's condition: without it neither database sees that the index applies.
_NOT_PENDING = sa.text("outbox_pending.state <> 'pending'")


@dataclass(frozen=True, slots=True)
class Entry:
    """A message and where it stands."""

    #: outbox_message.id; known inside this database only.
    row: int
    id: UUID
    source: str
    topic: str
    key: str | None
    sequence: int | None
    state: str
    attempts: int
    last_error: str | None
    created_at: datetime
    #: When the relay looks at it next; None once it is published.
    available_at: datetime | None


@dataclass(frozen=True, slots=True)
class Publication:
    """The broker confirmed it at that time, to that relay."""

    at: datetime
    relay: str


@dataclass(frozen=True, slots=True)
class Action:
    """What a person ordered."""

    at: datetime
    actor: str
    action: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Detail:
    """Everything known of one message."""

    entry: Entry
    content_type: str
    headers: dict[str, str]
    body: bytes
    #: More than one after a duplicate, a replay or a requeue.
    publications: tuple[Publication, ...]
    actions: tuple[Action, ...]
    #: The earlier message of its key that it waits for.
    held_by: Entry | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which messages are meant; None: any."""

    state: str | None = None
    topic: str | None = None
    key: str | None = None


# --- reading ------------------------------------------------------------------------------------------------------------


def entries(connection: Connection, which: Filter, *, limit: int, before: int | None = None) -> list[Entry]:
    """Return at most *limit* messages, newest first, with rows below *before*.

    Messages that are pending, dead and so on are found by index. Published ones and all ones are read back from the newest,
    so a topic or key that is rare among them costs a look at many rows.
    """
    if which.state in (None, PUBLISHED):
        return _of_messages(connection, which, limit, before)
    query = sa.select(tables.pending).where(_pending.state == which.state).limit(limit)
    if which.state == State.PENDING:
        query = query.order_by(_pending.message_row.desc())
    else:
        # `+ 0` keeps the planner from walking the whole backlog in that order to save the sort of a few rows.
        query = query.where(_NOT_PENDING).order_by(sa.desc(_pending.message_row + 0))
    for column, value in ((_pending.topic, which.topic), (_pending.key, which.key)):
        if value is not None:
            query = query.where(column == value)
    if before is not None:
        query = query.where(_pending.message_row < before)
    waiting = connection.execute(query).all()
    messages = _messages(connection, [row.message_row for row in waiting])
    return [_entry(messages[row.message_row], row) for row in waiting if row.message_row in messages]


def _of_messages(connection: Connection, which: Filter, limit: int, before: int | None) -> list[Entry]:
    query = _envelopes().order_by(_message.id.desc()).limit(limit)
    if which.state == PUBLISHED:
        query = query.where(~sa.exists().where(_pending.message_row == _message.id))
    for column, value in ((_message.topic, which.topic), (_message.key, which.key)):
        if value is not None:
            query = query.where(column == value)
    if before is not None:
        query = query.where(_message.id < before)
    return _with_states(connection, connection.execute(query).all())


def find(connection: Connection, ids: Sequence[UUID]) -> list[Entry]:
    """Return the messages of *ids*, in that order. Raises OutboxError naming every id that is not in this outbox."""
    found: dict[UUID, Entry] = {}
    for start in range(0, len(ids), CHUNK):
        query = _envelopes().where(_message.message_id.in_(ids[start : start + CHUNK]))
        found |= {entry.id: entry for entry in _with_states(connection, connection.execute(query).all())}
    missing = [str(id_) for id_ in ids if id_ not in found]
    if missing:
        raise OutboxError("\n".join(f"message {id_} is not in this outbox" for id_ in missing))
    return [found[id_] for id_ in dict.fromkeys(ids)]


def detail(connection: Connection, id_: UUID) -> Detail:
    """Return everything known of message *id_*. Raises OutboxError when it is not in this outbox."""
    (entry,) = find(connection, [id_])
    content = connection.execute(
        sa.select(_message.content_type, _message.headers, _message.body).where(_message.id == entry.row)
    ).one()
    actions = connection.execute(sa.select(tables.action).where(tables.action.c.message_id == id_).order_by(tables.action.c.id))
    return Detail(
        entry=entry,
        content_type=content.content_type,
        headers=json.loads(content.headers) if content.headers else {},
        body=bytes(content.body),
        publications=_publications(connection, entry),
        actions=tuple(Action(row.at, row.actor, row.action, row.reason) for row in actions),
        held_by=_holder(connection, entry),
    )


def _publications(connection: Connection, entry: Entry) -> tuple[Publication, ...]:
    receipt = tables.receipt.c
    # A batch covers a range of rows; whether this one is in it only its ids tell.
    spanning = connection.execute(
        sa.select(receipt.settled_at, receipt.relay, receipt.message_ids)
        .where(receipt.last_row >= entry.row, receipt.first_row <= entry.row)
        .order_by(receipt.id)
    )
    return tuple(Publication(row.settled_at, row.relay) for row in spanning if _holds(row.message_ids, entry.id.bytes))


def _holds(packed: bytes, id_: bytes) -> bool:
    place = packed.find(id_)
    while place % len(id_):  # across the border of two ids (or -1: absent, which is no multiple either)
        if place < 0:
            return False
        place = packed.find(id_, place + 1)
    return True


def _holder(connection: Connection, entry: Entry) -> Entry | None:
    if entry.key is None or entry.state != State.PENDING:
        return None
    held = sa.and_(_pending.state == State.UNROUTABLE, _pending.topic == entry.topic)
    waiting = connection.execute(
        sa.select(tables.pending)
        .where(_NOT_PENDING, _pending.key == entry.key, _pending.message_row < entry.row)
        .where(sa.or_(_pending.state.in_([State.RETRYING, State.DEAD]), held))
        .order_by(_pending.id)
        .limit(1)
    ).first()
    if waiting is None:
        return None
    envelope = _messages(connection, [waiting.message_row]).get(waiting.message_row)
    return _entry(envelope, waiting) if envelope is not None else None


def newest_row(connection: Connection) -> int:
    """Return the highest message row, 0 for none."""
    return connection.scalar(sa.select(sa.func.max(_message.id))) or 0


def rows_above(connection: Connection, floor: int, topic: str | None, limit: int) -> list[int]:
    """Return the message rows above *floor*, lowest first, at most *limit*."""
    query = sa.select(_message.id).where(_message.id > floor).order_by(_message.id).limit(limit)
    if topic is not None:
        query = query.where(_message.topic == topic)
    return list(connection.scalars(query))


def by_rows(connection: Connection, rows: Collection[int]) -> list[Entry]:
    """Return the messages of *rows*, lowest first."""
    return _with_states(connection, [row for _, row in sorted(_messages(connection, rows).items())])


def topics(connection: Connection, sample: int = 1000) -> list[str]:
    """Return the topics that were seen lately: among the newest *sample* messages, the next ones to send, and those stuck."""
    newest = sa.select(_message.topic).order_by(_message.id.desc()).limit(sample).subquery()
    oldest = sa.select(_pending.topic).order_by(_pending.id).limit(sample).subquery()
    stuck = sa.select(_pending.topic).where(_NOT_PENDING).limit(sample).subquery()
    found: set[str] = set()
    for source in (newest, oldest, stuck):
        found.update(connection.scalars(sa.select(source.c.topic).distinct()))
    return sorted(found)


def _envelopes() -> sa.Select[Any]:
    """All columns but the body and the headers: lists never load payloads."""
    c = _message
    return sa.select(c.id, c.message_id, c.source, c.topic, c.key, c.sequence, c.created_at)


def _messages(connection: Connection, rows: Collection[int]) -> dict[int, sa.Row[Any]]:
    wanted = sorted(rows)
    found: dict[int, sa.Row[Any]] = {}
    for start in range(0, len(wanted), CHUNK):
        query = _envelopes().where(_message.id.in_(wanted[start : start + CHUNK]))
        found |= {row.id: row for row in connection.execute(query)}
    return found


def _with_states(connection: Connection, envelopes: Sequence[sa.Row[Any]]) -> list[Entry]:
    waiting: dict[int, sa.Row[Any]] = {}
    for start in range(0, len(envelopes), CHUNK):
        rows = [envelope.id for envelope in envelopes[start : start + CHUNK]]
        query = sa.select(tables.pending).where(_pending.message_row.in_(rows)).order_by(_pending.id)
        waiting |= {row.message_row: row for row in connection.execute(query)}
    return [_entry(envelope, waiting.get(envelope.id)) for envelope in envelopes]


def _entry(envelope: sa.Row[Any], waiting: sa.Row[Any] | None) -> Entry:
    return Entry(
        row=envelope.id,
        id=envelope.message_id,
        source=envelope.source,
        topic=envelope.topic,
        key=envelope.key,
        sequence=envelope.sequence,
        state=PUBLISHED if waiting is None else waiting.state,
        attempts=0 if waiting is None else waiting.attempts,
        last_error=None if waiting is None else waiting.error,
        created_at=envelope.created_at,
        available_at=None if waiting is None else waiting.available_at,
    )


# --- acting -------------------------------------------------------------------------------------------------------------


def count(connection: Connection, which: Filter) -> int:
    """Return how many messages *which* means; its state is one of ACTIONABLE."""
    return connection.scalar(_selected(which, sa.func.count())) or 0


def matching(connection: Connection, which: Filter, *, after: int) -> list[tuple[int, int]]:
    """Return (pending id, message row) of the next CHUNK of *which* with pending ids above *after*.

    Walking through all of them reads the table once.
    """
    query = _selected(which, _pending.id, _pending.message_row).where(_pending.id > after).order_by(_pending.id).limit(CHUNK)
    return [(row.id, row.message_row) for row in connection.execute(query)]


def _selected(which: Filter, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
    query = sa.select(*columns).where(_NOT_PENDING, _pending.state == which.state)
    for column, value in ((_pending.topic, which.topic), (_pending.key, which.key)):
        if value is not None:
            query = query.where(column == value)
    return query


def requeue(connection: Connection, rows: Iterable[int], *, actor: str) -> list[UUID]:
    """Let the relay send the messages of *rows* (message rows) now, with their attempts counted anew; return their ids.

    They keep their place: a row's id does not change, so what waits behind it goes out after it. Rows that are no longer
    in one of the ACTIONABLE states are left as they are.
    """
    now = database_now(connection)
    changed = _lock(connection, rows)
    values = {"state": State.PENDING, "available_at": now, "attempts": 0, "error": None}
    reasons = {row.message_row: f"was {row.state}" + (f": {row.error}" if row.error else "") for row in changed}
    return _change(connection, changed, values, "requeue", actor, now, reasons)


def discard(connection: Connection, rows: Iterable[int], *, actor: str, reason: str) -> list[UUID]:
    """Never send the messages of *rows* (message rows), and let what waits behind them go; return their ids.

    They stay in the tables. Rows that are no longer in one of the ACTIONABLE states are left as they are. What a relay is
    sending at this moment it may still deliver (see `perhaps_flying`), before all that waits behind it; then it counts as
    published.
    """
    now = database_now(connection)
    changed = _lock(connection, rows)
    reasons = {row.message_row: reason for row in changed}
    return _change(connection, changed, {"state": State.DISCARDED}, "discard", actor, now, reasons)


def perhaps_flying(connection: Connection, rows: Iterable[int]) -> int:
    """Return how many of *rows* (message rows) a relay may be sending now: due, in the hands of one whose lease runs."""
    now = database_now(connection)
    worked_on = sa.exists().where(tables.shard.c.id == _pending.shard, tables.shard.c.lease_until > now)
    query = sa.select(sa.func.count()).where(
        _pending.message_row.in_(list(rows)),
        _pending.state.in_([State.RETRYING, State.UNROUTABLE]),
        _pending.available_at <= now + _SOON,
        worked_on,
    )
    return connection.scalar(query) or 0


def _lock(connection: Connection, rows: Iterable[int]) -> Sequence[sa.Row[Any]]:
    locks.be_brief(connection)  # somebody who suspends the command in between must not stop the relay
    query = (
        sa.select(tables.pending)
        .where(_pending.message_row.in_(list(rows)), _pending.state.in_(ACTIONABLE))
        .order_by(_pending.id)
        .with_for_update()
    )
    return connection.execute(query).all()


def _change(
    connection: Connection,
    changed: Sequence[sa.Row[Any]],
    values: dict[str, Any],
    action: str,
    actor: str,
    now: datetime,
    reasons: dict[int, str],
) -> list[UUID]:
    if not changed:
        return []
    ids = [row.id for row in changed]
    connection.execute(sa.update(tables.pending).where(_pending.id.in_(ids)).values(**values))
    envelopes = _messages(connection, [row.message_row for row in changed])
    connection.execute(
        sa.insert(tables.action),
        [
            {
                "at": now,
                "actor": actor[:255],
                "action": action,
                "topic": row.topic,
                "message_id": envelopes[row.message_row].message_id,
                "reason": reasons[row.message_row],
            }
            for row in changed
        ],
    )
    return [envelopes[row.message_row].message_id for row in changed]
