"""A running service, on RabbitMQ with PostgreSQL and embedded with SQLite: what arrives is applied once, or parked."""

from __future__ import annotations

import gzip
import json
import struct
import threading
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pika
import pytest
import sqlalchemy as sa

from outbox.consumer import Retry, Service, heartbeat, operating, provisioning, runtime, tables, topology
from outbox.consumer.tables import Reason, State
from outbox.errors import BrokerError, ConfigurationError, OutboxError, SchemaError, Unavailable
from outbox.message import cloud_event
from tests.kit.consuming import (
    EXCHANGE,
    QUICK,
    TOPIC,
    Desk,
    Recorder,
    Running,
    data,
    message,
    rows,
    running,
    series,
    settings_for,
)
from tests.kit.ports import free_port
from tests.kit.proxy import TO_CLIENT, TO_SERVER, Proxy
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from outbox.settings import Settings

QUEUE = f"{EXCHANGE}.exports"


@dataclass
class Place:
    """A broker and a database."""

    broker_url: str
    database_url: str

    @property
    def desk(self) -> Desk:
        return Desk(self.broker_url)

    def settings(self, **more: str) -> Settings:
        return settings_for(self.broker_url, self.database_url, **more)


@pytest.fixture(params=["rabbitmq-postgres", "embedded-sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "embedded-sqlite":
        return Place(f"embedded:///{tmp_path / 'broker.db'}", f"sqlite:///{tmp_path / 'service.db'}")
    return Place(request.getfixturevalue("broker_url"), request.getfixturevalue("postgres_url"))


@pytest.fixture
def rabbit(broker_url: str, sqlite_url: str) -> Place:
    return Place(broker_url, sqlite_url)


def applied(service: Running, count: int) -> None:
    eventually(lambda: service.status().applied_total >= count, 30, f"{count} messages to be applied")


def by_key(recorder: Recorder, service: Running) -> dict[str | None, list[int]]:
    found: dict[str | None, list[int]] = defaultdict(list)
    for effect in recorder.seen(service.engine):
        found[effect.key].append(effect.number)
    return found


# --- what arrives ------------------------------------------------------------------------------------------------------


def test_every_message_is_applied_once_in_order_within_its_key_and_acknowledged(place: Place) -> None:
    recorder = Recorder()
    keyed = [each for group in zip(*(series(f"key:{number}", 15) for number in range(10)), strict=True) for each in group]
    with running(recorder.service, place.settings(CONSUMER_BATCH="7", CONSUMER_PREFETCH="40")) as service:
        place.desk.publish(*keyed, *[message(number) for number in range(50)], keyed[0], keyed[7])
        eventually(lambda: service.status().duplicates_total == 2, 30, "the duplicates to be recognised")
        applied(service, 200)
        found = by_key(recorder, service)
        assert all(found[f"key:{number}"] == list(range(1, 16)) for number in range(10))
        assert sorted(found[None]) == list(range(50))
        status = service.status()
        assert (status.applied_total, status.late_total, status.gaps_total, status.parked) == (200, 0, 0, 0)
    assert place.desk.left(QUEUE) == 0


def test_a_poisonous_message_is_parked_its_key_waits_behind_it_and_a_requeue_applies_all_in_order(place: Place) -> None:
    broken = threading.Event()
    broken.set()

    def fail(received: Any, _session: Any) -> None:
        if received.key == "bad" and received.sequence == 2 and broken.is_set():
            raise ValueError("no such room: \0 payload")

    recorder = Recorder(before=fail)
    with running(recorder.service, place.settings()) as service:
        bad = series("bad", 6)
        place.desk.publish(*bad, *series("good", 6))
        eventually(lambda: service.status().parked == 5, 20, "the poison and what is behind it to be parked")
        applied(service, 7)
        entries = operating.parked_list(service.engine, service.service)
        assert [(entry.sequence, entry.reason, entry.state) for entry in entries] == [
            (2, Reason.FAILED, State.PARKED),
            *[(number, Reason.BEHIND, State.BEHIND) for number in (3, 4, 5, 6)],
        ]
        (detail,) = operating.parked_show(service.engine, service.service, entries[0].id)
        assert detail.body == cloud_event(bad[1])
        assert (detail.entry.attempts, detail.behind, detail.held_by) == (QUICK.max_attempts, 4, None)
        assert "ValueError: no such room" in (detail.entry.error or "")
        assert "Traceback" in (detail.detail or "")
        (behind,) = operating.parked_show(service.engine, service.service, entries[2].id)
        assert behind.held_by == entries[0].id
        assert service.status().held_keys == 1

        broken.clear()
        assert operating.requeue(service.engine, service.service, [entries[0].id], actor="me@here") == [entries[0].id]
        applied(service, 12)
        place.desk.publish(*series("bad", 2, first=7))
        applied(service, 14)
        assert by_key(recorder, service) == {"bad": list(range(1, 9)), "good": list(range(1, 7))}
        status = service.status()
        assert (status.parked, status.held_keys, status.late_total, status.duplicates_total) == (0, 0, 0, 0)
    assert place.desk.left(QUEUE) == 0


def test_a_discarded_message_lets_those_behind_it_go(place: Place) -> None:
    def fail(received: Any, _session: Any) -> None:
        if received.sequence == 1:
            raise ValueError("no")

    recorder = Recorder(before=fail)
    with running(recorder.service, place.settings()) as service:
        place.desk.publish(*series("a", 3))
        eventually(lambda: service.status().parked == 3)
        first, second, _ = operating.parked_list(service.engine, service.service)
        with pytest.raises(OutboxError, match="only waiting behind"):
            operating.discard(service.engine, service.service, [second.id], actor="me@here", reason="x")
        operating.discard(service.engine, service.service, [first.id], actor="me@here", reason="sent by mistake")
        applied(service, 2)
        assert recorder.numbers(service.engine) == [2, 3]
        (detail,) = operating.parked_show(service.engine, service.service, first.id)
        assert (detail.entry.state, detail.actor, detail.note) == (State.DISCARDED, "me@here", "sent by mistake")
        assert (service.status().parked, service.status().held_keys) == (0, 0)


def test_a_long_retry_is_replayed_by_itself_when_it_is_due(place: Place) -> None:
    back = threading.Event()

    def later(received: Any, _session: Any) -> None:
        if received.sequence == 1 and not back.is_set():
            raise Retry(after=3600, reason="mail server in maintenance")

    recorder = Recorder(before=later)
    with running(recorder.service, place.settings()) as service:
        place.desk.publish(*series("a", 3))
        eventually(lambda: service.status().parked == 3, what="the message and those behind it to be set aside")
        first = operating.parked_list(service.engine, service.service)[0]
        assert (first.reason, first.state) == (Reason.LATER, State.DUE)
        assert service.status().waiting_for_a_person == 0
        back.set()
        with service.engine.begin() as connection:  # an hour passes
            connection.execute(sa.update(tables.parked).where(tables.parked.c.id == first.row).values(due_at=first.parked_at))
        applied(service, 3)
        assert recorder.numbers(service.engine) == [1, 2, 3]


def test_a_short_retry_keeps_the_message_in_hand_and_costs_no_attempt(place: Place) -> None:
    tries = []

    def not_yet(received: Any, _session: Any) -> None:
        if received.sequence == 2:
            tries.append(1)
            if len(tries) < 10:
                raise Retry

    recorder = Recorder(before=not_yet)
    with running(recorder.service, place.settings()) as service:
        place.desk.publish(*series("a", 3))
        applied(service, 3)
        assert recorder.numbers(service.engine) == [1, 2, 3]
        assert service.status().parked == 0


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b'{"specversion":"1.0"}', gzip.compress(b"x" * 10_000, mtime=0)], ids=repr)
def test_what_is_no_message_is_parked_with_its_bytes_and_the_service_goes_on(place: Place, body: bytes) -> None:
    recorder = Recorder()
    with running(recorder.service, place.settings()) as service:
        place.desk.publish(body, message(1))
        applied(service, 1)
        eventually(lambda: service.status().parked == 1)
        (entry,) = operating.parked_list(service.engine, service.service)
        (detail,) = operating.parked_show(service.engine, service.service, entry.id)
        assert (detail.body, entry.reason, entry.topic) == (body, Reason.UNDECODABLE, TOPIC)
    assert place.desk.left(QUEUE) == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gzip", "\U0001f4a9"])
