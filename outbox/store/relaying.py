"""The statements by which a relay reads: what may be sent, what comes before it, how much waits.

Reading takes no lock and writes nothing: a relay reads the rows of shards it leases. Holds, rows not yet due and rows the
relay already has in memory are excluded in the statement, before LIMIT, so that nothing that must wait can fill a batch. A
read looks at a bounded number of rows, however few of them may go, and says where the next one begins.
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
from outbox.store import witness
from outbox.store.clock import clock, now
from outbox.store.lists import among as _among
from outbox.store.lists import as_list as _list
from outbox.store.lists import outside as _outside
from outbox.store.witness import Witness
from outbox.tables import HOLDING, State, Timestamp, message, pending

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.engine import Connection

    from outbox.store.witness import World


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
    #: Keys and topics of which enough rows are in memory.
    keys: Collection[str] = ()
    topics: Collection[str] = ()
    #: Topics that are asked with one message at a time, and whose turn it is not. Later messages of their keys wait.
    closed_topics: Collection[str] = ()
    #: Topics of which rows in the state `unroutable` are left out: nobody listened a moment ago.
    unheard_topics: Collection[str] = ()


def _literal(state: State) -> sa.ColumnElement[str]:
    # Written into the statement: a planner matches the partial index of holding rows only with constants.
    return sa.literal_column(f"'{state}'", sa.String())


# --- reading ------------------------------------------------------------------------------------------------------------


#: How many rows a read looks at, at most: some milliseconds where every one of them must wait.
SCANNED = 2_000


class Page(NamedTuple):
    """What a read brought."""

    rows: list[Row]
    #: The id up to which everything was looked at; None where there was no more.
    end: int | None


@cache
def _waiting(dialect: str, *, bounded: bool, closed: bool) -> sa.Select[Any]:
    row = pending.alias("r")
    ids = [row.c.id > sa.bindparam("after", type_=sa.BigInteger())]
    if bounded:  # else left out: with two bounds PostgreSQL expects few rows, and may sort all that wait
        ids.append(row.c.id <= sa.bindparam("upto", type_=sa.BigInteger()))
    scanned = (
        sa.select(
            *(row.c[name] for name in Row._fields),
            row.c.available_at,
            sa.func.row_number().over(order_by=row.c.id).label("number"),
        )
        .where(*ids)
        .order_by(row.c.id)
        .limit(sa.bindparam("scanned", type_=sa.Integer()))
        .subquery("p")
    )
    due = sa.func.now(type_=Timestamp()) if dialect == "postgresql" else now(dialect)
    may_go = [
        scanned.c.state.in_([_literal(state) for state in (State.PENDING, State.RETRYING, State.UNROUTABLE)]),
        scanned.c.available_at <= due,
        _outside(scanned.c.id, "ids", sa.BigInteger(), dialect),
        sa.or_(scanned.c.key.is_(None), _outside(scanned.c.key, "keys", sa.Text(), dialect)),
        _outside(scanned.c.topic, "topics", sa.Text(), dialect),
        sa.or_(scanned.c.state != _literal(State.UNROUTABLE), _outside(scanned.c.topic, "unheard_topics", sa.Text(), dialect)),
        # IS NOT TRUE: PostgreSQL takes that to be half of the rows, and IS NULL so rare that it compiles the statement first.
        _held(scanned).is_not(sa.true()),
    ]
    if closed:
        may_go.append(_outside(scanned.c.topic, "closed", sa.Text(), dialect))
        may_go.append(_behind_closed(scanned, dialect).is_not(sa.true()))
    return (
        sa.select(*(scanned.c[name] for name in Row._fields), scanned.c.number)
        # The last row of a full page comes whatever it is: it says where the next page begins.
        .where(sa.or_(scanned.c.number == sa.bindparam("scanned", type_=sa.Integer()), sa.and_(*may_go)))
        .order_by(scanned.c.id)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
    )


def _held(row: sa.FromClause) -> sa.ColumnElement[bool]:
    """Return whether an earlier message of the key of *row* waits, so that it must wait, too; NULL if not."""
    hold = pending.alias("h")
    # Not EXISTS: PostgreSQL would make a join of it, and choose one by how many holds there were when it last counted.
    return (
        sa.select(sa.true())
        .where(
            hold.c.key == row.c.key,
            hold.c.sequence < row.c.sequence,
            hold.c.state.in_([_literal(state) for state in HOLDING]),  # the condition of the index, word for word
            # No queue is bound to the topic of what is unroutable, so no queue could see the order with other topics.
            sa.or_(hold.c.state != _literal(State.UNROUTABLE), hold.c.topic == row.c.topic),
        )
        .limit(sa.literal_column("1"))
        .scalar_subquery()
    )


def _behind_closed(row: sa.FromClause, dialect: str) -> sa.ColumnElement[bool]:
    """Return whether an earlier message of the key of *row* is of a topic that is not read now; NULL if not.

    `predecessors` would say so, but only when the bodies of all that must wait have been loaded.
    """
    earlier = pending.alias("c")
    return (
        sa.select(sa.true())
        .where(
            earlier.c.key == row.c.key,
            _among(earlier.c.topic, "closed", sa.Text(), dialect),
            earlier.c.sequence < row.c.sequence,
            earlier.c.state != _literal(State.DISCARDED),
        )
        .limit(sa.literal_column("1"))
        .scalar_subquery()
    )


def read(
    connection: Connection, *, after: int, limit: int, exclude: Exclusions, upto: int | None = None, scanned: int = SCANNED
) -> Page:
    """Return up to *limit* rows that may be sent now, of the first *scanned* with ids above *after*, in the order of their ids.

    *upto*: the last id to look at.
    """
    dialect = connection.dialect.name
    found = connection.execute(
        _waiting(dialect, bounded=upto is not None, closed=bool(exclude.closed_topics)),
        {
            "after": after,
            "upto": upto,
            "scanned": scanned,
            "limit": limit,
            "ids": _list(exclude.ids, dialect),
            "keys": _list(exclude.keys, dialect),
            "topics": _list(exclude.topics, dialect),
            "closed": _list(exclude.closed_topics, dialect),
            "unheard_topics": _list(exclude.unheard_topics, dialect),
            **({} if dialect == "postgresql" else clock(dialect)),
        },
    ).all()
    rows = [Row(*values[:-1]) for values in found]
    if found and found[-1].number == scanned:
        last = rows.pop()
        return Page(rows, last.id - 1)
    if len(rows) == limit:
        return Page(rows, rows[-1].id)
    return Page(rows, upto)


def newest(connection: Connection) -> int:
    """Return the highest id there is; 0 where there is none."""
    return connection.scalar(sa.select(sa.func.max(pending.c.id))) or 0


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
    stored = [column for column in wanted.c if column.name != "before"]
    # Of the first one only: it is the same for all, and need not travel with each.
    asked = [sa.case((wanted.c.before == 0, column)) for column in witness.columns(dialect)]
    return (
        sa.select(*stored, *asked).where(wanted.c.before < sa.bindparam("bytes", type_=sa.BigInteger())).order_by(wanted.c.id)
    )


class Content(NamedTuple):
    """What a read of messages brought."""

    #: By message row. An InvalidMessage where the stored row can't be a message.
    found: dict[int, Message | InvalidMessage]
    #: Their message ids, by message row.
    ids: dict[int, UUID]
    #: The rows that exist but did not fit; read them again later.
    postponed: frozenset[int]
    #: Which database answered; None where nothing was found.
    world: World | None = None


def messages(connection: Connection, rows: Collection[int], *, max_bytes: int, known_by: Witness | None = None) -> Content:
    """Return the messages of *rows*, lowest first, until their bodies have *max_bytes*; at least one.

    A separate statement by row number: joined to outbox_pending it became a merge join over all retained messages.
    *known_by* is asked for in the same statement.
    """
    if not rows:
        return Content({}, {}, frozenset())
    dialect, known_by = connection.dialect.name, known_by or Witness()
    parameters = {"rows": _list(rows, dialect), "low": min(rows), "high": max(rows), "bytes": max_bytes, **known_by.parameters}
    found: dict[int, Message | InvalidMessage] = {}
    ids: dict[int, UUID] = {}
    loaded_bytes = 0
    world: World | None = None
    for *values, server, remembers in connection.execute(_messages(dialect), parameters):
        world = world or known_by.world(server, remembers)
        found[values[0]] = _message(*values)
        ids[values[0]] = values[1]
        loaded_bytes += len(values[_BODY])
    last = max(found, default=0)
    postponed = frozenset(row for row in rows if row > last) if loaded_bytes >= max_bytes else frozenset()
    return Content(found, ids, postponed, world)


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
    row, first = pending.alias("p"), pending.alias("f")
    asked = sa.select(row.c.id, row.c.key, row.c.topic, row.c.sequence, _first(row.c.key).label("first")).where(
        _among(row.c.id, "ids", sa.BigInteger(), dialect), row.c.state != _literal(State.DISCARDED)
    )
    # From topic to topic by the index: what waits behind the first message of a topic is never looked at. And by subqueries,
    # which PostgreSQL makes no joins of.
    firsts = asked.cte("firsts", recursive=True)
    last_topic = sa.select(first.c.topic).where(first.c.id == firsts.c.first).correlate(firsts).scalar_subquery()
    onwards = sa.select(*list(firsts.c)[:-1], _first(firsts.c.key, last_topic)).where(firsts.c.first.is_not(None))
    firsts = firsts.union_all(onwards)
    # What is unroutable holds its own topic only, and so does all that waits behind it.
    must_go = sa.or_(first.c.topic == firsts.c.topic, first.c.state != _literal(State.UNROUTABLE))
    ahead = sa.case(
        (first.c.sequence >= firsts.c.sequence, Ahead.NOTHING.value), (must_go, Ahead.WAITS.value), else_=Ahead.PASSABLE.value
    )
    of_each = sa.select(ahead).where(first.c.id == firsts.c.first).scalar_subquery()
    return sa.select(firsts.c.id, sa.func.coalesce(sa.func.max(of_each), Ahead.NOTHING.value)).group_by(firsts.c.id)


def _first(key: sa.ColumnElement[Any], after_topic: Any = None) -> sa.ScalarSelect[int]:
    """Return the id of the first message of *key*, by topic and sequence; with *after_topic* in the next topic."""
    row = pending.alias("n")
    query = sa.select(row.c.id).where(row.c.key == key, row.c.state != _literal(State.DISCARDED))
    if after_topic is not None:
        query = query.where(row.c.topic > after_topic)
    return query.order_by(row.c.topic, row.c.sequence).limit(sa.literal_column("1")).scalar_subquery()


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
    return Census(by_state=by_state, scheduled=scheduled or 0, held_keys=held or 0, lag_seconds=lag(connection))


def lag(connection: Connection) -> float:
    """Return the age in seconds of the oldest message that is pending and due; 0 where there is none."""
    moment = now(connection.dialect.name)
    due = sa.and_(pending.c.state == State.PENDING, pending.c.available_at <= moment)
    oldest = sa.select(pending.c.message_row).where(due).order_by(pending.c.id).limit(1).scalar_subquery()
    row = connection.execute(
        sa.select(message.c.created_at, moment.label("now")).where(message.c.id == oldest), clock(connection.dialect.name)
    ).first()
    return max(0.0, (row.now - row.created_at).total_seconds()) if row else 0.0


def is_trouble(error: Exception) -> bool:
    """Say whether *error* is the database's (down, restarted, deadlock, serialization), so that waiting helps."""
    return isinstance(error, (sa.exc.DBAPIError, sa.exc.TimeoutError, sa.exc.ResourceClosedError))


def describe(error: BaseException, limit: int = 300) -> str:
    """Return the first line of what the driver said; parameters (hence payloads) are never in it."""
    return database.first_line(error, limit)
