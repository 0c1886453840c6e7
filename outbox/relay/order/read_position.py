"""From which id to which the next read goes. Pure: the clock is an argument.

Ids are drawn before commits, so a row may appear below ids already read. Reading everything each time would find it, but
steps over all that must wait, and over every dead row that an old snapshot keeps. So reads go ahead from the last id looked
at; a little less often from where that was a second ago; and from the start as often as a tenth of the time allows. Nothing
is lost whatever the reads in between skip, and order never depends on it (see `Lanes`).

No read is long. One that looks behind ends after so many rows (`drain.SCANNED`) or ids, and goes on from there when its turn
comes again; between two of its pages the next read goes ahead. So all that waits is looked at again in a bounded number of
reads, and a new message waits for one page at most.

A relay that begins where much must wait has no such place to go on from until it has been through all of it. Until then every
second read is a scout's, far ahead where the newest are: what it passes over is met again on the way.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

#: Reads from the start take at most about a tenth of the time, and begin at most this often, and this often if cheap.
_FULL_SPACING, _FULL_SECONDS = 9.0, 0.05
#: Reads from the floor take at most about a fifth of the time.
_FLOOR_SPACING = 4.0
#: The floor is where reads had arrived this long ago: most transactions are shorter.
_FLOOR_SECONDS = 1.0
#: A page behind that takes longer goes over fewer ids from now on, but over this many.
_PAGE_SECONDS, _PAGE_IDS = 0.02, 10_000


@dataclass(slots=True, eq=False)
class _Sweep:
    """Reads from a start up to where reads have come, page by page, for a share of the time."""

    spacing: float
    least_seconds: float
    due_at: float = 0.0
    #: The id after which the next page begins; None between two rounds.
    at: int | None = None

    def went(self, end: int | None, began: float, ended: float) -> None:
        """A page has ended at *end*, or the round with it (None)."""
        self.at = end
        self.due_at = ended + max(self.least_seconds if end is None else 0.0, (ended - began) * self.spacing)


@dataclass(frozen=True, slots=True)
class Span:
    """The ids that one read goes over."""

    after: int
    #: None: as far as there are rows.
    upto: int | None = None
    sweep: _Sweep | None = None
    #: It is a page of a round of reads from the start; its first.
    sweeps_all: bool = False
    begins: bool = False
    #: It is far ahead: what it leaves out need not be remembered.
    scouts: bool = False


class Position:
    """How far reads have come."""

    def __init__(self) -> None:
        self._cursor = 0
        self._floor = 0
        self._passed: deque[tuple[float, int]] = deque()
        self._from_start = _Sweep(_FULL_SPACING, _FULL_SECONDS)
        self._from_floor = _Sweep(_FLOOR_SPACING, 0.0)
        self._full_wanted = True
        #: The last read went behind and did not arrive: the next one goes ahead.
        self._ahead = False
        self._page_ids = math.inf
        self._slowest = 0.0
        #: Up to where scouts have come; None where none are needed. And whether one is next.
        self._scouted: int | None = None
        self._scouts_next = False

    @property
    def scouting(self) -> bool:
        """Whether every second read is far ahead."""
        return self._scouted is not None

    def scout_from(self, after: int) -> None:
        """Let every second read be one above *after* until the others have come there."""
        if after > self._cursor:
            self._scouted, self._scouts_next = after, True

    def want_full(self) -> None:
        """Something below may have become free: read from the start as soon as its cost allows."""
        self._full_wanted = True

    @property
    def full_wanted_at(self) -> float:
        """When a read from the start should be made for which somebody waits; infinity when nobody does."""
        return self._from_start.due_at if self._full_wanted or self._from_start.at is not None else math.inf

    def next(self, now: float, revisit: int | None) -> Span:
        """Return over which ids to read. *revisit*: the id after which rows were passed over that may be loaded now."""
        if self._scouted is not None and self._scouts_next:
            return Span(self._scouted, scouts=True)
        if self._ahead:
            return Span(self._cursor)
        sweep = self._from_start
        if now >= sweep.due_at:
            return replace(self._behind(sweep.at or 0, sweep), sweeps_all=True, begins=sweep.at is None)
        sweep = self._from_floor
        if now >= sweep.due_at:
            return self._behind(self._floor if sweep.at is None else sweep.at, sweep)
        if revisit is not None and revisit < self._cursor:
            return self._behind(revisit)
        return Span(self._cursor)

    def _behind(self, after: int, sweep: _Sweep | None = None) -> Span:
        upto = after + self._page_ids
        return Span(after, int(upto) if upto < self._cursor else None, sweep)

    def returned(self, span: Span, last: int | None, end: int | None, *, began: float, ended: float) -> int | None:
        """Take in that a read looked at all up to *end* (None: there was no more) and brought rows up to *last* (None: none).

        Returns the id from which on rows are left that reads had passed before; None when there are none.
        """
        reached = last if end is None else end
        self._scouts_next = not span.scouts
        if span.scouts:
            self._scouted = reached or self._scouted
            return None
        if span.sweeps_all:
            self._full_wanted = self._full_wanted and not span.begins
            self._adapt(span, end, ended - began)
        if reached is not None and reached > self._cursor:
            self._cursor = reached
            self._passed.append((ended, reached))
        if self._scouted is not None and (self._cursor >= self._scouted or (end is None and span.upto is None)):
            self._scouted = None
        while self._passed and self._passed[0][0] <= ended - _FLOOR_SECONDS:
            self._floor = self._passed.popleft()[1]
        left = end if end is not None and end < self._cursor else None
        if span.sweep is not None:
            span.sweep.went(left, began, ended)
        if left is None and span.after <= self._floor:
            self._from_floor.went(None, began, ended)
        self._ahead = left is not None
        return left

    def _adapt(self, span: Span, end: int | None, took: float) -> None:
        """See that a page takes about as long as it may, where it is long for the dead rows between its ids."""
        if span.begins:
            if self._slowest < _PAGE_SECONDS / 2:
                self._page_ids *= 2
            self._slowest = 0.0
        self._slowest = max(self._slowest, took)
        if took > _PAGE_SECONDS and end == span.upto:
            ids = (self._cursor if end is None else end) - span.after
            self._page_ids = max(_PAGE_IDS, min(self._page_ids, ids * _PAGE_SECONDS / took))
