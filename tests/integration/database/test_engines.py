"""What an engine does when its server changes under it, or is gone."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError

from outbox import database
from outbox.database import Role

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Spawn


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_demoted_primary_is_left_for_another_connection(postgres_url: str, driver: str) -> None:
    engine = database.create_engine(postgres_url.replace("+psycopg:", f"+{driver}:"))
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


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has these options")
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("role", Role)
def test_both_ends_of_a_connection_notice_that_the_other_is_gone(postgres_url: str, driver: str, role: Role) -> None:
    engine = database.create_engine(postgres_url.replace("+psycopg:", f"+{driver}:"), role=role)
    with engine.connect() as connection:
        driver_connection: Any = connection.connection.driver_connection
        with socket.socket(fileno=os.dup(driver_connection.fileno())) as ours:
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            assert [ours.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [5, 5, 3, 15_000]
        shown = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")
        assert [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in shown] == ["5", "5", "3", "15000"]
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_whose_a_session_is_can_be_seen_at_the_server(postgres_url: str, driver: str) -> None:
    url = postgres_url.replace("+psycopg:", f"+{driver}:")
    engine = database.create_engine(url, role=Role.SERVICE, name="exports")
    with engine.connect() as connection:
        name = connection.exec_driver_sql("SHOW application_name").scalar()
    assert name == f"outbox exports {socket.gethostname()[:30]}:{os.getpid()}"
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_relay_whose_database_accepts_and_is_silent_at_the_start_ends_on_sigterm(
    driver: str, spawn: Spawn, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+{driver}://u@127.0.0.1:{silent.getsockname()[1]}/shop?connect_timeout=2"
        process = spawn("outbox", "relay", env={"DATABASE_URL": url, "BROKER_URL": f"embedded:///{tmp_path}/broker.db"})
        silent.settimeout(30)
        with silent.accept()[0]:
            process.terminate()
            assert process.wait() == 0
