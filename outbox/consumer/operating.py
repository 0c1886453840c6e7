"""What an operator does with a service: its tables, its state, its parked messages, its queues.

Each function is one command of `outbox consumer`; none prints, asks or exits.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox import database, migrations
from outbox.consumer import orders, parking, tables
from outbox.consumer.heartbeat import SEEN_SECONDS
from outbox.consumer.migrations import history
from outbox.consumer.orders import Discard, Filter, Requeue, Sweep
from outbox.consumer.tables import State
from outbox.consumer.transaction import reading
from outbox.errors import OutboxError, SchemaError, Unavailable
from outbox.store.clock import database_now

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import Connection, Engine, Row

    from outbox.consumer.service import Service
    from outbox.settings import Settings

_parked, _key, _counter, _process = tables.parked, tables.key, tables.counter, tables.process
_SUMS = [sa.func.coalesce(sa.func.sum(_counter.c[name]), 0).label(name) for name in ("applied", "duplicates", "late", "gaps")]
#: Parked messages that a process replays at once, on SQLite one.
REPLAYERS = 4
_USUAL = timedelta(seconds=SEEN_SECONDS)
_LONG = 4 * _USUAL
_PAUSE_SECONDS = 0.1
_ANY = Filter()
_ALIVE = 8 * _USUAL


def open_engine(service: Service, settings: Settings) -> Engine:
    """Return an engine for the service's own database, `CONSUMER_DATABASE_URL` with `{service}` filled in."""
    settings.require("CONSUMER_DATABASE_URL")
    url = str(settings.consumer_database_url).replace("{service}", service.name)
    if sa.make_url(url).get_backend_name() == "sqlite":
        return database.create_engine(url, role=database.Role.SERVICE)
    # A connection for each worker and each replay, upkeep, background work, and one to spare; for a while also one for each
    # that stands in for a stuck worker. Not asked whether it is alive each time it is taken, which would be a sixth of a small
    # transaction: one that fails is made again, and the work with it.
    spare = 2 + min(settings.consumer_workers, REPLAYERS) + len(service.backgrounds)
    size = settings.consumer_workers + spare
    options = {"pool_size": size, "max_overflow": settings.consumer_workers, "pool_pre_ping": False}
    return database.create_engine(url, role=database.Role.SERVICE, name=service.name, **options)


# --- tables --------------------------------------------------------------------------------------------------------------


def migrate(service: Service, engine: Engine) -> int:
    """Create or upgrade inbox and parking, create the service's own tables that are missing; return the steps it took."""
    steps = migrations.upgrade(engine, history(service.typed))
    missing = _missing_tables(service, engine)
    if missing and service.tables is not None:
        service.tables.create_all(engine)
    return steps + len(missing)


def check(service: Service, engine: Engine, *, migrate_first: bool = False) -> None:
    """Raise SchemaError, saying what to type, unless all tables are there and of this code's version."""
    if migrate_first:
        migrate(service, engine)
    migrations.check(engine, history(service.typed))
    if missing := _missing_tables(service, engine):
        raise SchemaError(
            f"tables of service {service.name!r} do not exist: {', '.join(missing)}; run: {history(service.typed).command}"
        )


def _missing_tables(service: Service, engine: Engine) -> list[str]:
    if service.tables is None:
        return []
    with reading(engine) as connection:
        look = sa.inspect(connection)
        return [table.fullname for table in service.tables.sorted_tables if not look.has_table(table.name, schema=table.schema)]


# --- parked messages ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A parked message."""

    #: The message id; for a body that can't be read `sha256:…`, its digest.
    id: str
    source: str
    topic: str
    key: str | None
    sequence: int | None
    state: str
    reason: str
    attempts: int
    #: One line.
    error: str | None
    created_at: datetime | None
    parked_at: datetime
    #: When the worker tries it by itself.
    due_at: datetime | None
    #: consumer_parked.id; known inside this database only.
    row: int


@dataclasses.dataclass(frozen=True, slots=True)
class Detail:
    """Everything known of a parked message."""

    entry: Entry
    #: The traceback.
    detail: str | None
    #: AMQP properties and headers.
    properties: dict[str, Any]
    #: As it came.
    body: bytes
    #: How many messages of its key wait behind it.
    behind: int
    #: The message of its key that it waits for.
    held_by: str | None
    #: When, who and why a person last acted on it.
    acted_at: datetime | None
    actor: str | None
    note: str | None


#: What an `Entry` holds: no bodies.
_ENTRY = [_parked.c.id, _parked.c.message_id] + [
    _parked.c[each.name] for each in dataclasses.fields(Entry) if each.name not in ("id", "row")
]


class AmbiguousId(OutboxError):
    """Messages of several sources have the id that was given."""


