"""Messages that arrived and wait for a worker. Pure but for its lock: no I/O.

A key is in one worker's hands at a time, and its messages leave in the order they came; keys run beside each other.
Messages without a key wait for nobody.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outbox.consumer.arrival import Arrival, Key


@dataclass(slots=True, eq=False)
class _Lane:
    """The messages of one key; the lane of those without a key is never taken."""

    key: Key | None
    messages: deque[Arrival] = field(default_factory=deque)
    taken: bool = False


class Waiting:
    """The waiting messages of a service, shared by the receiving thread (`add`) and the workers (`take`, `release`)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lanes: dict[Key | None, _Lane] = {}
        self._ready: deque[_Lane] = deque()  # lanes that hold messages and are not taken
        self._closed = False

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

        A suspect comes alone.
        """
        with self._changed:
            while not self._ready and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            batch: list[Arrival] = []
            while self._ready and len(batch) < limit:
                lane = self._ready.popleft()
                self._fill(batch, lane, limit)
                if batch[-1].suspect or (lane.messages and lane.messages[0].suspect):
                    break
            return batch

    def _fill(self, batch: list[Arrival], lane: _Lane, limit: int) -> None:
        while lane.messages and len(batch) < limit and not (batch and lane.messages[0].suspect):
            batch.append(lane.messages.popleft())
            lane.taken = lane.key is not None
            if batch[-1].suspect:
                break
        if lane.messages and not lane.taken:
            self._ready.append(lane)
            self._changed.notify()

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
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return sum(len(lane.messages) for lane in self._lanes.values())
