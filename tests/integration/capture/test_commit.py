"""What happens around the commit: other listeners, flushes inside it, failures of it, two phases."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from outbox import CaptureError, InvalidMessage, Outbox, SchemaError, migrations, tables
from outbox.database import create_engine
from tests.integration.capture.conftest import Talk, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kit.servers import PostgresServer


def test_sent_by_another_listener_of_the_commit_it_is_still_in(world: World) -> None:
    def last_minute(_session: Session) -> None:
        world.send(n=2)

    session = world.begin()
    event.listen(session, "before_commit", last_minute)
    world.send(n=1)
    session.commit()
    event.remove(session, "before_commit", last_minute)
    assert world.numbers() == [1, 2]


def test_sent_by_a_flush_inside_the_commit_it_is_still_in(world: World) -> None:
    def on_flush(_session: Session, _context: object) -> None:
        world.send(n=2)

    session = world.begin()
    event.listen(session, "after_flush", on_flush)
    session.add(Talk(title="x"))
    session.commit()
    event.remove(session, "after_flush", on_flush)
    assert world.numbers() == [2]


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


def test_what_the_flush_of_the_commit_sends_comes_after_what_was_sent_before(world: World) -> None:
    def on_flush(_session: Session, _context: object) -> None:
        world.send(n=2)

    session = world.begin()
    world.send(n=1)
    session.add(Talk(title="x"))
    event.listen(session, "after_flush", on_flush)
    session.commit()
    event.remove(session, "after_flush", on_flush)
    assert world.numbers() == [1, 2]
    assert [row.sequence for row in world.rows()] == [1, 2]


def test_a_listener_of_the_commit_may_use_savepoints(world: World) -> None:
    def listen(current: Session) -> None:
        lost = current.begin_nested()
        world.send(n=2)
        lost.rollback()
        world.send(n=3)
        with current.begin_nested():
            world.send(n=4)

    session = world.begin()
    world.send(n=1)
    event.listen(session, "before_commit", listen, once=True)
    session.commit()
    assert world.numbers() == [1, 3, 4]


def test_a_commit_that_a_listener_stopped_can_be_tried_again(world: World) -> None:
    def stop(_session: Session) -> None:
        event.remove(session, "before_commit", stop)
        raise RuntimeError("not yet")

    session = world.begin()
    world.send(n=1)
    event.listen(session, "before_commit", stop)
    with pytest.raises(RuntimeError, match="not yet"):
        session.commit()
    world.send(n=2)
    with session.begin_nested():
        world.send(n=3)
    session.commit()
    assert world.numbers() == [1, 2, 3]


def test_sent_after_the_release_of_a_savepoint_by_its_listener_it_is_refused(world: World) -> None:
    def too_late(_session: Session) -> None:
        world.send()

    session = world.begin()
    savepoint = session.begin_nested()
    event.listen(session, "after_commit", too_late)
    with pytest.raises(CaptureError, match="committed already"):
        savepoint.commit()
    event.remove(session, "after_commit", too_late)
    session.close()


def test_sent_after_a_failed_flush_it_is_refused(world: World) -> None:
    session = world.begin()
    session.add_all([Talk(title="same"), Talk(title="same")])
    with pytest.raises(IntegrityError):
        session.flush()
    with pytest.raises(CaptureError, match=r"takes no more work in this transaction .* roll back first"):
        world.send()
    session.rollback()


@pytest.mark.parametrize("table", ["outbox_key", "outbox_message", "outbox_pending"])
def test_a_batch_that_cannot_be_written_leaves_only_the_rollback(world: World, table: str) -> None:
    session = world.begin()
    world.send(n=1, secret="the payload")
    session.execute(sa.text(f"ALTER TABLE {table} RENAME TO elsewhere"))
    with pytest.raises(SchemaError, match="run: outbox migrate") as refused:
        session.commit()
    assert f"missing in {session.get_bind().engine.url}, or older" in str(refused.value)
    assert "the payload" not in "".join(traceback.format_exception(refused.value))
    with pytest.raises(CaptureError, match="can only be rolled back"):
        session.commit()
    session.rollback()
    assert world.rows() == []
    session.begin()
    world.send(n=2)
    session.commit()
    assert [row.sequence for row in world.rows()] == [1]


def test_payloads_are_in_no_error_of_the_database(world: World) -> None:
    engine = sa.create_engine(world.engine.url)  # shows parameters, unlike ours
    with Session(engine) as session:
        session.begin()
        world.outbox.send("a.b", {"secret": "the payload"}, session=session)
        if engine.dialect.name == "postgresql":  # numbers are 64 bits wide: there is no next one
            session.execute(sa.insert(tables.key).values(key="k", sequence=2**63 - 1))
        else:
            session.execute(sa.text("CREATE TRIGGER no BEFORE INSERT ON outbox_pending BEGIN SELECT raise(ABORT, 'no'); END"))
        world.outbox.send("a.b", {"secret": "the payload"}, key="k", session=session)
        with pytest.raises(DBAPIError) as failed:
            session.commit()
        session.rollback()
    engine.dispose()
    assert "the payload" not in str(failed.value)


def test_two_phases_commit_a_message_like_one(private_postgres: Callable[..., PostgresServer]) -> None:
    engine = create_engine(private_postgres(max_prepared_transactions=5).url)
    migrations.upgrade(engine)
    outbox = Outbox(source="/tests")
    for end in ("commit", "rollback"):
        with Session(engine, twophase=True) as session:
            session.execute(sa.text("SELECT 1"))
            outbox.send(f"first.{end}", 1, key="k", session=session)
            session.prepare()
            with pytest.raises(CaptureError, match="prepared for its commit"):
                outbox.send("second", 1, session=session)
            getattr(session, end)()
    with engine.connect() as connection:
        assert connection.scalars(sa.select(tables.pending.c.topic)).all() == ["first.commit"]
    engine.dispose()


def test_a_listener_may_roll_back_the_savepoint_that_the_outer_commit_found_open(world: World) -> None:
    session = world.begin()
    root, savepoint = session.get_transaction(), session.begin_nested()
    assert root is not None

    def listen(_session: Session) -> None:
        savepoint.rollback()

    savepoint.rollback()
    world.send(n=1)
    savepoint = session.begin_nested()
    world.send(n=2)
    event.listen(session, "before_commit", listen, once=True)
    root.commit()
    assert world.numbers() == [1]


def test_nothing_is_written_on_the_way_of_a_rollback_after_a_commit_that_failed(world: World) -> None:
    session = world.begin()
    world.send(n=1)
    with pytest.raises(InvalidMessage):
        world.send(n=object())
    session.begin_nested()
    with pytest.raises(InvalidMessage):
        world.send(n=object())
    with pytest.raises(CaptureError, match="can only be rolled back"):
        session.commit()
    session.rollback()
    world.begin()
    world.send(n=2)
    session.commit()
    assert world.numbers() == [2]
