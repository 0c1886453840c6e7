"""Which deliveries of one channel may be acknowledged. Pure; used by the receiving thread alone."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outbox.consumer.arrival import Arrival


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

    Workers finish in any order, and *multiple* acknowledges everything up to a tag: so only up to the last delivery before
    which everything is settled. What is settled behind it waits; a crash delivers it again, and the inbox knows it.
    """

    def __init__(self) -> None:
        self._open: deque[tuple[Any, Arrival]] = deque()
        self._settled: set[Any] = set()

    def delivered(self, tag: Any, arrival: Arrival) -> None:
        """A delivery came."""
        self._open.append((tag, arrival))

    def settled(self, tag: Any) -> None:
        """The transaction of a delivery committed."""
        self._settled.add(tag)

    def ready(self) -> list[Any]:
        """Return the tags that may be acknowledged now, in order, and forget them."""
        tags = []
        while self._open and self._open[0][0] in self._settled:
            tag, _ = self._open.popleft()
            self._settled.discard(tag)
            tags.append(tag)
        return tags

    def unsettled(self) -> list[Arrival]:
        """Return the deliveries that are still to be settled, in order."""
        return [arrival for tag, arrival in self._open if tag not in self._settled]

    def __len__(self) -> int:
        return len(self._open)
