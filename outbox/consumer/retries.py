"""What an exception means: wait, try again, or give the message up. The only place that decides it."""

from __future__ import annotations

import logging
import random
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.exc import DBAPIError

from outbox.consumer.batch import Deliveries, Settled
from outbox.consumer.delivery import again
from outbox.consumer.exclusive import Turnstile
from outbox.consumer.failures import describe, first_line, is_the_databases, is_transient, place
from outbox.consumer.outcomes import Incomplete, Reject, Retry
from outbox.consumer.parking import PATIENCE_SECONDS, Aside, patience, plain, unnamed
from outbox.consumer.tables import Reason
from outbox.consumer.transaction import Conflict, Cut, Transient
from outbox.process.backoff import Backoff
from outbox.process.logs import say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from outbox.consumer.delivery import Arrival

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Now and then a handler has to wait; so often in a row, and an operator wants to know why nothing moves.
_NOTEWORTHY = 5
#: A batch that conflicts is repeated alone so often; then the culprit is looked for.
_CONFLICTS = 3


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
    #: While the database is away, and between the attempts at a message that is not sure to be to blame.
    without_database: Backoff = field(default=Backoff(0.2, 5.0))
    #: After `Retry()`.
    when_asked: Backoff = field(default=Backoff(1.0, 60.0))
    #: So long a message may wait in a worker's hands for something else than itself; for longer it is set aside.
    in_hand_seconds: float = 5.0
    #: So long a message may wait at all at its handler's wish.
    patience_seconds: float = PATIENCE_SECONDS


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
        self._problem = ""
        #: How often anything was committed, by whichever thread.
        self.commits = 0

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
        """The database was away: everybody waits, longer each time."""
        self.everybody(self.noted(error))

    def noted(self, error: BaseException) -> float:
        """The database did not do what was wanted; return for how long to wait, longer each time."""
        with self._lock:
            self._failures += 1
            # One deadlock is everyday life; the second failure in a row is news.
            if self._failures == 2 and not self._problem:
                cause = error.__cause__ or error
                self._problem = first_line(cause) if is_transient(cause) or isinstance(cause, DBAPIError) else place(cause)
                sentence = f"service {self._service!r}: its database can't be used now; waiting for it ({self._problem})"
                say(log, logging.WARNING, "consumer.database_lost", sentence, service=self._service)
            return self._policy.without_database.wait(self._failures, self._rng)

    def everybody(self, seconds: float) -> None:
        """Let all wait for *seconds*: what each of them needs is away."""
        with self._lock:
            self._until = max(self._until, time.monotonic() + seconds)

    def over(self) -> None:
        """A transaction was committed."""
        self.commits += 1
        if not self._failures:
            return
        with self._lock:
            if self._problem:
                say(log, logging.INFO, "consumer.database_back", f"service {self._service!r}: its database is back")
            self._failures = 0
            self._problem = ""


@dataclass(slots=True, eq=False, kw_only=True)
class Case:
    """What was tried with one message, and when to try again."""

    failed: int = 0
    #: How often its handler asked to try again later.
    asked: int = 0
    #: When it first had to wait for something else than itself; as `time.monotonic()`.
    since: float | None = None
    #: Not before; as `time.monotonic()`.
    due: float = 0.0
    #: It met a conflict: from then on it is tried alone.
    alone: bool = False
    #: What `Pause.commits` was when it first failed for want of something that others may have had.
    commits: int | None = None

    def waits(self, seconds: float) -> None:
        """Try it again in *seconds*."""
        self.due = time.monotonic() + seconds

    def waited(self) -> float:
        """Return for how many seconds it has been waiting."""
        self.since = time.monotonic() if self.since is None else self.since
        return time.monotonic() - self.since


@dataclass(slots=True, eq=False, kw_only=True)
class InHand(Case):
    """A message that came from the broker, and stays in a worker's hands."""

    arrival: Arrival

    @property
    def lane(self) -> object:
        """What waits with it: the later messages of its key, or nothing."""
        return self if self.arrival.key is None else self.arrival.key


