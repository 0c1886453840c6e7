"""Replays parked messages that are due, in the order of their key, as the workers handle what arrives.

A replay happens in one transaction with the handlers' effects: the row goes when the effect comes. The key is locked from
the look at its line to the commit, so what arrives meanwhile waits and then sees the key held or free, nothing between.
Any process of the service may replay; the locks let one of them do each. What another replays is left to it without a wait;
messages that arrive are waited for, because they may come without a break. A process replays several keys beside each other:
a replay that hangs stops its own key.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from outbox.consumer import delivery as arrivals
from outbox.consumer import heartbeat, inbox, parking, telemetry
from outbox.consumer.batch import Settled, Tally, count, task_of
from outbox.consumer.failures import is_transient
from outbox.consumer.outcomes import Outcome
from outbox.consumer.parking import Aside
from outbox.consumer.retries import GivenUp, Stopping, crashed
from outbox.consumer.tables import State
from outbox.consumer.transaction import Transient, reading, transaction
from outbox.errors import InvalidMessage
from outbox.process import failpoints
from outbox.process.logs import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import Connection, Row

    from outbox.consumer.batch import Deliveries
    from outbox.consumer.delivery import Arrival, Key
    from outbox.consumer.exclusive import Turnstile
    from outbox.consumer.retries import Attempts
    from outbox.consumer.transaction import HandlerSession

log = logging.getLogger(__name__)

#: How often a service looks for messages that are due.
_POLL_SECONDS = 1.0
_AT_ONCE = 50
#: How long a replay waits for those that park behind it: a batch of them takes a second at most.
_KEY_SECONDS = 2.0


class Replays:
    """The transactions of replaying."""

    def __init__(self, deliveries: Deliveries, process: str) -> None:
        self._deliveries = deliveries
        self._service = deliveries.service
        self._name = deliveries.service.name
        self._process = process

    def due(self) -> list[Row[Any]]:
        """Return messages that are due. Raises Transient."""
        try:
            with reading(self._deliveries.engine) as connection:
                return parking.due(connection, self._name, self._deliveries.clock(), _AT_ONCE)
        except SQLAlchemyError as error:
            if is_transient(error):
                raise Transient(str(error)) from error
            raise

    def is_ours(self, row_id: int, key: Key | None) -> bool:
        """Say whether a message could be replayed now: nobody else has it, and it is its turn. Begins nothing."""
        with transaction(self._deliveries.engine) as session:
            return self._ours(session.connection(), row_id, key) is not None

    def begin(self, row_id: int, key: Key | None) -> int:
        """Record that the replay of a message begins; return in how many processes it did without an end, 0: not its turn.

        This process counts once, however often it begins; another one counts when it is dead.
        """
        with transaction(self._deliveries.engine) as session:
            head = self._ours(session.connection(), row_id, key)
            if head is None:
                return 0
            starts = head.starts if head.starts and head.starter == self._process else head.starts + 1
            parking.write_starts(session.connection(), row_id, starts, self._process)
            return int(starts)

    def _ours(self, connection: Connection, row_id: int, key: Key | None) -> Row[Any] | None:
        head = self._head(connection, row_id, key)
        if head is None:
            return None
        if head.id != row_id:
            parking.wait_for_turn(connection, row_id)
            return None
        return head if self._is_due(head) and not self._is_anothers(connection, head) else None

    def _is_anothers(self, connection: Connection, row: Row[Any]) -> bool:
        """Say whether a living process is between two transactions of a replay: then its lock does not tell."""
        if not row.starts or row.starter in (None, self._process):
            return False
        return heartbeat.lives(connection, self._name, row.starter, self._deliveries.clock())

    def end(self, row_id: int) -> None:
        """Record that a replay ended, without success: the process lives."""
        with transaction(self._deliveries.engine) as session:
            parking.write_starts(session.connection(), row_id, 0, None)

    def replay(self, row_id: int, key: Key | None, limit: int) -> list[Settled]:
        """Apply the message, and at most *limit* - 1 of those that wait only for it; raises what a handler raises."""
        with transaction(self._deliveries.engine) as session:
            connection = session.connection()
            head = self._head(connection, row_id, key)
            if head is None or head.id != row_id or not self._is_due(head):
                return []  # another process, or a person, was faster
            rows = [head]
            if key is not None and limit > 1:
                for following in parking.line(connection, self._name, key, limit)[1:]:
                    if following.state != State.BEHIND:
                        break
                    rows.append(following)
            settled = [self._apply(session, row) for row in rows]
            failpoints.reached("K3")
            parking.remove(connection, [row.id for row in rows])
            if key is not None:
                parking.move_up(connection, self._name, [key], self._deliveries.clock())
            late = sum(each.late for each in settled)
            count(connection, self._name, self._deliveries.worker, Tally(applied=len(settled), late=late))
        failpoints.reached("K4")
        return settled

    def set_aside_again(self, row_id: int, key: Key | None, aside: Aside) -> list[Settled]:
        """Record why the message stays parked; nobody waits for one that holds nothing."""
        with transaction(self._deliveries.engine) as session:
            connection = session.connection()
            head = self._head(connection, row_id, key, wait=True)
            if head is None or head.id != row_id:
                return []
            aside = aside.after(head, self._deliveries.clock())
            holds = aside.holds(key)
            parking.set_aside_again(connection, row_id, aside, holds=holds)
            if key is not None and not holds:
                parking.move_up(connection, self._name, [key], self._deliveries.clock())
            arrival = _arrival(head)
        return [Settled(arrival, Outcome.PARKED, aside=aside)]

    def _head(self, connection: Connection, row_id: int, key: Key | None, *, wait: bool = False) -> Row[Any] | None:
        """Return, locked, the message whose turn it is: the head of *key*, or without a key the message itself.

        None as well where another transaction keeps the key, unless we are to *wait* for it.
        """
        if key is None:
            return parking.lock(connection, row_id)
        if wait:
            inbox.lock_marks(connection, self._name, [key])
        elif not (inbox.lock_free_marks(connection, self._name, [key]) or self._in_turn(connection, key)):
            return None
        return self._first(connection, key)

    def _in_turn(self, connection: Connection, key: Key) -> bool:
        """Lock *key* after whoever has it, which is soon if that is a message that arrived; another's replay is left to it."""
        head = self._first(connection, key)
        if head is None or self._is_anothers(connection, head):
            return False
        return inbox.lock_mark_in_turn(connection, self._name, key, _KEY_SECONDS)

    def _first(self, connection: Connection, key: Key) -> Row[Any] | None:
        line = parking.line(connection, self._name, key, 1)
        return line[0] if line else None

    def _is_due(self, row: Row[Any]) -> bool:
        return bool(row.state == State.DUE and row.due_at <= self._deliveries.clock())

    def _apply(self, session: HandlerSession, row: Row[Any]) -> Settled:
        arrival = _arrival(row)
        task = task_of(self._service, arrival)
        if arrival.message is None and row.key is not None:  # it could be read when it was parked
            raise InvalidMessage(arrival.problem)
        if isinstance(task, Aside):
            raise GivenUp(task)
        begun = time.perf_counter()
        task.handle(session, late=row.late)
        return Settled(arrival, Outcome.APPLIED, late=row.late, handler_seconds=time.perf_counter() - begun)


