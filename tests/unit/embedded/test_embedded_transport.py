"""What the embedded broker does beyond, or other than, RabbitMQ; what both do is in `tests/contract/test_embedded_kombu.py`."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import amqp.exceptions
import pytest
from kombu.entity import Exchange, Queue
from kombu.messaging import Consumer

from outbox.embedded import connection as connect
from outbox.embedded.file import BrokerFileError
from outbox.embedded.ownership import Delivery, Ownership
from outbox.embedded.queues import Publication, Queues

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.db"


@pytest.fixture
def queues(path: Path) -> Iterator[Queues]:
    with Queues(path) as opened:
        opened.declare_queue("exports")
        opened.bind("exports", "#", exchange="openevent")
        yield opened


@pytest.fixture
def connection(path: Path) -> Iterator[Any]:
    with connect(f"embedded:///{path}") as connection:
        yield connection


def _publish(queues: Queues, *bodies: bytes, **headers: str) -> None:
    queues.publish("openevent", [Publication("session.modified", body, {"headers": headers}) for body in bodies])


def _consume(connection: Any, prefetch: int = 10, queue: str = "exports", **options: Any) -> list[Any]:
    got: list[Any] = []
    consumer: Any = Consumer(  # type: ignore[no-untyped-call]
        connection.channel(),
        [Queue(queue, no_declare=True)],  # type: ignore[no-untyped-call]
        on_message=got.append,
        prefetch_count=prefetch,
        **options,
    )
    consumer.consume()
    return got


def _drain(connection: Any, count: int) -> None:
    for _ in range(count):
        connection.drain_events(timeout=5)


def test_a_compression_header_expands_nothing(queues: Queues, connection: Any) -> None:
    bomb = zlib.compress(b"0" * 1_000_000)
    _publish(queues, bomb, compression="application/x-gzip")
    got = _consume(connection)
    _drain(connection, 1)
    assert got[0].body == bomb
    assert got[0].headers["compression"] == "application/x-gzip"
    assert got[0].errors == []


def test_a_requeued_message_keeps_its_place(queues: Queues, connection: Any) -> None:
    _publish(queues, b"1", b"2", b"3")
    got = _consume(connection)
    _drain(connection, 1)
    got[0].requeue()
    _drain(connection, 3)
    assert [message.body for message in got] == [b"1", b"1", b"2", b"3"]


def test_whatever_the_prefetch_of_earlier_owners_the_order_of_the_rows_stays(queues: Queues, path: Path) -> None:
    _publish(queues, b"1", b"2", b"3", b"4", b"5")
    for prefetch, expected in ((5, b"12345"), (2, b"12"), (4, b"1234"), (0, b"12345")):
        with connect(f"embedded:///{path}") as connection:
            got = _consume(connection, prefetch)
            _drain(connection, len(expected))
            assert b"".join(message.body for message in got) == expected


def test_a_cancelled_consumer_keeps_the_queue_until_it_has_settled_what_it_holds(queues: Queues, path: Path) -> None:
    """RabbitMQ lets the next one start at once, with later messages of the same key."""
    _publish(queues, b"1", b"2", b"3")
    with connect(f"embedded:///{path}") as first, connect(f"embedded:///{path}") as second:
        got = _consume(first, prefetch=2)
        _drain(first, 2)
        got[0].channel.basic_cancel(got[0].delivery_info["consumer_tag"])
        following = _consume(second)
        got[0].ack()
        with pytest.raises(TimeoutError):
            second.drain_events(timeout=0.1)
        got[1].ack()
        _drain(second, 1)
        assert [message.body for message in following] == [b"3"]


def test_a_consumer_that_cancels_with_nothing_in_hand_frees_the_queue(queues: Queues, connection: Any) -> None:
    channel = connection.channel()
    channel.basic_consume("exports", "tag", print)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    assert queues.depth("exports").consumed
    channel.basic_cancel("tag")
    assert not queues.depth("exports").consumed


def test_two_consumers_of_one_connection_take_turns(queues: Queues, connection: Any) -> None:
    queues.declare_queue("mail")
    queues.bind("mail", "#", exchange="openevent")
    _publish(queues, *[b"%d" % number for number in range(4)])
    exports, mail = _consume(connection), _consume(connection, queue="mail")
    _drain(connection, 4)
    assert (len(exports), len(mail)) == (2, 2)


def test_a_full_queue_does_not_starve_another_one(queues: Queues, connection: Any) -> None:
    _publish(queues, *[b"%d" % number for number in range(2000)])
    queues.declare_queue("mail")
    queues.bind("mail", "#", exchange="openevent")
    mail, exports = _consume(connection, queue="mail"), _consume(connection)
    _drain(connection, 1)
    _publish(queues, b"a letter")
    while not mail:
        if not exports[-1].acknowledged:
            exports[-1].ack()
        _drain(connection, 1)
    assert len(exports) < 1000


def test_messages_taken_and_not_yet_delivered_still_count_as_waiting(queues: Queues, connection: Any) -> None:
    """A worker that drains asks this before it ends: taken ahead is not done."""
    _publish(queues, b"1", b"2", b"3")
    got = _consume(connection)
    _drain(connection, 1)
    channel = got[0].channel
    assert channel.queue_declare("exports", passive=True).message_count == 2
    _drain(connection, 1)
    assert channel.queue_declare("exports", passive=True).message_count == 1


def test_no_timeout_looks_once(queues: Queues, connection: Any) -> None:
    got = _consume(connection)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    _publish(queues, b"1")
    connection.drain_events(timeout=0)
    assert [message.body for message in got] == [b"1"]


def test_a_message_that_commits_just_after_a_look_found_nothing_is_delivered(
    queues: Queues, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Ownership.take
    looks: list[list[Delivery]] = []

    def look_and_miss(self: Ownership, count: int) -> list[Delivery]:
        found = look(self, count)
        if not looks:
            _publish(queues, b"1")
        looks.append(found)
        return found

    monkeypatch.setattr(Ownership, "take", look_and_miss)
    got = _consume(connection)
    _drain(connection, 1)
    assert looks[0] == []
    assert [message.body for message in got] == [b"1"]


def test_a_connection_says_where_it_leads(connection: Any, path: Path) -> None:
    assert connection.as_uri() == f"embedded:///{path}"
    assert str(path) in repr(connection)
    assert connection.clone().as_uri() == connection.as_uri()


def test_a_connection_connects_again_after_it_was_dropped(queues: Queues, connection: Any) -> None:
    _publish(queues, b"1")
    _consume(connection)
    _drain(connection, 1)
    connection.collect()
    assert not connection.connected
    got = _consume(connection)
    _drain(connection, 1)
    assert got[0].delivery_info["redelivered"]


def test_a_file_that_cannot_be_used_is_a_named_error(path: Path) -> None:
    path.write_bytes(b"no database" * 100)
    with pytest.raises(BrokerFileError, match="file is not a database"):
        connect(f"embedded:///{path}").connect()  # type: ignore[no-untyped-call]


def test_a_removed_file_ends_the_connection(queues: Queues, connection: Any, path: Path) -> None:
    got = _consume(connection)
    _publish(queues, b"1")
    _drain(connection, 1)
    path.unlink()
    with pytest.raises(connection.connection_errors, match="was removed or replaced"):
        connection.drain_events(timeout=5)
    assert not connection.connected
    with pytest.raises(connection.connection_errors, match="closed"):
        got[0].ack()


def test_an_acknowledgement_that_a_full_disk_refuses_ends_the_connection_and_the_message_comes_again(
    queues: Queues, connection: Any, path: Path
) -> None:
    _publish(queues, b"1")
    got = _consume(connection)
    _drain(connection, 1)
    file = connection.connection.queues.file
    with file.reading() as rows:
        rows.execute("CREATE TEMP TRIGGER full BEFORE DELETE ON message BEGIN SELECT raise(FAIL, 'disk is full'); END")
    with pytest.raises(amqp.exceptions.RecoverableConnectionError, match="disk is full"):
        got[0].ack()
    assert not connection.connected
    with connect(f"embedded:///{path}") as following:
        again = _consume(following)
        _drain(following, 1)
        assert again[0].body == b"1"


@pytest.mark.parametrize(
    ("declare", "what"),
    [
        (lambda channel: channel.exchange_declare("x", type="fanout"), "fanout"),
        (lambda channel: channel.exchange_declare("x", type="topic", auto_delete=True), "auto_delete"),
        (lambda channel: channel.queue_declare("q", exclusive=True), "exclusive"),
        (lambda channel: channel.queue_declare("q", auto_delete=True), "auto_delete"),
        (lambda channel: channel.queue_declare(""), "nameless"),
        (lambda channel: channel.basic_qos(100, 0, False), "prefetch_size"),
        (lambda channel: channel.basic_qos(0, 10, True), "apply_global"),
        (lambda channel: channel.basic_consume("exports", "tag", print, no_ack=True), "no_ack"),
    ],
)
def test_what_it_does_not_have_is_refused(queues: Queues, connection: Any, declare: Any, what: str) -> None:
    with pytest.raises(amqp.exceptions.AMQPNotImplementedError, match=what):
        declare(connection.default_channel)


def test_quorum_and_dead_letter_arguments_are_accepted(queues: Queues, connection: Any) -> None:
    arguments = {
        "x-queue-type": "quorum",
        "x-single-active-consumer": True,
        "x-delivery-limit": 1000,
        "x-dead-letter-exchange": "openevent.dead",
    }
    exchange = Exchange("openevent", type="topic", durable=True)  # type: ignore[no-untyped-call]
    queue: Any = Queue("mail", exchange, "session.*", durable=True, queue_arguments=arguments)  # type: ignore[no-untyped-call]
    queue(connection).declare()
    queue(connection).declare()
    assert [binding.pattern for binding in queues.bindings("openevent") if binding.queue == "mail"] == ["session.*"]


def test_a_queue_in_use_or_with_messages_is_deleted_only_when_that_was_meant(queues: Queues, connection: Any) -> None:
    channel = connection.channel()
    _publish(queues, b"1")
    with pytest.raises(amqp.exceptions.PreconditionFailed):
        channel.queue_delete("exports", if_empty=True)
    _consume(connection)
    _drain(connection, 1)
    with pytest.raises(amqp.exceptions.PreconditionFailed):
        channel.queue_delete("exports", if_unused=True)
    assert channel.queue_delete("exports") == 1


def test_a_consumer_tag_is_used_once_on_a_channel(queues: Queues, connection: Any) -> None:
    channel = connection.channel()
    channel.basic_consume("exports", "tag", print)
    with pytest.raises(amqp.exceptions.NotAllowed, match="tag"):
        channel.basic_consume("exports", "tag", print)


def test_acknowledging_everything_with_tag_zero_settles_all(queues: Queues, connection: Any) -> None:
    _publish(queues, b"1", b"2")
    got = _consume(connection)
    _drain(connection, 2)
    got[0].channel.basic_ack(0, multiple=True)
    got[0].channel.basic_ack(0, multiple=True)
    assert (queues.depth("exports").ready, queues.depth("exports").leased) == (0, 0)
