"""What capture reads of SQLAlchemy that has no public name: these tests fail before an upgrade can lose a message."""

from __future__ import annotations

import sqlalchemy as sa

from outbox.database import prepare
from outbox.fates import savepoints


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


def test_the_isolation_level_that_an_engine_was_made_with_is_known() -> None:
    assert sa.create_engine("sqlite://", isolation_level="AUTOCOMMIT").dialect._on_connect_isolation_level == "AUTOCOMMIT"
    assert sa.create_engine("sqlite://").dialect._on_connect_isolation_level is None
