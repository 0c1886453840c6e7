"""What a handler may do wrong: its message alone is parked, and everybody else's applied, once."""

from __future__ import annotations

import dataclasses
import random
import sqlite3
import tempfile
import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from outbox.consumer import delivery, operating, tables, telemetry
from outbox.consumer.delivery import LARGE_BYTES
from outbox.consumer.exclusive import Turnstile
from outbox.consumer.outcomes import HandlerMistake
from outbox.consumer.parking import Aside
from outbox.consumer.redrive import Redriver
from outbox.consumer.retries import Attempts, Pause
from outbox.consumer.tables import Reason, State
from outbox.database import create_engine
from outbox.message import Received, received
from tests.kit.consuming import QUICK, Stage, arrival, message, rows, series
from tests.kit.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

    from outbox.consumer.delivery import Arrival

#: In the middle of the batch.
CULPRIT = 4
INNOCENTS = [1, 2, 3, 5, 6, 7, 8]


@pytest.fixture
def stage(engine: Engine) -> Stage:
    return Stage(engine)


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


def settle(stage: Stage, *numbers: int) -> Pause:
    """Settle one batch as a worker does."""
    return settle_arrivals(stage, [arrival(message(number)) for number in numbers])


def settle_arrivals(stage: Stage, batch: list[Arrival]) -> Pause:
    rng = random.Random(1)
    pause = Pause("exports", QUICK, threading.Event(), rng)
    Attempts(stage.deliveries, QUICK, pause, rng).settle(batch, lambda _settled: None)
    return pause


def the_culprit_alone_is_parked(stage: Stage, *, with_nothing_kept: bool = True) -> Any:
    """Return its row; everybody else was applied once."""
    numbers = sorted(effect.number for effect in stage.seen)
    assert [number for number in numbers if with_nothing_kept or number in INNOCENTS] == INNOCENTS
    (parked,) = stage.parked
    assert (parked.reason, b'{"number":%d}' % CULPRIT in parked.body) == (Reason.FAILED, True)
    assert (stage.status.applied_total, stage.status.duplicates_total) == (len(INNOCENTS), 0)
    return parked


@pytest.mark.filterwarnings("ignore:transaction already deassociated")  # what SQLAlchemy says of one of these mistakes
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
    # Outside of any transaction, a statement is kept at once: that of the culprit, and no other's.
    parked = the_culprit_alone_is_parked(stage, with_nothing_kept=way != "the driver's autocommit")
    assert parked.error.startswith("outbox.consumer.outcomes.HandlerMistake: a handler ")
    stage.recorder.before = None
    settle(stage, 20)  # the connection is as good as new
    assert stage.seen[-1].number == 20


def test_who_goes_on_after_sqlite_rolled_back_by_itself_keeps_nothing(stage: Stage) -> None:
    if stage.engine.dialect.name != "sqlite":
        pytest.skip("a transaction of PostgreSQL does not end by an error")

    def lose_the_transaction(received: Any, session: Session) -> None:
        if received.data["number"] == CULPRIT:  # then goes on, and writes as all do
            session.execute(sa.text("CREATE TABLE own (id INTEGER PRIMARY KEY)"))
            session.execute(sa.text("INSERT INTO own VALUES (1)"))
            swallowing(by_text("INSERT OR ROLLBACK INTO own VALUES (1)"))(session)

    stage.recorder.before = lose_the_transaction
    settle(stage, *sorted([*INNOCENTS, CULPRIT]))
    assert "went on after an error" in the_culprit_alone_is_parked(stage).error


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
    stage.recorder.before = by_all_constraints
    settle(stage, 3)
    assert "SET CONSTRAINTS ALL (name your own constraints)" in stage.parked[0].error


def by_all_constraints(_message: Any, session: Session) -> None:
    session.execute(sa.text("SET CONSTRAINTS ALL IMMEDIATE"))


def test_a_session_that_is_used_after_the_handler_returned_says_so(stage: Stage) -> None:
    kept: list[Session] = []
    stage.recorder.before = lambda _message, session: kept.append(session)
    settle(stage, 1)
    with pytest.raises(SQLAlchemyError, match="closed"):
        kept[0].execute(stage.recorder.effects.insert().values(message_id="late", number=2, late=False))


# --- errors that look like the database's ------------------------------------------------------------------------------


def connection_gone(session: Session) -> None:
    session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))


def statement(text: str) -> Callable[[Session], object]:
    return lambda session: session.execute(sa.text(text))


def another_database_is_away(_session: Session) -> None:
    psycopg.connect(host="127.0.0.1", port=free_port(), dbname="theirs", connect_timeout=5)


