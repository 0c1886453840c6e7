"""What is refused, in which words, and that nothing commits without its message afterwards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session

from outbox import CaptureError, ConfigurationError, InvalidMessage, Outbox, OutboxError, database, migrations
from outbox.database import create_engine
from tests.integration.capture.conftest import Base, Talk, World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy.engine import Engine


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


def test_bytes_over_the_limit_are_refused(world: World) -> None:
    world.begin()
    world.outbox.send("a.b", b"y" * 262_144, content_type="application/octet-stream")
    with pytest.raises(InvalidMessage, match="must be bytes, at most OUTBOX_MAX_BODY=262144 of them"):
        world.outbox.send("a.b", b"y" * 262_145, content_type="application/octet-stream")


@pytest.mark.parametrize("content_type", ["text/json", "application/vnd.talk+json", "application/json; charset=utf-8"])
def test_bytes_that_say_they_are_json_are_that(world: World, content_type: str) -> None:
    world.begin()
    world.outbox.send("a.b", '{"title": "é"}'.encode(), content_type=content_type)
    for wrong in (b"{", b"", '"é"'.encode("latin-1")):
        with pytest.raises(InvalidMessage, match=r"the data is no JSON in UTF-8, which content type .*json.* says it is"):
            world.outbox.send("a.b", wrong, content_type=content_type)


def nested(depth: int) -> list[Any]:
    data: list[Any] = ["[{"]
    for _ in range(depth - 1):
        data = [data]
    return data


def test_data_that_a_decoder_might_find_too_deep_is_refused(world: World) -> None:
    world.begin()
    world.outbox.send("a.b", nested(200))
    world.outbox.send("a.b", [{"[": "]"}] * 500)
    with pytest.raises(InvalidMessage, match="nested deeper than 200 lists and objects; send it flatter"):
        world.outbox.send("a.b", nested(201))
    with pytest.raises(InvalidMessage, match="nested deeper than 200"):
        world.outbox.send("a.b", b"[" * 201 + b"]" * 201, content_type="text/json")


def test_headers_that_no_frame_would_hold_are_refused_together(world: World) -> None:
    world.begin()
    world.outbox.send("a.b", 1, headers={f"name{number}": "é" * 120 for number in range(8)})
    with pytest.raises(
        InvalidMessage, match="the 9 headers have 2259 bytes together, more than 2048; send long texts in the data"
    ):
        world.outbox.send("a.b", 1, headers={f"name{number}": "x" * 240 for number in range(9)})


@dataclass
class Sale:
    item_id: int = 1


@pytest.mark.parametrize("sender", [{"event_id": 1}, [1], (1,), {1}, Sale()], ids=lambda sender: type(sender).__name__)
def test_data_in_the_place_of_the_sender_is_refused(world: World, sender: object) -> None:
    session = world.begin()
    with pytest.raises(
        InvalidMessage, match=f"the sender is a {type(sender).__name__}, which looks like the data; the sender c"
    ):
        world.signal.send(sender)
    with pytest.raises(CaptureError, match="can only be rolled back"):
        session.commit()


def test_a_service_that_is_a_dataclass_may_be_the_sender(world: World) -> None:
    session = world.begin()
    world.signal.send(Sale(), event_id=1, n=1)
    session.commit()
    assert world.numbers() == [1]


def test_data_without_a_name_is_refused(world: World) -> None:
    world.begin()
    signal: Any = world.signal
    with pytest.raises(InvalidMessage, match=r"signal 'talks_modified': 2 arguments of send\(\) .* have no name; .*event_id=7"):
        signal.send(None, 1, "accepted", event_id=1)
    with pytest.raises(InvalidMessage, match="1 arguments of send"):
        asyncio.run(signal.send_async(None, {"event_id": 1}))


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
    assert world.numbers() == [1]


@pytest.mark.parametrize("header", [{"CC": "x"}, {"type": "x"}, {"x-match": "x"}, {"Tenant": "x"}, {"a": "é\n"}])
def test_reserved_and_impossible_headers_are_refused(world: World, header: dict[str, str]) -> None:
    world.begin()
    with pytest.raises(InvalidMessage, match="header"):
        world.outbox.send("a.b", 1, headers=header)


@pytest.mark.parametrize("part", ["connection", "transaction"])
def test_a_commit_beneath_the_session_does_not_leave_its_messages_behind(world: World, part: str) -> None:
    session = world.begin()
    session.add(Talk(title="one"))
    session.flush()
    world.send()
    connection: Any = session.connection()
    beneath = connection if part == "connection" else connection.get_transaction()
    with pytest.raises(CaptureError, match=r"signal 'talks_modified' sent; call session.commit\(\)"):
        beneath.commit()
    session.rollback()
    assert world.rows() == []
    session.begin()
    assert session.scalars(sa.select(Talk.title)).all() == []
    world.send()
    session.add(Talk(title="two"))
    session.commit()
    assert len(world.rows()) == 1


def test_autocommit_is_refused(world: World) -> None:
    engine = world.engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(engine) as session:
        session.begin()
        with pytest.raises(CaptureError, match="AUTOCOMMIT"):
            world.outbox.send("a.b", 1, session=session)
        session.rollback()
    with engine.connect() as connection, connection.begin(), pytest.raises(CaptureError, match="AUTOCOMMIT"):
        world.outbox.send("a.b", 1, session=connection)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Engine]:
    """A second database with the tables of the application and of the outbox."""
    engine = create_engine(f"sqlite:///{tmp_path}/other.db")
    migrations.upgrade(engine)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_a_write_to_a_second_database_in_the_transaction_is_refused(world: World, other: Engine) -> None:
    elsewhere = {"bind_arguments": {"bind": other}}
    session = world.begin()
    session.execute(sa.text("SELECT 1"))
    session.execute(sa.insert(Talk).values(title="there"), **elsewhere)
    with pytest.raises(
        CaptureError, match=r"second database: it wrote to .*other\.db, and the outbox tables are in .*Outbox\(eng"
    ):
        world.send()
    session.rollback()
    session.begin()
    world.send()
    session.execute(sa.insert(Talk).values(title="there"), **elsewhere)
    with pytest.raises(CaptureError, match="second database"):
        session.commit()
    session.rollback()
    assert world.rows() == []


def test_a_database_that_was_only_read_is_no_second_one(world: World, other: Engine) -> None:
    """Reads of a replica, writes on the primary."""
    elsewhere = {"bind_arguments": {"bind": other}}
    session = world.begin()
    assert session.scalars(sa.select(Talk), **elsewhere).all() == []
    session.execute(sa.text("/* a hint */ WITH one AS (SELECT 1) SELECT * FROM one"), **elsewhere)
    session.add(Talk(title="here"))
    session.flush()
    world.send(n=1)
    session.scalars(sa.select(Talk), **elsewhere).all()
    session.commit()
    assert world.numbers() == [1]


class RoutingSession(Session):
    """The recipe of SQLAlchemy's documentation: reads go to a replica, writes to the primary."""

    primary: Engine
    replica: Engine

    def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> Engine:
        writes = self._flushing or isinstance(clause, (sa.Update, sa.Delete, sa.Insert))
        return self.primary if writes else self.replica


