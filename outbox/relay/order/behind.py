"""Keys and topics of which enough is loaded: reads leave the rest out, and later go back to where they passed it over. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Selection:
    """What one read does about those that are behind."""

    left_out: list[str]
    #: Read on now → from where.
    resumed: dict[str, int]


class Behind:
    """Names (keys, or topics) of which rows were passed over, each with the id above which they were.

    Such a one is left out by reads, so that what is passed over later need not be noted. When it has room it is read on from
    its id, page by page, until it has enough again or reads have come to where those ahead begin.
    """

    def __init__(self, has_room: Callable[[str], bool]) -> None:
        self._has_room = has_room
        self._marks: dict[str, int] = {}
        #: The same, of the read that is under way.
        self._passed: dict[str, int] = {}

    def lowest(self) -> int | None:
        """Return the lowest id above which something may be read on; None if nothing may."""
        return min((mark for name, mark in self._marks.items() if self._has_room(name)), default=None)

    def any_full(self) -> bool:
        """Say whether one of them has no room."""
        return any(not self._has_room(name) for name in self._marks)

    def select(self, after: int) -> Selection:
        """Return what a read above *after* does about them; it begins."""
        self._passed = {}
        resumed = {name: mark for name, mark in self._marks.items() if mark >= after and self._has_room(name)}
        return Selection([name for name in self._marks if name not in resumed], resumed)

    def passed(self, name: str, after: int) -> None:
        """The read that is under way passes over the rows of *name* above *after*."""
        self._passed.setdefault(name, after)

    def read_on(self, name: str, after: int) -> None:
        """Rows of *name* above *after*, which reads have passed, are free now."""
        self._marks[name] = min(after, self._marks.get(name, after))

    def ended(self, selection: Selection, end: int | None) -> None:
        """The read looked at all up to *end*, or (None) up to where reads ahead begin."""
        for name, mark in selection.resumed.items():
            if self._marks.get(name) != mark:
                continue  # since the read began something has become free further back, or all was forgotten
            del self._marks[name]
            if end is not None:
                self._marks[name] = max(mark, end)
        for name, mark in self._passed.items():
            self.read_on(name, mark)

    def clear(self) -> None:
        """Forget all."""
        self._marks.clear()
