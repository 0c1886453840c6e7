"""The statements of `outbox status`: how much waits, for what, who works on it. Bounded, whatever the backlog."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from outbox import tables
from outbox.store.clock import database_now
from outbox.tables import HOLDING, State

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.engine import Connection

#: Waiting messages are counted one by one up to this many (about half a second); beyond it the answer is "at least".
COUNTED = 1_000_000
#: Stuck messages of each state that are named.
NAMED = 10
#: Relays that were seen within this time are listed.
_REMEMBERED = timedelta(days=1)
_RATE = timedelta(minutes=1)

# The very text of the partial index's condition: without it neither database sees that the index applies.
_NOT_PENDING = sa.text("outbox_pending.state <> 'pending'")
_NOT_DISCARDED = sa.text("outbox_pending.state <> 'discarded'")


@dataclass(frozen=True, slots=True)
class Stuck:
    """A message that waits for a binding, for a retry or for a person."""

    id: UUID
    topic: str
    key: str | None
    sequence: int | None
    state: str
    attempts: int
    last_error: str | None
    created_at: datetime
    available_at: datetime
    #: Later messages that wait for this one; counted up to 1,000.
    behind: int


@dataclass(frozen=True, slots=True)
class Relay:
    """A relay as its last heartbeat left it."""

    id: str
    host: str
    pid: int
    version: str
    state: str
    started_at: datetime
    seen_age_seconds: float
    #: Shards whose lease it holds now.
    shards: int
    broker_connected: bool
    broker_blocked: bool
    broker_detail: str
    #: What else hinders it, and the next step; empty when nothing does.
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything `outbox status` shows, as of one moment of the database's clock."""

    at: datetime
    #: Waiting to be sent, the retrying ones included, those that are not due yet excluded.
    pending: int
    #: False when there are more than COUNTED; then `pending` and `scheduled` are lower bounds.
    counted_all: bool
    retrying: int
    #: Not due yet.
    scheduled: int
    unroutable: int
    dead: int
    discarded: int
    #: Of the oldest message that is pending and due; 0 where there is none.
    lag_seconds: float
    held_keys: int
    #: The oldest ones of each state, dead ones first.
    stuck: tuple[Stuck, ...]
    published_total: int
    published_per_second: float
    last_published_at: datetime | None
    relays: tuple[Relay, ...]


def overview(connection: Connection) -> Overview:
    """Read everything; some statements, each bounded."""
    now = database_now(connection)
    waiting, scheduled, exact = _waiting(connection, now)
    states = _states(connection)
    total, rate, last = _published(connection, now)
    return Overview(
        at=now,
        pending=waiting,
        counted_all=exact,
        retrying=states.get(State.RETRYING, 0),
        scheduled=scheduled,
        unroutable=states.get(State.UNROUTABLE, 0),
        dead=states.get(State.DEAD, 0),
        discarded=states.get(State.DISCARDED, 0),
        lag_seconds=_lag(connection, now),
        held_keys=_held_keys(connection),
        stuck=tuple(item for state in (State.DEAD, State.UNROUTABLE, State.RETRYING) for item in _stuck(connection, state)),
        published_total=total,
        published_per_second=rate,
        last_published_at=last,
        relays=_relays(connection, now),
    )


def _waiting(connection: Connection, now: datetime) -> tuple[int, int, bool]:
    pending = tables.pending.c
    rows = (
        sa.select(pending.state, pending.available_at)
        .where(pending.state.in_([State.PENDING, State.RETRYING]))
        .limit(COUNTED + 1)
        .subquery()
    )
    later = sa.and_(rows.c.state == State.PENDING, rows.c.available_at > now)
    query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(sa.case((later, 1), else_=0)), 0)).select_from(rows)
    total, scheduled = connection.execute(query).one()
    return min(total, COUNTED) - int(scheduled), int(scheduled), total <= COUNTED


def _states(connection: Connection) -> dict[str, int]:
    state = tables.pending.c.state
    rows = connection.execute(sa.select(state, sa.func.count()).where(_NOT_PENDING).group_by(state))
    return {row[0]: row[1] for row in rows}