def test_a_body_is_bytes_whatever_encoding_its_properties_name(place: Place, encoding: str) -> None:
    def fail(received: Any, _session: Any) -> None:
        if received.data["number"] == 1:
            raise ValueError("no")

    recorder = Recorder(before=fail)
    odd = '{"text":"\xe4'.encode()
    with running(recorder.service, place.settings()) as service:
        given = {"content_encoding": encoding, "content_type": "text/plain"}
        fails = message(1)
        place.desk.publish(fails, odd, message(2), properties=given)
        applied(service, 1)
        eventually(lambda: service.status().parked == 2, what="both to be parked")
        assert {row.body for row in rows(service.engine, tables.parked)} == {cloud_event(fails), odd}
    assert place.desk.left(QUEUE) == 0


def test_unreadable_messages_with_equal_bytes_are_all_kept_and_a_replay_keeps_them_apart(place: Place) -> None:
    recorder = Recorder()
    with running(recorder.service, place.settings()) as service:
        for number in range(5):
            place.desk.publish(b'{"order":"paid"}', properties={"message_id": str(number)})
        place.desk.publish(b'{"order":"paid"}', properties={"headers": {"id": "0"}})
        eventually(lambda: service.status().parked == 6, what="all to be parked")
        assert service.status().duplicates_total == 0
        before = [entry.id for entry in operating.parked_list(service.engine, service.service)]
        operating.requeue(service.engine, service.service, before, actor="me@here")
        eventually(lambda: service.status().waiting_for_a_person == 6, what="all to be tried and parked again")
        assert [entry.id for entry in operating.parked_list(service.engine, service.service)] == before
    assert place.desk.left(QUEUE) == 0


