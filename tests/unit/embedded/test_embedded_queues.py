from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from outbox.embedded.file import BrokerFileUnavailable
from outbox.embedded.ownership import Delivery, Ownership, QueueLock, lock_path
from outbox.embedded.queues import Binding, Depth, NoSuchQueue, Publication, Queues, queue_number

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def queues(tmp_path: Path) -> Iterator[Queues]:
    with Queues(tmp_path / "broker.db") as opened:
        yield opened


def _say(topic: str, body: bytes = b"{}") -> Publication:
    return Publication(topic=topic, body=body, properties={})


def _own(queues: Queues, name: str) -> Ownership:
    with queues.file.reading() as connection:
        number = queue_number(connection, name)
    lock = QueueLock(lock_path(queues.file, number))
    assert lock.take()
    return Ownership.begin(queues.file, number, lock)


def _contents(queues: Queues, name: str) -> list[Delivery]:
    owner = _own(queues, name)
    try:
        return owner.take(1000)
    finally:
        owner.release()


def test_a_topic_reaches_every_queue_with_a_binding_that_takes_it_once(queues: Queues) -> None:
    for name, patterns in {"exports": ["session.*", "#"], "mail": ["session.state_changed"], "nobody": ["speaker.*"]}.items():
        queues.declare_queue(name)
        for pattern in patterns:
            queues.bind(name, pattern, exchange="openevent")
    assert queues.publish("openevent", [_say("session.modified", b"1"), _say("session.state_changed", b"2")]) == [1, 2]
    assert [delivery.body for delivery in _contents(queues, "exports")] == [b"1", b"2"]
    assert [delivery.body for delivery in _contents(queues, "mail")] == [b"2"]
    assert _contents(queues, "nobody") == []


def test_a_topic_without_a_queue_reaches_none(queues: Queues) -> None:
    assert queues.publish("openevent", [_say("session.modified")]) == [0]


def test_a_binding_counts_for_its_exchange_alone(queues: Queues) -> None:
    queues.declare_queue("dead")
    queues.bind("dead", "#", exchange="openevent.dead")
    assert queues.publish("openevent", [_say("session.modified")]) == [0]
    assert queues.publish("openevent.dead", [_say("session.modified")]) == [1]


def test_bindings_are_listed_and_removed(queues: Queues) -> None:
    queues.declare_queue("exports")
    for pattern in ("session.*", "event.modified", "session.*"):
        queues.bind("exports", pattern, exchange="openevent")
    assert queues.bindings("openevent") == [
        Binding("openevent", "event.modified", "exports"),
        Binding("openevent", "session.*", "exports"),
    ]
    assert queues.bindings("elsewhere") == []
    queues.unbind("exports", "session.*", exchange="openevent")
    queues.unbind("exports", "never.bound", exchange="openevent")
    assert [binding.pattern for binding in queues.bindings("openevent")] == ["event.modified"]


def test_declaring_a_queue_again_keeps_its_messages(queues: Queues) -> None:
    queues.declare_queue("exports")
    queues.bind("exports", "#", exchange="openevent")
    queues.publish("openevent", [_say("a")])
    queues.declare_queue("exports")
    assert queues.queues() == ["exports"]
    assert queues.depth("exports") == Depth(ready=1, leased=0, consumed=False)


def test_a_queue_that_was_never_declared_is_named(queues: Queues) -> None:
    for operation in (
        lambda: queues.bind("exports", "#", exchange="openevent"),
        lambda: queues.unbind("exports", "#", exchange="openevent"),
        lambda: queues.depth("exports"),
        lambda: queues.purge("exports"),
        lambda: queues.delete_queue("exports"),
    ):
        with pytest.raises(NoSuchQueue, match="no queue 'exports' on the embedded broker"):
            operation()


def test_the_depth_tells_waiting_from_handed_out_and_whether_somebody_consumes(queues: Queues) -> None:
    queues.declare_queue("exports")
    queues.bind("exports", "#", exchange="openevent")
    queues.publish("openevent", [_say("a") for _ in range(5)])
    owner = _own(queues, "exports")
    first, *_ = owner.take(3)
    assert queues.depth("exports") == Depth(ready=2, leased=3, consumed=True)
    owner.settle([first.id], take=0)
    assert queues.depth("exports") == Depth(ready=2, leased=2, consumed=True)
    owner.release()
    assert queues.depth("exports") == Depth(ready=4, leased=0, consumed=False)


def test_purging_spares_what_a_consumer_holds(queues: Queues) -> None:
    queues.declare_queue("exports")
    queues.bind("exports", "#", exchange="openevent")
    queues.publish("openevent", [_say("a") for _ in range(5)])
    owner = _own(queues, "exports")
    owner.take(2)
    assert queues.purge("exports") == 3
    owner.release()
    assert queues.purge("exports") == 2
    assert queues.depth("exports") == Depth(ready=0, leased=0, consumed=False)


def test_a_deleted_queue_takes_its_bindings_and_messages_with_it(queues: Queues) -> None:
    for name in ("exports", "mail"):
        queues.declare_queue(name)
        queues.bind(name, "#", exchange="openevent")
    queues.publish("openevent", [_say("a"), _say("b")])
    assert queues.delete_queue("exports") == 2
    assert queues.queues() == ["mail"]
    assert queues.publish("openevent", [_say("c")]) == [1]
    queues.declare_queue("exports")
    assert queues.depth("exports") == Depth(ready=0, leased=0, consumed=False)
    assert queues.depth("mail").ready == 3


def test_a_batch_that_fails_publishes_nothing(queues: Queues) -> None:
    queues.declare_queue("exports")
    queues.bind("exports", "#", exchange="openevent")
    unfit = Publication(topic="b", body=b"", properties={"headers": object()})
    with pytest.raises(TypeError):
        queues.publish("openevent", [_say("a"), unfit])
    assert queues.depth("exports").ready == 0


def test_a_full_disk_is_unavailable_and_publishes_nothing(queues: Queues) -> None:
    queues.declare_queue("exports")
    queues.bind("exports", "#", exchange="openevent")
    with queues.file.reading() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages + 4}")
    queues.publish("openevent", [_say("a")])
    with pytest.raises(BrokerFileUnavailable, match="database or disk is full"):
        queues.publish("openevent", [_say("b", b"x" * 1000) for _ in range(100)])
    queues.publish("openevent", [_say("c")])
    assert [delivery.topic for delivery in _contents(queues, "exports")] == ["a", "c"]
