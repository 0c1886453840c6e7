"""A service that stops, and its successor: a key stays in order, on a real RabbitMQ and on the embedded broker."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.consuming import Desk, Recorder, Running, series, settings_for
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.orm import Session

    from outbox.message import Received


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
    from outbox.consumer import topology
    from outbox.consumer.link import Link

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
