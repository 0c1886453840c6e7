"""Messages that arrived and wait for a worker. Pure but for its lock: no I/O.

A key is in one worker's hands at a time, and its messages leave in the order they came; keys run beside each other.
Messages without a key wait for nobody.

What shares a batch shares its fate until the batch is done: while one message of it takes long, the keys of the others
wait, until they are given back (`hand`). So a batch is no more than a second of work, as far as one can tell: messages whose
handler was slow of late, or was not yet called, or is in a call that does not end, come alone. And it is no more than a
mebibyte of bodies.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outbox.consumer.delivery import again

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from outbox.consumer.delivery import Arrival, Key

#: How much work one transaction is, by what its handlers took of late.
_BATCH_SECONDS = 1.0
#: And how much it holds in memory, decoded.
_BATCH_BYTES = 1024 * 1024


@dataclass(slots=True, eq=False)
class _Lane:
    """The messages of one key; the lane of those without a key is never taken."""

    key: Key | None
    messages: deque[Arrival] = field(default_factory=deque)
    taken: bool = False


class _Batch:
    """What one worker is about to be given."""

    def __init__(self, limit: int, seconds_of: Callable[[Arrival], float]) -> None:
        self.arrivals: list[Arrival] = []
        self._limit = limit
        self._seconds_of = seconds_of
        self._seconds = 0.0
        self._bytes = 0

    def takes(self, arrival: Arrival) -> bool:
        """Add *arrival* if it may share the batch with what is in it; say whether it was added."""
        seconds, size = self._seconds + self._seconds_of(arrival), self._bytes + arrival.size
        if self.arrivals and (
            len(self.arrivals) >= self._limit
            or arrival.suspect
            or self.arrivals[0].suspect
            or seconds > _BATCH_SECONDS
            or size > _BATCH_BYTES
        ):
            return False
        self.arrivals.append(arrival)
        self._seconds, self._bytes = seconds, size
        return True


class Waiting:
    """The waiting messages of a service, shared by the receiving thread (`add`) and the workers (`take`, `release`).

    *seconds_of* says how long a message's handler may take.
    """

    def __init__(self, seconds_of: Callable[[Arrival], float] = lambda _: 0.0) -> None:
        self._seconds_of = seconds_of
        self._changed = threading.Condition()
        self._lanes: dict[Key | None, _Lane] = {}
        self._ready: deque[_Lane] = deque()  # lanes that hold messages and are not taken
        #: Nobody takes anything any more.
        self.closed = threading.Event()

    def add(self, arrival: Arrival) -> None:
        """Let *arrival* wait for a worker."""
        with self._changed:
            lane = self._lanes.get(arrival.key)
            if lane is None:
                lane = self._lanes[arrival.key] = _Lane(arrival.key)
            lane.messages.append(arrival)
            if len(lane.messages) == 1 and not lane.taken:
                self._ready.append(lane)
                self._changed.notify()

    def take(self, limit: int) -> list[Arrival] | None:
        """Wait for messages and return at most *limit*, whose keys are the caller's until `release`; None when closed.

        A suspect comes alone, and what may take long.
        """
        with self._changed:
            while not self._ready and not self.closed.is_set():
                self._changed.wait()
            if self.closed.is_set():
                return None
            batch = _Batch(limit, self._seconds_of)
            while self._ready and batch.takes(self._ready[0].messages[0]):
                self._fill(batch, self._ready.popleft())
            if self._ready:
                self._changed.notify()
        return [again(each) if each.slim else each for each in batch.arrivals]

    def _fill(self, batch: _Batch, lane: _Lane) -> None:
        """Move from *lane* what shares *batch*; it took the first one."""
        lane.messages.popleft()
        lane.taken = lane.key is not None
        while lane.messages and batch.takes(lane.messages[0]):
            lane.messages.popleft()
        if lane.messages and not lane.taken:
            self._ready.append(lane)  # behind the others: messages without a key are not to starve keys

    def release(self, batch: Sequence[Arrival]) -> None:
        """The caller is done with the keys of *batch*."""
        with self._changed:
            for key in {arrival.key for arrival in batch} - {None}:
                lane = self._lanes[key]
                lane.taken = False
                if lane.messages:
                    self._ready.append(lane)
                    self._changed.notify()
                else:
                    del self._lanes[key]

    def give_back(self, batch: Sequence[Arrival]) -> None:
        """Let *batch* wait again, before all others of its keys, which the caller is done with."""
        with self._changed:
            for arrival in reversed(batch):
                lane = self._lanes.get(arrival.key)
                if lane is None:
                    lane = self._lanes[arrival.key] = _Lane(arrival.key)
                if lane.taken or not lane.messages:
                    lane.taken = False
                    self._ready.appendleft(lane)
                lane.messages.appendleft(arrival)
            self._changed.notify_all()

    def clear(self) -> None:
        """Forget what no worker has taken: its connection is gone, it will be delivered again."""
        with self._changed:
            for lane in self._lanes.values():
                lane.messages.clear()
            self._lanes = {key: lane for key, lane in self._lanes.items() if lane.taken}
            self._ready.clear()

    def close(self) -> None:
        """Let nobody take anything any more."""
        with self._changed:
            self.closed.set()
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return sum(len(lane.messages) for lane in self._lanes.values())
