"""Sending, on SQLite and PostgreSQL: what is written, when, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session

from outbox import CaptureError, InvalidMessage, Outbox, OutboxError, database, tables
from outbox.database import create_engine
from tests.integration.capture.conftest import Talk, World

if TYPE_CHECKING:
    from pathlib import Path


# --- what is written ----------------------------------------------------------------------------------------------------


def test_a_commit_writes_the_message_a_rollback_does_not(world: World) -> None:
    session = world.begin()
    session.add(Talk(title="one"))
    world.send(session_id=7)
    session.commit()
    session.begin()
    world.send(session_id=8)
    session.rollback()
    (row,) = world.rows()
    assert json.loads(row.body) == {"event_id": 1, "session_id": 7}
    assert (row.topic, row.key, row.sequence, row.state, row.attempts) == ("talk.modified", "event:1", 1, "pending", 0)


def test_the_body_is_frozen_when_the_signal_is_sent(world: World) -> None:
    session = world.begin()
    data = {"title": "before"}
    world.send(talk=data)
    data["title"] = "after"
    session.commit()
    assert json.loads(world.rows()[0].body)["talk"] == {"title": "before"}


def test_numbers_follow_the_order_of_sending_per_key_and_return_on_rollback(world: World) -> None:
    session = world.begin()
    for event_id in (2, 1, 2, 2, 1):
        world.send(event_id=event_id)
    session.commit()
    session.begin()
    world.send(event_id=2)
    session.rollback()
    session.begin()
    world.send(event_id=2)
    world.outbox.send("free", {})
    session.commit()
    assert world.numbered() == [
        ("event:2", 1), ("event:1", 1), ("event:2", 2), ("event:2", 3), ("event:1", 2), ("event:2", 4), (None, None),
    ]  # fmt: skip


def test_one_commit_is_one_statement_on_postgresql_however_many_signals(world: World) -> None:
    expected = 1 if world.engine.dialect.name == "postgresql" else 4
    for count in (1, 200):
        session = world.begin()
        session.execute(sa.text("SELECT 1"))
        for number in range(count):
            world.send(event_id=number % 7)
        with statements(world) as seen:
            session.commit()
        assert len(seen) == expected, seen


class Colour(Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    at: date


def test_what_applications_have_in_hand_can_be_sent(world: World) -> None:
    session = world.begin()
    moment = datetime(2026, 5, 1, 12, tzinfo=UTC)
    id_ = UUID(int=7)
    world.send(when=moment, price=Decimal("1.10"), id=id_, colour=Colour.RED, point=Point(1, date(2026, 5, 1)), text="é\u2028")
    session.commit()
    assert json.loads(world.rows()[0].body) == {
        "event_id": 1, "when": "2026-05-01T12:00:00Z", "price": "1.10", "id": str(id_), "colour": "red",
        "point": {"x": 1, "at": "2026-05-01"}, "text": "é\u2028",
    }  # fmt: skip


def test_send_returns_the_id_and_takes_headers_and_other_content(world: World) -> None:
    session = world.begin()
    id_ = world.outbox.send("file.made", b"%PDF", key="file:1", content_type="application/pdf", headers={"tenant": "a"})
    session.commit()
    (row,) = world.rows()
    assert (row.message_id, bytes(row.body), json.loads(row.headers)) == (id_, b"%PDF", {"tenant": "a"})


def test_unheard_is_stored_with_the_row(world: World) -> None:
    world.outbox.capture(world.signal, topic="whoever.listens", unheard="drop")
    world.begin()
    world.send()
    world.session.commit()
    assert {row.topic: row.unheard for row in world.rows()} == {"talk.modified": "hold", "whoever.listens": "drop"}


def test_a_connection_is_written_on_at_once(world: World) -> None:
    with world.engine.begin() as connection:
        world.outbox.send("a.b", {"n": 1}, session=connection)
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.pending)) == 1
        connection.rollback()
    assert world.rows() == []


def test_a_big_batch_is_written_in_pieces_and_in_order(world: World) -> None:
    session = world.begin()
    for number in range(90):
        world.send(event_id=number % 3, text="x" * 250_000)
    session.commit()
    assert world.numbered() == [(f"event:{n % 3}", n // 3 + 1) for n in range(90)]


# --- savepoints ---------------------------------------------------------------------------------------------------------


def test_a_savepoint_takes_its_messages_with_it(world: World) -> None:
    session = world.begin()
    world.send(n=1)
    with session.begin_nested():
        world.send(n=2)
        inner = session.begin_nested()
        world.send(n=3)
        inner.rollback()
        world.send(n=4)
    lost = session.begin_nested()
    with session.begin_nested():
        world.send(n=5)
    lost.rollback()
    session.commit()
    assert [json.loads(row.body)["n"] for row in world.rows()] == [1, 2, 4]


def test_a_flush_error_inside_a_savepoint_drops_what_the_savepoint_held(world: World) -> None:
    session = world.begin()
    session.add(Talk(title="taken"))
    session.flush()
    world.send(n=1)
    savepoint = session.begin_nested()
    world.send(n=2)
    session.add(Talk(title="taken"))
    with pytest.raises(IntegrityError):
        session.flush()
    savepoint.rollback()
    world.send(n=3)
    session.commit()
    assert [json.loads(row.body)["n"] for row in world.rows()] == [1, 3]


def test_the_outer_transaction_may_commit_over_an_open_savepoint(world: World) -> None:
    session = world.begin()
    root = session.get_transaction()
    assert root is not None
    world.send(n=1)
    session.begin_nested()
    world.send(n=2)
    root.commit()
    assert [json.loads(row.body)["n"] for row in world.rows()] == [1, 2]


def test_a_savepoint_on_the_connection_itself_decides_too(world: World) -> None:
    session = world.begin()
    connection = session.connection()
    savepoint = connection.begin_nested()
    world.send(n=1)
    savepoint.rollback()
    savepoint = connection.begin_nested()
    world.send(n=2)
    savepoint.commit()
    session.commit()
    assert [json.loads(row.body)["n"] for row in world.rows()] == [2]


@pytest.mark.parametrize("end", ["close", "reset"])
def test_closing_drops_what_was_held_and_says_so(world: World, end: str, caplog: pytest.LogCaptureFixture) -> None:
    session = world.begin()
    world.send()
    with caplog.at_level(logging.WARNING):
        getattr(session, end)()
    assert world.rows() == []
    assert "signal 'talks_modified' as 'talk.modified' (1); call session.commit()" in caplog.text


@pytest.mark.parametrize("end", ["rollback", "failed flush", "rolled back savepoint", "commit"])
def test_an_end_in_good_order_is_not_warned_of(world: World, end: str, caplog: pytest.LogCaptureFixture) -> None:
    session = world.begin()
    with caplog.at_level(logging.WARNING):
        if end == "rolled back savepoint":
            savepoint = session.begin_nested()
            world.send()
            savepoint.rollback()
            session.commit()
        else:
            world.send()
            if end == "failed flush":
                session.add_all([Talk(title="twice"), Talk(title="twice")])
                with pytest.raises(IntegrityError):
                    session.flush()
            if end == "commit":
                session.commit()
            else:
                session.rollback()
        session.close()
    assert caplog.text == ""


def test_closing_after_a_savepoint_was_rolled_back_is_warned_of_all_the_same(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    session = world.begin()
    world.send()
    session.begin_nested().rollback()
    with caplog.at_level(logging.WARNING):
        session.close()
    assert "signal 'talks_modified' as 'talk.modified' (1); call session.commit()" in caplog.text


def test_a_session_joined_to_an_outer_transaction_shares_its_end(world: World) -> None:
    for mode in ("create_savepoint", "rollback_only", "conditional_savepoint"):
        for keep in (True, False):
            before = len(world.rows())
            with world.engine.connect() as connection:
                outer = connection.begin()
                with Session(connection, join_transaction_mode=mode) as session:
                    session.execute(sa.text("SELECT 1"))
                    world.outbox.send("a.b", 1, session=session)
                    session.commit()
                if keep:
                    outer.commit()
                else:
                    outer.rollback()
            assert len(world.rows()) == before + keep, (mode, keep)


# --- at the commit ------------------------------------------------------------------------------------------------------


def test_sent_by_another_listener_of_the_commit_it_is_still_in(world: World) -> None:
    def last_minute(_session: Session) -> None:
        world.send(n=2)

    session = world.begin()
    event.listen(session, "before_commit", last_minute)
    world.send(n=1)
    session.commit()
    event.remove(session, "before_commit", last_minute)
    assert [json.loads(row.body)["n"] for row in world.rows()] == [1, 2]


def test_sent_by_a_flush_inside_the_commit_it_is_still_in(world: World) -> None:
    def on_flush(_session: Session, _context: object) -> None:
        world.send(n=2)

    session = world.begin()
    event.listen(session, "after_flush", on_flush)
    session.add(Talk(title="x"))
    session.commit()
    event.remove(session, "after_flush", on_flush)
    assert [json.loads(row.body)["n"] for row in world.rows()] == [2]


def test_sent_after_the_commit_it_is_refused(world: World) -> None:
    def too_late(_session: Session) -> None:
        world.send()

    session = world.begin()
    session.execute(sa.text("SELECT 1"))
    event.listen(session, "after_commit", too_late)
    with pytest.raises(CaptureError, match="committed already"):
        session.commit()
    event.remove(session, "after_commit", too_late)


def test_a_failed_commit_leaves_nothing(world: World) -> None:
    session = world.begin()
    session.add(Talk(title="same"))
    session.flush()
    world.send()
    session.add(Talk(title="same"))
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()
    assert world.rows() == []


# --- refused ------------------------------------------------------------------------------------------------------------


def test_without_a_transaction_it_is_refused(world: World) -> None:
    with pytest.raises(CaptureError, match="signal 'talks_modified': no transaction is open on the session"):
        world.send()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"x": float("nan")}, r"data\.x is nan"),
        ({"x": [1, {"y": {1, 2}}]}, r"data\.x\[1\]\.y is a set"),
        ({"x": Talk(title="t")}, r"data\.x is a Talk, a database object"),
        ({"x": "\ud800"}, r"data\.x is text that UTF-8 can't express"),
        ({"event_id": None}, "event_id is None; flush before you send"),
        ({"x": "y" * 300_000}, "more than OUTBOX_MAX_BODY=262144"),
        ({"event_id": "k" * 256}, "key .* has 262 bytes"),
    ],
)
def test_what_cannot_be_a_message_is_refused_and_dooms_the_transaction(world: World, data: dict[str, Any], words: str) -> None:
    session = world.begin()
    session.add(Talk(title="beside it"))
    with pytest.raises(InvalidMessage, match=f"signal 'talks_modified': .*{words}"):
        world.send(**data)
    with pytest.raises(CaptureError, match="can only be rolled back"):
        session.commit()
    session.rollback()
    assert world.rows() == []
    assert session.scalar(sa.select(sa.func.count()).select_from(Talk)) == 0


def test_a_cycle_is_refused(world: World) -> None:
    world.begin()
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(InvalidMessage, match="contains itself"):
        world.send(x=cycle)


def test_a_refusal_inside_a_savepoint_dooms_the_savepoint_alone(world: World) -> None:
    session = world.begin()
    world.send(n=1)
    savepoint = session.begin_nested()
    with pytest.raises(InvalidMessage):
        world.send(event_id=None)
    with pytest.raises(CaptureError, match="can only be rolled back"):
        savepoint.commit()
    savepoint.rollback()
    session.commit()
    assert [json.loads(row.body)["n"] for row in world.rows()] == [1]


@pytest.mark.parametrize("header", [{"CC": "x"}, {"type": "x"}, {"x-match": "x"}, {"Tenant": "x"}, {"a": "é\n"}])
def test_reserved_and_impossible_headers_are_refused(world: World, header: dict[str, str]) -> None:
    world.begin()
    with pytest.raises(InvalidMessage, match="header"):
        world.outbox.send("a.b", 1, headers=header)


def test_autocommit_is_refused(world: World) -> None:
    engine = world.engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(engine) as session:
        session.begin()
        with pytest.raises(CaptureError, match="AUTOCOMMIT"):
            world.outbox.send("a.b", 1, session=session)
        session.rollback()
    with engine.connect() as connection, connection.begin(), pytest.raises(CaptureError, match="AUTOCOMMIT"):
        world.outbox.send("a.b", 1, session=connection)


def test_a_second_database_in_the_transaction_is_refused(world: World, tmp_path: Path) -> None:
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    session = world.begin()
    session.execute(sa.text("SELECT 1"))
    session.connection(bind_arguments={"bind": other})
    with pytest.raises(CaptureError, match="second database"):
        world.send()
    session.rollback()
    session.begin()
    world.send()
    session.connection(bind_arguments={"bind": other})
    with pytest.raises(CaptureError, match="second database"):
        session.commit()
    session.rollback()
    assert world.rows() == []
    other.dispose()


def test_a_sqlite_engine_without_begin_is_refused_in_a_savepoint(world: World, tmp_path: Path) -> None:
    raw = sa.create_engine(f"sqlite:///{tmp_path}/raw.db")
    with Session(raw) as session:
        session.begin()
        session.begin_nested()
        session.execute(sa.text("SELECT 1"))
        with pytest.raises(CaptureError, match=r"outbox\.database\.prepare"):
            world.outbox.send("a.b", 1, session=session)
        session.rollback()
    assert not database.is_prepared(raw)


@pytest.mark.parametrize("source", [async_sessionmaker(), 42])
def test_what_gives_no_session_is_refused(source: Any) -> None:
    with pytest.raises(OutboxError, match="session="):
        Outbox(session=source, source="/x")


def test_without_any_session_the_next_step_is_named() -> None:
    from blinker import Signal

    signal, outbox = Signal(), Outbox(source="/x")
    outbox.capture(signal, topic="a.b")
    with pytest.raises(CaptureError, match=r"no session can be found for it; send inside `with app\.app_context\(\):`"):
        signal.send(None)


# --- PostgreSQL: several writers ----------------------------------------------------------------------------------------


def test_two_commits_of_the_same_keys_in_opposite_order_do_not_deadlock(world: World) -> None:
    def write(order: tuple[int, ...]) -> None:
        with Session(world.engine) as session, session.begin():
            for event_id in order:
                world.outbox.send("a.b", 1, key=f"event:{event_id}", session=session)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, [(1, 2, 3), (3, 2, 1)] * 25))
    for number in (1, 2, 3):
        assert [s for k, s in world.numbered() if k == f"event:{number}"] == list(range(1, 51))


def statements(world: World) -> Any:
    """Collect the statements sent inside the block, BEGIN and COMMIT not counted."""
    return _Statements(world)


class _Statements:
    def __init__(self, world: World) -> None:
        self._engine = world.engine
        self.seen: list[str] = []

    def __enter__(self) -> list[str]:
        event.listen(self._engine, "before_cursor_execute", self._note)
        return self.seen

    def __exit__(self, *_: object) -> None:
        event.remove(self._engine, "before_cursor_execute", self._note)

    def _note(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            self.seen.append(statement)
