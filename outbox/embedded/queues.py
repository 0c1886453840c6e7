"""Queues, bindings and publishing on the broker's file: what the relay, the topology commands and tests need.

Every exchange is a topic exchange and exists as soon as somebody names it; a binding key without `*` and `#` makes it a
direct one. Queues are durable. Consuming is in `ownership`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outbox.embedded import ownership
from outbox.embedded.file import BrokerFile
from outbox.embedded.routing import matches
from outbox.errors import OutboxError
from outbox.process import failpoints

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping
    from types import TracebackType
    from typing import Self


class NoSuchQueue(OutboxError):
    """The queue was never declared, or was deleted."""


@dataclass(frozen=True, slots=True)
class Binding:
    """*queue* gets what is published to *exchange* with a topic that *pattern* takes."""

    exchange: str
    pattern: str
    queue: str


@dataclass(frozen=True, slots=True)
class Depth:
    """The messages of one queue, and whether somebody consumes it."""

    ready: int
    #: Handed to the present consumer and not acknowledged.
    leased: int
    consumed: bool


@dataclass(frozen=True, slots=True)
class Publication:
    """One message to publish. *properties* are AMQP's, with `headers` among them; they must fit into JSON."""

    topic: str
    body: bytes
    properties: Mapping[str, Any]


class Queues:
    """A connection to the broker's file *path*, created where it is missing. Raises the errors of `outbox.embedded.file`."""

    def __init__(self, path: Path | str) -> None:
        self.file = BrokerFile(Path(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close; doing so again changes nothing."""
        self.file.close()

    def declare_queue(self, name: str) -> None:
        """Create the queue *name*; where it exists nothing changes."""
        with self.file.transaction() as connection:
            connection.execute("INSERT INTO queue (name) VALUES (?) ON CONFLICT DO NOTHING", (name,))

    def delete_queue(self, name: str) -> int:
        """Remove the queue, its bindings and its messages; return how many these were. Its consumer is told."""
        with self.file.transaction() as connection:
            queue = queue_number(connection, name)
            removed = connection.execute("DELETE FROM message WHERE queue = ?", (queue,)).rowcount
            connection.execute("DELETE FROM binding WHERE queue = ?", (queue,))
            connection.execute("DELETE FROM queue WHERE id = ?", (queue,))
        ownership.lock_path(self.file, queue).unlink(missing_ok=True)  # safe: the number is never used again
        return removed

    def purge(self, name: str) -> int:
        """Remove the messages that wait and return how many; those in a consumer's hands stay with it."""
        with self.file.transaction() as connection:
            queue = queue_number(connection, name)
            above = _handed_out(connection, queue) if ownership.is_owned(self.file, queue) else 0
            return connection.execute("DELETE FROM message WHERE queue = ? AND id > ?", (queue, above)).rowcount

    def queues(self) -> list[str]:
        """Return the names of all queues, sorted."""
        with self.file.reading() as connection:
            return [name for (name,) in connection.execute("SELECT name FROM queue ORDER BY name")]

    def depth(self, name: str) -> Depth:
        """Return how many messages of the queue wait and how many are in its consumer's hands."""
        with self.file.reading() as connection:
            queue = queue_number(connection, name)
            counts = "SELECT count(*), coalesce(sum(id <= ?), 0) FROM message WHERE queue = ?"
            total, leased = connection.execute(counts, (_handed_out(connection, queue), queue)).fetchone()
        consumed = ownership.is_owned(self.file, queue)
        leased = leased if consumed else 0  # its consumer is gone: the next one takes these back
        return Depth(ready=total - leased, leased=leased, consumed=consumed)

    def bind(self, queue: str, pattern: str, *, exchange: str) -> None:
        """Let *queue* get what is published to *exchange* under *pattern*; doing so again changes nothing."""
        with self.file.transaction() as connection:
            row = (exchange, pattern, queue_number(connection, queue))
            connection.execute("INSERT INTO binding (exchange, pattern, queue) VALUES (?, ?, ?) ON CONFLICT DO NOTHING", row)

    def unbind(self, queue: str, pattern: str, *, exchange: str) -> None:
        """Remove a binding; one that does not exist is no error, as in RabbitMQ."""
        with self.file.transaction() as connection:
            row = (exchange, pattern, queue_number(connection, queue))
            connection.execute("DELETE FROM binding WHERE exchange = ? AND pattern = ? AND queue = ?", row)

    def bindings(self, exchange: str) -> list[Binding]:
        """Return the bindings of *exchange*, by queue and pattern."""
        query = (
            "SELECT exchange, pattern, name FROM binding JOIN queue ON queue.id = binding.queue "
            "WHERE exchange = ? ORDER BY name, pattern"
        )
        with self.file.reading() as connection:
            return [Binding(*row) for row in connection.execute(query, (exchange,))]

    def publish(self, exchange: str, publications: Iterable[Publication]) -> list[int]:
        """Put each message, in order, into the queues bound to its topic; return for each how many queues that were.

        One transaction: when this returns, all of them are durable; when it raises, none was published.
        """
        reached: list[int] = []
        rows: list[tuple[int, str, str, str, bytes]] = []
        with self.file.transaction() as connection:
            # Read within the transaction: a queue that is bound now has a claim on everything that commits from now on.
            router = _Router(connection, exchange)
            for publication in publications:
                queues = router.queues(publication.topic)
                reached.append(len(queues))
                properties = json.dumps(dict(publication.properties), ensure_ascii=False, separators=(",", ":"))
                rows += [(queue, exchange, publication.topic, properties, publication.body) for queue in queues]
            connection.executemany(
                "INSERT INTO message (queue, exchange, topic, properties, body) VALUES (?, ?, ?, ?, ?)", rows
            )
            failpoints.reached("E1")
        return reached


class _Router:
    """The bindings of one exchange, as they are during one transaction."""

    def __init__(self, connection: sqlite3.Connection, exchange: str) -> None:
        query = "SELECT pattern, queue FROM binding WHERE exchange = ? ORDER BY queue"
        self._bindings: list[tuple[str, int]] = connection.execute(query, (exchange,)).fetchall()
        self._known: dict[str, list[int]] = {}

    def queues(self, topic: str) -> list[int]:
        if topic not in self._known:
            # Once for each queue, however many of its patterns take the topic.
            found = dict.fromkeys(queue for pattern, queue in self._bindings if matches(pattern, topic))
            self._known[topic] = list(found)
        return self._known[topic]


def queue_number(connection: sqlite3.Connection, name: str) -> int:
    """Return the number of the queue *name*; raise NoSuchQueue."""
    row = connection.execute("SELECT id FROM queue WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise NoSuchQueue(f"no queue {name!r} on the embedded broker; `outbox consumer run` of its service declares it")
    return int(row[0])


def _handed_out(connection: sqlite3.Connection, queue: int) -> int:
    (number,) = connection.execute("SELECT handed_out FROM queue WHERE id = ?", (queue,)).fetchone()
    return int(number)