def test_events_in_binary_mode_are_applied_in_order_and_parked_as_events(place: Place) -> None:
    def fail(received: Any, _session: Any) -> None:
        if received.data["number"] == 3 and not mended.is_set():
            raise ValueError("no")

    mended, recorder = threading.Event(), Recorder(before=fail)
    with running(recorder.service, place.settings()) as service:
        for number in range(1, 6):
            attributes = {"specversion": "1.0", "id": str(number), "source": "/shop", "type": TOPIC, "partitionkey": "a"}
            headers = {f"cloudEvents:{name}": value for name, value in attributes.items()}
            properties = {"content_type": "application/json", "headers": headers}
            place.desk.publish(data(number=number), properties=properties)
        eventually(lambda: service.status().parked == 3, what="the third and those behind it to be parked")
        mended.set()
        operating.requeue(service.engine, service.service, ["3"], actor="me@here")
        applied(service, 5)
        assert recorder.numbers(service.engine, "a") == [1, 2, 3, 4, 5]


def test_a_missing_field_parks_the_message_at_once_with_the_field_named(place: Place) -> None:
    recorder = Recorder()
    with running(recorder.service, place.settings()) as service:
        place.desk.publish(message(body=data(other=1)))
        eventually(lambda: service.status().parked == 1)
        (entry,) = operating.parked_list(service.engine, service.service)
        assert entry.reason == Reason.INCOMPLETE
        assert "number" in (entry.error or "")


def test_a_topic_nobody_handles_any_more_is_parked_and_replayed_once_somebody_does(place: Place) -> None:
    before = Recorder()
    before.service.on("room.modified")(lambda _message, _session, /, **_extra: None)
    with running(before.service, place.settings()):
        pass  # its binding stays
    after = Recorder()
    stray = message(1, key="a", sequence=1, topic="room.modified")
    with running(after.service, place.settings()) as service:
        place.desk.publish(stray, *series("a", 2, first=2))
        applied(service, 2)
        eventually(lambda: service.status().parked == 1)
        assert service.status().held_keys == 0
    repaired = Recorder()
    repaired.service.on("room.modified")(repaired._record)
    with running(repaired.service, place.settings()) as service:
        operating.requeue(service.engine, service.service, [str(stray.id)], actor="me@here")
        applied(service, 3)
        assert repaired.numbers(service.engine) == [2, 3, 1]


# --- stopping ----------------------------------------------------------------------------------------------------------