def test_a_session_that_reads_from_a_replica_sends_with_the_engine_of_the_outbox(world: World, other: Engine) -> None:
    RoutingSession.primary, RoutingSession.replica = world.engine, other
    outbox = Outbox(source="/tests", engine=world.engine)
    with RoutingSession() as session:
        assert session.scalars(sa.select(Talk)).all() == []
        session.add(Talk(title="one"))
        session.flush()
        outbox.send("a.b", {"n": 1}, session=session)
        session.commit()
        session.add(Talk(title="two"))
        session.flush()
        with pytest.raises(CaptureError, match=r"second database: it wrote to .*Outbox\(engine=…\)"):
            Outbox(source="/tests").send("a.b", {"n": 2}, session=session)
    assert world.numbers() == [1]


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


@pytest.mark.parametrize("source", [async_sessionmaker(), 42, Session])
def test_what_gives_no_session_is_refused(source: Any) -> None:
    with pytest.raises(OutboxError, match="session="):
        Outbox(session=source, source="/x")


def test_without_any_session_the_next_step_is_named() -> None:
    from blinker import Signal

    signal, outbox = Signal(), Outbox(source="/x")
    outbox.capture(signal, topic="a.b")
    with pytest.raises(CaptureError, match=r"no session can be found for it; send inside `with app\.app_context\(\):`"):
        signal.send(None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sorce": "/x"}, r"OUTBOX_SORCE \(argument\) is no setting; did you mean OUTBOX_SOURCE\?"),
        ({"max_body": "lots", "window": 0}, r"OUTBOX_MAX_BODY=lots \(argument\): .*\nOUTBOX_WINDOW=0 \(argument\)"),
        ({"engine": "sqlite:///shop.db"}, "engine= got str, no engine; give what create_engine returned"),
    ],
)
def test_what_an_outbox_can_not_be_made_with_is_refused_where_it_is_made(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Outbox(**arguments)


def test_what_an_outbox_is_made_with_may_only_fit_what_is_set_elsewhere() -> None:
    Outbox(lease="5s", source=None)  # shorter than the default of OUTBOX_CONFIRM_TIMEOUT, which the environment may say


def test_what_is_no_signal_can_not_be_captured() -> None:
    with pytest.raises(ConfigurationError, match=r"'sold' is no Blinker signal; give one, such as Namespace\(\)\.signal"):
        Outbox(source="/x").capture("sold", topic="item.sold")  # type: ignore[arg-type]