def _lag(connection: Connection, now: datetime) -> float:
    pending, message = tables.pending.c, tables.message.c
    due = sa.or_(pending.state == State.RETRYING, sa.and_(pending.state == State.PENDING, pending.available_at <= now))
    # Ids follow time closely enough for an age, and the first due row is near the start of the index.
    row = connection.scalar(sa.select(pending.message_row).where(due).order_by(pending.id).limit(1))
    if row is None:
        return 0.0
    created: datetime | None = connection.scalar(sa.select(message.created_at).where(message.id == row))
    return max(0.0, (now - created).total_seconds()) if created else 0.0


def _held_keys(connection: Connection) -> int:
    pending = tables.pending.c
    query = sa.select(sa.func.count(sa.distinct(pending.key))).where(_NOT_PENDING, pending.state.in_(HOLDING))
    return connection.scalar(query) or 0


def _stuck(connection: Connection, state: State) -> list[Stuck]:
    pending, message = tables.pending.c, tables.message.c
    # `+ 0` keeps the planner from walking the whole backlog in the order of its ids to save the sort of a few rows.
    stuck = sa.select(tables.pending).where(_NOT_PENDING, pending.state == state)
    rows = connection.execute(stuck.order_by(pending.id + 0).limit(NAMED)).all()
    query = sa.select(message.id, message.message_id, message.created_at).where(message.id.in_([r.message_row for r in rows]))
    messages = {row.id: row for row in connection.execute(query)} if rows else {}
    return [
        Stuck(
            id=messages[row.message_row].message_id,
            topic=row.topic,
            key=row.key,
            sequence=row.sequence,
            state=row.state,
            attempts=row.attempts,
            last_error=row.error,
            created_at=messages[row.message_row].created_at,
            available_at=row.available_at,
            behind=_behind(connection, row),
        )
        for row in rows
        if row.message_row in messages
    ]


def _behind(connection: Connection, row: sa.Row[tuple[object, ...]]) -> int:
    if row.key is None:
        return 0
    pending = tables.pending.c
    later = sa.select(pending.id).where(
        _NOT_DISCARDED, pending.key == row.key, pending.id > row.id, pending.state == State.PENDING
    )
    if row.state == State.UNROUTABLE:  # no queue could see the order with other topics
        later = later.where(pending.topic == row.topic)
    return connection.scalar(sa.select(sa.func.count()).select_from(later.limit(1000).subquery())) or 0


def _published(connection: Connection, now: datetime) -> tuple[int, float, datetime | None]:
    receipt = tables.receipt.c
    total, last = connection.execute(sa.select(sa.func.sum(receipt.messages), sa.func.max(receipt.settled_at))).one()
    recent = connection.scalar(sa.select(sa.func.sum(receipt.messages)).where(receipt.settled_at > now - _RATE))
    return int(total or 0), float(recent or 0) / _RATE.total_seconds(), last


def _relays(connection: Connection, now: datetime) -> tuple[Relay, ...]:
    relay, shard = tables.relay.c, tables.shard.c
    owned = sa.select(shard.owner, sa.func.count()).where(shard.lease_until > now).group_by(shard.owner)
    shards = {row[0]: row[1] for row in connection.execute(owned)}
    rows = connection.execute(
        sa.select(tables.relay).where(relay.seen_at > now - _REMEMBERED).order_by(relay.seen_at.desc(), relay.id)
    )
    return tuple(
        Relay(
            id=row.id,
            host=row.host,
            pid=row.pid,
            version=row.version,
            state=row.state,
            started_at=row.started_at,
            seen_age_seconds=max(0.0, (now - row.seen_at).total_seconds()),
            shards=shards.get(row.id, 0),
            broker_connected=row.broker_connected,
            broker_blocked=row.broker_blocked,
            broker_detail=row.broker_detail or "",
            trouble=row.trouble or "",
        )
        for row in rows
    )