def test_a_drain_ends_by_itself_when_everything_was_applied_also_what_was_due(place: Place) -> None:
    recorder = Recorder()
    provisioning.apply(recorder.service, place.settings())
    place.desk.publish(*series("a", 30), message(1, topic=TOPIC, body=b"[]"))
    first = Running(recorder.service, place.settings(), drain=True).start(ready=False)
    assert first.join() == 0
    assert recorder.numbers(first.engine) == list(range(1, 31))
    assert first.status().parked == 1
    (entry,) = operating.parked_list(first.engine, first.service)
    operating.requeue(first.engine, first.service, [entry.id], actor="me@here")
    second = Running(recorder.service, place.settings(), drain=True).start(ready=False)
    assert second.join() == 0
    assert operating.parked_list(second.engine, second.service)[0].state == State.PARKED  # it was tried, and failed again
    status = second.status()
    assert not status.running
    assert status.lag_seconds is not None
    assert status.lag_seconds < 30


def test_a_stop_does_not_wait_for_a_message_that_is_backing_off(place: Place) -> None:
    tried = threading.Event()

    def wait(_received: Any, _session: Any) -> None:
        tried.set()
        raise Retry(after=60)

    recorder = Recorder(before=wait)
    service = Running(recorder.service, place.settings()).start()
    place.desk.publish(message(1, key="a", sequence=1))
    assert tried.wait(10)
    assert service.stop() == 0
    assert place.desk.left(QUEUE) == 1


def test_a_handler_that_does_not_end_in_time_is_reported_and_its_message_stays(place: Place) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hang(_received: Any, _session: Any) -> None:
        inside.set()
        go_on.wait(20)

    recorder = Recorder(before=hang)
    service = Running(recorder.service, place.settings(OUTBOX_SHUTDOWN_TIMEOUT="200ms")).start()
    place.desk.publish(message(1))
    assert inside.wait(10)
    assert service.stop() == 1
    assert place.desk.left(QUEUE) == 1
    go_on.set()


# --- servers that come and go ------------------------------------------------------------------------------------------


def through(proxy: Proxy, url: str) -> str:
    parts = urlsplit(url)
    return url.replace(f"{parts.hostname}:{parts.port}", f"127.0.0.1:{proxy.port}")


def test_a_service_starts_before_its_broker_and_resumes_after_every_loss_of_it(rabbit: Place) -> None:
    recorder = Recorder()
    port = urlsplit(rabbit.broker_url).port
    assert port is not None
    with Proxy(port) as proxy:
        proxy.refuse()
        settings = settings_for(through(proxy, rabbit.broker_url), rabbit.database_url)
        service = Running(recorder.service, settings).start(ready=False)
        eventually(lambda: service.runtime.ready().detail["broker"], what="it to say that there is no broker")
        assert not service.runtime.ready().ok
        assert service.runtime.live().ok
        proxy.restore()
        for round_ in range(3):
            eventually(lambda: service.runtime.ready().ok, 20, "it to consume")
            rabbit.desk.publish(*series(f"key:{round_}", 40))
            applied(service, round_ * 40 + 5)
            proxy.reset()
        applied(service, 120)
        eventually(lambda: rabbit.desk.waiting(QUEUE) == 0)
        assert all(by_key(recorder, service)[f"key:{round_}"] == list(range(1, 41)) for round_ in range(3))
        service.stop()


def test_acknowledgements_that_never_arrive_cost_duplicates_and_no_second_effect(rabbit: Place) -> None:
    recorder = Recorder()
    port = urlsplit(rabbit.broker_url).port
    assert port is not None
    with Proxy(port) as proxy:
        settings = settings_for(through(proxy, rabbit.broker_url), rabbit.database_url)
        with running(recorder.service, settings) as service:
            proxy.stall(TO_SERVER)  # from here on the broker hears nothing
            rabbit.desk.publish(*series("a", 30))
            applied(service, 30)
            proxy.reset()
            proxy.restore()
            eventually(lambda: service.status().duplicates_total == 30, 20, "the redeliveries to be recognised")
            eventually(lambda: rabbit.desk.waiting(QUEUE) == 0)
            assert recorder.numbers(service.engine) == list(range(1, 31))


