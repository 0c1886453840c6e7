"""What a person orders for parked messages: requeue them, or discard them; set by set, so that thousands cost little.

A key is locked only while the set it belongs to is written. One that the service has in hand (a handler works on it, maybe for
long) is left out of its set and tried again at the end: whoever waited for it would keep all other keys of the set locked.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox.consumer import inbox, parking
from outbox.consumer.tables import Reason, State, parked
from outbox.consumer.transaction import reading
from outbox.store.clock import database_now

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from datetime import datetime

    from sqlalchemy.engine import Connection, Engine, Row

    from outbox.consumer.delivery import Key
    from outbox.consumer.inbox import Mark

    Act = Callable[["Connection", Sequence[Row[Any]], dict[Key, Mark]], None]

#: Messages in one transaction.
CHUNK = 500
#: How long an order waits for messages that the service has in hand.
PATIENCE_SECONDS = 10.0
_PAUSE_SECONDS = 0.1
_TURN_SECONDS = 1.0
#: What orders read of a row: its body may be large.
_LOOKED_AT = [
    parked.c[name] for name in ("id", "source", "message_id", "topic", "key", "sequence", "state", "reason", "holds", "late")
]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which parked messages are meant; None: any."""

    state: State | None = None
    reason: Reason | None = None
    topic: str | None = None
    key: str | None = None
    #: Only of these topics, and what could not be read when it came.
    topics: Collection[str] | None = None

    def conditions(self, service: str) -> list[sa.ColumnElement[bool]]:
        """Return it as SQL. Discarded messages are meant only when asked for."""
        given = ((name, getattr(self, name)) for name in ("state", "reason", "topic", "key"))
        found = [parked.c.service == service, *(parked.c[name] == value for name, value in given if value is not None)]
        if self.state is None:
            found.append(parked.c.state != State.DISCARDED)
        if self.topics is not None:
            found.append(sa.or_(parked.c.topic.in_(self.topics), parked.c.reason == Reason.UNDECODABLE))
        return found


# --- one set -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue:
    """Let the worker try messages again: now, or when those before them in their key are gone."""

    service: str
    actor: str
    #: None: by the database's clock.
    now: datetime | None = None

    def __call__(self, connection: Connection, rows: Sequence[Row[Any]], marks: dict[Key, Mark]) -> None:
        """Requeue *rows*, whose keys are locked."""
        now = self.now or database_now(connection)
        again = {"state": State.DUE, "due_at": now, "starts": 0, "starter": None, "waiting_since": None}
        _update(connection, rows, actor=self.actor, acted_at=now, **again)
        keyed = [row for row in rows if row.key is not None]
        # From now on it holds its key, whatever it was parked for: what it waits for and what waits for it stays in order.
        _update(connection, keyed, holds=True)
        _update(connection, [row for row in keyed if _is_overtaken(row, marks[_key(row)])], late=True)
        keys = {_key(row) for row in keyed}
        inbox.write_marks(connection, self.service, {key: inbox.Mark(held=True) for key in keys})
        heads = parking.heads(connection, self.service, keys)
        behind = [row for row in keyed if heads[_key(row)] != row.id]
        _update(connection, behind, state=State.BEHIND, due_at=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """Never apply messages; those behind them go on."""

    service: str
    actor: str
    reason: str
    #: None: by the database's clock.
    now: datetime | None = None

    def __call__(self, connection: Connection, rows: Sequence[Row[Any]], _marks: dict[Key, Mark]) -> None:
        """Discard *rows*, whose keys are locked."""
        now = self.now or database_now(connection)
        gone = {"state": State.DISCARDED, "due_at": None, "holds": False, "note": self.reason}
        _update(connection, rows, actor=self.actor, acted_at=now, **gone)
        parking.move_up(connection, self.service, {_key(row) for row in rows if row.key is not None}, now)


def _is_overtaken(row: Row[Any], mark: Mark) -> bool:
    return not row.holds and row.sequence is not None and row.sequence < mark.sequence


def _update(connection: Connection, rows: Sequence[Row[Any]], **values: Any) -> None:
    if rows:
        connection.execute(sa.update(parked).where(parked.c.id.in_([row.id for row in rows])).values(values))


def look(connection: Connection, row_ids: Collection[int], *, lock: bool = False) -> list[Row[Any]]:
    """Return what orders need to know of parked messages, in order; to *lock* leaves out those another transaction has."""
    query = sa.select(*_LOOKED_AT).where(parked.c.id.in_(row_ids)).order_by(parked.c.id)
    return list(connection.execute(query.with_for_update(skip_locked=True) if lock else query))


def locked(connection: Connection, service: str, row_ids: Collection[int]) -> tuple[list[Row[Any]], dict[Key, Mark], set[int]]:
    """Return messages and the marks of their keys, locked; and which of the messages the service has in hand."""
    rows = look(connection, row_ids)
    marks = inbox.lock_free_marks(connection, service, {_key(row) for row in rows if row.key is not None})
    free = [row.id for row in rows if row.key is None or _key(row) in marks]
    ours = look(connection, free, lock=True)  # again: what was read before the lock may have changed meanwhile
    there = {row.id for row in look(connection, [row.id for row in rows])}
    return ours, marks, there - {row.id for row in ours}


def wait_for_keys(connection: Connection, service: str, rows: Sequence[Row[Any]]) -> None:
    """Lock the keys of *rows*, each after those who asked before: a key whose messages keep coming is never free."""
    for key in sorted({_key(row) for row in rows if row.key is not None}):
        inbox.lock_mark_in_turn(connection, service, key, _TURN_SECONDS)


# --- many --------------------------------------------------------------------------------------------------------------


def count(connection: Connection, service: str, which: Filter) -> tuple[int, int]:
    """Return how many messages are meant, and the number of the last of them."""
    query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.max(parked.c.id), 0)).where(*which.conditions(service))
    number, last = connection.execute(query).one()
    return int(number), int(last)


