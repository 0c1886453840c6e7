"""How a commit wakes an idle relay on PostgreSQL: NOTIFY, and seldom.

A notification costs its commit a lock that the whole server shares, so a process sends at most one every few
milliseconds. That makes it a hint only: a woken relay keeps reading for twice that long, and an unwoken one polls.
"""

from __future__ import annotations

import time

CHANNEL = "outbox"
#: The least time between two notifications of one process.
THROTTLE_SECONDS = 0.005


class Throttle:
    """Says whether a notification is due. Two threads at once may both hear yes: one hint too many harms nobody."""

    def __init__(self, seconds: float = THROTTLE_SECONDS) -> None:
        self._seconds = seconds
        self._next = 0.0

    def due(self, now: float | None = None) -> bool:
        """Return True at most once in the throttle's time; *now* is on the monotonic clock."""
        moment = time.monotonic() if now is None else now
        if moment < self._next:
            return False
        self._next = moment + self._seconds
        return True
