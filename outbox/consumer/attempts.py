"""What an exception means: wait, try again, or give the message up. The only place that decides it."""

from __future__ import annotations

import logging
import random
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.exc import DBAPIError

from outbox.backoff import Backoff
from outbox.consumer.arrival import again
from outbox.consumer.delivery import Deliveries, Settled
from outbox.consumer.failures import describe, first_line, is_transient, place
from outbox.consumer.outcomes import Incomplete, Reject, Retry
from outbox.consumer.parking import Aside
from outbox.consumer.tables import Reason
from outbox.consumer.transaction import Transient
from outbox.logs import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from outbox.consumer.arrival import Arrival

log = logging.getLogger(__name__)
T = TypeVar("T")

#: A `Retry(after)` up to this keeps the message in hand; a longer one sets it aside.
LONGEST_WAIT_SECONDS = 60.0
#: Now and then a handler has to wait; so often in a row, and an operator wants to know why nothing moves.
_NOTEWORTHY = 5


class GivenUp(Exception):
    """Work found out that its message can't be handled, and no attempt would help."""

    def __init__(self, aside: Aside) -> None:
        super().__init__(aside.error)
        self.aside = aside


class Stopping(Exception):
    """The process is to end: what is not settled stays with the broker."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient a service is."""

    max_attempts: int = 5
    #: Between the attempts at one message. Short: its worker waits.
    between_attempts: Backoff = field(default=Backoff(0.1, 5.0))
    #: While the database is away.
    without_database: Backoff = field(default=Backoff(0.2, 5.0))
    #: After `Retry()`.
    when_asked: Backoff = field(default=Backoff(1.0, LONGEST_WAIT_SECONDS))


class Pause:
    """Stops all workers of a service for a while: what they need is away. Shared by all threads."""

    def __init__(self, service: str, policy: Policy, stopping: threading.Event, rng: random.Random) -> None:
        self._service = service
        self._policy = policy
        self._stopping = stopping
        self._rng = rng
        self._lock = threading.Lock()
        self._until = 0.0
        self._failures = 0
        self._asked = 0
        self._problem = ""

    @property
    def problem(self) -> str:
        """Why the service's database can't be used; empty when it can."""
        return self._problem

    def wait(self) -> None:
        """Return when work may begin; raises Stopping."""
        while True:
            seconds = self._until - time.monotonic()
            if self._stopping.wait(max(0.0, seconds)) if seconds > 0 else self._stopping.is_set():
                raise Stopping
            if seconds <= 0:
                return

    def rest(self, seconds: float) -> None:
        """Let the calling thread alone wait; raises Stopping."""
        if self._stopping.wait(seconds):
            raise Stopping

    def database_failed(self, error: BaseException) -> None:
        """The database was away or busy: everybody waits, longer each time."""
        with self._lock:
            self._failures += 1
            # One deadlock is everyday life; the second failure in a row is news.
            if self._failures == 2 and not self._problem:
                cause = error.__cause__ or error
                self._problem = first_line(cause) if is_transient(cause) or isinstance(cause, DBAPIError) else place(cause)
                sentence = f"service {self._service!r}: its database can't be used now; waiting for it ({self._problem})"
                say(log, logging.WARNING, "consumer.database_lost", sentence, service=self._service)
            self._begin(self._policy.without_database.wait(self._failures, self._rng))

    def asked_for(self, seconds: float | None) -> None:
        """A handler raised Retry: everybody waits *seconds*, or longer each time."""
        with self._lock:
            self._asked += 1
            if self._asked == _NOTEWORTHY:
                sentence = (
                    f"service {self._service!r}: handlers raised Retry {_NOTEWORTHY} times in a row; nothing is applied until "
                    "what they wait for is back"
                )
                say(log, logging.WARNING, "consumer.waiting", sentence, service=self._service)
            self._begin(self._policy.when_asked.wait(self._asked, self._rng) if seconds is None else seconds)

    def _begin(self, seconds: float) -> None:
        self._until = max(self._until, time.monotonic() + seconds)

    def over(self) -> None:
        """A transaction was committed."""
        if not self._failures and not self._asked:
            return
        with self._lock:
            if self._problem:
                say(log, logging.INFO, "consumer.database_back", f"service {self._service!r}: its database is back")
            self._failures = self._asked = 0
            self._problem = ""


