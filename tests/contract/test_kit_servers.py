"""The private servers keep what the fault tests build on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pika
import psycopg
import pytest
from sqlalchemy import create_engine, text

from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from pika.adapters.blocking_connection import BlockingChannel

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


def _publish(channel: BlockingChannel, body: bytes) -> None:
    channel.basic_publish("", "kept", body, pika.BasicProperties(delivery_mode=2), mandatory=True)


def test_a_crash_of_rabbitmq_keeps_what_was_confirmed(private_rabbit: Callable[[], RabbitServer]) -> None:
    server = private_rabbit()
    connection = pika.BlockingConnection(pika.URLParameters(server.url))
    channel = connection.channel()
    channel.queue_declare("kept", durable=True, arguments={"x-queue-type": "quorum"})
    channel.confirm_delivery()
    _publish(channel, b"confirmed")
    server.kill()
    with pytest.raises(pika.exceptions.AMQPConnectionError):
        connection.process_data_events(time_limit=10)
    server.start()
    with pika.BlockingConnection(pika.URLParameters(server.url)) as again:
        body = eventually(lambda: again.channel().basic_get("kept")[2], what="the message after the crash")
    assert body == b"confirmed"


def test_a_memory_alarm_blocks_publishers_until_it_is_cleared(private_rabbit: Callable[[], RabbitServer]) -> None:
    server = private_rabbit()
    states: list[str] = []
    connection = pika.BlockingConnection(pika.URLParameters(server.url))
    connection.add_on_connection_blocked_callback(lambda *_: states.append("blocked"))
    connection.add_on_connection_unblocked_callback(lambda *_: states.append("unblocked"))
    channel = connection.channel()
    channel.queue_declare("alarmed", durable=True)
    server.set_memory_alarm()
    channel.basic_publish("", "alarmed", b"")  # the broker blocks those who publish
    eventually(lambda: connection.process_data_events(0.05) or states, what="connection.blocked")
    server.clear_memory_alarm()
    eventually(lambda: connection.process_data_events(0.05) or len(states) > 1, what="connection.unblocked")
    assert states == ["blocked", "unblocked"]
    connection.close()


def test_all_connections_can_be_closed_from_the_brokers_side(private_rabbit: Callable[[], RabbitServer]) -> None:
    server = private_rabbit()
    connection = pika.BlockingConnection(pika.URLParameters(server.url))
    server.close_all_connections("for a test")
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="for a test"):
        connection.process_data_events(time_limit=10)


def test_a_lent_rabbitmq_is_empty_and_healthy_whatever_the_last_test_did(
    private_rabbit: Callable[[], RabbitServer],
) -> None:
    server = private_rabbit()
    with pika.BlockingConnection(pika.URLParameters(server.url)) as connection:
        connection.channel().queue_declare("left_behind", durable=True)
    server.set_memory_alarm()
    server.suspend()
    server.heal()
    assert server.management.request("GET", "queues") == []
    with pika.BlockingConnection(pika.URLParameters(server.url)) as connection:
        channel = connection.channel()
        channel.queue_declare("new", durable=True)
        channel.confirm_delivery()
        channel.basic_publish("", "new", b"", mandatory=True)


def test_an_orderly_stop_tells_the_clients(private_rabbit: Callable[[], RabbitServer]) -> None:
    server = private_rabbit()
    connection = pika.BlockingConnection(pika.URLParameters(server.url))
    server.stop()
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="320"):
        connection.process_data_events(time_limit=10)
    assert not server.running