def test_a_delivery_cut_in_the_middle_of_a_frame_is_taken_whole_from_the_next_connection(rabbit: Place) -> None:
    recorder = Recorder()
    port = urlsplit(rabbit.broker_url).port
    assert port is not None
    with Proxy(port) as proxy:
        settings = settings_for(through(proxy, rabbit.broker_url), rabbit.database_url)
        with running(recorder.service, settings) as service:
            proxy.cut_after(700, TO_CLIENT)
            rabbit.desk.publish(*series("a", 10))
            applied(service, 10)
            assert recorder.numbers(service.engine) == list(range(1, 11))


def test_a_slow_handler_does_not_cost_the_connection_its_heartbeats(rabbit: Place) -> None:
    go_on = threading.Event()
    recorder = Recorder(before=lambda _message, _session: go_on.wait(20))
    port = urlsplit(rabbit.broker_url).port
    assert port is not None
    with Proxy(port) as proxy:
        settings = settings_for(f"{through(proxy, rabbit.broker_url)}?heartbeat=1", rabbit.database_url)
        with running(recorder.service, settings) as service:
            rabbit.desk.publish(message(1))
            eventually(lambda: rabbit.desk.waiting(QUEUE) == 0, what="the message to be in hand")
            before = proxy.passed(TO_SERVER)
            # A heartbeat is 8 bytes, one leaves every half second; two missed ones, and the broker closes the connection.
            eventually(lambda: proxy.passed(TO_SERVER) - before >= 6 * 8, what="six heartbeats")
            go_on.set()
            applied(service, 1)
            assert service.status().duplicates_total == 0


@pytest.mark.parametrize("broker", ["rabbitmq", "embedded"])
def test_a_database_that_cuts_a_transaction_costs_no_attempt_and_no_effect(
    request: pytest.FixtureRequest, broker: str, postgres_url: str, tmp_path: Path
) -> None:
    url = request.getfixturevalue("broker_url") if broker == "rabbitmq" else f"embedded:///{tmp_path}/broker.db"
    other = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    cut: list[int] = []

    def cut_the_connection(received: Any, session: Any) -> None:
        number = received.data["number"]
        if number % 10 == 5 and number not in cut:
            cut.append(number)
            pid = session.scalar(sa.text("SELECT pg_backend_pid()"))
            with other.connect() as connection:
                connection.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    recorder = Recorder(before=cut_the_connection)
    with running(recorder.service, settings_for(url, postgres_url, CONSUMER_MAX_ATTEMPTS="1")) as service:
        Desk(url).publish(*series("a", 40))
        applied(service, 40)
        assert recorder.numbers(service.engine) == list(range(1, 41))
        assert service.status().parked == 0
        assert len(cut) == 4
    other.dispose()


def test_a_deadlock_between_two_workers_costs_no_attempt(broker_url: str, postgres_url: str) -> None:
    both = threading.Barrier(2)
    met: list[str] = []

    def cross(received: Any, session: Any) -> None:
        first, second = (1, 2) if received.key == "a" else (2, 1)
        lock = sa.text("SELECT pg_advisory_xact_lock(:number)")
        session.execute(lock, {"number": first})
        if len(met) < 2:
            met.append(received.key)
            both.wait(10)
        session.execute(lock, {"number": second})

    recorder = Recorder(before=cross, batch=1)
    settings = settings_for(broker_url, postgres_url, CONSUMER_WORKERS="2", CONSUMER_MAX_ATTEMPTS="1")
    with running(recorder.service, settings) as service:
        Desk(broker_url).publish(message(1, key="a", sequence=1), message(2, key="b", sequence=1))
        applied(service, 2)
        assert sorted(recorder.numbers(service.engine)) == [1, 2]
        assert service.status().parked == 0


def test_the_same_messages_given_to_two_processes_at_once_have_one_effect_each(broker_url: str, postgres_url: str) -> None:
    one, two = Recorder(), Recorder()
    elsewhere = settings_for(broker_url, postgres_url, OUTBOX_EXCHANGE="another")
    with (
        running(one.service, settings_for(broker_url, postgres_url)) as first,
        running(two.service, elsewhere) as second,
        Desk(broker_url).channel() as channel,
    ):
        sent = [each for group in zip(*(series(f"key:{number}", 25) for number in range(8)), strict=True) for each in group]
        for each in sent:
            for exchange in (EXCHANGE, "another"):
                channel.basic_publish(exchange, TOPIC, cloud_event(each))
        applied(first, 200)
        eventually(lambda: first.status().duplicates_total == 200, 20, "every second delivery to be recognised")
        found = by_key(one, second)
        assert all(found[f"key:{number}"] == list(range(1, 26)) for number in range(8))
        assert first.status().parked == 0


