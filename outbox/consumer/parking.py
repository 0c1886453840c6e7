"""Messages set aside, and the holds they put on their keys. Every statement on `consumer_parked`.

A key is held while a parked message of it `holds`. The first of them, by arrival, is its head: nothing behind it moves
before it was replayed or discarded. Whoever changes a keyed row has locked the key before (`inbox.lock_marks`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox.consumer import inbox
from outbox.consumer.delivery import properties_as_text
from outbox.consumer.tables import Reason, State, parked
from outbox.message import MAX_NAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

    from sqlalchemy.engine import Connection, Row

    from outbox.consumer.delivery import Arrival, Key

#: Nothing this service does depends on such a message, so nothing waits for it.
_FREE_REASONS = (Reason.NO_HANDLER, Reason.UNDECODABLE)
#: So long a message may wait at its handler's wish.
PATIENCE_SECONDS = 3600.0
#: And so long between two tries, if the handler does not wish for more.
_LONGEST_PAUSE = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Aside:
    """That a message is to be set aside, and why."""

    reason: Reason
    error: str
    detail: str = ""
    attempts: int = 0
    #: When to try again by itself; None: when a person says so.
    due_at: datetime | None = None
    late: bool = False
    #: False: later messages of its key need not wait for it.
    hold: bool = True
    #: The class of the exception and where it was raised: without its text, for logs.
    place: str = ""
    #: When its handler first asked for a later time.
    since: datetime | None = None

    @property
    def state(self) -> State:
        """What the message waits for."""
        if self.reason is Reason.BEHIND:
            return State.BEHIND
        return State.PARKED if self.due_at is None else State.DUE

    def holds(self, key: Key | None) -> bool:
        """Whether later messages of *key* must wait for it."""
        return key is not None and self.hold and self.reason not in _FREE_REASONS

    def plain(self) -> Aside:
        """Return this in letters that any database takes."""
        return dataclasses.replace(self, error=_ascii(self.error), detail="")

    def after(self, before: Row[Any], now: datetime) -> Aside:
        """Return this for a message that is parked already.

        Who asks again for a later time waits longer, and not for ever. A version of the service that can do nothing with the
        message does not take away its hold: what waits behind it was held for a reason that this version does not know.
        """
        if self.reason in _FREE_REASONS and before.reason not in (*_FREE_REASONS, Reason.BEHIND):
            return dataclasses.replace(self, reason=Reason(before.reason))
        if self.reason is not Reason.LATER or self.due_at is None:
            return self
        since = before.waiting_since or now
        waited, wish = now - since, self.due_at - now
        if waited.total_seconds() > patience(wish.total_seconds()):
            return dataclasses.replace(self, reason=Reason.FAILED, due_at=None)
        return dataclasses.replace(self, due_at=now + max(wish, min(waited / 4, _LONGEST_PAUSE)), since=since)


def patience(wish_seconds: float | None, seconds: float = PATIENCE_SECONDS) -> float:
    """Return for how long a message may wait whose handler wishes to be called again after *wish_seconds*."""
    return max(seconds, 10 * (wish_seconds or 0.0))


# --- what can't be written as it is --------------------------------------------------------------------------------------


def plain(arrival: Arrival, aside: Aside) -> tuple[Arrival, Aside]:
    """Return *arrival* with nothing that only people read: properties, traceback, letters beyond ASCII in the error."""
    body = arrival.body if isinstance(arrival.body, bytes) else str(arrival.body).encode("utf-8", "backslashreplace")
    return dataclasses.replace(arrival, body=body, properties={"left out": "could not be written"}), aside.plain()


def unnamed(arrival: Arrival, aside: Aside) -> tuple[Arrival, Aside]:
    """Return *arrival* known by a digest alone: what is left when its id, topic or key can't be written."""
    reduced, told = plain(arrival, aside)
    digest = f"sha256:{hashlib.sha256(repr(arrival.identity).encode() + reduced.body).hexdigest()}"
    topic = _ascii(arrival.topic)[:MAX_NAME_BYTES]
    return dataclasses.replace(reduced, message=None, digest=digest, routing_key=topic), told


def _ascii(text: str) -> str:
    return text.replace("\0", "\\0").encode("ascii", "backslashreplace").decode()


def row(service: str, arrival: Arrival, aside: Aside, now: datetime) -> dict[str, Any]:
    """Return the row that sets *arrival* aside."""
    source, message_id = arrival.identity
    message = arrival.message
    return {
        "service": service,
        "source": source,
        "message_id": message_id,
        "topic": arrival.topic,
        "key": message.key if message else None,
        "sequence": message.sequence if message else None,
        "state": aside.state,
        "reason": aside.reason,
        "holds": aside.holds(arrival.key),
        "late": aside.late,
        "attempts": aside.attempts,
        "starts": 0,
        "error": aside.error,
        "detail": aside.detail or None,
        "created_at": message.created_at if message else None,
        "parked_at": now,
        "due_at": aside.due_at,
        "waiting_since": (aside.since or now) if aside.reason is Reason.LATER else None,
        "properties": properties_as_text(arrival.properties),
        "body": arrival.body,
    }