def parked_list(engine: Engine, service: Service, which: Filter = _ANY, *, limit: int = 50) -> list[Entry]:
    """Return at most *limit* parked messages, in the order they came; discarded ones only when asked for."""
    query = sa.select(*_ENTRY).where(*which.conditions(service.name)).order_by(_parked.c.id).limit(limit)
    with reading(engine) as connection:
        return [_entry(row) for row in connection.execute(query)]


def parked_count(engine: Engine, service: Service, which: Filter) -> tuple[int, int]:
    """Return how many parked messages are meant, and the row of the last of them, for `requeue_all` and `discard_all`."""
    with reading(engine) as connection:
        return orders.count(connection, service.name, which)


def parked_show(engine: Engine, service: Service, message_id: str, source: str | None = None) -> list[Detail]:
    """Return the parked messages of that id: one of each source. Raises OutboxError when there is none."""
    with reading(engine) as connection:
        rows = _find(connection, service, [message_id], source)
        query = sa.select(_parked).where(_parked.c.id.in_([row.id for row in rows])).order_by(_parked.c.id)
        return [_detail(connection, row) for row in connection.execute(query)]


def parked_these(engine: Engine, service: Service, ids: Sequence[str], source: str | None = None) -> list[Entry]:
    """Return the parked messages *ids*. Raises OutboxError for one that is not there, AmbiguousId for one that several are."""
    with reading(engine) as connection:
        return [_entry(row) for row in _find_one_each(connection, service, ids, source)]


def requeue(
    engine: Engine, service: Service, ids: Sequence[str], *, actor: str, source: str | None = None, now: datetime | None = None
) -> list[str]:
    """Let the worker replay the messages *ids*, those of a key in their order; return the ids.

    Raises OutboxError, having changed nothing, for an id that is not parked, was discarded, or waits behind another one,
    AmbiguousId for one that messages of several sources have, unless *source* says which is meant, Unavailable while the
    service has one of them in hand.
    """
    return _act(engine, service, ids, source, "requeue", Requeue(service=service.name, actor=actor, now=now))


def discard(
    engine: Engine,
    service: Service,
    ids: Sequence[str],
    *,
    actor: str,
    reason: str,
    source: str | None = None,
    now: datetime | None = None,
) -> list[str]:
    """Never apply the messages *ids*; later ones of their keys go on. Returns the ids; raises as `requeue`."""
    act = Discard(service=service.name, actor=actor, reason=reason, now=now)
    return _act(engine, service, ids, source, "discard", act)


def requeue_all(engine: Engine, service: Service, which: Filter, *, last: int, actor: str) -> Sweep:
    """Return the order that lets the worker replay the messages *which* means, up to the row *last*, a chunk at a time."""
    return Sweep(engine, service.name, which, last=last, act=Requeue(service=service.name, actor=actor))


def discard_all(engine: Engine, service: Service, which: Filter, *, last: int, actor: str, reason: str) -> Sweep:
    """Return the order that never applies the messages *which* means, up to the row *last*, a chunk at a time."""
    return Sweep(engine, service.name, which, last=last, act=Discard(service=service.name, actor=actor, reason=reason))


def _act(
    engine: Engine, service: Service, ids: Sequence[str], source: str | None, verb: str, act: Requeue | Discard
) -> list[str]:
    pause, deadline, again = threading.Event(), time.monotonic() + orders.PATIENCE_SECONDS, False
    while True:
        with engine.begin() as connection:
            found = _find_one_each(connection, service, ids, source)
            if again:
                orders.wait_for_keys(connection, service.name, found)
            rows, marks, in_hand = orders.locked(connection, service.name, [row.id for row in found])
            if refused := [text for row in rows if (text := _why_not(row))]:
                raise OutboxError("\n".join([*refused, f"nothing was changed; {verb} the first of a key"]))
            if not in_hand and len(rows) == len(found):
                act(connection, rows, marks)
                return [row.message_id for row in rows]
        if time.monotonic() > deadline:
            raise Unavailable(f"service {service.name!r} is handling messages of these keys; nothing was changed; try again")
        again = not pause.wait(_PAUSE_SECONDS)


def _why_not(row: Row[Any]) -> str | None:
    if row.state == State.DISCARDED:
        return f"message {row.message_id} was discarded"
    if row.state == State.BEHIND:
        return f"message {row.message_id} is only waiting behind an earlier message of its key {row.key!r}"
    return None


def _find_one_each(connection: Connection, service: Service, ids: Sequence[str], source: str | None) -> list[Row[Any]]:
    rows = _find(connection, service, ids, source)
    sources: dict[str, list[str]] = {}
    for row in rows:
        sources.setdefault(row.message_id, []).append(row.source)
    if several := {id_: found for id_, found in sources.items() if len(found) > 1}:
        named = [f"id {id_} is that of messages of {' and of '.join(map(repr, found))}" for id_, found in several.items()]
        raise AmbiguousId("\n".join(named))
    return rows


