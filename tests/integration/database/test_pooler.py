"""Behind a pooler that gives each transaction another server connection: everything is right, and what can't be is said."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Outbox, database, migrations, tables
from outbox.consumer.outcomes import Outcome
from outbox.database import Role, notifications
from outbox.relay import commit_listener
from outbox.relay.daemon import Relay, open_database
from outbox.store.wakeup import CHANNEL
from tests.integration.relay.running import running
from tests.integration.relay.stage import settings
from tests.kit.builders import message, write
from tests.kit.consuming import Stage, series
from tests.kit.fakes import FakeBroker
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Engine

#: More clients than the pooler has server connections.
_CLIENTS = 8
#: psycopg prepares a statement when it is executed for the sixth time.
_TIMES = 12
DRIVERS = pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])


def through(url: str, driver: str) -> str:
    return url.replace("+psycopg:", f"+{driver}:")


@DRIVERS
def test_an_application_s_commits_through_a_pooler_are_all_kept(pooled_url: str, driver: str) -> None:
    engine = database.create_engine(through(pooled_url, driver), pool_size=_CLIENTS)
    migrations.upgrade(engine)
    outbox = Outbox(source="/x")

    def work(client: int) -> None:
        for number in range(_TIMES):
            with Session(engine) as session, session.begin():
                for _ in range(1 + number % 2):
                    outbox.send("t", {"n": number}, key=f"k{client}", session=session)

    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(work, range(_CLIENTS)))
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.pending)) == _CLIENTS * _TIMES * 3 // 2
    engine.dispose()


@DRIVERS
def test_a_service_behind_a_pooler_applies_everything_and_parks_nothing(pooled_url: str, driver: str) -> None:
    engine = database.create_engine(through(pooled_url, driver), role=Role.SERVICE, pool_size=_CLIENTS)
    stage = Stage(engine)

    def work(client: int) -> set[Outcome]:
        return {outcome for each in series(f"k{client}", _TIMES) for outcome in stage.settle(each)}

    with ThreadPoolExecutor(_CLIENTS) as pool:
        assert set.union(*pool.map(work, range(_CLIENTS))) == {Outcome.APPLIED}
    assert (stage.status.applied_total, stage.status.parked) == (_CLIENTS * _TIMES, 0)
    engine.dispose()


def test_what_a_server_connection_was_told_stays_the_pooler_s_own(pooled_url: str) -> None:
    database.create_engine(pooled_url, role=Role.SERVICE).connect().close()
    engine = database.create_engine(pooled_url)
    names = ("tcp_keepalives_idle", "tcp_user_timeout", "idle_in_transaction_session_timeout")
    with engine.connect() as connection:
        sources = sa.text("SELECT DISTINCT source FROM pg_settings WHERE name = ANY(:names)")
        assert "session" not in connection.scalars(sources, {"names": list(names)}).all()
    engine.dispose()


@pytest.mark.parametrize("fixture", ["postgres_url", "pooled_url"])
@DRIVERS
def test_a_handler_may_wait_for_longer_than_the_server_lets_a_transaction_wait(
    fixture: str, driver: str, postgres_url: str, request: pytest.FixtureRequest
) -> None:
    url = through(request.getfixturevalue(fixture), driver)  # no connection was made yet: each will have the new default
    administrator = database.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with administrator.connect() as connection:
        name = administrator.url.database
        connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET idle_in_transaction_session_timeout = 1000')
    administrator.dispose()
    shown = sa.text("SHOW idle_in_transaction_session_timeout")
    for role, expected in ((Role.SERVICE, "0"), (Role.APP, "1s")):
        engine = database.create_engine(url, role=role)
        with engine.begin() as connection:
            assert connection.scalar(shown) == expected
        engine.dispose()


@pytest.mark.parametrize(
    ("fixture", "role", "query", "threshold"),
    [
        ("postgres_url", Role.SERVICE, "", 5),
        ("postgres_url", Role.SERVICE, "?prepare_threshold=none", None),
        ("postgres_url", Role.APP, "", None),
        ("postgres_url", Role.RELAY, "", None),
        ("pooled_url", Role.SERVICE, "", None),
        ("pooled_url", Role.SERVICE, "?prepare_threshold=5", 5),
    ],
)
def test_only_a_service_that_finds_no_pooler_prepares_statements_unasked(
    fixture: str, role: Role, query: str, threshold: int | None, request: pytest.FixtureRequest
) -> None:
    engine = database.create_engine(request.getfixturevalue(fixture) + query, role=role)
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        assert driver.prepare_threshold == threshold
    engine.dispose()


@pytest.fixture
def pooled(pooled_url: str) -> Iterator[Engine]:
    engine = open_database(pooled_url)
    migrations.upgrade(engine)
    yield engine
    engine.dispose()


def said(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if getattr(record, "outbox_event", "") == event]


def listeners(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT DISTINCT channel FROM pg_listening_channels() AS channel")))


def test_a_relay_behind_a_pooler_says_that_it_polls_and_leaves_no_ear_there(
    pooled: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    broker = FakeBroker()
    with running(Relay(settings(poll_seconds=0.05), pooled, broker)):
        eventually(lambda: said(caplog, "wakeup.polling"), 20.0, "the relay to find out")
        with pooled.begin() as connection:
            write(connection, message())
        eventually(lambda: broker.delivered, what="a message found by polling")
        assert listeners(pooled) == []
    (sentence,) = said(caplog, "wakeup.polling")
    assert "looked for every 50ms" in sentence
    assert said(caplog, "wakeup.listening") == []


def test_a_relay_whose_own_notification_does_not_come_back_polls(
    pooled: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(notifications, "is_pooled", lambda _: False)  # a pooler that hands on the server's process id
    monkeypatch.setattr(commit_listener, "_TRIAL_SECONDS", 0.5)
    with running(Relay(settings(poll_seconds=0.05), pooled, FakeBroker())):
        eventually(lambda: said(caplog, "wakeup.polling"), 20.0, "the relay to find out")
    assert said(caplog, "wakeup.listening") == []


@DRIVERS
def test_a_notification_is_heard_through_every_driver(postgres_url: str, driver: str) -> None:
    engine = database.create_engine(through(postgres_url, driver))
    pooled = engine.raw_connection()
    connection = pooled.driver_connection
    pooled.detach()
    assert connection is not None
    connection.autocommit = True
    assert not notifications.is_pooled(connection)
    notifications.listen(connection, CHANNEL)
    assert notifications.heard(connection, 0.01) == []
    with engine.begin() as another:
        another.execute(sa.select(sa.func.pg_notify(CHANNEL, "x")))
    assert notifications.heard(connection, 10.0) == ["x"]
    assert notifications.heard(connection, 0.01) == []
    connection.close()
    engine.dispose()
