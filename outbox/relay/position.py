"""From which id the next read starts. Pure: the clock is an argument.

Ids are drawn before commits, so a row may appear below ids already read. Reading from the start each time would find it, but
steps over every dead row that an old snapshot keeps. So reads go ahead from the last id read; a little less often from
where that was a second ago; and from the start as often as a tenth of the time allows. Nothing is lost whatever the
reads in between skip, and order never depends on it (see `Lanes.prove`).
"""

from __future__ import annotations

import math
from collections import deque

#: A read from the start takes at most about a tenth of the time, and comes at most this often, and this often if cheap.
_FULL_SPACING, _FULL_SECONDS = 9.0, 0.05
#: A read from the floor takes at most about a fifth of the time.
_FLOOR_SPACING = 4.0
#: The floor is where reads had arrived this long ago: most transactions are shorter.
_FLOOR_SECONDS = 1.0


class Position:
    """How far reads have come."""

    def __init__(self) -> None:
        self._cursor = 0
        self._floor = 0
        self._passed: deque[tuple[float, int]] = deque()
        self._full_at = 0.0
        self._floor_at = 0.0
        self._full_wanted = True

    def want_full(self) -> None:
        """Something below may have become free: read from the start as soon as its cost allows."""
        self._full_wanted = True

    @property
    def full_wanted_at(self) -> float:
        """When a read from the start should be made for which somebody waits; infinity when nobody does."""
        return self._full_at if self._full_wanted else math.inf

    def next(self, now: float, revisit: int | None) -> int:
        """Return the id after which to read: 0 when a read from the start is due, else at most *revisit*."""
        if now >= self._full_at:
            return 0
        start = self._floor if now >= self._floor_at else self._cursor
        return start if revisit is None else min(start, revisit)

    def returned(self, after: int, last: int | None, *, began: float, ended: float) -> None:
        """Take in that a read above *after* brought rows up to *last* (None: no rows)."""
        took = ended - began
        if after == 0:
            self._full_at = ended + max(_FULL_SECONDS, took * _FULL_SPACING)
            self._full_wanted = False
        if after <= self._floor:
            self._floor_at = ended + took * _FLOOR_SPACING
        if last is not None and last > self._cursor:
            self._cursor = last
            self._passed.append((ended, last))
        while self._passed and self._passed[0][0] <= ended - _FLOOR_SECONDS:
            self._floor = self._passed.popleft()[1]

    def stop_before(self, id_: int) -> None:
        """Rows from *id_* on were not taken after all: the next read ahead starts there."""
        self._cursor = min(self._cursor, id_ - 1)
        while self._passed and self._passed[-1][1] > self._cursor:
            self._passed.pop()