class Attempts:
    """Settles messages, however often that takes: for one worker thread."""

    def __init__(self, deliveries: Deliveries, policy: Policy, pause: Pause, rng: random.Random) -> None:
        self.deliveries = deliveries
        self.policy = policy
        self.pause = pause
        self._rng = rng

    def settle(self, batch: Sequence[Arrival], done: Callable[[list[Settled]], None]) -> None:
        """Settle *batch*, together if that works, else one by one; *done* is told after each commit. Raises Stopping."""
        if len(batch) > 1:
            if self._together(batch, done):
                return
            batch = [again(arrival) for arrival in batch]
        for arrival in batch:
            done(self._alone(arrival))

    def _together(self, batch: Sequence[Arrival], done: Callable[[list[Settled]], None]) -> bool:
        while True:
            self.pause.wait()
            try:
                settled = self.deliveries.settle(batch)
            except Transient as error:
                self.pause.database_failed(error)
                batch = [again(arrival) for arrival in batch]
            except Exception:  # noqa: BLE001 - whatever it was, it is looked at when the culprit is alone
                return False
            else:
                self.pause.over()
                done(settled)
                return True

    def _alone(self, arrival: Arrival) -> list[Settled]:
        def work() -> list[Settled]:
            nonlocal arrival
            try:
                return self._watched(arrival) if arrival.suspect else self.deliveries.settle([arrival])
            except Exception:
                arrival = again(arrival)
                raise

        def give_up(aside: Aside) -> list[Settled]:
            return self.deliveries.settle([arrival], {arrival: aside})

        return self.persist(work, give_up)

    def _watched(self, arrival: Arrival) -> list[Settled]:
        """Settle a suspect: that it is tried is on record before, in case the process does not live to tell."""
        begun = self.deliveries.begin_attempt(arrival)
        if begun > self.policy.max_attempts:
            raise GivenUp(crashed(begun - 1, "handling"))
        try:
            return self.deliveries.settle([arrival])
        except Exception:
            self.until_written(lambda: self.deliveries.end_attempt(arrival))  # it failed, and we live
            raise

    def persist(self, work: Callable[[], T], give_up: Callable[[Aside], T]) -> T:
        """Return what *work* returns, tried as often as the policy allows, else what *give_up* does. Raises Stopping."""
        failed = 0
        while True:
            self.pause.wait()
            aside = None
            try:
                result = work()
            except Transient as error:
                self.pause.database_failed(error)
            except Retry as later:
                seconds = later.after_seconds
                if seconds is not None and seconds > LONGEST_WAIT_SECONDS:
                    aside = Aside(Reason.LATER, *describe(later), due_at=self._after(seconds))
                else:
                    self.pause.asked_for(seconds)
            except Reject as reason:
                aside = Aside(Reason.REJECTED, *describe(reason), attempts=1, hold=reason.hold)
            except GivenUp as reason:
                aside = reason.aside
            except Incomplete as reason:
                aside = Aside(Reason.INCOMPLETE, describe(reason)[0])
            except Exception as error:  # noqa: BLE001 - a handler may raise anything
                failed += 1
                if failed >= self.policy.max_attempts:
                    aside = Aside(Reason.FAILED, *describe(error), attempts=failed)
                else:
                    self.pause.rest(self.policy.between_attempts.wait(failed, self._rng))
            else:
                self.pause.over()
                return result
            if aside is not None:
                return self.until_written(partial(give_up, aside))

    def _after(self, seconds: float) -> datetime:
        return self.deliveries.clock() + timedelta(seconds=seconds)

    def until_written(self, write: Callable[[], T]) -> T:
        """Return what *write* returns, tried until the database takes it: what is to be parked has nowhere else to go."""
        while True:
            self.pause.wait()
            try:
                result = write()
            except Exception as error:  # noqa: BLE001 - also a missing permission or a full disk may be mended
                self.pause.database_failed(error)
            else:
                self.pause.over()
                return result


def crashed(times: int, doing: str) -> Aside:
    """Return the reason for a message that the process did not survive."""
    return Aside(Reason.CRASHED, f"the process died {times} times while {doing} it", attempts=times)


class Turnstile:
    """Lets work run side by side, and suspects alone: when one kills the process, nobody else's attempt is to blame."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False
        self._asking = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others, after those who ask to be alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._asking)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """When nobody else is inside."""
        with self._changed:
            self._asking += 1
            self._changed.wait_for(lambda: not self._alone and not self._inside)
            self._asking -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()
