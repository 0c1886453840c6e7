"""One batch of messages, in one transaction: inbox, order, handlers, parking, counters, commit.

Nothing here retries and nothing here knows the broker; `attempts` decides what an exception means.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from outbox import migrations
from outbox.consumer import delivery as arrivals
from outbox.consumer import inbox, parking, tables
from outbox.consumer.failures import is_transient
from outbox.consumer.hand import Hand
from outbox.consumer.migrations import history
from outbox.consumer.outcomes import Outcome
from outbox.consumer.parking import Aside
from outbox.consumer.seal import protect
from outbox.consumer.tables import Reason
from outbox.consumer.transaction import transaction
from outbox.database import prepare
from outbox.errors import InvalidMessage
from outbox.message import Message, Received, cloud_event
from outbox.process import failpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.engine import Connection

    from outbox.consumer.delivery import Arrival, Key
    from outbox.consumer.handlers import Handler
    from outbox.consumer.inbox import Mark
    from outbox.consumer.seal import Seal
    from outbox.consumer.service import Service
    from outbox.consumer.transaction import HandlerSession

_NONE_ASIDE: Mapping[Arrival, Aside] = {}


def now_utc() -> datetime:
    """Return the present time."""
    return datetime.now(UTC)


@dataclass(slots=True)
class Settled:
    """What became of one delivery of a committed batch."""

    arrival: Arrival
    outcome: Outcome
    late: bool = False
    aside: Aside | None = None
    handler_seconds: float = 0.0


@dataclass(slots=True)
class Tally:
    """What one transaction adds to the service's counters."""

    applied: int = 0
    duplicates: int = 0
    late: int = 0
    gaps: int = 0
    parked: int = 0


@dataclass(frozen=True, slots=True)
class Deliveries:
    """Applies messages of *service* in transactions on *engine*; one for each worker thread."""

    service: Service
    engine: Engine
    #: Whose row of the counters this one adds to.
    worker: int
    clock: Callable[[], datetime] = field(default=now_utc)
    #: What the worker thread has in hand.
    hand: Hand = field(default_factory=Hand)

    def __post_init__(self) -> None:
        protect(self.engine)

    def settle(self, batch: Sequence[Arrival], aside: Mapping[Arrival, Aside] = _NONE_ASIDE) -> list[Settled]:
        """Settle *batch* in one transaction, in order: applied, recognised as duplicates, or parked.

        Those in *aside* are parked without being handled. Raises Transient, Cut, or what a handler raised; then nothing of
        the batch was written.
        """
        with transaction(self.engine) as session, self.hand.settling(batch, session.connection()):
            settled = _Batch(self.service, session, self.clock(), self.worker, self.hand).settle(batch, aside)
        failpoints.reached("K4")
        return settled

    def database_works(self) -> bool:
        """Say whether a new connection can be made and written with: an old one may be dead by its handler's doing."""
        engine = Engine(self.engine.pool.recreate(), self.engine.dialect, self.engine.url, hide_parameters=True)
        try:
            with engine.connect() as connection:
                connection.execute(_probe(engine.dialect.name))
                connection.rollback()
        except Exception as error:  # noqa: BLE001 - what is no trouble of the database's says that it is there
            return not is_transient(error)
        finally:
            engine.dispose()
        return True

    def begin_attempt(self, arrival: Arrival) -> int:
        """Record, before it is handled, that *arrival* is about to be; return how often that began without an end."""
        with transaction(self.engine) as session:
            return inbox.begin_attempt(session.connection(), self.service.name, arrival.identity, self.clock())

    def end_attempt(self, arrival: Arrival) -> None:
        """Record that the attempt ended, without success: the process lives."""
        with transaction(self.engine) as session:
            inbox.end_attempts(session.connection(), self.service.name, [arrival.identity])


