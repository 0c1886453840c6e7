from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from outbox.embedded.ownership import Ownership, OwnershipLost, QueueLock, is_owned, lock_path
from outbox.embedded.queues import Publication, Queues, queue_number
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def queues(tmp_path: Path) -> Iterator[Queues]:
    with Queues(tmp_path / "broker.db") as opened:
        opened.declare_queue("exports")
        opened.bind("exports", "#", exchange="openevent")
        yield opened


def _publish(queues: Queues, *bodies: bytes) -> None:
    queues.publish("openevent", [Publication(topic="a", body=body, properties={}) for body in bodies])


def _number(queues: Queues) -> int:
    with queues.file.reading() as connection:
        return queue_number(connection, "exports")


def _lock(queues: Queues) -> QueueLock:
    return QueueLock(lock_path(queues.file, _number(queues)))


def _own(queues: Queues) -> Ownership:
    lock = _lock(queues)
    assert lock.take()
    return Ownership.begin(queues.file, _number(queues), lock)


def test_one_owner_at_a_time_and_the_next_when_it_has_let_go(queues: Queues) -> None:
    first, second = _lock(queues), _lock(queues)
    assert first.take()
    assert not second.take()
    assert is_owned(queues.file, _number(queues))
    first.close()
    assert not is_owned(queues.file, _number(queues))
    assert second.take()
    assert not first.take()


def test_a_forked_child_does_not_keep_its_parents_queue(queues: Queues) -> None:
    lock = _lock(queues)
    assert lock.take()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # alive until the parent says otherwise
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        os.close(read)
        lock.close()
        eventually(_lock(queues).take, what="the child to have let go")
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_messages_are_taken_in_order_and_only_once(queues: Queues) -> None:
    _publish(queues, b"1", b"2", b"3")
    owner = _own(queues)
    assert [delivery.body for delivery in owner.take(2)] == [b"1", b"2"]
    assert [delivery.body for delivery in owner.take(2)] == [b"3"]
    assert owner.take(2) == []
    _publish(queues, b"4")
    assert [delivery.body for delivery in owner.take(2)] == [b"4"]


def test_a_new_owner_starts_with_what_was_not_acknowledged_whatever_it_takes_at_once(queues: Queues) -> None:
    _publish(queues, b"1", b"2", b"3", b"4", b"5")
    first = _own(queues)
    taken = first.take(4)
    first.settle([taken[1].id], take=0)
    first.release()
    second = _own(queues)
    assert [(delivery.body, delivery.returns) for delivery in second.take(2)] == [(b"1", 1), (b"3", 1)]
    second.release()
    third = _own(queues)
    # The fourth was in nobody's hands while the second owner lived: it came back once, not twice.
    assert [(delivery.body, delivery.returns) for delivery in third.take(9)] == [(b"1", 2), (b"3", 2), (b"4", 1), (b"5", 0)]


def test_acknowledging_and_taking_the_next_is_one_step(queues: Queues) -> None:
    _publish(queues, b"1", b"2", b"3")
    owner = _own(queues)
    first, second = owner.take(2)
    assert [delivery.body for delivery in owner.settle([first.id, second.id], take=5)] == [b"3"]
    assert (queues.depth("exports").ready, queues.depth("exports").leased) == (0, 1)


def test_what_is_put_back_is_counted(queues: Queues) -> None:
    _publish(queues, b"1")
    owner = _own(queues)
    (delivery,) = owner.take(1)
    assert owner.put_back(delivery).returns == 1
    assert owner.put_back(owner.put_back(delivery)).returns == 2


def test_an_owner_whose_queue_was_taken_over_settles_nothing(queues: Queues) -> None:
    _publish(queues, b"1")
    stale = _own(queues)
    (delivery,) = stale.take(1)
    lock_path(queues.file, _number(queues)).unlink()  # a person tidied up
    _own(queues)
    with pytest.raises(OwnershipLost, match="took the queue over"):
        stale.settle([delivery.id], take=1)
    with pytest.raises(OwnershipLost):
        stale.put_back(delivery)
    with pytest.raises(OwnershipLost):
        stale.take(1)
    assert queues.depth("exports").ready == 1


def test_a_deleted_queue_has_no_owner(queues: Queues) -> None:
    number, lock = _number(queues), _lock(queues)
    owner = _own(queues)
    queues.delete_queue("exports")
    with pytest.raises(OwnershipLost, match="deleted"):
        owner.take(1)
    owner.release()
    assert lock.take()
    with pytest.raises(OwnershipLost, match="deleted"):
        Ownership.begin(queues.file, number, lock)


def test_a_number_is_never_used_again(queues: Queues) -> None:
    """Otherwise a new message would lie among those already handed out, and a new queue would find an old one's lock."""
    _publish(queues, b"1")
    owner = _own(queues)
    (first,) = owner.take(1)
    owner.settle([first.id], take=0)
    _publish(queues, b"2")
    (second,) = owner.take(1)
    assert second.id > first.id
    before = _number(queues)
    queues.delete_queue("exports")
    queues.declare_queue("exports")
    assert _number(queues) > before