class Sweep:
    """One order for all messages that *which* means, up to the row *last*: those that come meanwhile are not meant."""

    def __init__(self, engine: Engine, service: str, which: Filter, *, last: int, act: Act) -> None:
        self._engine = engine
        self._service = service
        self._which = which
        self._last = last
        self._act = act
        #: Rows that the service has in hand: the order did not reach them.
        self.left: set[int] = set()
        #: Their keys: what comes later in one is not ordered before.
        self._passed: set[Key] = set()

    def run(self) -> Iterator[int]:
        """Yield, after each commit, how many messages it was for."""
        for chunk in self._chunks():
            yield self._order(chunk)
        pause, deadline = threading.Event(), time.monotonic() + PATIENCE_SECONDS
        while self.left and time.monotonic() < deadline:
            pause.wait(_PAUSE_SECONDS)
            rest, self.left, self._passed = sorted(self.left), set(), set()
            for start in range(0, len(rest), CHUNK):
                for _, of_key in groupby(sorted(self._read(rest[start : start + CHUNK]), key=_lane), key=_lane):
                    yield self._order(list(of_key), in_turn=True)

    def _chunks(self) -> Iterator[list[Row[Any]]]:
        after = 0
        while True:
            with reading(self._engine) as connection:
                query = sa.select(*_LOOKED_AT).where(*self._which.conditions(self._service))
                query = query.where(parked.c.id > after, parked.c.id <= self._last).order_by(parked.c.id).limit(CHUNK)
                chunk = list(connection.execute(query))
            if not chunk:
                return
            after = chunk[-1].id
            yield chunk

    def _read(self, row_ids: Collection[int]) -> list[Row[Any]]:
        with reading(self._engine) as connection:
            return look(connection, row_ids)

    def _order(self, chunk: Sequence[Row[Any]], *, in_turn: bool = False) -> int:
        wanted = {row.id for row in chunk if _key(row) not in self._passed}
        with self._engine.begin() as connection:
            if in_turn:
                wait_for_keys(connection, self._service, chunk)
            rows, marks, in_hand = locked(connection, self._service, wanted)
            meant = [row for row in rows if self._which.state is None or row.state == self._which.state]
            self._act(connection, meant, marks)
        self.left |= in_hand | ({row.id for row in chunk} - wanted)
        self._passed |= {_key(row) for row in chunk if row.id in in_hand and row.key is not None}
        return len(meant)


def _key(row: Row[Any]) -> Key:
    return row.source, row.key


def _lane(row: Row[Any]) -> Key:
    return row.source, row.key or ""