def another_file_is_locked(_session: Session) -> None:
    """Two connections to a database of the handler's own."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (sqlite3.connect(f"{folder}/theirs.db", timeout=0) for _ in range(2))
        try:
            first.execute("BEGIN EXCLUSIVE")
            second.execute("BEGIN EXCLUSIVE")
        finally:
            first.close()
            second.close()


def out_of_connections(_session: Session) -> None:
    raise sa.exc.TimeoutError("QueuePool limit of size 5 overflow 10 reached, connection timed out")


def interrupted(_session: Session) -> None:
    raise KeyboardInterrupt


class GreenTimeout(BaseException):
    """As gevent's."""


def timed_out(_session: Session) -> None:
    raise GreenTimeout


TROUBLES: dict[str, Callable[[Session], object]] = {
    "another database is away": another_database_is_away,
    "another file is locked": another_file_is_locked,
    "a pool of its own is empty": out_of_connections,
    "the connection is invalidated": lambda session: session.connection().invalidate(),
    "what is no Exception": timed_out,
}
TROUBLES_OF_POSTGRES: dict[str, Callable[[Session], object]] = {
    "the connection dies": connection_gone,
    "the connection dies, swallowed": swallowing(connection_gone),
    "the driver's connection is closed": by_the_driver("close"),
    "serialization failure": statement("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$"),
    "deadlock, swallowed": swallowing(statement("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$")),
    "lock not available": statement("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '55P03'; END $$"),
    "a limit of statements": statement("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '53400'; END $$"),
    "a missing file": statement("SELECT pg_read_file('/nonexistent')"),
    "no room": statement("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '53100'; END $$"),
    "read only": lambda session: session.execute(sa.text("SET TRANSACTION READ ONLY")),
    "a prepared statement of nobody": statement("EXECUTE nobody"),
}


@pytest.mark.parametrize("trouble", [*TROUBLES, *TROUBLES_OF_POSTGRES])
def test_an_error_that_one_message_brings_about_stops_nobody_else(stage: Stage, trouble: str) -> None:
    if trouble in TROUBLES_OF_POSTGRES and stage.engine.dialect.name != "postgresql":
        pytest.skip("only PostgreSQL has it")

    def fail(received: Any, session: Session) -> None:
        if received.data["number"] == CULPRIT:
            {**TROUBLES, **TROUBLES_OF_POSTGRES}[trouble](session)

    stage.recorder.before = fail
    pause = settle(stage, *sorted([*INNOCENTS, CULPRIT]))
    the_culprit_alone_is_parked(stage)
    assert pause.problem == ""


def test_what_a_handler_sets_for_the_whole_connection_fails_nobody_else(stage: Stage) -> None:
    if stage.engine.dialect.name != "postgresql":
        pytest.skip("SQLite has no such settings")

    def work(received: Any, session: Session) -> None:
        culprit = received.data["number"] == CULPRIT
        session.execute(sa.text("SET DateStyle = 'German'" if culprit else "SELECT date '02/28/2026'"))

    stage.recorder.before = work
    for number in sorted([*INNOCENTS, CULPRIT]):  # no two in one transaction
        settle(stage, number)
    assert [effect.number for effect in stage.seen] == sorted([*INNOCENTS, CULPRIT])


def test_control_c_is_for_whoever_runs_the_handler_in_the_main_thread(stage: Stage) -> None:
    stage.recorder.before = lambda _message, session: interrupted(session)
    with pytest.raises(KeyboardInterrupt):
        stage.settle(message(1))
    assert rows(stage.engine, tables.inbox) == []


# --- what can't be read any more -----------------------------------------------------------------------------------------