def write(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Set messages aside, in this order."""
    for each in rows:  # one by one: the numbers are the order, which a statement with many rows does not promise
        connection.execute(sa.insert(parked).values(each))


# --- replaying ---------------------------------------------------------------------------------------------------------


def due(connection: Connection, service: str, now: datetime, limit: int) -> list[Row[Any]]:
    """Return messages that are due (id, source, key, due_at, starts); whether their turn has come is another question."""
    query = (
        sa.select(parked.c.id, parked.c.source, parked.c.key, parked.c.due_at, parked.c.starts)
        .where(parked.c.service == service, parked.c.state == State.DUE, parked.c.due_at <= now)
        .order_by(parked.c.due_at, parked.c.id)
        .limit(limit)
    )
    return list(connection.execute(query))


def line(connection: Connection, service: str, key: Key, limit: int) -> list[Row[Any]]:
    """Return the first *limit* messages that hold *key*, in the order of their arrival."""
    query = (
        sa.select(parked)
        .where(parked.c.service == service, parked.c.source == key[0], parked.c.key == key[1])
        .where(parked.c.holds)  # which discarded ones do not
        .order_by(parked.c.id)
        .limit(limit)
    )
    return list(connection.execute(query))


def lock(connection: Connection, row_id: int) -> Row[Any] | None:
    """Return one parked message, locked; None when it is gone or another process has it in hand."""
    query = sa.select(parked).where(parked.c.id == row_id, parked.c.state != State.DISCARDED)
    return connection.execute(query.with_for_update(skip_locked=True)).one_or_none()


def write_starts(connection: Connection, row_id: int, starts: int, process: str | None) -> None:
    """Record in how many processes the replay of a message began and did not end, and the last of them."""
    connection.execute(sa.update(parked).where(parked.c.id == row_id).values(starts=starts, starter=process))


def set_aside_again(connection: Connection, row_id: int, aside: Aside, *, holds: bool) -> None:
    """Record why the replay of a parked message failed."""
    connection.execute(
        sa.update(parked)
        .where(parked.c.id == row_id)
        .values(
            state=aside.state,
            reason=aside.reason,
            error=aside.error,
            detail=aside.detail or None,
            attempts=parked.c.attempts + aside.attempts,
            starts=0,
            starter=None,
            holds=holds,
            due_at=aside.due_at,
            waiting_since=aside.since,
        )
    )


def remove(connection: Connection, row_ids: Sequence[int]) -> None:
    """Delete messages that were applied."""
    connection.execute(sa.delete(parked).where(parked.c.id.in_(row_ids)))


def wait_for_turn(connection: Connection, row_id: int) -> None:
    """A message that is due has others before it: it goes when they are gone."""
    still_due = sa.and_(parked.c.id == row_id, parked.c.state == State.DUE)  # a person may have discarded it meanwhile
    connection.execute(sa.update(parked).where(still_due).values(state=State.BEHIND, due_at=None))


def move_up(connection: Connection, service: str, keys: Collection[Key], now: datetime) -> None:
    """The heads of *keys* are gone: the turn of their successors has come; a key without one is free."""
    if not keys:
        return
    first = heads(connection, service, keys)
    inbox.free(connection, service, [key for key in keys if key not in first])
    turn = sa.and_(parked.c.id.in_(first.values()), parked.c.state == State.BEHIND)
    if first:
        connection.execute(sa.update(parked).where(turn).values(state=State.DUE, due_at=now))


def heads(connection: Connection, service: str, keys: Collection[Key]) -> dict[Key, int]:
    """Return the row of the message that holds each of *keys* and came first; a free key has none."""
    if not keys:
        return {}
    dialect = connection.dialect.name
    rows = inbox.passed(dialect, ("source", "key"), sorted(keys))
    found = connection.execute(_heads(dialect), {"service": service, **rows})
    return {(source, key): row_id for source, key, row_id in found if row_id is not None}


@cache
def _heads(dialect: str) -> Any:
    given = inbox.given(dialect, source=sa.Text(), key=sa.Text())
    of_key = (parked.c.service == sa.bindparam("service"), parked.c.source == given.c.source, parked.c.key == given.c.key)
    first = sa.select(sa.func.min(parked.c.id)).where(*of_key, parked.c.holds).correlate(given).scalar_subquery()
    return sa.select(given.c.source, given.c.key, first)


# --- counting ----------------------------------------------------------------------------------------------------------


def count(connection: Connection, service: str) -> int:
    """Return how many messages are parked; discarded ones are not."""
    query = sa.select(sa.func.count()).where(parked.c.service == service, parked.c.state != State.DISCARDED)
    return int(connection.scalar(query) or 0)


def prune(connection: Connection, service: str, before: datetime, limit: int) -> int:
    """Forget at most *limit* messages that were discarded before *before*; return how many."""
    old = (
        sa.select(parked.c.id)
        .where(parked.c.service == service, parked.c.state == State.DISCARDED, parked.c.acted_at < before)
        .limit(limit)
    )
    return connection.execute(sa.delete(parked).where(parked.c.id.in_(old))).rowcount
