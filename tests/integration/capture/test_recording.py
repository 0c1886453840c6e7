"""What tests and operators see of captured messages: recordings and counters."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from outbox import InvalidMessage, Outbox
from tests.integration.capture.conftest import Talk, World, counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import Connection

    from outbox import Message


def bodies(messages: Sequence[Message]) -> list[bytes]:
    return [message.body for message in messages]


# --- record() -----------------------------------------------------------------------------------------------------------


def test_a_recording_shows_what_committed_and_what_is_pending(world: World) -> None:
    with world.outbox.record() as messages:
        assert messages == []
        session = world.begin()
        world.outbox.send("a.b", 1)
        assert bodies(messages) == [b"1"]
        session.commit()
        session.begin()
        world.outbox.send("a.b", 2)
    assert bodies(messages) == [b"1", b"2"]
    world.outbox.send("a.b", 3)
    assert bodies(messages) == [b"1", b"2"]
    session.commit()


def test_what_is_rolled_back_leaves_the_recording_also_after_it_ended(world: World) -> None:
    session = world.begin()
    with world.outbox.record() as messages:
        world.outbox.send("a.b", 1)
        with session.begin_nested() as lost:
            world.outbox.send("a.b", 2)
            lost.rollback()
        with session.begin_nested():
            world.outbox.send("a.b", 3)
        with pytest.raises(InvalidMessage):
            world.outbox.send("a.b", object())
        assert bodies(messages) == [b"1", b"3"]
    session.rollback()
    assert messages == []


def test_a_closed_session_and_a_failed_commit_leave_nothing_in_the_recording(world: World) -> None:
    with world.outbox.record() as messages:
        world.begin()
        world.outbox.send("a.b", 1)
        world.session.close()
        assert messages == []
        session = world.begin()
        world.outbox.send("a.b", 2)
        session.add_all([Talk(title="same"), Talk(title="same")])
        with pytest.raises(IntegrityError):
            session.commit()
        session.rollback()
        assert messages == []


def test_a_recording_follows_connections_and_joined_sessions_too(world: World) -> None:
    with world.outbox.record() as messages, world.engine.connect() as connection:
        connection.begin()
        world.outbox.send("a.b", 1, session=connection)
        savepoint = connection.begin_nested()
        world.outbox.send("a.b", 2, session=connection)
        with Session(connection) as session:
            session.execute(sa.text("SELECT 1"))
            world.outbox.send("a.b", 3, session=session)
            session.commit()
        assert bodies(messages) == [b"1", b"2", b"3"]
        savepoint.rollback()
        assert bodies(messages) == [b"1"]
        connection.rollback()
        assert messages == []
        connection.begin()
        world.outbox.send("a.b", 4, session=connection)
        connection.commit()
        connection.begin()
        connection.rollback()
        assert bodies(messages) == [b"4"]


def test_a_recording_is_of_one_outbox_and_may_hold_another(world: World) -> None:
    other = Outbox(session=world.sessions, source="/other")
    with world.outbox.record() as outer, other.record() as others, world.outbox.record() as inner:
        world.begin()
        world.outbox.send("a.b", 1)
        other.send("a.b", 2)
        world.session.commit()
    assert (bodies(outer), bodies(inner), bodies(others)) == ([b"1"], [b"1"], [b"2"])


# --- counters -----------------------------------------------------------------------------------------------------------


def test_what_commits_is_counted_once_at_the_outermost_commit(world: World) -> None:
    topic = "counted.captured"
    before = counted("outbox_captured_total", topic)
    session = world.begin()
    world.outbox.send(topic, 1)
    with session.begin_nested():
        world.outbox.send(topic, 2)
    with session.begin_nested() as lost:
        world.outbox.send(topic, 3)
        lost.rollback()
    assert counted("outbox_captured_total", topic) == before
    session.commit()
    assert counted("outbox_captured_total", topic) == before + 2
    with world.engine.connect() as connection:
        for end in (connection.rollback, connection.commit):
            connection.begin()
            world.outbox.send(topic, 4, session=connection)
            end()
    assert counted("outbox_captured_total", topic) == before + 3


@pytest.mark.parametrize("end", ["close", "reset"])
def test_closing_without_commit_is_one_warning_and_is_counted(world: World, end: str, caplog: pytest.LogCaptureFixture) -> None:
    before = counted("outbox_uncommitted_total", "talk.modified")
    session = world.begin()
    world.send()
    with session.begin_nested():
        world.send()
    session.begin_nested().rollback()
    getattr(session, end)()
    (warning,) = caplog.records
    assert (warning.levelno, warning.getMessage()) == (
        logging.WARNING,
        "sent, but neither committed nor rolled back, so nobody will hear of it: signal 'talks_modified' as 'talk.modified' "
        "(2); call session.commit() after send()",
    )
    assert counted("outbox_uncommitted_total", "talk.modified") == before + 2


def test_a_session_that_an_error_closes_was_not_forgotten(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), Session(world.engine) as session:  # noqa: PT012
        session.begin()
        world.outbox.send("a.b", 1, session=session)
        raise ZeroDivisionError
    session = world.begin()
    world.send()
    session.rollback()
    assert caplog.records == []


def test_a_joined_session_that_committed_has_forgotten_nothing_whatever_the_connection_does(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The recipe of SQLAlchemy's documentation for tests: the outermost transaction is rolled back after each."""
    app = Flask("tested")
    world.outbox.init_app(app)
    with world.engine.connect() as connection:
        outer = connection.begin()
        session = Session(connection, join_transaction_mode="create_savepoint")
        with world.outbox.record() as messages:
            for end in (session.commit, lambda: None):
                with app.app_context():
                    session.add(Talk(title=f"number {len(messages)}"))
                    session.flush()
                    with session.begin_nested():
                        world.outbox.send("a.b", 1, session=session)
                    end()
        assert len(messages) == 2
        session.close()
        outer.rollback()
    assert messages == []
    (warning,) = caplog.messages
    assert "neither committed nor rolled back" in warning
    assert "outbox.send() as 'a.b' (1)" in warning


def test_what_fails_to_commit_on_a_connection_is_neither_counted_nor_recorded(world: World) -> None:
    topic = "counted.failed"
    before = counted("outbox_captured_total", topic)
    with world.outbox.record() as messages, world.engine.connect() as connection:
        connection.begin()
        fail_at_commit(connection)
        world.outbox.send(topic, 1, session=connection)
        with pytest.raises(IntegrityError):
            connection.commit()
        connection.rollback()
        assert messages == []
        with connection.begin():
            world.outbox.send(topic, 2, session=connection)
    assert bodies(messages) == [b"2"]
    assert counted("outbox_captured_total", topic) == before + 1


def fail_at_commit(connection: Connection) -> None:
    """Violate a constraint that is only looked at by the COMMIT."""
    connection.execute(sa.text("CREATE TABLE a (n INTEGER PRIMARY KEY)"))
    connection.execute(sa.text("CREATE TABLE b (n INTEGER REFERENCES a (n) DEFERRABLE INITIALLY DEFERRED)"))
    connection.execute(sa.text("INSERT INTO b VALUES (1)"))
