"""What an engine does when its server changes under it."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError

from outbox import database


def test_a_demoted_primary_is_left_for_another_connection(postgres_url: str) -> None:
    engine = database.create_engine(postgres_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n integer)")
    with engine.connect() as connection:
        connection.exec_driver_sql("SET default_transaction_read_only = on")  # what a write on a standby is answered
        connection.commit()
        with pytest.raises(DBAPIError) as raised:
            connection.exec_driver_sql("INSERT INTO t VALUES (1)")
    assert raised.value.connection_invalidated
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")
    engine.dispose()
