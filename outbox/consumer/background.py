"""Background work of a service: what its handlers left behind in tables, done in a thread of its own."""

from __future__ import annotations

import logging
import random
import threading
from typing import TYPE_CHECKING

from outbox.consumer.failures import place
from outbox.process.backoff import Backoff
from outbox.process.logs import say

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from outbox.consumer.service import Background

log = logging.getLogger(__name__)

_AFTER_FAILURE = Backoff(0.5, 30.0)
#: It looks this often without being woken: a commit of another process, or of the redriver, wakes nobody here.
_LOOK_SECONDS = 1.0


class Worker:
    """Calls one function until it has nothing more to do, whenever there may be something."""

    def __init__(self, service: str, function: Background, engine: Engine) -> None:
        self._service = service
        self._function = function
        self._name = getattr(function, "__qualname__", repr(function))
        self._engine = engine
        self._rng = random.Random()  # noqa: S311 - spreads retries, keeps no secret
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._idle = threading.Event()
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name=f"background-{self._name}", daemon=True)

    @property
    def idle(self) -> bool:
        """Whether the last call said that nothing is left, and nothing was committed since."""
        return self._idle.is_set() and not self._wake.is_set()

    def start(self) -> None:
        """Begin; the first call comes at once, for what an earlier process left."""
        self._thread.start()

    def wake(self) -> None:
        """Say that there may be work; from any thread."""
        self._wake.set()

    def stop(self, timeout: float) -> bool:
        """Let it do what is there, for at most *timeout* seconds; return whether it ended. Work that fails is left."""
        self._ending.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            ending = self._ending.is_set()
            self._idle.clear()  # before the other: nobody may see "nothing left" between a wake-up and its work
            self._wake.clear()
            failed = not self._work()
            self._idle.set()
            if ending:
                return
            if failed:
                self._ending.wait(_AFTER_FAILURE.wait(self._failures, self._rng))
            else:
                self._wake.wait(_LOOK_SECONDS)

    def _work(self) -> bool:
        """Call the function until it is done; return False when it failed."""
        try:
            while self._function(self._engine):
                pass
        except BaseException as error:  # a service's own code, also sys.exit(): the service goes on, and so does this thread
            self._failures += 1
            sentence = f"background work {self._name} failed and is tried again: {place(error)}"
            # The text of an error may quote what the service works on: it goes to the traceback, at debug level only.
            say(log, logging.ERROR, "consumer.background_failed", sentence, service=self._service, failures=self._failures)
            log.debug("background work failed", exc_info=error)
            return False
        self._failures = 0
        return True
