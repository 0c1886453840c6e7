"""The worker threads of a service: they take waiting messages and settle them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

from outbox.consumer import telemetry
from outbox.consumer.retries import Stopping
from outbox.process.logs import say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from outbox.consumer.batch import Settled
    from outbox.consumer.delivery import Arrival
    from outbox.consumer.key_lanes import Waiting
    from outbox.consumer.retries import Attempts

log = logging.getLogger(__name__)


class Pool:
    """Worker threads, one for each of *attempts*; *wake* is called when something was settled or a thread ended."""

    def __init__(
        self,
        attempts: Sequence[Attempts],
        waiting: Waiting,
        *,
        batch: int,
        wake: Callable[[], None],
    ) -> None:
        self._waiting = waiting
        self._batch = batch
        self._wake = wake
        self._finished: deque[Arrival] = deque()
        #: What ended a thread that should not have ended; a bug, or a failpoint.
        self.crash: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(each,), name=f"worker-{each.deliveries.worker}", daemon=True)
            for each in attempts
        ]

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def finished(self) -> list[Arrival]:
        """Return what was settled since the last call; for the receiving thread."""
        arrivals = []
        while self._finished:
            arrivals.append(self._finished.popleft())
        return arrivals

    @property
    def working(self) -> bool:
        """Whether a thread still runs; after `Waiting.close` each ends with the transaction in hand."""
        return any(thread.is_alive() for thread in self._threads)

    def join(self, timeout: float) -> None:
        """Wait, at most *timeout* seconds, for a thread to end."""
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout)
                return

    def _run(self, attempts: Attempts) -> None:
        try:
            while (batch := self._waiting.take(self._batch)) is not None:
                self._settle(attempts, batch)
        except BaseException as error:
            self.crash = error
            say(log, logging.CRITICAL, "consumer.worker_crashed", f"a worker ended: {type(error).__name__}")
            log.debug("a worker ended", exc_info=error)
        finally:
            self._wake()

    def _settle(self, attempts: Attempts, batch: list[Arrival]) -> None:
        def done(results: list[Settled]) -> None:
            self._finished.extend(result.arrival for result in results)
            telemetry.settled(attempts.deliveries.service, results)
            self._wake()

        try:
            attempts.settle(batch, done)
        except Stopping:
            pass  # what is not settled is not acknowledged: the next process gets it first
        finally:
            self._waiting.release(batch)
