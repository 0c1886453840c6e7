"""A handler that ends the transaction of its batch, by whatever means: it alone is parked, everybody else applied once."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from outbox.consumer import tables
from outbox.consumer.attempts import Attempts, Pause
from outbox.consumer.outcomes import HandlerMistake
from outbox.consumer.tables import Reason
from outbox.database import create_engine
from tests.consuming import QUICK, Stage, arrival, message, rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

    from tests.kit.servers import ExternalPostgres, PostgresServer

#: In the middle of the batch.
CULPRIT = 4
INNOCENTS = [1, 2, 3, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def postgres_engine(postgres_server: PostgresServer | ExternalPostgres) -> Iterator[Engine]:
    with postgres_server.database() as url:
        engine = create_engine(url)
        yield engine
        engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A service on an empty database: PostgreSQL's is made once for this file, because making one takes a second."""
    if request.param == "sqlite":
        engine = create_engine(request.getfixturevalue("sqlite_url"))
        yield Stage(engine)
        engine.dispose()
        return
    engine = request.getfixturevalue("postgres_engine")
    yield Stage(engine)
    with engine.begin() as connection:
        there = sa.MetaData()
        there.reflect(connection)
        there.drop_all(connection)


def driver(session: Session) -> Any:
    return session.connection().connection.driver_connection


def by_text(statement: str) -> Callable[[Session], object]:
    return lambda session: session.execute(sa.text(statement))


def by_the_driver(call: str) -> Callable[[Session], object]:
    return lambda session: getattr(driver(session), call)()


def by_the_drivers_cursor(statement: str) -> Callable[[Session], object]:
    return lambda session: driver(session).cursor().execute(statement)


def beginning_anew(end: Callable[[Session], object]) -> Callable[[Session], object]:
    def work(session: Session) -> None:
        end(session)
        session.execute(sa.text("BEGIN"))

    return work


def swallowing(end: Callable[[Session], object]) -> Callable[[Session], object]:
    def work(session: Session) -> None:
        try:
            end(session)
        except Exception:  # noqa: BLE001 - as handlers do
            return

    return work


def committing_by_itself(session: Session) -> None:
    driver(session).rollback()
    driver(session).autocommit = True


WAYS: dict[str, Callable[[Session], object]] = {
    **{text: by_text(text) for text in ("COMMIT", "  commit;", "END", "ROLLBACK", "rollback transaction", "-- done\nCOMMIT")},
    **{text: by_text(text) for text in ("/* done */ COMMIT", "/* undo */ ROLLBACK")},
    **{f"{text}, swallowed": swallowing(by_text(text)) for text in ("/* done */ COMMIT", "/* undo */ ROLLBACK")},
    "; COMMIT": by_the_drivers_cursor("; COMMIT"),
    "the driver's cursor": by_the_drivers_cursor("/* done */ COMMIT"),
    "the driver's commit()": by_the_driver("commit"),
    "the driver's commit(), swallowed": swallowing(by_the_driver("commit")),
    "the driver's rollback()": by_the_driver("rollback"),
    "the connection's rollback()": lambda session: session.connection().rollback(),
    "the connection's commit()": lambda session: session.connection().commit(),
    "ROLLBACK and BEGIN": beginning_anew(by_text("/* undo */ ROLLBACK")),
    "COMMIT and BEGIN": beginning_anew(swallowing(by_text("/* done */ COMMIT"))),
}
#: Not on SQLite: it takes one statement at a time, and its driver has no such thing.
OF_POSTGRES: dict[str, Callable[[Session], object]] = {
    "SELECT 1; COMMIT": by_text("SELECT 1; COMMIT"),
    "ABORT": by_text("ABORT"),
    "ROLLBACK; SELECT 1": by_text("ROLLBACK; SELECT 1"),
    "COMMIT AND CHAIN": by_text("COMMIT AND CHAIN"),
    "PREPARE TRANSACTION": by_text("PREPARE TRANSACTION 'theirs'"),
    "the driver's autocommit": committing_by_itself,
}


def settle(stage: Stage, *numbers: int) -> None:
    """Settle one batch as a worker does."""
    rng = random.Random(1)
    attempts = Attempts(stage.deliveries, QUICK, Pause("exports", QUICK, threading.Event(), rng), rng)
    attempts.settle([arrival(message(number)) for number in numbers], lambda _settled: None)


def seen_by_others(engine: Engine, table: sa.Table) -> int:
    with engine.connect().execution_options(outbox_read_only=True) as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


@pytest.mark.parametrize("way", [*WAYS, *OF_POSTGRES])
def test_who_ends_the_transaction_is_parked_and_everybody_else_applied_once(stage: Stage, way: str) -> None:
    if way in OF_POSTGRES and stage.engine.dialect.name != "postgresql":
        pytest.skip("only PostgreSQL knows it")

    def end(received: Any, session: Session) -> None:
        if received.data["number"] == CULPRIT:
            session.execute(stage.recorder.effects.insert().values(message_id="half", number=-1, late=False))
            {**WAYS, **OF_POSTGRES}[way](session)

    stage.recorder.before = end
    settle(stage, *sorted([*INNOCENTS, CULPRIT]))
    assert [effect.number for effect in stage.seen if effect.number in INNOCENTS] == INNOCENTS
    assert [effect for effect in stage.seen if effect.number == -1] == []  # nothing of the culprit's either
    (parked,) = stage.parked
    assert (parked.reason, b'{"number":%d}' % CULPRIT in parked.body) == (Reason.FAILED, True)
    assert parked.error.startswith("outbox.consumer.outcomes.HandlerMistake: a handler ")
    assert (stage.status.applied_total, stage.status.duplicates_total) == (len(INNOCENTS), 0)
    stage.recorder.before = None
    settle(stage, 20)  # the connection is as good as new
    assert stage.seen[-1].number == 20


@pytest.mark.parametrize("way", ["/* done */ COMMIT", "the driver's commit()"])
def test_a_process_that_dies_right_after_a_handlers_commit_has_lost_nothing(stage: Stage, way: str) -> None:
    class Death(BaseException):
        """Ends the process before anything can be put right."""

    def die(received: Any, session: Session) -> None:
        if received.data["number"] == CULPRIT:
            swallowing(WAYS[way])(session)
            raise Death

    stage.recorder.before = die
    batch = [arrival(message(number)) for number in sorted([*INNOCENTS, CULPRIT])]
    with pytest.raises((Death, HandlerMistake)):
        stage.settled(*batch)
    assert rows(stage.engine, tables.inbox) == []  # nobody will be taken for a duplicate
    assert stage.seen == []  # and nobody be applied twice


def test_a_handler_may_check_its_own_deferred_constraints(stage: Stage) -> None:
    if stage.engine.dialect.name != "postgresql":
        pytest.skip("SQLite has no SET CONSTRAINTS")
    with stage.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE own (id int PRIMARY KEY CONSTRAINT own_one UNIQUE DEFERRABLE)"))
    stage.recorder.before = lambda _message, session: session.execute(sa.text("SET CONSTRAINTS own_one IMMEDIATE"))
    settle(stage, 1, 2)
    assert [effect.number for effect in stage.seen] == [1, 2]


def test_a_session_that_is_used_after_the_handler_returned_says_so(stage: Stage) -> None:
    kept: list[Session] = []
    stage.recorder.before = lambda _message, session: kept.append(session)
    settle(stage, 1)
    with pytest.raises(SQLAlchemyError, match="closed"):
        kept[0].execute(stage.recorder.effects.insert().values(message_id="late", number=2, late=False))
