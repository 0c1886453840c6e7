"""The statements by which a relay reads: what may be sent, what comes before it, how much waits.

Reading takes no lock and writes nothing: a relay reads the rows of shards it leases. Holds, rows not yet due and rows the
relay already has in memory are excluded in the statement, before LIMIT, so that nothing that must wait can fill a batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from outbox import database
from outbox.errors import InvalidMessage
from outbox.message import Message
from outbox.store.clock import clock, now
from outbox.store.lists import among as _among
from outbox.store.lists import as_list as _list
from outbox.tables import HOLDING, State, Timestamp, message, pending

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.engine import Connection


class Row(NamedTuple):
    """A row of outbox_pending that may be sent."""

    id: int
    message_row: int
    shard: int
    topic: str
    key: str | None
    sequence: int | None
    attempts: int
    state: str
    #: `hold`, or `drop`: nobody listening is fine.
    unheard: str


@dataclass(frozen=True, slots=True)
class Exclusions:
    """What a read leaves out, because the relay has it in memory or must not send it now."""

    ids: Collection[int] = ()
    #: Keys of which enough rows are in memory.
    keys: Collection[str] = ()
    #: Topics that are asked with one message at a time, and whose turn it is not.
    topics: Collection[str] = ()
    #: Topics of which rows in the state `unroutable` are left out: nobody listened a moment ago.
    unheard_topics: Collection[str] = ()


def _literal(state: State) -> sa.ColumnElement[str]:
    # Written into the statement: a planner matches the partial index of holding rows only with constants.
    return sa.literal_column(f"'{state}'", sa.String())


# --- reading ------------------------------------------------------------------------------------------------------------


@cache
def _waiting(dialect: str) -> sa.Select[Any]:
    row, hold = pending.alias("p"), pending.alias("h")
    # Not EXISTS: PostgreSQL would make a join of it, and choose one by how many holds there were when it last counted.
    # IS NOT TRUE: it takes that to be half of the rows, and IS NULL to be so rare that it compiles the statement first.
    held = (
        sa.select(sa.true())
        .where(
            hold.c.key == row.c.key,
            # Plus 0: or SQLite takes the index by sequence, and walks all earlier rows of a hot key for each of its rows.
            hold.c.sequence + sa.literal_column("0") < row.c.sequence,
            hold.c.state != _literal(State.PENDING),
            _holds(hold, row),
        )
        .limit(sa.literal_column("1"))
        .scalar_subquery()
    )
    due = sa.func.now(type_=Timestamp()) if dialect == "postgresql" else now(dialect)
    return (
        sa.select(*(row.c[name] for name in Row._fields))
        .where(
            row.c.id > sa.bindparam("after", type_=sa.BigInteger()),
            row.c.state.in_([_literal(state) for state in (State.PENDING, State.RETRYING, State.UNROUTABLE)]),
            row.c.available_at <= due,
            sa.not_(_among(row.c.id, "ids", sa.BigInteger(), dialect)),
            sa.or_(row.c.key.is_(None), sa.not_(_among(row.c.key, "keys", sa.Text(), dialect))),
            sa.not_(_among(row.c.topic, "topics", sa.Text(), dialect)),
            sa.or_(
                row.c.state != _literal(State.UNROUTABLE),
                sa.not_(_among(row.c.topic, "unheard_topics", sa.Text(), dialect)),
            ),
            held.is_not(sa.true()),
        )
        .order_by(row.c.id)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
    )


def _holds(earlier: sa.FromClause, later: sa.FromClause) -> sa.ColumnElement[bool]:
    always = [_literal(state) for state in HOLDING if state is not State.UNROUTABLE]
    return sa.or_(
        earlier.c.state.in_(always),
        # No queue is bound to that topic, so no queue could see the order with other topics.
        sa.and_(earlier.c.state == _literal(State.UNROUTABLE), earlier.c.topic == later.c.topic),
    )


def read(connection: Connection, *, after: int, limit: int, exclude: Exclusions) -> list[Row]:
    """Return up to *limit* rows that may be sent now, with ids above *after*, in the order of their ids."""
    dialect = connection.dialect.name
    found = connection.execute(
        _waiting(dialect),
        {
            "after": after,
            "limit": limit,
            "ids": _list(exclude.ids, dialect),
            "keys": _list(exclude.keys, dialect),
            "topics": _list(exclude.topics, dialect),
            "unheard_topics": _list(exclude.unheard_topics, dialect),
            **({} if dialect == "postgresql" else clock(dialect)),
        },
    )
    return [Row(*values) for values in found]


@cache
def _messages(dialect: str) -> sa.Select[Any]:
    # The running size decides in the database how many bodies travel: 500 rows may be 2 MB or 2 GB.
    size = sa.func.octet_length(message.c.body) if dialect == "postgresql" else sa.func.length(message.c.body)
    wanted = (
        sa.select(message, (sa.func.sum(size).over(order_by=message.c.id) - size).label("before"))
        .where(
            _among(message.c.id, "rows", sa.BigInteger(), dialect),
            # Lets PostgreSQL skip partitions even in a generic plan.
            message.c.id.between(sa.bindparam("low", type_=sa.BigInteger()), sa.bindparam("high", type_=sa.BigInteger())),
        )
        .subquery()
    )
    columns = [column for column in wanted.c if column.name != "before"]
    return sa.select(*columns).where(wanted.c.before < sa.bindparam("bytes", type_=sa.BigInteger())).order_by(wanted.c.id)


class Content(NamedTuple):
    """What a read of messages brought."""

    #: By message row. An InvalidMessage where the stored row can't be a message.
    found: dict[int, Message | InvalidMessage]
    #: Their message ids, by message row.
    ids: dict[int, UUID]
    #: The rows that exist but did not fit; read them again later.
    postponed: frozenset[int]


def messages(connection: Connection, rows: Collection[int], *, max_bytes: int) -> Content:
    """Return the messages of *rows*, lowest first, until their bodies have *max_bytes*; at least one.

    A separate statement by row number: joined to outbox_pending it became a merge join over all retained messages.
    """
    if not rows:
        return Content({}, {}, frozenset())
    dialect = connection.dialect.name
    parameters = {"rows": _list(rows, dialect), "low": min(rows), "high": max(rows), "bytes": max_bytes}
    found: dict[int, Message | InvalidMessage] = {}
    ids: dict[int, UUID] = {}
    loaded_bytes = 0
    for values in connection.execute(_messages(dialect), parameters):
        found[values[0]] = _message(*values)
        ids[values[0]] = values[1]
        loaded_bytes += len(values[_BODY])
    last = max(found, default=0)
    return Content(found, ids, frozenset(row for row in rows if row > last) if loaded_bytes >= max_bytes else frozenset())


_BODY = list(message.c).index(message.c.body)


def _message(
    _row: int,
    message_id: UUID,
    source: str,
    topic: str,
    key: str | None,
    sequence: int | None,
    content_type: str,
    headers: str | None,
    body: bytes,
    created_at: datetime,
) -> Message | InvalidMessage:
    try:
        return Message(
            id=message_id,
            source=source,
            topic=topic,
            key=key,
            sequence=sequence,
            body=bytes(body),
            content_type=content_type,
            headers=json.loads(headers) if headers else {},
            created_at=created_at,
        )
    except InvalidMessage as error:
        return error
    except (ValueError, AttributeError) as error:
        return InvalidMessage(f"message {message_id}: its stored headers are no JSON object: {error}")


class Ahead(IntEnum):
    """What is before a message in its key."""

    #: All earlier ones are delivered, or discarded.
    NOTHING = 0
    #: Only what nobody listens to, in other topics: a person may requeue it at any time, and then it is no longer passed.
    PASSABLE = 1
    #: A message that must go first.
    WAITS = 2


@cache
def _predecessors(dialect: str) -> sa.Select[Any]:
    row, earlier, unheard = pending.alias("p"), pending.alias("e"), pending.alias("u")
    no_queue = sa.exists(sa.literal(1)).where(
        unheard.c.key == earlier.c.key,
        unheard.c.topic == earlier.c.topic,
        unheard.c.sequence <= earlier.c.sequence,
        unheard.c.state == _literal(State.UNROUTABLE),
    )
    anything = sa.exists(sa.literal(1)).where(
        earlier.c.key == row.c.key,
        earlier.c.sequence < row.c.sequence,
        earlier.c.state != _literal(State.DISCARDED),
    )
    # What is unroutable, or waits behind it, holds its own topic only.
    waits = anything.where(sa.or_(earlier.c.topic == row.c.topic, ~no_queue))
    ahead = sa.case((waits, Ahead.WAITS.value), (anything, Ahead.PASSABLE.value), else_=Ahead.NOTHING.value)
    return sa.select(row.c.id, ahead).where(
        _among(row.c.id, "ids", sa.BigInteger(), dialect), row.c.state != _literal(State.DISCARDED)
    )


def predecessors(connection: Connection, ids: Collection[int]) -> dict[int, Ahead]:
    """Say of each of *ids* what is before it in its key; ids that are gone are left out.

    Asked after a read: a read that starts above id 0 may have passed over an earlier row that committed late.
    """
    dialect = connection.dialect.name
    return {id_: Ahead(ahead) for id_, ahead in connection.execute(_predecessors(dialect), {"ids": _list(ids, dialect)})}


# --- for people -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Census:
    """How many rows wait and for what; for metrics and for the last words of `--drain`."""

    by_state: dict[str, int]
    #: Rows not yet due, of the states that are sent by themselves.
    scheduled: int
    held_keys: int
    #: Age of the oldest row that is due.
    lag_seconds: float


def census(connection: Connection) -> Census:
    """Count what waits. It looks at every pending row: ask rarely."""
    dialect = connection.dialect.name
    moment = now(dialect)
    parameters = clock(dialect)
    counts = connection.execute(sa.select(pending.c.state, sa.func.count()).group_by(pending.c.state))
    by_state: dict[str, int] = {row[0]: row[1] for row in counts}
    due = pending.c.available_at <= moment
    sent = pending.c.state.in_([State.PENDING, State.RETRYING, State.UNROUTABLE])
    scheduled = connection.scalar(sa.select(sa.func.count()).where(sent, ~due), parameters)
    held = connection.scalar(sa.select(sa.func.count(pending.c.key.distinct())).where(pending.c.state.in_(HOLDING)))
    oldest = sa.select(pending.c.message_row).where(pending.c.state == State.PENDING, due).order_by(pending.c.id).limit(1)
    row = connection.execute(
        sa.select(message.c.created_at, moment.label("now")).where(message.c.id == oldest.scalar_subquery()), parameters
    ).first()
    lag = max(0.0, (row.now - row.created_at).total_seconds()) if row else 0.0
    return Census(by_state=by_state, scheduled=scheduled or 0, held_keys=held or 0, lag_seconds=lag)


def is_trouble(error: Exception) -> bool:
    """Say whether *error* is the database's (down, restarted, deadlock, serialization), so that waiting helps."""
    return isinstance(error, (sa.exc.DBAPIError, sa.exc.TimeoutError, sa.exc.ResourceClosedError))


def describe(error: BaseException, limit: int = 300) -> str:
    """Return the first line of what the driver said; parameters (hence payloads) are never in it."""
    return database.first_line(error, limit)
