"""One consumer of one queue: waits for its turn, takes messages ahead, remembers what is not settled."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from outbox.embedded.ownership import Delivery, Ownership, OwnershipLost, QueueLock, lock_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox.embedded.file import BrokerFile
    from outbox.embedded.transport import Message

#: How many messages are taken ahead where no prefetch limits it.
_UNLIMITED = 500


class Subscription:
    """A consumer of one queue: waits to own it, then holds at most *prefetch* of its messages (0: no limit)."""

    def __init__(self, file: BrokerFile, tag: str, queue: int, prefetch: int, callback: Callable[[Message], object]) -> None:
        self.tag = tag
        self.callback = callback
        self._file = file
        self._queue = queue
        self._prefetch = prefetch
        self._lock = QueueLock(lock_path(file, queue))
        self._ownership: Ownership | None = None
        self._cancelled = False
        self._waiting: deque[Delivery] = deque()  # taken from the queue, not yet given to the callback
        self._unacknowledged: dict[int, Delivery] = {}
        self._seen: int | None = None  # the data version at which the queue held nothing more

    def next(self, version: int) -> Delivery | None:
        """Return the next message for the callback, None when there is none or this consumer may have none.

        *version* is a data version of the file not older than the last commit that is to be seen.
        """
        if self._cancelled:
            return None
        if not self._waiting:
            self._look(version)
        if not self._waiting:
            return None
        delivery = self._waiting.popleft()
        self._unacknowledged[delivery.id] = delivery._replace(body=b"")  # whoever has it keeps it, or not
        return delivery

    def _look(self, version: int) -> None:
        credit = self._credit()
        if credit == 0 or version == self._seen:
            return
        if self._ownership is None:
            if not self._lock.take():
                return
            self._ownership = Ownership.begin(self._file, self._queue, self._lock)
        self._keep(self._ownership.take(credit), credit, version)

    def undelivered(self, queue: int) -> int:
        """Return how many messages of *queue* are here and not yet given to the callback."""
        return len(self._waiting) if queue == self._queue else 0

    def acknowledge(self, deliveries: list[int]) -> None:
        """Remove *deliveries* for good, and take as many others in the same transaction."""
        version = self._file.data_version()
        for number in deliveries:
            del self._unacknowledged[number]
        credit = 0 if self._cancelled else self._credit()
        taken = self._owner().settle(deliveries, take=credit)
        self._keep(taken, credit, version)
        self._release_if_done()

    def give_back(self, number: int) -> None:
        """Deliver a message again, before all later ones that the callback has not seen."""
        delivery = self._owner().put_back(self._unacknowledged[number])
        del self._unacknowledged[number]
        if not self._cancelled:
            self._waiting = deque(sorted([*self._waiting, delivery]))
        self._release_if_done()

    def cancel(self) -> None:
        """Deliver nothing more. The queue stays ours until what was delivered is settled: a successor keeps its order."""
        self._cancelled = True
        self._waiting.clear()
        self._release_if_done()

    def close(self) -> None:
        """Let a successor take over, whatever is unacknowledged."""
        self._cancelled = True
        self._lock.close()

    def _owner(self) -> Ownership:
        if self._ownership is None:
            raise OwnershipLost("this consumer does not own its queue")
        return self._ownership

    def _credit(self) -> int:
        """Return how many more messages may be taken."""
        if self._prefetch == 0:
            return max(0, _UNLIMITED - len(self._waiting))
        return max(0, self._prefetch - len(self._waiting) - len(self._unacknowledged))

    def _keep(self, taken: list[Delivery], wanted: int, version: int) -> None:
        self._waiting.extend(taken)
        self._seen = version if len(taken) < wanted else None

    def _release_if_done(self) -> None:
        if self._cancelled and not self._unacknowledged:
            self.close()
