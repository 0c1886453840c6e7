"""The answers at hand: what the broker said, kept until the database has it. Pure: the clock is an argument.

Answers wait a little for company, because a commit costs the disk's time. An answer whose row somebody else has locked
stays here and is tried again with growing pauses, while those that come after it are recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox.process.backoff import Backoff
from outbox.store.settling import Change, Confirmed

if TYPE_CHECKING:
    from collections.abc import Collection

Settlement = Confirmed | Change

#: Answers wait this long for company before they are settled. A commit costs the disk's time, and new messages wait for it.
_COMPANY_SECONDS = 0.05
#: How long a locked row is left alone: most locks are of a command that is about to commit.
_LOCKED = Backoff(base_seconds=0.1, maximum_seconds=2.0)
#: A lock that lasts longer than this is worth a word.
_LONG_SECONDS = 3.0


class Answers:
    """What is to be settled, and when."""

    def __init__(self, enough: int) -> None:
        """*enough* answers are settled without waiting for company."""
        self._enough = enough
        self._fresh: list[Settlement] = []
        self._since = 0.0
        self._locked: list[Settlement] = []
        self._refusals = 0
        self._retry_at = 0.0
        self._locked_since = 0.0

    def __len__(self) -> int:
        return len(self._fresh) + len(self._locked)

    def locked(self, now: float) -> list[int]:
        """Return the pending ids whose answers wait for somebody's lock, when that has taken longer than a command's."""
        if now - self._locked_since < _LONG_SECONDS:
            return []
        return [each.id for each in self._locked]

    def add(self, answer: Settlement, now: float) -> None:
        """Take in one more."""
        if not self._fresh:
            self._since = now
        self._fresh.append(answer)

    @property
    def due_at(self) -> float | None:
        """When something should be settled; None when nothing is at hand."""
        due = []
        if self._fresh:
            due.append(self._since if len(self._fresh) >= self._enough else self._since + _COMPANY_SECONDS)
        if self._locked:
            due.append(self._retry_at)
        return min(due, default=None)

    def due(self, now: float) -> tuple[list[Confirmed], list[Change]]:
        """Return what to settle in one transaction now."""
        chosen = self._fresh if now < self._retry_at else [*self._locked, *self._fresh]
        return (
            [each for each in chosen if isinstance(each, Confirmed)],
            [each for each in chosen if isinstance(each, Change)],
        )

    def settled(self, tried: Collection[int], locked: Collection[int], now: float) -> list[int]:
        """The transaction that settled *tried* was committed, save for those *locked*; return the ids that are done with."""
        at_hand = [*self._locked, *self._fresh]
        self._fresh = []
        self._locked = [each for each in at_hand if each.id in locked or each.id not in tried]
        if locked:
            self._locked_since = self._locked_since if self._refusals else now
            self._refusals += 1
            self._retry_at = now + _LOCKED.ceiling(self._refusals)
        elif not self._locked:
            self._refusals, self._retry_at = 0, 0.0
        return [each.id for each in at_hand if each.id in tried and each.id not in locked]
