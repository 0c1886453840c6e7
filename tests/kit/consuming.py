"""Services, messages and brokers for tests of the consumer runtime."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pika
import sqlalchemy as sa

from outbox.consumer import Outcome, Service, operating, tables
from outbox.consumer.batch import Deliveries
from outbox.consumer.delivery import Arrival, read
from outbox.consumer.retries import Policy
from outbox.consumer.runtime import Runtime
from outbox.embedded.queues import Publication, Queues
from outbox.embedded.urls import path_of
from outbox.message import Message, cloud_event, new_id
from outbox.process.backoff import Backoff
from outbox.settings import Settings, load
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

    from outbox.consumer.batch import Settled
    from outbox.message import Received

EXCHANGE = "openevent"
TOPIC = "session.modified"
#: As patient as a test can be.
QUICK = Policy(
    max_attempts=3,
    between_attempts=Backoff(0.001, 0.002),
    without_database=Backoff(0.01, 0.1),
    when_asked=Backoff(0.01, 0.05),
)


def message(
    number: int = 1, *, key: str | None = None, sequence: int | None = None, topic: str = TOPIC, **more: Any
) -> Message:
    """Return a message whose data holds *number*."""
    given = {"id": new_id(), "source": "/tests", "created_at": datetime.now(UTC), "body": b'{"number":%d}' % number, **more}
    return Message(topic=topic, key=key, sequence=sequence, **given)


def series(key: str, count: int, *, first: int = 1) -> list[Message]:
    """Return *count* messages of *key* in sequence, numbered alike."""
    return [message(number, key=key, sequence=number) for number in range(first, first + count)]


@dataclass(frozen=True, slots=True)
class Effect:
    """What the recording service did with a message."""

    key: str | None
    number: int
    late: bool


@dataclass
class Recorder:
    """A service that writes a row for each message, and the means to make it fail."""

    name: str = "exports"
    order: Any = "late-ok"
    batch: int | None = None
    #: Called with the message before its row is written.
    before: Any = None
    tables: sa.MetaData = field(default_factory=sa.MetaData)

    def __post_init__(self) -> None:
        self.effects = sa.Table(
            "effects",
            self.tables,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("message_id", sa.String(255), nullable=False),
            sa.Column("key", sa.String(255)),
            sa.Column("number", sa.Integer, nullable=False),
            sa.Column("late", sa.Boolean, nullable=False),
        )
        self.service = Service(self.name, order=self.order, batch=self.batch, tables=self.tables)
        self.service.on(TOPIC)(self._record)

    def _record(self, message: Received, db_session: Session, /, *, number: int, **extra: Any) -> None:
        if self.before is not None:
            self.before(message, db_session)
        row = {"message_id": message.id, "key": message.key, "number": number, "late": message.late}
        db_session.execute(self.effects.insert().values(row))

    def seen(self, engine: Engine) -> list[Effect]:
        """Return the effects in the order they were written."""
        with engine.connect().execution_options(outbox_read_only=True) as connection:
            rows = connection.execute(sa.select(self.effects).order_by(self.effects.c.id))
            return [Effect(row.key, row.number, row.late) for row in rows]

    def numbers(self, engine: Engine, key: str | None = None) -> list[int]:
        """Return the numbers of the effects, of one key if given."""
        return [effect.number for effect in self.seen(engine) if key is None or effect.key == key]


class Desk:
    """The publishing side of a broker, and a look at its queues."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._embedded = url.startswith("embedded:")

    def publish(self, *messages: Message | bytes, topic: str = TOPIC, properties: Mapping[str, Any] | None = None) -> None:
        """Publish in order; returns when the broker has all of them."""
        bodies = [each if isinstance(each, bytes) else cloud_event(each) for each in messages]
        topics = [topic if isinstance(each, bytes) else each.topic for each in messages]
        if self._embedded:
            with Queues(path_of(self.url)) as queues:
                for body, name in zip(bodies, topics, strict=True):
                    queues.publish(EXCHANGE, [Publication(name, body, properties or {})])
            return
        with self.channel() as channel:
            for body, name in zip(bodies[:-1], topics[:-1], strict=True):
                channel.basic_publish(EXCHANGE, name, body, pika.BasicProperties(delivery_mode=2, **(properties or {})))
            channel.confirm_delivery()  # the last one waits for the broker, which takes a channel's messages in order
            last = pika.BasicProperties(delivery_mode=2, **(properties or {}))
            channel.basic_publish(EXCHANGE, topics[-1], bodies[-1], last, mandatory=True)

    def publish_to(self, queue: str, body: bytes) -> None:
        """Publish past the exchange, straight into *queue*."""
        with self.channel() as channel:
            channel.confirm_delivery()
            channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2), mandatory=True)

    def waiting(self, queue: str) -> int:
        """Return how many messages of *queue* were not delivered."""
        if self._embedded:
            with Queues(path_of(self.url)) as queues:
                return queues.depth(queue).ready
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count)

    def left(self, queue: str) -> int:
        """Return how many messages a stopped service left in *queue*, once the broker has noticed that it is gone."""
        if self._embedded:
            with Queues(path_of(self.url)) as queues:
                depth = queues.depth(queue)
                return depth.ready + depth.leased

        def unconsumed() -> bool:
            with self.channel() as channel:
                return bool(channel.queue_declare(queue, passive=True).method.consumer_count == 0)

        eventually(unconsumed, what=f"the consumers of {queue} to be gone")
        return self.waiting(queue)

    @contextmanager
    def channel(self) -> Iterator[Any]:
        """A channel of another client library."""
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()


