"""One owner for each queue: who may take its messages, and what happens to them when that one dies.

The owner holds an operating-system lock (flock) on a file beside the broker's. The kernel releases it when the process
ends, however it ends, and not a moment before. A lease with an end in time would need a heartbeat written for each queue,
would let a successor wait for it, and would be lost by an owner that is merely slow: then two would work on one queue.

A new owner first takes back everything that was handed out and not acknowledged, and starts from the lowest row. So
whatever dies, a queue is delivered in its order, and nothing is copied or put at the end.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from typing import TYPE_CHECKING, NamedTuple

from outbox.errors import OutboxError
from outbox.process import failpoints

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence
    from pathlib import Path

    from outbox.embedded.file import BrokerFile


class OwnershipLost(OutboxError):
    """The queue was deleted, or its lock file was removed and another process took over."""


class Delivery(NamedTuple):
    """A message in its owner's hands."""

    id: int
    #: Earlier deliveries that were not acknowledged: RabbitMQ's `x-delivery-count`.
    returns: int
    exchange: str
    topic: str
    properties: str
    body: bytes


class QueueLock:
    """The lock that makes a process the owner of one queue."""

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _open_locks.add(self)

    def take(self) -> bool:
        """Take the lock if nobody has it, without waiting; False as well once it was closed."""
        if self._descriptor is None:
            return False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Release the lock, if it is held; doing so again changes nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_open_locks: weakref.WeakSet[QueueLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # A child shares its parent's lock: after a handler forked, the queue would stay taken until that child ended too.
    for lock in list(_open_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)


def lock_path(file: BrokerFile, queue: int) -> Path:
    """Return where the lock of the queue with this number is. A number, because names may hold anything."""
    return file.path.with_name(f"{file.path.name}-queue-{queue}.lock")


def is_owned(file: BrokerFile, queue: int) -> bool:
    """Say whether a living process consumes the queue."""
    path = lock_path(file, queue)
    if not path.exists():
        return False
    # Taken for an instant; a consumer that tries in that instant tries again.
    lock = QueueLock(path)
    try:
        return not lock.take()
    finally:
        lock.close()


class Ownership:
    """The right to take the messages of one queue; ends with `release`, or with the process."""

    def __init__(self, file: BrokerFile, queue: int, epoch: int, lock: QueueLock) -> None:
        self._file = file
        self._queue = queue
        self._epoch = epoch
        self._lock = lock
        self._cursor = 0  # the last message taken

    @classmethod
    def begin(cls, file: BrokerFile, queue: int, lock: QueueLock) -> Ownership:
        """Become the owner, *lock* being held: take back what the last one did not acknowledge. Raises OwnershipLost."""
        with file.transaction() as connection:
            row = connection.execute("SELECT epoch, handed_out FROM queue WHERE id = ?", (queue,)).fetchone()
            if row is None:
                raise OwnershipLost("the queue was deleted")
            epoch, handed_out = row[0] + 1, row[1]
            connection.execute("UPDATE message SET returns = returns + 1 WHERE queue = ? AND id <= ?", (queue, handed_out))
            connection.execute("UPDATE queue SET epoch = ?, handed_out = 0 WHERE id = ?", (epoch, queue))
        return cls(file, queue, epoch, lock)

    def take(self, count: int) -> list[Delivery]:
        """Return the next messages, at most *count*; that they were handed out is durable."""
        with self._file.reading() as connection:
            self._check(connection)
            waiting = "SELECT 1 FROM message WHERE queue = ? AND id > ? LIMIT 1"
            if connection.execute(waiting, (self._queue, self._cursor)).fetchone() is None:
                return []  # found without a lock that others would wait for
        return self.settle((), take=count)

    def settle(self, acknowledged: Sequence[int], *, take: int) -> list[Delivery]:
        """Remove the *acknowledged* messages and return the next ones, at most *take*: one transaction for both."""
        with self._file.transaction() as connection:
            self._check(connection)
            connection.executemany("DELETE FROM message WHERE id = ?", ((number,) for number in acknowledged))
            query = (
                "SELECT id, returns, exchange, topic, properties, body FROM message WHERE queue = ? AND id > ? "
                "ORDER BY id LIMIT ?"
            )
            rows = connection.execute(query, (self._queue, self._cursor, take)).fetchall()
            deliveries = [Delivery(*row) for row in rows]
            if deliveries:
                connection.execute("UPDATE queue SET handed_out = ? WHERE id = ?", (deliveries[-1].id, self._queue))
            failpoints.reached("E2")
        if deliveries:
            self._cursor = deliveries[-1].id
        return deliveries

    def put_back(self, delivery: Delivery) -> Delivery:
        """Count a delivery that was given back, and return it as it is to be delivered again."""
        with self._file.transaction() as connection:
            self._check(connection)
            connection.execute("UPDATE message SET returns = returns + 1 WHERE id = ?", (delivery.id,))
            (body,) = connection.execute("SELECT body FROM message WHERE id = ?", (delivery.id,)).fetchone()
        return delivery._replace(returns=delivery.returns + 1, body=body)

    def release(self) -> None:
        """Let another process take over; doing so again changes nothing."""
        self._lock.close()

    def _check(self, connection: sqlite3.Connection) -> None:
        row = connection.execute("SELECT epoch FROM queue WHERE id = ?", (self._queue,)).fetchone()
        if row is None:
            raise OwnershipLost("the queue was deleted")
        if row[0] != self._epoch:
            raise OwnershipLost("another process took the queue over: its lock file was removed")