def _arrival(row: Row[Any]) -> Arrival:
    properties = json.loads(row.properties)
    headers = properties.get("headers") or {}  # what could not be read when it was parked may be readable now
    return arrivals.read(bytes(row.body), routing_key=row.topic, properties=properties, headers=headers, digest=row.message_id)


class Redriver:
    """The threads that replay what is due, one for each of *attempts*; *process* is who begins replays."""

    def __init__(
        self, attempts: Sequence[Attempts], turnstile: Turnstile, stopping: threading.Event, *, batch: int, process: str
    ) -> None:
        self._service = attempts[0].deliveries.service
        self._turnstile = turnstile
        self._stopping = stopping
        self._batch = batch
        self._replayers = [(each, Replays(each.deliveries, process)) for each in attempts]
        self._lock = threading.Lock()
        #: What the last look found and nobody has taken, one message of each key.
        self._found: deque[Row[Any]] = deque()
        self._in_hand: set[object] = set()
        self._quiet = False
        self._threads = [
            threading.Thread(target=self._run, args=each, name=f"redriver-{number}", daemon=True)
            for number, each in enumerate(self._replayers, 1)
        ]

    def start(self) -> None:
        """Begin to look."""
        for thread in self._threads:
            thread.start()

    @property
    def idle(self) -> bool:
        """Whether the last look found nothing that it could replay, and nothing is being replayed."""
        with self._lock:
            return self._quiet and not self._found and not self._in_hand

    @property
    def working(self) -> bool:
        """Whether a thread still runs; when stopping each ends with the transaction in hand."""
        return any(thread.is_alive() for thread in self._threads)

    def join(self, timeout: float) -> None:
        """Wait, at most *timeout* seconds, for a thread to end."""
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout)
                return

    def _run(self, attempts: Attempts, replays: Replays) -> None:
        while not self._stopping.is_set():
            try:
                attempts.pause.wait()
                found = self._look(attempts, replays)
            except Stopping:
                return
            except Transient as error:
                attempts.pause.database_failed(error)
                continue
            except BaseException as error:  # whatever a handler raised: without this thread nothing parked would ever move
                say(log, logging.ERROR, "consumer.redrive_failed", f"replaying failed: {type(error).__name__}")
                log.debug("replaying failed", exc_info=error)
                found = False
            if not found:
                self._stopping.wait(_POLL_SECONDS)

    def look(self) -> bool:
        """Replay what is due; return whether that changed anything. Raises Stopping."""
        return self._look(*self._replayers[0])

    def _look(self, attempts: Attempts, replays: Replays) -> bool:
        self._find(replays)
        changed = False
        while (row := self._take()) is not None:
            try:
                changed |= self._replay(attempts, replays, row)
            finally:
                with self._lock:
                    self._in_hand.remove(_lane(row))
        self._quiet = not changed
        return changed

    def _find(self, replays: Replays) -> None:
        with self._lock:
            if not self._found:
                first_of_lane = {_lane(row): row for row in reversed(replays.due())}
                self._found.extend(sorted(first_of_lane.values(), key=lambda row: (row.due_at, row.id)))

    def _take(self) -> Row[Any] | None:
        """Return a message whose key no other thread has in hand; it is the caller's until it leaves `_in_hand`."""
        with self._lock:
            while self._found:
                row = self._found.popleft()
                if _lane(row) not in self._in_hand:
                    self._in_hand.add(_lane(row))
                    return row
        return None

    def _replay(self, attempts: Attempts, replays: Replays, row: Row[Any]) -> bool:
        key = _key(row)

        def give_up(aside: Aside) -> list[Settled]:
            return replays.set_aside_again(row.id, key, aside)

        # A replay that did not end may have killed its process: it runs alone, and brings nobody else's message along.
        begun_before = row.starts > 0
        if begun_before and not replays.is_ours(row.id, key):  # looked at before others are kept out
            return False
        with self._turnstile.alone() if begun_before else self._turnstile.shared():
            settled = None
            if key is not None and self._batch > 1 and not begun_before:
                settled = self._together(attempts, replays, row.id, key)
            if settled is None:
                settled = attempts.persist(lambda: _watched(attempts, replays, row.id, key, 1), give_up)
        telemetry.settled(self._service, settled)
        return bool(settled)

    def _together(self, attempts: Attempts, replays: Replays, row_id: int, key: Key) -> list[Settled] | None:
        attempts.pause.wait()
        try:
            return _watched(attempts, replays, row_id, key, self._batch)
        except Stopping:
            raise
        except Exception:  # noqa: BLE001 - whatever it was, it is looked at when the first is alone
            return None


def _watched(attempts: Attempts, replays: Replays, row_id: int, key: Key | None, limit: int) -> list[Settled]:
    begun = replays.begin(row_id, key)
    if begun == 0:
        return []
    if begun > attempts.policy.max_attempts:
        raise GivenUp(crashed(begun - 1, "replaying"))
    try:
        return replays.replay(row_id, key, limit)
    except Exception:
        attempts.until_written(lambda: replays.end(row_id))
        raise


def _key(row: Row[Any]) -> Key | None:
    return None if row.key is None else (row.source, row.key)


def _lane(row: Row[Any]) -> object:
    """What no two threads may have in hand: the key, without one the message."""
    return _key(row) or row.id
