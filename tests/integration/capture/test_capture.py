"""What is written for a signal, on SQLite and PostgreSQL."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import tables
from tests.integration.capture.conftest import Talk, World
from tests.kit.costs import statements


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
    keys = 7
    for count in (1, 200):
        expected = 1 if world.engine.dialect.name == "postgresql" else 3 + min(count, keys)
        session = world.begin()
        session.execute(sa.text("SELECT 1"))
        for number in range(count):
            world.send(event_id=number % keys)
        with statements(world.engine) as seen:
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


def test_two_commits_of_the_same_keys_in_opposite_order_do_not_deadlock(world: World) -> None:
    def write(order: tuple[int, ...]) -> None:
        with Session(world.engine) as session, session.begin():
            for event_id in order:
                world.outbox.send("a.b", 1, key=f"event:{event_id}", session=session)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, [(1, 2, 3), (3, 2, 1)] * 25))
    for number in (1, 2, 3):
        assert [s for k, s in world.numbered() if k == f"event:{number}"] == list(range(1, 51))