def settings_for(broker_url: str, database_url: str, **more: str) -> Settings:
    """Return settings with these URLs."""
    given = {"BROKER_URL": broker_url, "CONSUMER_DATABASE_URL": database_url, "OUTBOX_EXCHANGE": EXCHANGE, **more}
    return load(given)


class Running:
    """A service that runs in a thread of this process."""

    def __init__(
        self, service: Service, settings: Settings, *, policy: Policy = QUICK, drain: bool = False, migrate: bool = True
    ) -> None:
        self.engine = operating.open_engine(service, settings)
        self.service = service
        if migrate:
            operating.migrate(service, self.engine)
        self.runtime = Runtime(service, settings, self.engine, policy=policy, drain=drain)
        self.exit_code: int | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)

    def _run(self) -> None:
        try:
            self.exit_code = self.runtime.run()
        except BaseException as error:  # noqa: BLE001 - raised again in join()
            self.error = error

    def start(self, *, ready: bool = True) -> Running:
        """Start, and wait until it consumes."""
        self._thread.start()
        if ready:
            eventually(lambda: self.runtime.ready().ok or self.error, 20, "the service to be ready")
            if self.error is not None:
                raise self.error
        return self

    def stop(self) -> int | None:
        """Stop as SIGTERM does; return the exit code."""
        self.runtime.stop()
        return self.join()

    def join(self, timeout: float = 30.0) -> int | None:
        """Wait for its end; return the exit code, raise what it raised."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the service still runs"
        if self.error is not None:
            raise self.error
        return self.exit_code

    def status(self) -> operating.Status:
        """What `outbox consumer status` says."""
        return operating.status(self.engine, self.service)


@contextmanager
def running(service: Service, settings: Settings, **options: Any) -> Iterator[Running]:
    """Run *service* while the block lasts."""
    process = Running(service, settings, **options)
    try:
        yield process.start()
        process.stop()
    finally:
        process.runtime.stop()
        process.engine.dispose()


class Stage:
    """A recording service on a database."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.engine = engine
        self.recorder = Recorder(**options)
        operating.migrate(self.recorder.service, engine)
        self.deliveries = Deliveries(self.recorder.service, engine, worker=0)

    def settle(self, *messages: Message | bytes | Arrival) -> list[Outcome]:
        return [each.outcome for each in self.settled(*messages)]

    def settled(self, *messages: Message | bytes | Arrival) -> list[Settled]:
        return self.deliveries.settle([arrival(each) for each in messages])

    @property
    def seen(self) -> list[Effect]:
        return self.recorder.seen(self.engine)

    @property
    def parked(self) -> list[Any]:
        return list(rows(self.engine, tables.parked))

    @property
    def status(self) -> operating.Status:
        return operating.status(self.engine, self.recorder.service)


def arrival(given: Message | bytes | Arrival) -> Arrival:
    if isinstance(given, Arrival):
        return given
    return read(given if isinstance(given, bytes) else cloud_event(given), routing_key="session.modified")


def rows(engine: Engine, table: sa.Table) -> Sequence[Any]:
    """Return all rows of *table*."""
    with engine.connect().execution_options(outbox_read_only=True) as connection:
        return connection.execute(sa.select(table)).all()


def data(**fields: Any) -> bytes:
    """Return *fields* as a body."""
    return json.dumps(fields).encode()
