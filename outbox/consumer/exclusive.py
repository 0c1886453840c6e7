"""Who may work beside others, and who is to be alone for a while."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

#: When conflicts recur within so many seconds, work is done one after the other for as long.
_CALM_SECONDS = 10.0
#: So long it is waited for everybody else to be done, and others are kept out: by what conflicted, and by a suspect.
_CALM_PATIENCE_SECONDS = 1.0
_ALONE_PATIENCE_SECONDS = 5.0


class Turnstile:
    """Lets work run side by side, and some of it alone.

    A suspect is, so that when it kills the process nobody else's attempt is to blame; and what met a conflict, because
    repeated beside the others it would meet the next one.

    For a while: what has been inside for *patience_seconds* did not kill the process by starting, and nobody waits for it
    any longer. Otherwise one handler that hangs would keep a suspect out for ever, and the suspect everybody else.
    """

    def __init__(
        self, *, patience_seconds: float = _ALONE_PATIENCE_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._conflict_at = self._calm_until = float("-inf")
        self._patience = patience_seconds
        self._clock = clock
        self._changed = threading.Condition()
        self._asking = 0
        # Who is inside, and until when others wait for them.
        self._beside: dict[object, float] = {}
        self._alone: dict[object, float] = {}

    def conflict(self) -> None:
        """Two transactions were in each other's way. When that recurs, all are one after the other for a while."""
        now = time.monotonic()
        if now - self._conflict_at < _CALM_SECONDS:
            self._calm_until = now + _CALM_SECONDS
        self._conflict_at = now

    def side_by_side(self) -> AbstractContextManager[None]:
        """Beside others, or one after the other while conflicts recur."""
        return self.calm() if time.monotonic() < self._calm_until else self.shared()

    def calm(self) -> AbstractContextManager[None]:
        """When nobody else is inside, unless that takes long."""
        return self.alone(_CALM_PATIENCE_SECONDS)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others, after those who ask to be alone."""
        with self._changed:
            while seconds := self._patience if self._asking else self._to_wait(self._alone):
                self._changed.wait(seconds)
            who = self._enter(self._beside, self._patience)
        try:
            yield
        finally:
            self._leave(self._beside, who)

    @contextmanager
    def alone(self, patience_seconds: float | None = None) -> Iterator[None]:
        """When nobody else is inside who came a moment ago; keeps others out, and waits, for *patience_seconds* at most."""
        patience = self._patience if patience_seconds is None else patience_seconds
        deadline = self._clock() + patience
        with self._changed:
            self._asking += 1
            while seconds := min(self._to_wait({**self._beside, **self._alone}), max(0.0, deadline - self._clock())):
                self._changed.wait(seconds)
            self._asking -= 1
            who = self._enter(self._alone, patience)
        try:
            yield
        finally:
            self._leave(self._alone, who)

    def _to_wait(self, inside: dict[object, float]) -> float:
        return max(0.0, max(inside.values(), default=0.0) - self._clock())

    def _enter(self, inside: dict[object, float], patience_seconds: float) -> object:
        who = object()
        inside[who] = self._clock() + patience_seconds
        return who

    def _leave(self, inside: dict[object, float], who: object) -> None:
        with self._changed:
            del inside[who]
            self._changed.notify_all()