class _Batch:
    """The work of one transaction."""

    def __init__(self, service: Service, session: HandlerSession, now: datetime, worker: int, hand: Hand) -> None:
        self._service = service
        self._session = session
        self._connection: Connection = session.connection()
        self._now = now
        self._worker = worker
        self._hand = hand
        self._marks: dict[Key, Mark] = {}
        self._tally = Tally()
        self._rows: list[dict[str, object]] = []

    def settle(self, batch: Sequence[Arrival], aside: Mapping[Arrival, Aside]) -> list[Settled]:
        name = self._service.name
        new = inbox.take(self._connection, name, [arrival.identity for arrival in batch], self._now, self._session.seal)
        failpoints.reached("K2")
        first: list[Arrival | None] = []
        for arrival in batch:  # twice in one batch: the first is new, the second a duplicate
            first.append(arrival if arrival.identity in new else None)
            new.discard(arrival.identity)
        # After the inbox: whoever else had one of these messages has committed, and what it did to the key is seen.
        keys = {arrival.key for arrival in first if arrival is not None and arrival.key is not None}
        self._marks = inbox.lock_marks(self._connection, name, keys)
        settled = [
            self._duplicate(arrival) if fresh is None else self._take(arrival, aside.get(arrival))
            for arrival, fresh in zip(batch, first, strict=True)
        ]
        self._hand.handled()
        failpoints.reached("K3")
        if self._rows:
            parking.write(self._connection, self._rows)
            failpoints.reached("K6")
        inbox.write_marks(self._connection, name, self._marks)
        inbox.end_attempts(self._connection, name, [arrival.identity for arrival in batch if arrival.suspect])
        count(self._connection, name, self._worker, self._tally, self._session.seal)
        return settled

    def _duplicate(self, arrival: Arrival) -> Settled:
        self._tally.duplicates += 1
        return Settled(arrival, Outcome.DUPLICATE)

    def _take(self, arrival: Arrival, aside: Aside | None) -> Settled:
        late, held = self._note(arrival)
        task = aside or self._task(arrival, late=late, held=held)
        if isinstance(task, Aside):
            return self._park(arrival, dataclasses.replace(task, late=late))
        self._hand.handles(arrival, task.handler.calls.usual_seconds())
        begun = time.perf_counter()
        task.handle(self._session, late=late)
        self._tally.applied += 1
        self._tally.late += late
        return Settled(arrival, Outcome.APPLIED, late=late, handler_seconds=time.perf_counter() - begun)

    def _note(self, arrival: Arrival) -> tuple[bool, bool]:
        """Note the arrival's sequence; say whether it is late and whether its key is held."""
        if arrival.key is None:
            return False, False
        mark = self._marks[arrival.key]
        sequence = arrival.message.sequence if arrival.message else None
        late = sequence is not None and 0 < sequence <= mark.sequence
        if sequence is not None and mark.sequence > 0 and sequence > mark.sequence + 1:
            self._tally.gaps += 1
        mark.sequence = max(mark.sequence, sequence or 0)
        return late, mark.held

    def _task(self, arrival: Arrival, *, late: bool, held: bool) -> Task | Aside:
        if arrival.dead_lettered and arrival.message is not None:
            return Aside(Reason.DEAD_LETTERED, "the broker gave it up after too many deliveries; `x-death` says which")
        task = task_of(self._service, arrival)
        if isinstance(task, Aside):
            return task
        if held:
            return Aside(Reason.BEHIND, "an earlier message of its key is parked")
        if late and self._service.strict:
            return Aside(Reason.LATE, "a later message of its key was applied before it, and the service is strict")
        return task

    def _park(self, arrival: Arrival, aside: Aside) -> Settled:
        self._rows.append(parking.row(self._service.name, arrival, aside, self._now))
        if arrival.key is not None and aside.holds(arrival.key):
            self._marks[arrival.key].held = True
        self._tally.parked += 1
        return Settled(arrival, Outcome.PARKED, late=aside.late, aside=aside)


@dataclass(frozen=True, slots=True)
class Task:
    """A message and the handler it is for."""

    message: Received
    handler: Handler
    #: Why its data can't be read now, though it could be before; perhaps it can be again, and its key waits until then.
    problem: str = ""

    def handle(self, session: HandlerSession, *, late: bool) -> None:
        """Call the handler; the next message finds the session as if it were new. Raises whatever the handler raises."""
        if self.problem:
            raise InvalidMessage(self.problem)
        session.hand_over()
        self.handler(dataclasses.replace(self.message, late=True) if late else self.message, session)
        session.seal.check()
        # Objects of this message must not be found by the next: alone in its transaction it would not see them either.
        session.expunge_all()
        session.info.clear()


def task_of(service: Service, arrival: Arrival) -> Task | Aside:
    """Return what *service* has to do for *arrival*, or why it can't do anything."""
    if arrival.message is None:
        return Aside(Reason.UNDECODABLE, arrival.problem)
    handler = service.handler(arrival.topic)
    if handler is None:
        return Aside(Reason.NO_HANDLER, f"service {service.name!r} has no handler for {arrival.topic!r}")
    return Task(arrival.message, handler, arrival.problem)


def _probe(dialect: str) -> Any:
    """Return a statement that shows whether the database takes any; a demoted PostgreSQL takes no INSERT."""
    return sa.insert(tables.nothing).values(id=0) if dialect == "postgresql" else sa.select(tables.nothing)


@cache
def _count(dialect: str, *, lifting: bool) -> Any:
    """Return the statement that adds to the counters; *lifting* the seal it does so only where that is found."""
    table = tables.counter
    columns = [table.c.service, table.c.worker, *(table.c[each.name] for each in dataclasses.fields(Tally))]
    values = sa.select(*(sa.bindparam(column.name, type_=column.type) for column in columns))
    if lifting:
        seal = sa.delete(tables.seal).where(tables.seal.c.id == sa.bindparam("seal")).returning(tables.seal.c.id)
        values = values.select_from(seal.cte("lifted"))
    statement = inbox.insert(dialect, table).from_select(columns, values.where(sa.true()))
    return statement.on_conflict_do_update(
        index_elements=[table.c.service, table.c.worker],
        set_={column.name: column + statement.excluded[column.name] for column in columns[2:]},
    ).returning(table.c.worker)


def count(connection: Connection, service: str, worker: int, tally: Tally, seal: Seal | None = None) -> None:
    """Add *tally* to the service's counters, and lift *seal* with the same statement."""
    values = {"service": service, "worker": worker, **dataclasses.asdict(tally)}
    if seal is None or not seal.is_put:
        connection.execute(_count(connection.dialect.name, lifting=False), values)
        return
    counted = connection.execute(_count(connection.dialect.name, lifting=True), {**values, "seal": seal.number})
    seal.is_lifted(found=counted.first() is not None)


def deliver_once(service: Service, message: Message | Received | bytes, engine: Engine) -> Outcome:
    """See `Service.deliver`."""
    migrations.upgrade(prepare(engine), history(service.name))
    if service.tables is not None:
        service.tables.create_all(engine)
    if isinstance(message, Received):
        arrival = arrivals.of_message(message, b"")
    else:
        arrival = arrivals.read(cloud_event(message) if isinstance(message, Message) else message)
    return Deliveries(service, engine, worker=0).settle([arrival])[0].outcome
