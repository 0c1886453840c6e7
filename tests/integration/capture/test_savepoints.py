"""A message shares the fate of the rows beside it, in savepoints of sessions and of connections."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from outbox import CaptureError, InvalidMessage
from tests.integration.capture.conftest import Talk, World


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
    assert world.numbers() == [1, 2, 4]


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
    assert world.numbers() == [1, 3]


def test_the_outer_transaction_may_commit_over_an_open_savepoint(world: World) -> None:
    session = world.begin()
    root = session.get_transaction()
    assert root is not None
    world.send(n=1)
    session.begin_nested()
    world.send(n=2)
    root.commit()
    assert world.numbers() == [1, 2]


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
    assert world.numbers() == [2]


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


def test_a_refused_message_is_not_outrun_by_a_commit_over_an_open_savepoint(world: World) -> None:
    session = world.begin()
    root = session.get_transaction()
    assert root is not None
    with pytest.raises(InvalidMessage):
        world.send(event_id=None)
    session.begin_nested()
    with pytest.raises(CaptureError, match=r"can only be rolled back: signal 'talks_modified': key .* flush before you send"):
        root.commit()
    session.rollback()


def test_what_a_flush_before_a_savepoint_sends_belongs_to_the_outer_transaction(world: World) -> None:
    def on_flush(_session: Session, _context: object) -> None:
        world.send(n=1)

    session = world.begin()
    session.add(Talk(title="flushed by begin_nested, before the SAVEPOINT"))
    event.listen(session, "after_flush", on_flush)
    savepoint = session.begin_nested()
    event.remove(session, "after_flush", on_flush)
    savepoint.rollback()
    session.commit()
    assert world.numbers() == [1]


# --- savepoints that the session did not make ---------------------------------------------------------------------------


def test_a_savepoint_of_the_session_inside_one_of_the_connection_goes_with_it(world: World) -> None:
    session = world.begin()
    outer = session.connection().begin_nested()
    with session.begin_nested():
        session.add(Talk(title="inside"))
        session.flush()
        world.send(n=1)
    outer.rollback()
    world.send(n=2)
    session.commit()
    assert world.numbers() == [2]


def test_a_savepoint_of_the_session_decides_inside_one_of_the_connection(world: World) -> None:
    session = world.begin()
    session.connection().begin_nested()
    savepoint = session.begin_nested()  # no SAVEPOINT yet: the session sends it with the first statement
    world.send(n=1)
    savepoint.rollback()
    session.commit()
    assert world.rows() == []


def test_inside_a_savepoint_of_the_connection_no_message_overtakes_one_of_its_key(world: World) -> None:
    session = world.begin()
    world.send(n=1)
    savepoint = session.connection().begin_nested()
    world.send(event_id=2, n=2)
    with pytest.raises(CaptureError, match=r"an earlier message of key 'event:1' waits .* use session\.begin_nested"):
        world.send(n=3)
    savepoint.rollback()
    with pytest.raises(CaptureError, match="can only be rolled back"):
        session.commit()
    session.rollback()
    assert world.rows() == []


# --- sessions joined to a transaction of others -------------------------------------------------------------------------

JOIN_MODES: tuple[Any, ...] = ("create_savepoint", "rollback_only", "conditional_savepoint", "control_fully")


@pytest.mark.parametrize("mode", JOIN_MODES[:3])
@pytest.mark.parametrize("keep", [True, False], ids=["outer commits", "outer rolls back"])
def test_a_joined_session_that_commits_shares_the_end_of_the_outer_transaction(world: World, mode: Any, keep: bool) -> None:
    with world.engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode=mode) as session:
            session.add(Talk(title="beside it"))
            world.outbox.send("a.b", 1, session=session)
            session.commit()
        if keep:
            outer.commit()
        else:
            outer.rollback()
    assert len(world.rows()) == talks(world) == keep


@pytest.mark.parametrize("mode", JOIN_MODES)
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
def test_a_joined_session_has_a_message_exactly_where_it_has_the_row(world: World, mode: Any, end: str) -> None:
    """Whatever the mode makes of commit, rollback and close, inside an outer savepoint or not."""
    for outer_savepoint in (False, True):
        with world.engine.connect() as connection:
            connection.begin()
            if outer_savepoint:
                connection.begin_nested()
            session = Session(connection, join_transaction_mode=mode)
            session.add(Talk(title=f"{outer_savepoint}"))
            session.flush()
            with session.begin_nested():
                world.outbox.send("a.b", 1, key="k", session=session)
            getattr(session, end)()
            session.close()
            if connection.in_transaction():
                connection.commit()
        assert len(world.rows()) == talks(world)


def test_after_a_refusal_in_a_joined_session_the_outer_transaction_cannot_commit(world: World) -> None:
    with world.engine.connect() as connection:
        connection.begin()
        session = Session(connection)
        session.add(Talk(title="beside it"))
        session.flush()
        with pytest.raises(InvalidMessage):
            world.outbox.send("a.b", object(), session=session)
        session.close()
        connection.commit()
    assert talks(world) == 0


def test_a_refusal_before_any_work_of_a_joined_session_leaves_the_outer_transaction_alone(world: World) -> None:
    with world.engine.connect() as connection:
        connection.begin()
        connection.execute(sa.insert(Talk).values(title="of somebody else"))
        with Session(connection) as session, pytest.raises(CaptureError, match="no transaction is open on the session"):
            world.outbox.send("a.b", 1, session=session)
        connection.commit()
    assert talks(world) == 1


def talks(world: World) -> int:
    with world.engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(Talk)) or 0