# --- RabbitMQ's own ----------------------------------------------------------------------------------------------------


class RawProperties(pika.BasicProperties):  # type: ignore[misc]
    """Property bytes that no client would write."""

    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self._raw = raw

    def encode(self) -> list[bytes]:
        return [self._raw]


def test_properties_that_no_client_can_decode_do_not_stop_a_message(rabbit: Place) -> None:
    name = b"when"
    inside = bytes([len(name)]) + name + b"T" + struct.pack(">Q", 2**63)
    recorder = Recorder()
    with running(recorder.service, rabbit.settings()) as service:
        with rabbit.desk.channel() as channel:
            for number in (1, 2):
                body = cloud_event(message(number, key="a", sequence=number))
                raw = struct.pack(">H", 0x2000) + struct.pack(">I", len(inside)) + inside
                channel.basic_publish(EXCHANGE, TOPIC, body, RawProperties(raw))
        applied(service, 2)
        assert service.status().duplicates_total == 0
    assert rabbit.desk.left(QUEUE) == 0


def test_a_compression_header_expands_nothing_and_changes_nothing(rabbit: Place) -> None:
    recorder = Recorder()
    bomb = gzip.compress(b"0" * 50_000_000)
    with running(recorder.service, rabbit.settings()) as service:
        properties = {"headers": {"compression": "application/x-gzip"}, "content_encoding": "binary"}
        rabbit.desk.publish(bomb, message(1), properties=properties)
        applied(service, 1)
        eventually(lambda: service.status().parked == 1)
        (row,) = rows(service.engine, tables.parked)
        assert row.body == bomb
        assert json.loads(row.properties)["headers"] == {"compression": "application/x-gzip"}


def test_huge_headers_are_no_obstacle(rabbit: Place) -> None:
    recorder = Recorder()
    with running(recorder.service, rabbit.settings()) as service:
        rabbit.desk.publish(message(1), b"garbage", properties={"headers": {f"h{number}": "x" * 1000 for number in range(100)}})
        applied(service, 1)
        eventually(lambda: service.status().parked == 1)


def test_what_the_broker_gave_up_on_is_read_back_and_parked(rabbit: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "DELIVERY_LIMIT", 2)
    recorder = Recorder()
    provisioning.apply(recorder.service, rabbit.settings())
    gone, stays = message(1, key="a", sequence=1), message(2, key="b", sequence=1)
    rabbit.desk.publish(gone)
    with rabbit.desk.channel() as channel:
        for method, _, _ in channel.consume(QUEUE, inactivity_timeout=0.1):
            if method is not None:
                channel.basic_reject(method.delivery_tag, requeue=True)
            elif rabbit.desk.waiting(f"{QUEUE}.dead"):
                break
    rabbit.desk.publish(stays)
    with running(recorder.service, rabbit.settings()) as service:
        applied(service, 1)
        eventually(lambda: service.status().parked == 1, 20, "the dead letter to be parked")
        (entry,) = operating.parked_list(service.engine, service.service)
        assert (entry.id, entry.reason) == (str(gone.id), Reason.DEAD_LETTERED)
        (detail,) = operating.parked_show(service.engine, service.service, entry.id)
        assert "x-death" in detail.properties["headers"] or "x-first-death-reason" in detail.properties["headers"]
        operating.requeue(service.engine, service.service, [entry.id], actor="me@here")
        applied(service, 2)
        eventually(lambda: rabbit.desk.waiting(f"{QUEUE}.dead") == 0)


