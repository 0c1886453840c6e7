"""Room that topics share: each may take much of it, and none all, so that there is room for one that comes. Pure.

A topic may take at most three times what is left. Alone it gets three quarters; of two that want everything each gets three
sevenths; and whoever comes when others have taken what they may still finds a quarter of what the last one found.
"""

from __future__ import annotations

_TIMES_WHAT_IS_LEFT = 3


class Budget:
    """So much room, and how much of it each topic has taken."""

    def __init__(self, capacity: int, taken: dict[str, int] | None = None) -> None:
        self._capacity = capacity
        self._taken = dict(taken or {})
        self.used = sum(self._taken.values())

    def copy(self) -> Budget:
        """Return another one in the same state."""
        return Budget(self._capacity, self._taken)

    def take(self, topic: str, amount: int) -> None:
        """*topic* takes *amount* more, whether it may or not."""
        self.used += amount
        self._taken[topic] = self._taken.get(topic, 0) + amount

    def give_back(self, topic: str, amount: int) -> None:
        """*topic* needs *amount* no more."""
        self.used -= amount
        self._taken[topic] -= amount
        if not self._taken[topic]:
            del self._taken[topic]

    def allows(self, topic: str) -> bool:
        """Say whether *topic* may take more."""
        return self._taken.get(topic, 0) < _TIMES_WHAT_IS_LEFT * (self._capacity - self.used)

    def allows_much(self, topic: str, amount: int) -> bool:
        """Say whether *topic* may take *amount* more, or half of all that it may ever have beside the others."""
        taken = self._taken.get(topic, 0)
        most = (self._capacity - self.used + taken) * _TIMES_WHAT_IS_LEFT // (_TIMES_WHAT_IS_LEFT + 1)
        return most > 0 and taken <= most - min(amount, (most + 1) // 2)