class Attempts:
    """Settles messages, however often that takes: for one worker thread."""

    def __init__(
        self, deliveries: Deliveries, policy: Policy, pause: Pause, rng: random.Random, turnstile: Turnstile | None = None
    ) -> None:
        self.deliveries = deliveries
        self.policy = policy
        self.pause = pause
        self._rng = rng
        self._turnstile = turnstile or Turnstile()

    def settle(self, batch: Sequence[Arrival], done: Callable[[list[Settled]], None]) -> None:
        """Settle *batch*, together if that works, else one by one; *done* is told after each commit. Raises Stopping."""
        if len(batch) > 1:
            if self._together(batch, done):
                return
            batch = [again(arrival) for arrival in batch if self.deliveries.hand.keeps(arrival)]
        self._one_by_one([InHand(arrival=arrival) for arrival in batch], done)

    # --- together ---------------------------------------------------------------------------------------------------------

    def _together(self, batch: Sequence[Arrival], done: Callable[[list[Settled]], None]) -> bool:
        """Say whether that worked; if not, it is looked for the culprit."""
        conflicts = 0
        while True:
            self.pause.wait()
            try:
                with self._turnstile.calm() if conflicts else self._turnstile.side_by_side():
                    settled = self.deliveries.settle(batch)
            except Cut:
                return False
            except Conflict as error:
                conflicts += 1
                self._turnstile.conflict()
                if conflicts == _CONFLICTS or not error.handled:
                    return False
            except Transient as error:
                if error.handled and self.deliveries.database_works():
                    return False
                self.pause.database_failed(error)
            except Exception:  # noqa: BLE001 - whatever it was, it is looked at when the culprit is alone
                return False
            else:
                self.pause.over()
                done(settled)
                return True
            batch = [again(arrival) for arrival in batch]

    # --- one by one -------------------------------------------------------------------------------------------------------

    def _one_by_one(self, cases: list[InHand], done: Callable[[list[Settled]], None]) -> None:
        """Settle each; while one waits, only the later ones of its key wait with it."""
        hand = self.deliveries.hand
        while cases:
            waiting: dict[object, InHand] = {}
            for case in list(cases):
                if case.lane in waiting or not hand.keeps(case.arrival):
                    continue
                hand.holds([each.arrival for each in cases])
                if (settled := self._tried(case)) is None:
                    waiting[case.lane] = case
                else:
                    cases.remove(case)
                    done(settled)
            # What was taken away meanwhile is another worker's; what was tried of it is forgotten.
            cases = [case for case in cases if hand.keeps(case.arrival)]
            if due := [case.due for case in waiting.values() if case in cases]:
                self._until(min(due))

    def _tried(self, case: InHand) -> list[Settled] | None:
        """Return what became of the message; None: it has to wait until it is due."""
        while case.due <= time.monotonic():
            settled = self._step(case, partial(self._settle_alone, case), partial(self._park, case))
            if settled is not None:
                return settled
        return None

    def _settle_alone(self, case: InHand) -> list[Settled]:
        arrival = case.arrival
        try:
            with self._guard(case):
                return self._watched(arrival) if arrival.suspect else self.deliveries.settle([arrival])
        except Exception:
            case.arrival = again(arrival)
            raise

    def _guard(self, case: InHand) -> AbstractContextManager[None]:
        if case.arrival.suspect:
            return self._turnstile.alone()
        return self._turnstile.calm() if case.alone else self._turnstile.side_by_side()

    def _park(self, case: InHand, aside: Aside) -> list[Settled]:
        def park(arrival: Arrival, aside: Aside) -> list[Settled]:
            return self.deliveries.settle([arrival], {arrival: aside})

        arrival = case.arrival
        return self.until_written(
            partial(park, arrival, aside), partial(park, *plain(arrival, aside)), partial(park, *unnamed(arrival, aside))
        )

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

    # --- what an exception means ------------------------------------------------------------------------------------------

    def persist(self, work: Callable[[], T], give_up: Callable[[Aside], T]) -> T:
        """Return what *work* returns, tried as often as the policy allows, else what *give_up* does. Raises Stopping."""
        case = Case()

        def park(aside: Aside) -> T:
            return self.until_written(partial(give_up, aside), partial(give_up, aside.plain()))

        while (result := self._step(case, work, park)) is None:
            self._until(case.due)
        return result

    def _step(self, case: Case, work: Callable[[], T], park: Callable[[Aside], T]) -> T | None:
        """Try once; return what became of it, None if it is to be tried again. Raises Stopping."""
        self.pause.wait()
        try:
            result = work()
        except Stopping:
            raise
        except Exception as error:  # noqa: BLE001 - a handler may raise anything
            aside = self._judged(case, error)
            return None if aside is None else park(aside)
        self.pause.over()
        return result

    def _judged(self, case: Case, error: Exception) -> Aside | None:
        """Return why the message is to be set aside; None: it is to be tried again."""
        match error:
            case Transient():
                return self._in_trouble(case, error)
            case Retry():
                return self._asked(case, error)
            case Reject():
                return Aside(Reason.REJECTED, *describe(error), attempts=1, hold=error.hold, place=place(error))
            case GivenUp():
                return error.aside
            case Incomplete():
                return Aside(Reason.INCOMPLETE, describe(error)[0], place=place(error))
            case _:
                return self._failed(case, error, self.policy.between_attempts)

    def _failed(self, case: Case, error: BaseException, backoff: Backoff) -> Aside | None:
        case.failed += 1
        if case.failed >= self.policy.max_attempts:
            return Aside(Reason.FAILED, *describe(error), attempts=case.failed, place=place(error))
        case.waits(backoff.wait(case.failed, self._rng))
        return None

    def _in_trouble(self, case: Case, error: Transient) -> Aside | None:
        """Tell the message that brings about its own trouble from the database that is away for everybody."""
        if isinstance(error, Conflict) and error.handled:
            self._turnstile.conflict()
            if not case.alone:  # next time nobody of ours can be in its way
                case.alone = True
                return None
        elif not isinstance(error, Conflict) and not (error.handled and self.deliveries.database_works()):
            self.pause.database_failed(error)
            return None
        elif not (error.handled and self._is_its_own(case, error)):
            return self._in_doubt(case, error)
        return self._failed(case, error.__cause__ or error, self.policy.without_database)

    def _is_its_own(self, case: Case, error: Transient) -> bool:
        """Say whether a message is to blame for its trouble, the database being there."""
        # Whose connection died, while a new one works, can't say that the database is away. But room and memory may be short
        # for all, as long as nobody else gets anything done.
        if case.commits is None:
            case.commits = self.pause.commits
        return error.lost or case.commits != self.pause.commits

    def _in_doubt(self, case: Case, error: Transient) -> Aside | None:
        """Let the message wait, and nobody else: another one has what it needs, or nobody can tell yet."""
        seconds = self.pause.noted(error)
        if error.handled and not self._may_stay(case, seconds):
            # Where the database takes this row it has room, and where not, everybody waits.
            return Aside(Reason.LATER, *describe(error.__cause__ or error), due_at=self._after(seconds), place=place(error))
        case.waits(seconds)
        return None

    def _may_stay(self, case: Case, seconds: float) -> bool:
        """Say whether a message may stay in a worker's hands until it is tried again."""
        return isinstance(case, InHand) and case.waited() + seconds <= self.policy.in_hand_seconds

    def _after(self, seconds: float) -> datetime:
        return self.deliveries.clock() + timedelta(seconds=seconds)

    def _asked(self, case: Case, later: Retry) -> Aside | None:
        """Let the message wait as its handler wished: in hand, or set aside, or not any longer."""
        waited = case.waited()
        case.asked += 1
        seconds = self._seconds(case, later)
        if waited > patience(later.after_seconds, self.policy.patience_seconds):
            return Aside(Reason.FAILED, *describe(later), attempts=case.asked, place=place(later))
        if later.everybody:
            self.pause.everybody(seconds)
        elif not self._may_stay(case, seconds):
            return Aside(Reason.LATER, *describe(later), due_at=self._after(seconds), place=place(later))
        if case.asked == _NOTEWORTHY:
            self._say_waiting(case, later)
        case.waits(seconds)
        return None

    def _seconds(self, case: Case, later: Retry) -> float:
        if later.after_seconds is None:
            return self.policy.when_asked.wait(case.asked, self._rng)
        # Never at once: a handler that asks for no time at all would be called as fast as the processor allows.
        return max(later.after_seconds, self.policy.between_attempts.ceiling(case.asked))

    def _say_waiting(self, case: Case, later: Retry) -> None:
        arrival = case.arrival if isinstance(case, InHand) else None
        which = "a parked message" if arrival is None else f"message {arrival.identity[1]}"
        whom = "the whole service waits" if later.everybody else "later messages of its key wait"
        sentence = f"the handler of {which} raised Retry {case.asked} times ({first_line(later)}); {whom}"
        fields = {} if arrival is None else {"topic": arrival.topic, "key": arrival.key and arrival.key[1]}
        say(log, logging.WARNING, "consumer.waiting", sentence, service=self.deliveries.service.name, **fields)

    # --- waiting ----------------------------------------------------------------------------------------------------------

    def _until(self, due: float) -> None:
        self.pause.rest(max(0.0, due - time.monotonic()))

    def until_written(self, write: Callable[[], T], *reduced: Callable[[], T]) -> T:
        """Return what *write* returns, tried until the database takes it: what is to be parked has nowhere else to go.

        Where it is not the database's state that stands in the way but what is written, the next of *reduced* is tried.
        """
        writes = [write, *reduced]
        while True:
            self.pause.wait()
            try:
                result = writes[0]()
            except Exception as error:  # noqa: BLE001 - also a missing permission or a full disk may be mended
                if len(writes) > 1 and not (isinstance(error, Transient) or is_the_databases(error)):
                    del writes[0]
                else:
                    self.pause.database_failed(error)
            else:
                self.pause.over()
                return result


def crashed(times: int, doing: str) -> Aside:
    """Return the reason for a message that the process did not survive."""
    return Aside(Reason.CRASHED, f"the process died {times} times while {doing} it", attempts=times)
