"""The database goes back in time under a living relay: restored from a backup, or a standby without the last commits."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from typing import TYPE_CHECKING

import psycopg
import pytest
import sqlalchemy as sa

from outbox import migrations
from outbox.relay.broker import Outcome
from outbox.relay.daemon import open_database
from outbox.store.witness import Witness
from tests.integration.relay.stage import Stage
from tests.kit.builders import message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy.engine import Engine

    from outbox.message import Message
    from tests.kit.servers import ExternalPostgres, PostgresServer


class Database:
    """A database of its own that can be copied, and put back to the copy."""

    def __init__(self, url: str, backup: Callable[[], None], restore: Callable[[], None]) -> None:
        self.engine = open_database(url)
        migrations.upgrade(self.engine)
        self._backup = backup
        self._restore = restore

    def backup(self) -> None:
        self._backup()
        self.engine.dispose()  # writers and the relay come back over new connections

    def restore(self) -> None:
        self._restore()
        self.engine.dispose()


@contextlib.contextmanager
def _in_a_file(folder: Path) -> Iterator[Database]:
    live, kept = folder / "outbox.db", folder / "backup.db"

    def copy(source: Path, target: Path) -> None:
        with contextlib.closing(sqlite3.connect(source)) as reading, contextlib.closing(sqlite3.connect(target)) as writing:
            reading.backup(writing)

    yield Database(f"sqlite:///{live}", lambda: copy(live, kept), lambda: copy(kept, live))


@contextlib.contextmanager
def _on_a_server(url: str) -> Iterator[Database]:
    name = str(sa.make_url(url).database)
    admin = sa.make_url(url).set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)

    def run(*statements: str) -> None:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            for statement in statements:
                connection.execute(statement.encode())

    yield Database(
        url,
        lambda: run(f"CREATE DATABASE {name}_kept TEMPLATE {name}"),
        lambda: run(f"DROP DATABASE {name} WITH (FORCE)", f"ALTER DATABASE {name}_kept RENAME TO {name}"),
    )


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """An empty outbox that can go back in time: the test runs once per kind of database."""
    if request.param == "sqlite":
        with _in_a_file(request.getfixturevalue("tmp_path")) as database:
            yield database
            database.engine.dispose()
        return
    server: PostgresServer | ExternalPostgres = request.getfixturevalue("postgres_server")
    with server.database() as url, _on_a_server(url) as database:
        yield database
        database.engine.dispose()


def said(caplog: pytest.LogCaptureFixture) -> int:
    return sum(getattr(record, "outbox_event", "") == "database.went_back" for record in caplog.records)


def keyed(key: str) -> Message:
    return message("x", key)


def test_what_was_in_flight_deletes_nothing_of_what_was_written_since(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(database.engine, lambda _: None if stage.delivered() else Outcome.CONFIRMED)
    stage.write(message(), message())
    stage.until(lambda: stage.published_total() == 1)
    database.backup()
    stage.write(*(keyed(f"key-{n}") for n in range(200)))
    stage.until(lambda: len(stage.broker.flying) == 201)

    database.restore()
    new = [keyed(f"key-{n}") for n in range(150)]
    stage.write(*new)
    for each in stage.broker.flying:
        stage.broker.answer(each)
    stage.broker.script = lambda _: Outcome.CONFIRMED
    stage.run_dry()

    assert {each.id for each in new} <= {each.id for each in stage.delivered()}
    assert stage.published_total() == 152
    assert said(caplog) == 1


def test_what_was_refused_puts_no_stranger_into_its_state(database: Database) -> None:
    stage = Stage(database.engine, lambda _: None if stage.delivered() else Outcome.CONFIRMED)
    stage.write(message())
    stage.until(lambda: stage.published_total() == 1)
    database.backup()
    stage.write(*(keyed(f"key-{n}") for n in range(10)))
    stage.until(lambda: len(stage.broker.flying) == 10)
    database.restore()
    new = [message("y", f"other-{n}") for n in range(10)]
    stage.write(*new)
    for each in stage.broker.flying:
        stage.broker.answer(each, Outcome.NACKED)
    stage.broker.script = lambda _: Outcome.CONFIRMED
    stage.run_dry()
    assert {each.id for each in new} <= {each.id for each in stage.delivered()}
    assert len(stage.broker.sent) == 1 + 10 + 10


def test_an_idle_relay_takes_no_number_of_a_key_for_its_next_that_only_was_so_before(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The key had come to 4 when the database went back to 2: the new fifth may not go before the new third and fourth."""
    stage = Stage(database.engine)
    stage.write(keyed("a"), keyed("a"))
    stage.run_dry()
    database.backup()
    stage.write(keyed("a"), keyed("a"), *(message() for _ in range(3)))
    stage.run_dry()
    stage.turn(2, seconds=0.0)  # a read from the start has just been made
    database.restore()
    stage.write(keyed("a"), keyed("a"))
    passed_over = len(stage.delivered())
    stage.write(*(message() for _ in range(4)), keyed("a"))  # its id is above all that were read before
    stage.relay.wake()
    stage.run_dry()
    assert [each.sequence for each in stage.delivered()[passed_over:] if each.key == "a"] == [3, 4, 5]
    assert said(caplog) == 1


def test_a_database_that_only_restarted_forgets_nothing_and_nothing_is_sent_twice(
    postgres: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    stage = Stage(postgres, lambda _: None if stage.delivered() else Outcome.CONFIRMED)
    stage.write(*(keyed("a") for _ in range(4)), *(keyed("b") for _ in range(4)))
    stage.until(lambda: stage.published_total() == 1 and stage.broker.flying)
    honest = Witness.world
    with monkeypatch.context() as patch:
        patch.setattr(Witness, "world", lambda *arguments: honest(*arguments)._replace(server="started later"))
        stage.broker.script = lambda _: Outcome.CONFIRMED
        for each in stage.broker.flying:
            stage.broker.answer(each)
        stage.run_dry()
    assert (len(stage.broker.sent), said(caplog)) == (8, 0)
    assert stage.sequences("a") == stage.sequences("b") == [1, 2, 3, 4]
