"""A service that stops, and its successor: a key stays in order, on a real RabbitMQ and on the embedded broker."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from outbox.consumer import hand, topology
from outbox.consumer.link import Link
from tests.kit.consuming import Desk, Recorder, Running, series, settings_for
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.orm import Session

    from outbox.consumer.delivery import Arrival
    from outbox.message import Received
    from outbox.settings import Settings


@pytest.fixture(params=["rabbitmq", "embedded"])
def any_broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "embedded":
        return f"embedded:///{tmp_path / 'broker.db'}"
    url: str = request.getfixturevalue("broker_url")
    return url


def test_the_next_consumer_sees_a_key_in_order_after_a_stop_with_prefetched_messages(
    any_broker_url: str, sqlite_url: str
) -> None:
    in_hand, go_on = threading.Event(), threading.Event()
    first_delivered: list[int] = []

    def hold_the_third(message: Received, _session: Session) -> None:
        first_delivered.append(message.sequence or 0)
        if message.sequence == 3:
            in_hand.set()
            go_on.wait(20)

    one, two = Recorder(before=hold_the_third, batch=1), Recorder(batch=1)
    settings = settings_for(any_broker_url, sqlite_url, CONSUMER_PREFETCH="20")
    first, second = Running(one.service, settings).start(), Running(two.service, settings).start()
    desk = Desk(any_broker_url)
    desk.publish(*series("event:1", 60))
    assert in_hand.wait(20), "the first consumer got no third message"
    first.runtime.stop()
    go_on.set()
    assert first.join() == 0
    assert first_delivered == [1, 2, 3]  # the transaction in hand was finished, no other begun
    eventually(lambda: len(two.numbers(second.engine, "event:1")) == 60, 20, "the second consumer to apply the rest")
    assert two.numbers(second.engine, "event:1") == list(range(1, 61))
    status = second.status()
    assert (status.applied_total, status.duplicates_total, status.late_total, status.gaps_total) == (60, 0, 0, 0)
    assert second.stop() == 0


def test_a_successor_on_another_database_gets_exactly_what_was_not_acknowledged_in_order(
    any_broker_url: str, tmp_path: Path
) -> None:
    go_on = threading.Event()
    reached = threading.Event()

    def hold(message: Received, _session: Session) -> None:
        if message.sequence == 5:
            reached.set()
            go_on.wait(20)

    one, two = Recorder(before=hold, batch=1), Recorder(batch=1)
    first = Running(one.service, settings_for(any_broker_url, f"sqlite:///{tmp_path}/one.db")).start()
    Desk(any_broker_url).publish(*series("event:1", 30))
    assert reached.wait(20)
    first.runtime.stop()
    go_on.set()
    first.join()
    assert one.numbers(first.engine) == [1, 2, 3, 4, 5]
    second = Running(two.service, settings_for(any_broker_url, f"sqlite:///{tmp_path}/two.db")).start()
    eventually(lambda: len(two.numbers(second.engine)) == 25, 20, "the rest to be applied")
    assert two.numbers(second.engine) == list(range(6, 31))  # the acknowledgements of the first five arrived
    second.stop()


def test_a_dropped_connection_gives_its_successor_what_was_prefetched_first(broker_url: str) -> None:
    """After a `basic.cancel` the successor would begin with the eleventh."""
    recorder = Recorder()
    wanted = topology.of(recorder.service, "openevent")
    got: dict[str, list[Any]] = {"first": [], "second": []}
    first, second = Link(broker_url), Link(broker_url)
    first.consume(wanted, 10, lambda arrival: got["first"].append(arrival))
    second.consume(wanted, 10, lambda arrival: got["second"].append(arrival))
    Desk(broker_url).publish(*series("event:1", 15))

    def received(link: Link, name: str, count: int) -> bool:
        link.receive(0.05)
        return len(got[name]) >= count

    eventually(lambda: received(first, "first", 10), 10, "the prefetch of the first consumer")
    first.drop()
    eventually(lambda: received(second, "second", 10), 10, "the successor")
    sequences = [arrival.message.sequence for arrival in got["second"]]
    assert sequences == sorted(sequences)
    assert sequences[0] == 1
    second.drop()


@pytest.mark.parametrize("batch", [1, 50])
def test_a_message_that_hangs_keeps_its_own_key_from_being_acknowledged_and_nothing_else(
    any_broker_url: str, postgres_url: str, sqlite_url: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand, "STUCK_SECONDS", 0.5)
    go_on = threading.Event()

    def hang(message: Received, _session: Session) -> None:
        if message.key == "hung" and message.sequence == 2:
            go_on.wait(30)

    one, two = Recorder(before=hang, batch=batch), Recorder(batch=1)
    settings = settings_for(any_broker_url, postgres_url, CONSUMER_PREFETCH="20", OUTBOX_SHUTDOWN_TIMEOUT="200ms")
    first = Running(one.service, settings).start()
    others = [each for group in zip(*(series(f"key:{number}", 20) for number in range(10)), strict=True) for each in group]
    Desk(any_broker_url).publish(*series("hung", 5), *others)
    eventually(lambda: first.status().applied_total == 201, 20, "all others to be applied")  # ten times the prefetch
    assert first.stop() == 1
    second = Running(two.service, settings_for(any_broker_url, sqlite_url)).start()
    eventually(lambda: len(two.numbers(second.engine)) == 4, 20, "the key's messages to be applied")
    assert two.numbers(second.engine, "hung") == [2, 3, 4, 5]
    assert second.stop() == 0
    assert Desk(any_broker_url).left("openevent.exports") == 0
    go_on.set()


PREFETCH = 20


class Reader:
    """A connection that notes what comes, and settles at random, in the order of each key."""

    def __init__(self, url: str) -> None:
        self.link = Link(url)
        self.got: dict[str, list[Arrival]] = defaultdict(list)
        self.settled: dict[str, int] = defaultdict(int)
        self.link.consume(topology.of(Recorder().service, "openevent"), PREFETCH, self._arrived)

    def _arrived(self, arrival: Arrival) -> None:
        assert arrival.message is not None
        self.got[arrival.message.key or ""].append(arrival)

    def receive(self, in_hand: int) -> None:
        def received() -> bool:
            self.link.receive(0.05)
            return len(self.link.in_hand()) >= in_hand

        eventually(received, 10, f"{in_hand} messages in hand")

    def settle_some(self, key: str, rng: random.Random) -> None:
        waiting = self.got[key][self.settled[key] :]
        for arrival in waiting[: rng.randint(0, len(waiting))]:
            assert arrival.receipt is not None
            arrival.receipt.settled()
            self.settled[key] += 1

    def sequences(self, key: str) -> list[int | None]:
        return [arrival.message.sequence for arrival in self.got[key] if arrival.message]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_was_acknowledged_in_between_the_rest_of_each_key_comes_again_in_order(any_broker_url: str, seed: int) -> None:
    rng = random.Random(seed)
    count = {"a": 60, "b": 60, "c": 60, "hung": 5}  # of the last one nothing is ever settled
    lines = {key: series(key, number) for key, number in count.items()}
    Reader(any_broker_url).link.drop()  # declares the queue
    Desk(any_broker_url).publish(*(lines[key].pop(0) for key in rng.sample(list(count), counts=count.values(), k=185)))
    done = dict.fromkeys(count, 0)
    while sum(done.values()) < 180:
        reader = Reader(any_broker_url)
        for _ in range(rng.randint(1, 3)):
            reader.receive(min(PREFETCH, 185 - sum(done.values()) - sum(reader.settled.values())))
            for key in ("a", "b", "c"):
                reader.settle_some(key, rng)
            reader.link.acknowledge(all_of_them=True)
        reader.link.flush()
        reader.link.drop()
        for key in count:
            assert reader.sequences(key) == list(range(done[key] + 1, done[key] + 1 + len(reader.got[key])))
            done[key] += reader.settled[key]
    assert done == {**count, "hung": 0}


class Hanging:
    """A handler that hangs from the message after *last* on, and fails when it is let go."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.let_go = threading.Event()

    def __call__(self, message: Received, _session: Session) -> None:
        if (message.sequence or 0) > self.last:
            self.let_go.wait(30)
            raise ValueError("let go")