def test_a_queue_with_other_arguments_is_refused_with_the_next_step(rabbit: Place) -> None:
    with rabbit.desk.channel() as channel:
        channel.queue_declare(QUEUE, durable=True)
    recorder = Recorder()
    operating.migrate(recorder.service, operating.open_engine(recorder.service, rabbit.settings()))
    with pytest.raises(ConfigurationError, match=rf"queue '{QUEUE}' exists and is not what is needed: .*x-.*; let its"):
        runtime.run(recorder.service, rabbit.settings())


def test_a_queue_deleted_under_a_running_service_is_declared_again(rabbit: Place, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    with running(recorder.service, rabbit.settings()) as service:
        with rabbit.desk.channel() as channel:
            channel.queue_delete(QUEUE)

        def declared_again() -> bool:
            try:
                return rabbit.desk.waiting(QUEUE) == 0
            except pika.exceptions.ChannelClosedByBroker:
                return False

        eventually(declared_again, 20, "the queue to be there again")
        assert f"the broker delivers no more: queue '{QUEUE}': it was deleted, or" in caplog.text
        eventually(lambda: service.runtime.ready().ok)
        rabbit.desk.publish(message(1))
        applied(service, 1)


# --- refusals at start -------------------------------------------------------------------------------------------------


def test_missing_tables_are_named_with_the_command_that_makes_them(rabbit: Place) -> None:
    recorder = Recorder()
    with pytest.raises(SchemaError, match="the consumer tables do not exist; run: outbox consumer migrate exports"):
        runtime.run(recorder.service, rabbit.settings())
    engine = operating.open_engine(recorder.service, rabbit.settings())
    operating.migrate(Service("exports"), engine)
    with pytest.raises(SchemaError, match="tables of service 'exports' do not exist: effects; run: outbox consumer migrate"):
        runtime.run(recorder.service, rabbit.settings())
    assert operating.migrate(recorder.service, engine) == 1
    assert operating.migrate(recorder.service, engine) == 0


def test_embedded_mode_makes_its_tables_by_itself(tmp_path: Path) -> None:
    place = Place(f"embedded:///{tmp_path}/broker.db", f"sqlite:///{tmp_path}/{{service}}.db")
    recorder = Recorder()
    with running(recorder.service, place.settings(), migrate=False):
        place.desk.publish(message(1))
    assert (tmp_path / "exports.db").exists()


@pytest.mark.parametrize(("change", "says"), [("password", "check user, password"), ("vhost", "virtual host")])
def test_a_broker_that_refuses_us_ends_the_service_with_a_named_error(rabbit: Place, change: str, says: str) -> None:
    recorder = Recorder()
    operating.migrate(recorder.service, operating.open_engine(recorder.service, rabbit.settings()))
    url = rabbit.broker_url.replace(":guest@", ":wrong@") if change == "password" else f"{rabbit.broker_url}-missing"
    with pytest.raises(BrokerError, match=says) as refusal:
        runtime.run(recorder.service, settings_for(url, rabbit.database_url))
    assert "wrong" not in str(refusal.value)


# --- seen from outside -------------------------------------------------------------------------------------------------


def test_probes_and_metrics_are_served_beside_the_service(place: Place) -> None:
    recorder, port = Recorder(), free_port()
    with running(recorder.service, place.settings(OUTBOX_HTTP_PORT=str(port))) as service:
        place.desk.publish(message(1), b"garbage")
        applied(service, 1)
        eventually(lambda: service.status().parked == 1)
        assert _get(port, "livez")["ok"] is True
        assert _get(port, "readyz")["connected"] is True
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        assert 'consumer_messages_total{outcome="applied",service="exports",topic="session.modified"}' in text
        assert 'outcome="parked",service="exports",topic="other"' in text
        assert "consumer_handler_seconds_bucket" in text
        assert "consumer_end_to_end_seconds_bucket" in text


def _get(port: int, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_the_lag_is_the_age_of_what_is_in_hand_and_grows_while_nobody_runs(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "SEEN_SECONDS", 0.1)
    monkeypatch.setattr(operating, "_USUAL", timedelta(seconds=0.2))
    go_on = threading.Event()
    recorder = Recorder(before=lambda _message, _session: go_on.wait(20))
    with running(recorder.service, place.settings()) as service:
        eventually(lambda: service.status().running, what="its row to be written")
        eventually(lambda: service.status().lag_seconds == 0.0, what="it to have nothing to do")
        place.desk.publish(message(1))
        eventually(lambda: (service.status().lag_seconds or 0) > 1.0, what="the lag of the message in hand to grow")
        go_on.set()
        eventually(lambda: service.status().lag_seconds == 0.0, what="the lag to be gone")
    stopped = service.status().lag_seconds
    assert stopped is not None
    assert not service.status().running
    eventually(lambda: (service.status().lag_seconds or 0) > stopped, what="the lag of a service that does not run to grow")


@pytest.mark.postgres
def test_the_lag_does_not_fall_when_the_broker_goes_away(
    broker_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rabbit = Place(broker_url, postgres_url)
    monkeypatch.setattr(heartbeat, "SEEN_SECONDS", 0.1)
    go_on = threading.Event()
    recorder = Recorder(before=lambda _message, _session: go_on.wait(20))
    port = urlsplit(rabbit.broker_url).port
    assert port is not None
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    with Proxy(port) as proxy:
        settings = settings_for(through(proxy, rabbit.broker_url), rabbit.database_url)
        with running(recorder.service, settings) as service:
            rabbit.desk.publish(*(message(number, created_at=long_ago) for number in range(3)))
            eventually(lambda: (service.status().lag_seconds or 0) > 3600, what="the lag of old messages to be seen")
            proxy.refuse()
            proxy.reset()
            go_on.set()
            eventually(lambda: not any(each["connected"] for each in service.status().processes), what="the loss to be seen")
            assert (service.status().lag_seconds or 0) > 3600
            proxy.restore()
            eventually(lambda: service.status().lag_seconds == 0.0, 20, "the lag to be gone")


def test_topology_is_shown_made_and_checked_without_running_the_service(place: Place) -> None:
    recorder = Recorder()
    assert provisioning.show(recorder.service, place.settings()).main.name == QUEUE
    if place.broker_url.startswith("amqp"):
        findings = provisioning.check(recorder.service, place.settings())
        assert [finding.ok for finding in findings] == [False, False, None]
        assert "does not exist" in findings[0].text
    provisioning.apply(recorder.service, place.settings())
    findings = provisioning.check(recorder.service, place.settings())
    assert [finding.ok for finding in findings][:2] == [True, True]
    assert findings[2].ok is (True if place.broker_url.startswith("embedded") else None)
    place.desk.publish(message(1))
    assert "1 messages wait" in provisioning.check(recorder.service, place.settings())[0].text


def test_a_service_is_retired_only_when_nothing_would_be_lost(place: Place) -> None:
    recorder = Recorder()
    with running(recorder.service, place.settings()), pytest.raises(OutboxError, match="consumers; stop the service first"):
        provisioning.retire(recorder.service, place.settings())
    place.desk.left(QUEUE)
    place.desk.publish(message(1))
    with pytest.raises(OutboxError, match=f"'{QUEUE}' holds 1 messages.*--drain"):
        provisioning.retire(recorder.service, place.settings())
    place.desk.publish(message(2))  # it is still bound
    assert provisioning.retire(recorder.service, place.settings(), force=True).queues == {QUEUE: 2, f"{QUEUE}.dead": 0}
    assert provisioning.retire(recorder.service, place.settings()).queues == {}


def test_a_broker_that_is_not_there_is_unavailable_to_the_commands(sqlite_url: str) -> None:
    settings = settings_for(f"amqp://guest:guest@127.0.0.1:{free_port()}/", sqlite_url)
    with pytest.raises(Unavailable, match="start the broker or correct BROKER_URL") as refusal:
        provisioning.apply(Recorder().service, settings)
    assert "guest:guest" not in str(refusal.value)


@pytest.mark.postgres
def test_the_workers_are_how_many_messages_are_in_hand_at_once(tmp_path: Path, postgres_url: str) -> None:
    together = threading.Barrier(7)  # by default there are four, and no seven would meet
    recorder = Recorder(before=lambda *_: together.wait(20))
    broker = f"embedded:///{tmp_path}/broker.db"
    with running(recorder.service, settings_for(broker, postgres_url, CONSUMER_WORKERS="7", CONSUMER_BATCH="1")) as service:
        Desk(broker).publish(*(message(number) for number in range(7)))
        applied(service, 7)