def test_what_can_not_be_decoded_for_want_of_memory_keeps_its_name_and_its_place(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = [dataclasses.replace(each, body=b'{"number":1,"text":"%s"}' % (b"x" * LARGE_BYTES)) for each in series("a", 2)]
    light = [delivery.slim(arrival(each)) for each in [*large, message(3, key="b")]]
    with monkeypatch.context() as patched:
        patched.setattr(delivery, "received", little_memory)
        taken = [delivery.again(each) if each.slim else each for each in light]
        settle_arrivals(stage, taken)
        first, behind = stage.parked
        assert (first.message_id, first.key, first.reason) == (str(large[0].id), "a", Reason.FAILED)
        assert (behind.message_id, behind.key, behind.reason) == (str(large[1].id), "a", Reason.BEHIND)
        assert "MemoryError" in first.error
        replay_all(stage)
        assert {row.state for row in stage.parked} == {State.PARKED, State.BEHIND}
    replay_all(stage)
    assert [effect.key for effect in stage.seen] == ["b", "a", "a"]


def little_memory(body: bytes) -> Received:
    if len(body) > LARGE_BYTES:
        raise MemoryError
    return received(body)


def replay_all(stage: Stage) -> None:
    """Requeue the first of a key, and replay what is due."""
    waiting = [row.message_id for row in stage.parked if row.state == State.PARKED]
    operating.requeue(stage.engine, stage.recorder.service, waiting, actor="me@here")
    rng = random.Random(1)
    pause = Pause("exports", QUICK, threading.Event(), rng)
    redriver = Redriver([Attempts(stage.deliveries, QUICK, pause, rng)], Turnstile(), threading.Event(), batch=10, process="me")
    while redriver.look():
        pass


# --- what can't be written ---------------------------------------------------------------------------------------------


def test_what_can_not_be_parked_as_it_is_is_parked_reduced(stage: Stage) -> None:
    stage.recorder.before = lambda received, _session: 1 / (received.data["number"] - CULPRIT)
    poison = dataclasses.replace(arrival(message(CULPRIT, key="a", sequence=1)), properties={"headers": Unspeakable()})
    settle_arrivals(stage, [arrival(message(1)), poison, *map(arrival, series("a", 2, first=5)), arrival(message(2))])
    first, *behind = stage.parked
    assert (first.reason, first.message_id, first.key) == (Reason.FAILED, poison.identity[1], "a")
    assert (first.body, "ZeroDivisionError" in first.error) == (poison.body, True)
    assert [row.reason for row in behind] == [Reason.BEHIND] * 2
    assert [effect.number for effect in stage.seen] == [1, 2]


class Unspeakable:
    """What can't even be shown."""

    def __repr__(self) -> str:
        raise ValueError("no")


def test_a_key_that_the_database_has_no_letters_for_is_parked_under_a_digest(postgres_engine: Engine) -> None:
    name = f"latin_{random.getrandbits(40)}"
    options = "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    anywhere = postgres_engine.execution_options(isolation_level="AUTOCOMMIT")
    with anywhere.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} {options}"))
    engine = create_engine(postgres_engine.url.set(database=name).render_as_string(hide_password=False))
    try:
        stage = Stage(engine)
        settle_arrivals(stage, [arrival(message(1)), arrival(message(2, key="\N{SNOWMAN}", sequence=1)), arrival(message(3))])
        assert [effect.number for effect in stage.seen] == [1, 3]
        (row,) = stage.parked
        assert row.message_id.startswith("sha256:")
        assert "\N{SNOWMAN}".encode() in row.body
    finally:
        engine.dispose()
        with anywhere.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name}"))


def test_an_error_of_another_database_is_the_handlers_own(stage: Stage) -> None:
    stage.recorder.before = lambda _message, session: another_file_is_locked(session)
    with pytest.raises(sqlite3.OperationalError, match="locked"):  # and not that ours is in trouble
        stage.settle(message(1))


def test_who_asks_again_and_again_for_a_later_time_waits_longer_and_then_for_a_person(stage: Stage) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    asked = Aside(Reason.LATER, "mail server", due_at=now + timedelta(seconds=1))
    waits = [
        asked.after(SimpleNamespace(waiting_since=now - timedelta(minutes=minutes)), now)  # type: ignore[arg-type]
        for minutes in (0, 4, 59, 61)
    ]
    assert [wait.due_at and (wait.due_at - now).total_seconds() for wait in waits] == [1.0, 60.0, 300.0, None]
    assert [wait.reason for wait in waits] == [Reason.LATER] * 3 + [Reason.FAILED]
    nightly = dataclasses.replace(asked, due_at=now + timedelta(hours=8))
    before = SimpleNamespace(waiting_since=now - timedelta(hours=24))
    assert nightly.after(before, now).reason is Reason.LATER  # type: ignore[arg-type]


def test_the_log_of_a_parked_message_says_the_class_and_the_place_and_no_payload(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.recorder.before = lambda received, _session: int(f"secret {received.data}")
    rng = random.Random(1)
    attempts = Attempts(stage.deliveries, QUICK, Pause("exports", QUICK, threading.Event(), rng), rng)
    attempts.settle([arrival(message(1))], lambda results: telemetry.settled(stage.recorder.service, results))
    assert "parked (failed: ValueError at " in caplog.text
    assert "test_mistakes.py" in caplog.text
    assert "secret" not in caplog.text