@pytest.mark.postgres
def test_a_smaller_prefetch_begins_when_the_queue_has_been_empty(broker_url: str, postgres_url: str) -> None:
    def settings(prefetch: int) -> Settings:
        more = {"CONSUMER_PREFETCH": str(prefetch), "OUTBOX_SHUTDOWN_TIMEOUT": "200ms"}
        return settings_for(broker_url, postgres_url, **more)

    for prefetch, last in ((20, 0), (5, 2)):
        handler = Hanging(last)
        service = Running(Recorder(before=handler, batch=1).service, settings(prefetch)).start()
        if last == 0:
            Desk(broker_url).publish(*series("event:1", 30))
        applied(service, last)
        in_hand(service, 20)  # the second one too takes as many as the first gave back
        assert service.stop() == 1
        handler.let_go.set()
    recorder = Recorder(batch=1)
    third = Running(recorder.service, settings(5)).start()
    applied(third, 30)
    assert recorder.numbers(third.engine) == list(range(1, 31))
    assert third.status().late_total == 0
    eventually(lambda: third.runtime._prefetch == 5, 20, "the smaller prefetch to begin")
    eventually(lambda: third.runtime.ready().ok, 20, "its connection")
    third.stop()
    fourth = Running(recorder.service, settings(5)).start()
    assert fourth.runtime._prefetch == 5
    fourth.stop()


def applied(service: Running, count: int) -> None:
    eventually(lambda: service.status().applied_total == count, 20, f"{count} to be applied")


def in_hand(service: Running, count: int) -> None:
    def found() -> bool:
        link = service.runtime._link
        return link is not None and len(link.in_hand()) == count

    eventually(found, 20, f"{count} messages in hand")
