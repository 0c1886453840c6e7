"""How carefully to send after connections were lost. Pure: told what happened, asked who may go.

A lost connection says nothing about the messages in flight, and nearly always it was not their fault; one that we dropped
ourselves, because nobody answered in time, never was. But a message that makes the broker close the connection would do so
for ever, with everybody else in the window. So:

* after a loss, the first message goes alone;
* a message lost three times, while others passed in between, is a suspect: suspects fly without company, and each time
  they are lost at most half as many, until one is alone;
* a suspect that is lost alone, after another message has passed on a connection of the same broker, is the culprit: that
  counts as its failed attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

#: Losses that make a suspect.
_SUSPICIOUS = 3


@dataclass(slots=True)
class _Losses:
    count: int
    #: How many messages had passed when it was lost last.
    passed: int
    #: Which loss it was: who was lost longest ago goes first.
    number: int


class Caution:
    """Remembers the losses of messages that have not passed yet."""

    def __init__(self) -> None:
        self._alone = True
        self._losses: dict[int, _Losses] = {}
        self._suspects: set[int] = set()
        self._group = 0
        self._passed = 0
        self._number = 0

    @property
    def alone(self) -> bool:
        """Whether the next message goes alone: nothing has passed since the connection was lost."""
        return self._alone

    def passed(self, id_: int) -> None:
        """The broker answered *id_*, whatever it said: the connection lives, and *id_* does not kill it."""
        self._passed += 1
        self._alone = False
        if self._losses:
            self._losses.pop(id_, None)
            self._suspects.discard(id_)
            if not self._suspects:
                self._group = 0

    def lost(self, ids: Collection[int], *, were_flying: int, blamed: bool = False) -> list[int]:
        """A connection was lost with *ids* in flight, *were_flying* in all; return the one that is to blame, if one is.

        *blamed*: the broker said that one of them was to blame, so all are suspects at once.
        """
        self._alone = True
        if not ids:
            return []
        self._number += 1
        culprit: list[int] = []
        for id_ in ids:
            losses = self._losses.setdefault(id_, _Losses(0, -1, 0))
            losses.number = self._number
            if blamed:
                losses.count = max(losses.count, _SUSPICIOUS)
            if self._passed <= losses.passed:
                continue  # nobody has passed since: the broker is down, not the message bad
            if id_ in self._suspects and were_flying == 1:
                culprit.append(id_)
            losses.count += 1
            losses.passed = self._passed
        if not self._suspects.isdisjoint(ids):
            self._group = max(1, min(self._group, were_flying) // 2)
        self._suspects.update(id_ for id_ in ids if self._losses[id_].count >= _SUSPICIOUS)
        if self._group == 0:
            self._group = len(self._suspects) // 2
        return culprit

    def dropped(self, ids: Iterable[int]) -> None:
        """We ended the connection with *ids* in flight: no evidence against any of them. Others go first next time."""
        self._alone = True
        self._number += 1
        for id_ in ids:
            self._losses.setdefault(id_, _Losses(0, -1, 0)).number = self._number

    def next_alone(self, ready: Iterable[int]) -> int | None:
        """Return which of *ready* goes first on a new connection: whoever was never lost, or lost longest ago."""
        return min(ready, key=lambda id_: (self._losses[id_].number if id_ in self._losses else 0, id_), default=None)

    @property
    def suspects(self) -> frozenset[int]:
        """Who must fly without company."""
        return frozenset(self._suspects)

    @property
    def group(self) -> int:
        """How many suspects may fly at once."""
        return max(1, self._group)

    def given_up(self, id_: int) -> None:
        """A person decides about *id_* now; it does not come again by itself."""
        self._losses.pop(id_, None)
        self._suspects.discard(id_)

    def forget(self, known: Collection[int]) -> None:
        """Keep nothing about messages that are not among *known*, save for culprits that will come again."""
        for id_ in [id_ for id_ in self._losses if id_ not in known and id_ not in self._suspects]:
            del self._losses[id_]