def _find(connection: Connection, service: Service, ids: Sequence[str], source: str | None = None) -> list[Row[Any]]:
    query = sa.select(*_ENTRY).where(_parked.c.service == service.name, _parked.c.message_id.in_(ids)).order_by(_parked.c.id)
    if source is not None:
        query = query.where(_parked.c.source == source)
    rows = list(connection.execute(query))
    # Of a message that came again after it was discarded, long ago, the one that waits is meant.
    waiting = {(row.source, row.message_id) for row in rows if row.state != State.DISCARDED}
    rows = [row for row in rows if row.state != State.DISCARDED or (row.source, row.message_id) not in waiting]
    missing = [each for each in ids if each not in {row.message_id for row in rows}]
    if missing:
        raise OutboxError(
            f"service {service.name!r} has no parked message {', '.join(missing)}"
            + (f" from {source!r}" if source is not None else "")
            + f"; outbox consumer parked list {service.typed}"
        )
    return rows


def _entry(row: Row[Any]) -> Entry:
    return Entry(
        id=row.message_id,
        row=row.id,
        **{each.name: getattr(row, each.name) for each in dataclasses.fields(Entry) if each.name not in ("id", "row")},
    )


def _detail(connection: Connection, row: Row[Any]) -> Detail:
    behind, held_by = 0, None
    if row.key is not None and row.holds:
        of_key = sa.and_(
            _parked.c.service == row.service, _parked.c.source == row.source, _parked.c.key == row.key, _parked.c.holds
        )
        behind = connection.scalar(sa.select(sa.func.count()).where(of_key, _parked.c.id > row.id)) or 0
        first = sa.select(_parked.c.message_id).where(of_key, _parked.c.id < row.id).order_by(_parked.c.id).limit(1)
        held_by = connection.scalar(first)
    return Detail(
        entry=_entry(row),
        detail=row.detail,
        properties=json.loads(row.properties),
        body=bytes(row.body),
        behind=behind,
        held_by=held_by,
        acted_at=row.acted_at,
        actor=row.actor,
        note=row.note,
    )


# --- state ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """How a service stands. `dataclasses.asdict` of it is `outbox consumer status --json`."""

    service: str
    applied_total: int
    duplicates_total: int
    #: Applied after a later message of their key.
    late_total: int
    #: Jumps in the sequence of a key; a service that takes some of a key's topics sees many.
    gaps_total: int
    #: Parked messages, by what they wait for; discarded ones are not counted.
    parked: int
    waiting_for_a_person: int
    held_keys: int
    #: Age of the oldest message that was delivered to the service and is not settled; 0: there is none, and the queue was seen
    #: empty. While nobody receives it grows from what was last known: from that message, where there was none from when the
    #: queue was last seen empty, because what was sent since may be waiting. None: it never ran.
    lag_seconds: float | None
    running: bool
    processes: list[dict[str, Any]]


def status(engine: Engine, service: Service, now: datetime | None = None) -> Status:
    """Return how *service* stands, from its own database alone."""
    name = service.name
    with reading(engine) as connection:
        now = now or database_now(connection)
        totals = connection.execute(sa.select(*_SUMS).where(_counter.c.service == name)).one()
        parked = parking.count(connection, name)
        person = connection.scalar(sa.select(sa.func.count()).where(_parked.c.service == name, _parked.c.state == State.PARKED))
        held = connection.scalar(sa.select(sa.func.count()).where(_key.c.service == name, _key.c.held))
        processes = connection.execute(sa.select(_process).where(_process.c.service == name)).all()
    alive = [each for each in processes if each.state == "running" and now - each.seen_at < _ALIVE]
    return Status(
        service=name,
        applied_total=int(totals.applied),
        duplicates_total=int(totals.duplicates),
        late_total=int(totals.late),
        gaps_total=int(totals.gaps),
        parked=parked,
        waiting_for_a_person=int(person or 0),
        held_keys=int(held or 0),
        lag_seconds=_lag(processes, alive, now),
        running=bool(alive),
        processes=[
            {
                "id": each.id,
                "host": each.host,
                "pid": each.pid,
                "connected": each.connected,
                "seen_age_seconds": round((now - each.seen_at).total_seconds(), 3),
            }
            for each in alive
        ],
    )


def _lag(processes: Sequence[Row[Any]], alive: Sequence[Row[Any]], now: datetime) -> float | None:
    if not processes:
        return None
    caught_up = max(each.caught_up_at or each.started_at for each in processes)
    since = [each.oldest_at for each in alive if each.oldest_at is not None]
    if any(each.connected for each in alive):
        # A row that is not written in time says nothing of what came since: on SQLite a slow handler keeps it from being.
        since += [each.seen_at for each in alive if now - each.seen_at > 2 * _USUAL]
        if not since and now - caught_up > _LONG:  # something waits that nobody is given
            since = [caught_up]
    else:  # what a dead process had in hand waits, unless another one has been through with everything since
        since += [each.oldest_at for each in processes if each.oldest_at is not None and each.seen_at > caught_up]
        since = since or [caught_up]
    return float((now - min([*since, now])).total_seconds())
