"""What a message costs the databases: statements that do not grow with a batch, and bytes that do not grow by surprise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Outbox, migrations
from outbox.consumer import Service, operating
from outbox.consumer.batch import Deliveries
from outbox.consumer.delivery import read
from outbox.database import create_engine
from outbox.message import cloud_event
from tests.integration.relay.stage import Stage
from tests.kit.builders import message
from tests.kit.consuming import TOPIC
from tests.kit.costs import statements, wal_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import Engine

    from tests.kit.servers import PostgresServer


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def outbox_engine(engine: Engine) -> Engine:
    migrations.upgrade(engine)
    return engine


def test_a_pass_of_the_relay_takes_as_many_statements_for_four_hundred_messages_as_for_four(outbox_engine: Engine) -> None:
    stage = Stage(outbox_engine, batch_size=500)
    stage.write(message("t"))
    stage.run_dry()  # the leases are taken, and a first message has gone alone
    forwarder = stage.relay.forwarder
    for count in (4, 400):
        stage.write(*(message("t", f"key:{number}" if number % 2 else None) for number in range(count)))
        with statements(outbox_engine) as reading:
            assert forwarder.read() == count
            forwarder.prove()
        with statements(outbox_engine) as sending:
            assert forwarder.send() == count
            forwarder.collect(0.0)
        with statements(outbox_engine) as settling:
            forwarder.settle()
        assert stage.rows() == []
        assert len(reading) == 2, reading  # pending rows, then their messages
        assert sending == []
        settles = 3 if outbox_engine.dialect.name == "postgresql" else 2  # time-outs of the transaction; delete; receipt
        assert len(settling) == settles, settling


def test_a_batch_of_a_service_takes_as_many_statements_for_fifty_messages_as_for_two(engine: Engine) -> None:
    service = Service("exports")

    @service.on(TOPIC)
    def nothing(message: Any, db_session: Any, /, **extra: Any) -> None:
        """Has no statements of its own."""

    operating.migrate(service, engine)
    deliveries = Deliveries(service, engine, worker=0)
    for count in (2, 50):
        batch = [read(cloud_event(message(TOPIC, f"{count}:{number % 7}", sequence=number + 1))) for number in range(count)]
        with statements(engine) as seen:
            deliveries.settle(batch)
        assert len(seen) == 4, seen  # inbox; marks of the keys, read and written; counters


@pytest.mark.parametrize(("key", "most"), [("event:7", 1050), (None, 850)])
def test_the_write_ahead_log_of_a_message_stays_small(
    private_postgres: Callable[..., PostgresServer], key: str | None, most: int
) -> None:
    outbox = Outbox(source="/tests")
    data = {"event_id": 7, "session_id": 12, "change": "accepted", "title": "x" * 60}  # about 120 bytes
    messages = 500
    # Its own, because no other test may write meanwhile; and nothing of the server's own may, either.
    with private_postgres(autovacuum="off", bgwriter_lru_maxpages=0).database() as url:
        engine = create_engine(url)
        migrations.upgrade(engine)

        def transactions(send: bool) -> Callable[[], None]:
            def work() -> None:
                for _ in range(messages):
                    with Session(engine) as session, session.begin():
                        session.execute(sa.text("INSERT INTO business (text) VALUES ('x')"))
                        if send:
                            outbox.send("session.modified", data, key=key, session=session)

            return work

        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE business (id bigserial PRIMARY KEY, text text)"))
        transactions(send=True)()
        without = wal_bytes(engine, transactions(send=False))
        each = (wal_bytes(engine, transactions(send=True)) - without) / messages
        engine.dispose()
    assert 0 < each < most
