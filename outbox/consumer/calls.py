"""The calls of a handler: which are under way, since when, where they are, and how long the next one may take."""

from __future__ import annotations

import math
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from outbox.message import Received

#: How much of an expectation is left when a call was quicker: some ten quick calls make up for one slow one.
_FADING = 0.9


@dataclass(slots=True, eq=False)
class Call:
    """A handler that has a message in hand."""

    message: Received
    #: Of the handler.
    name: str
    #: By the clock of its `Calls`.
    since: float
    thread: int = field(default_factory=threading.get_ident)

    def place(self, caller: str) -> str:
        """Return where the call is now: the function that code in the file *caller* called, and the innermost one.

        Never more than names and lines: what the frames hold may be payload.
        """
        innermost = outermost = frame = sys._current_frames().get(self.thread)
        while frame is not None and frame.f_code.co_filename != caller:
            outermost, frame = frame, frame.f_back
        if innermost is None or outermost is None or frame is innermost:
            return "unknown"
        return _line(outermost) if outermost is innermost else f"{_line(outermost)}, in {_line(innermost)}"


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}()"


class Calls:
    """The calls of one handler, in all threads of the process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._under_way: set[Call] = set()
        self._expected = math.inf

    def begin(self, message: Received, name: str) -> Call:
        """Note that a handler is about to be called in this thread."""
        call = Call(message, name, self._clock())
        self._under_way.add(call)
        return call

    def end(self, call: Call) -> None:
        """Note that it returned or raised."""
        self._under_way.discard(call)
        seconds = self._clock() - call.since
        self._expected = max(seconds, _FADING * self.usual_seconds() + (1 - _FADING) * seconds)

    def under_way(self) -> list[Call]:
        """Return the calls that have not ended."""
        return list(self._under_way)

    def usual_seconds(self) -> float:
        """Return how long calls took of late; 0 before one has ended."""
        return 0.0 if self._expected == math.inf else self._expected

    def expected_seconds(self) -> float:
        """Return how long the next call may take: about as long as the slowest of late; infinite before the first one."""
        now = self._clock()
        return max(self._expected, *(now - call.since for call in self.under_way()), 0.0)
