"""The worker threads of a service: they take waiting messages and settle them.

A worker that is stuck with a message (`hand`) is stood in for by a spare one, until it comes back. Then one of them ends.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

from outbox.consumer import telemetry
from outbox.consumer.delivery import again
from outbox.consumer.retries import Stopping
from outbox.process.logs import say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from outbox.consumer.batch import Settled
    from outbox.consumer.delivery import Arrival
    from outbox.consumer.hand import Freed
    from outbox.consumer.key_lanes import Waiting
    from outbox.consumer.retries import Attempts

log = logging.getLogger(__name__)

#: How often it is looked whether a worker is stuck.
_LOOK_SECONDS = 0.5


class Pool:
    """Worker threads, one for each of *attempts*, and of *spares* for each that is stuck.

    *wake* is called when something was settled or a thread ended.
    """

    def __init__(
        self,
        attempts: Sequence[Attempts],
        waiting: Waiting,
        *,
        batch: int,
        wake: Callable[[], None],
        spares: Sequence[Attempts] = (),
    ) -> None:
        self._waiting = waiting
        self._batch = batch
        self._wake = wake
        self._finished: deque[Arrival] = deque()
        #: What ended a thread that should not have ended; a bug, or a failpoint.
        self.crash: BaseException | None = None
        self._service = attempts[0].deliveries.service.name
        self._size = len(attempts)
        self._lock = threading.Lock()
        self._resting = [*attempts, *spares][::-1]
        self._working: dict[Attempts, threading.Thread] = {}
        self._short = False
        self._attendant = threading.Thread(target=self._attend, name="attendant", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._fill_up()
        self._attendant.start()

    def finished(self) -> list[Arrival]:
        """Return what was settled since the last call; for the receiving thread."""
        arrivals = []
        while self._finished:
            arrivals.append(self._finished.popleft())
        return arrivals

    @property
    def working(self) -> bool:
        """Whether a thread still runs; after `Waiting.close` each ends with the transaction in hand."""
        return any(thread.is_alive() for thread in self._threads())

    def join(self, timeout: float) -> None:
        """Wait, at most *timeout* seconds, for a thread to end."""
        for thread in self._threads():
            if thread.is_alive():
                thread.join(timeout)
                return

    def _threads(self) -> list[threading.Thread]:
        with self._lock:
            return list(self._working.values())

    # --- those who are stuck, and who stands in for them --------------------------------------------------------------

    def _attend(self) -> None:
        while not self._waiting.closed.wait(_LOOK_SECONDS):
            try:
                self.look()
            except Exception as error:  # the top of a thread; where no thread can be begun, others may end
                say(log, logging.ERROR, "consumer.attendant_failed", f"no spare worker: {error}", service=self._service)
                log.debug("looking after the workers failed", exc_info=error)

    def look(self) -> None:
        """Give what need not wait for stuck workers to others, and let spare ones stand in for them."""
        with self._lock:
            working = list(self._working)
        for attempts in working:
            if freed := attempts.deliveries.hand.free():
                _say_freed(self._service, freed)
                self._waiting.give_back([again(each) for each in freed.others])
        self._fill_up()

    def _fill_up(self) -> None:
        with self._lock:
            missing = self._size - self._able()
            while missing > 0 and self._resting:
                self._begin(self._resting[-1])
                missing -= 1
            was_short, self._short = self._short, not self._able()
        if self._short and not was_short:
            sentence = (
                f"all {len(self._working)} workers, spare ones included, are stuck; nothing else is handled until one returns"
            )
            say(log, logging.ERROR, "consumer.all_stuck", sentence, service=self._service)

    def _begin(self, attempts: Attempts) -> None:
        name = f"worker-{attempts.deliveries.worker}"
        thread = threading.Thread(target=self._run, args=(attempts,), name=name, daemon=True)
        thread.start()
        self._working[attempts] = thread
        self._resting.remove(attempts)

    def _able(self) -> int:
        return sum(not attempts.deliveries.hand.is_stuck() for attempts in self._working)

    def _may_go(self, attempts: Attempts) -> bool:
        """Say whether there are enough without the caller, who has nothing in hand; then it is no worker any more."""
        with self._lock:
            if len(self._working) <= self._size or self._able() <= self._size:
                return False
            del self._working[attempts]
            self._resting.append(attempts)
            return True

    # --- the work -----------------------------------------------------------------------------------------------------

    def _run(self, attempts: Attempts) -> None:
        try:
            while (batch := self._waiting.take(self._batch)) is not None:
                self._settle(attempts, batch)
                if self._may_go(attempts):
                    return
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

        hand = attempts.deliveries.hand
        hand.take(batch)
        try:
            attempts.settle(batch, done)
        except Stopping:
            pass  # what is not settled is not acknowledged: the next process gets it first
        finally:
            self._waiting.release([arrival for arrival in batch if hand.keeps(arrival)])


def _say_freed(service: str, freed: Freed) -> None:
    if freed.stuck is None:
        sentence = "a statement of the runtime takes long; the messages it is for are tried one by one"
        say(log, logging.WARNING, "consumer.stuck", sentence, service=service)
        return
    source, message_id = freed.stuck.identity
    how = "its transaction was rolled back, and it begins again, alone, when its handler returns" if freed.cut else "it goes on"
    sentence = f"message {message_id} takes long and keeps {len(freed.others)} others no longer; {how}"
    key = freed.stuck.key and freed.stuck.key[1]
    topic = freed.stuck.topic
    say(log, logging.WARNING, "consumer.stuck", sentence, service=service, topic=topic, source=source, key=key)
