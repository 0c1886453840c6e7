"""What capture reads of SQLAlchemy that has no public name: these tests fail before an upgrade can lose a message."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from outbox.capture.outcomes import savepoints
from outbox.capture.transactions import is_under_way
from outbox.database import prepare


def test_the_open_savepoints_of_a_connection_are_known_innermost_first() -> None:
    with prepare(sa.create_engine("sqlite://")).connect() as connection:
        connection.begin()
        assert savepoints(connection) == []
        outer = connection.begin_nested()
        inner = connection.begin_nested()
        assert savepoints(connection) == [inner, outer]
        assert len({inner._savepoint, outer._savepoint}) == 2
        inner.rollback()
        assert savepoints(connection) == [outer]


def test_who_opened_the_connection_of_a_session_is_known() -> None:
    engine = sa.create_engine("sqlite://")
    seen = []

    def after_begin(_session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        *_, opened_by_session = transaction._connections[connection]
        seen.append(opened_by_session)

    with engine.connect() as connection:
        for session in (Session(engine), Session(connection), Session(binds={sa.Table("t", sa.MetaData()): connection})):
            event.listen(session, "after_begin", after_begin)
            session.connection(bind_arguments={"bind": session.bind or connection})
            session.close()
    assert seen == [True, False, False]


def test_the_isolation_level_that_an_engine_was_made_with_is_known() -> None:
    assert sa.create_engine("sqlite://", isolation_level="AUTOCOMMIT").dialect._on_connect_isolation_level == "AUTOCOMMIT"
    assert sa.create_engine("sqlite://").dialect._on_connect_isolation_level is None


def test_a_transaction_that_is_being_ended_is_known_from_one_whose_savepoint_ends() -> None:
    seen: list[tuple[str, bool]] = []
    session = Session(sa.create_engine("sqlite://"))

    def after_end(_session: Session, ended: SessionTransaction) -> None:
        if ended.nested:
            seen.append((program, is_under_way(root)))

    event.listen(session, "after_transaction_end", after_end)
    for program in ("savepoint.commit", "savepoint.rollback", "session.rollback", "root.commit"):
        root = session.begin()
        savepoint = session.begin_nested()
        getattr({"savepoint": savepoint, "session": session, "root": root}[program.split(".")[0]], program.split(".")[1])()
        session.rollback()
    assert seen == [
        ("savepoint.commit", False),
        ("savepoint.rollback", False),
        ("session.rollback", False),
        ("root.commit", True),
    ]
