"""Wait for something to become true: poll with a deadline, and say what was awaited when it does not."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def eventually(predicate: Callable[[], T], timeout: float = 10.0, what: str = "the condition", interval: float = 0.02) -> T:
    """Return the first truthy value of *predicate*, asked every *interval* seconds for at most *timeout* seconds.

    Raises AssertionError, naming *what* and the last answer. An AssertionError in the predicate counts as "not yet"
    (and becomes the cause when time is up); any other exception passes through at once.
    """
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        refusal: AssertionError | None = None
        answer: T | None = None
        try:
            answer = predicate()
        except AssertionError as not_yet:
            refusal = not_yet
        if refusal is None and answer:
            return answer
        if time.monotonic() >= deadline:
            last = f"it said: {refusal}" if refusal is not None else f"last answer: {answer!r}"
            raise AssertionError(f"waited {timeout:g} s for {what}; {last}") from refusal
        pause.wait(interval)


def stands_still(thread: threading.Thread, inside: str, timeout: float = 10.0) -> None:
    """Return when *thread* waits, in a function called *inside*, for somebody to wake it.

    What it has not done by then it does not do by itself: the witness of "and nothing happens", on a machine of any speed.
    """
    eventually(lambda: _waits(thread, inside), timeout, f"{thread.name} to wait in {inside}", interval=0.002)


def _waits(thread: threading.Thread, inside: str) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names[:1] == ["wait"] and inside in names[1:]
