from __future__ import annotations

from outbox.embedded import describe


def test_two_files_are_one_machine_and_one_writer_at_a_time() -> None:
    text = describe("sqlite:///instance/outbox.db", "embedded:////srv/broker.db")
    assert "outbox in SQLite, embedded broker in /srv/broker.db" in text
    assert "this machine only" in text
    assert text.count("one transaction at a time writes") == 2
    assert "BROKER_URL=amqp://" in text


def test_an_embedded_broker_beside_a_database_server_keeps_its_own_limits_only() -> None:
    text = describe("postgresql+psycopg://user:secret@db/outbox", "embedded:////srv/broker.db")
    assert "this machine only" in text
    assert text.count("one transaction at a time writes") == 1


def test_sqlite_beside_rabbitmq_is_one_writer_at_a_time() -> None:
    text = describe("sqlite:///outbox.db", "amqp://user:secret@mq:5672/vhost")
    assert "RabbitMQ at mq" in text
    assert "this machine only" not in text
    assert text.count("one transaction at a time writes") == 1


def test_two_servers_have_no_limits_to_tell_and_no_secret_is_told() -> None:
    text = describe("postgresql+psycopg://user:secret@db/outbox", "amqp://user:secret@mq:5672/vhost")
    assert text == "outbox in a database server, RabbitMQ at mq"
