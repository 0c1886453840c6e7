"""The private servers keep what the fault tests build on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pika
import psycopg
import pytest
from sqlalchemy import create_engine, text

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kit.servers import ExternalPostgres, ExternalRabbit, PostgresServer, RabbitServer


def _libpq(url: str) -> str:
    return url.replace("postgresql+psycopg:", "postgresql:")


def test_each_test_gets_an_empty_database_of_its_own(postgres_server: PostgresServer | ExternalPostgres) -> None:
    with postgres_server.database() as first, postgres_server.database() as second:
        with psycopg.connect(_libpq(first), autocommit=True) as connection:
            connection.execute("CREATE TABLE only_here (n int)")
        with psycopg.connect(_libpq(second)) as connection:
            assert connection.execute("SELECT to_regclass('only_here')").fetchone() == (None,)


def test_a_database_url_opens_with_sqlalchemy(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar_one() == 1
    engine.dispose()


def test_a_crash_of_postgres_keeps_what_was_committed(private_postgres: Callable[[], PostgresServer]) -> None:
    server = private_postgres()
    url = server.url
    with psycopg.connect(_libpq(url)) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        connection.commit()
        connection.execute("INSERT INTO kept VALUES (1)")
        connection.commit()
        connection.execute("INSERT INTO kept VALUES (2)")
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert not server.running
    server.start()
    assert server.url == url
    with psycopg.connect(_libpq(url)) as connection:
        assert connection.execute("SELECT n FROM kept").fetchall() == [(1,)]


def test_two_virtual_hosts_do_not_see_each_other(rabbit_server: RabbitServer | ExternalRabbit) -> None:
    with rabbit_server.vhost() as first, rabbit_server.vhost() as second:
        with pika.BlockingConnection(pika.URLParameters(first)) as connection:
            connection.channel().queue_declare("only_here", durable=True)
        with (
            pika.BlockingConnection(pika.URLParameters(second)) as connection,
            pytest.raises(pika.exceptions.ChannelClosedByBroker, match="404"),
        ):
            connection.channel().queue_declare("only_here", passive=True)
