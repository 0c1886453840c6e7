"""Which deliveries of one channel may be acknowledged. Pure; used by the receiving thread alone."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox.consumer.delivery import Arrival

#: How long the oldest delivery may be open before those settled behind it go on alone: workers finish in any order, and
#: mostly the next moment brings one acknowledgement for all of them.
_LINE_SECONDS = 0.25


class Receipt:
    """Who is to acknowledge a delivery: the channel that brought it, and no other."""

    __slots__ = ("_acks", "_tag")

    def __init__(self, acks: Acks, tag: Any) -> None:
        self._acks = acks
        self._tag = tag

    def settled(self) -> None:
        """The transaction of this delivery committed; for the receiving thread."""
        self._acks.settled(self._tag)


class Acks:
    """The unacknowledged deliveries of one channel, in the order they came.

    *Multiple* acknowledges everything up to a tag: so only up to the last delivery before which everything is settled. What
    is settled behind an open one is acknowledged singly: a handler that hangs keeps its own message from being acknowledged
    and no other. A key stays in order all the same: its messages are settled in their order, so what the broker delivers
    again of it begins with the first that was not.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: OrderedDict[Any, Arrival] = OrderedDict()
        self._settled: set[Any] = set()
        #: Of the bodies of open deliveries, in memory.
        self.bytes = 0
        self._first_since = 0.0

    def delivered(self, tag: Any, arrival: Arrival) -> None:
        """A delivery came."""
        if not self._open:
            self._first_since = self._clock()
        self._open[tag] = arrival
        self.bytes += len(arrival.body)

    def settled(self, tag: Any) -> None:
        """The transaction of a delivery committed."""
        self._settled.add(tag)

    def ready(self, *, all_of_them: bool = False) -> tuple[list[Any], list[Any]]:
        """Return the tags that may be acknowledged now, in order, and forget them: together up to the last, and singly.

        Those behind an open one come when it has been open for a while, or with *all_of_them*.
        """
        together = self._prefix()
        if self._settled and (all_of_them or self._clock() - self._first_since >= _LINE_SECONDS):
            singly = sorted(self._settled)
            for tag in singly:
                self._close(tag)
            self._settled.clear()
            return together, singly
        return together, []

    def _prefix(self) -> list[Any]:
        tags = []
        while self._open and (tag := next(iter(self._open))) in self._settled:
            self._close(tag)
            self._settled.remove(tag)
            tags.append(tag)
        if tags:
            self._first_since = self._clock()
        return tags

    def _close(self, tag: Any) -> None:
        self.bytes -= len(self._open.pop(tag).body)

    def unsettled(self) -> list[Arrival]:
        """Return the deliveries that are still to be settled, in order."""
        return [arrival for tag, arrival in self._open.items() if tag not in self._settled]

    def __len__(self) -> int:
        return len(self._open)
