"""Whose turn it is to be written: in the order handed over, but no topic keeps another waiting. Pure: no I/O, no clock."""

from __future__ import annotations

import heapq
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class Turns(Generic[T]):
    """What waits to be written. Order matters within a key alone, and of a key one message is under way at a time."""

    def __init__(self) -> None:
        self._numbers = count()
        self._topics: dict[str, deque[tuple[int, T]]] = {}
        #: A heap of the number of each topic's first one. An entry that is no longer so is passed over.
        self._heads: list[tuple[int, str]] = []

    def __bool__(self) -> bool:
        return bool(self._topics)

    def __iter__(self) -> Iterator[T]:
        return (each for waiting in self._topics.values() for _, each in waiting)

    def add(self, topic: str, each: T) -> None:
        """Let *each* wait behind the others of its topic."""
        number = next(self._numbers)
        if topic not in self._topics:
            self._topics[topic] = deque()
            heapq.heappush(self._heads, (number, topic))
        self._topics[topic].append((number, each))

    def next(self, may_topic: Callable[[str], bool], may: Callable[[T], bool]) -> T | None:
        """Return the first one of a topic that may, and that may itself; the others keep waiting."""
        found: T | None = None
        passed: list[str] = []
        while self._heads and found is None:
            number, topic = heapq.heappop(self._heads)
            if topic not in self._topics or self._topics[topic][0][0] != number:
                continue
            found = self._first(topic, may) if may_topic(topic) else None
            passed.append(topic)
        for topic in passed:
            if topic in self._topics:
                heapq.heappush(self._heads, (self._topics[topic][0][0], topic))
        return found

    def _first(self, topic: str, may: Callable[[T], bool]) -> T | None:
        waiting = self._topics[topic]
        for _ in range(len(waiting)):
            number, each = waiting.popleft()
            if may(each):
                if not waiting:
                    del self._topics[topic]
                return each
            waiting.append((number, each))
        return None

    def remove(self, topic: str) -> list[T]:
        """Take out all that waits of *topic*."""
        return [each for _, each in self._topics.pop(topic, ())]

    def clear(self) -> None:
        """Forget everything."""
        self._topics.clear()
        self._heads.clear()
