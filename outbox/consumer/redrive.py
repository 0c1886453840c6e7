"""Replays parked messages that are due, in the order of their key, as the workers handle what arrives.

A replay happens in one transaction with the handlers' effects: the row goes when the effect comes. The key is locked from
the look at its line to the commit, so what arrives meanwhile waits and then sees the key held or free, nothing between.
Any process of the service may replay; the locks let one of them do each.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from outbox import failpoints
from outbox.consumer import arrival as arrivals
from outbox.consumer import inbox, parking, telemetry
from outbox.consumer.attempts import GivenUp, Stopping, crashed
from outbox.consumer.delivery import Settled, Tally, count, task_of
from outbox.consumer.failures import is_transient
from outbox.consumer.outcomes import Outcome
from outbox.consumer.parking import Aside
from outbox.consumer.tables import State
from outbox.consumer.transaction import Transient, reading, transaction
from outbox.logs import say

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Row

    from outbox.consumer.arrival import Arrival, Key
    from outbox.consumer.attempts import Attempts, Turnstile
    from outbox.consumer.delivery import Deliveries
    from outbox.consumer.transaction import HandlerSession

log = logging.getLogger(__name__)

#: How often a service looks for messages that are due.
_POLL_SECONDS = 1.0
_AT_ONCE = 50


class Replays:
    """The transactions of replaying."""

    def __init__(self, deliveries: Deliveries) -> None:
        self._deliveries = deliveries
        self._service = deliveries.service
        self._name = deliveries.service.name

    def due(self) -> list[Row[Any]]:
        """Return messages that are due. Raises Transient."""
        try:
            with reading(self._deliveries.engine) as connection:
                return parking.due(connection, self._name, self._deliveries.clock(), _AT_ONCE)
        except SQLAlchemyError as error:
            if is_transient(error):
                raise Transient(str(error)) from error
            raise

    def begin(self, row_id: int, key: Key | None) -> int:
        """Record that the replay of a message begins, and return how often one began without an end; 0: not its turn."""
        with transaction(self._deliveries.engine) as session:
            connection = session.connection()
            head = self._head(connection, row_id, key)
            if head is None:
                return 0
            if head.id != row_id:
                parking.wait_for_turn(connection, row_id)
                return 0
            return parking.count_start(connection, row_id) if self._is_due(head) else 0

    def end(self, row_id: int) -> None:
        """Record that a replay ended, without success: the process lives."""
        with transaction(self._deliveries.engine) as session:
            parking.forget_starts(session.connection(), row_id)

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
                parking.move_up(connection, self._name, key, self._deliveries.clock())
            late = sum(each.late for each in settled)
            count(connection, self._name, self._deliveries.worker, Tally(applied=len(settled), late=late))
        failpoints.reached("K4")
        return settled

    def set_aside_again(self, row_id: int, key: Key | None, aside: Aside) -> list[Settled]:
        """Record why the message stays parked; nobody waits for one that holds nothing."""
        with transaction(self._deliveries.engine) as session:
            connection = session.connection()
            head = self._head(connection, row_id, key)
            if head is None or head.id != row_id:
                return []
            aside = aside.after(head, self._deliveries.clock())
            holds = aside.holds(key)
            parking.set_aside_again(connection, row_id, aside, holds=holds)
            if key is not None and not holds:
                parking.move_up(connection, self._name, key, self._deliveries.clock())
            arrival = _arrival(head)
        return [Settled(arrival, Outcome.PARKED, aside=aside)]

    def _head(self, connection: Connection, row_id: int, key: Key | None) -> Row[Any] | None:
        """Return, locked, the message whose turn it is: the head of *key*, or without a key the message itself."""
        if key is None:
            return parking.lock(connection, row_id)
        inbox.lock_marks(connection, self._name, [key])
        line = parking.line(connection, self._name, key, 1)
        return line[0] if line else None

    def _is_due(self, row: Row[Any]) -> bool:
        return bool(row.state == State.DUE and row.due_at <= self._deliveries.clock())

    def _apply(self, session: HandlerSession, row: Row[Any]) -> Settled:
        arrival = _arrival(row)
        task = task_of(self._service, arrival)
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
    """The thread that replays what is due."""

    def __init__(self, attempts: Attempts, turnstile: Turnstile, stopping: threading.Event, *, batch: int) -> None:
        self._attempts = attempts
        self._service = attempts.deliveries.service
        self._replays = Replays(attempts.deliveries)
        self._turnstile = turnstile
        self._stopping = stopping
        self._batch = batch
        #: Whether the last look found nothing that is due.
        self.idle = False
        self._thread = threading.Thread(target=self._run, name="redriver", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    @property
    def working(self) -> bool:
        """Whether its thread still runs; when stopping it ends with the transaction in hand."""
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        """Wait, at most *timeout* seconds, for its end."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._attempts.pause.wait()
                found = self.look()
            except Stopping:
                return
            except Transient as error:
                self._attempts.pause.database_failed(error)
                continue
            except BaseException as error:  # whatever a handler raised: without this thread nothing parked would ever move
                say(log, logging.ERROR, "consumer.redrive_failed", f"replaying failed: {type(error).__name__}")
                log.debug("replaying failed", exc_info=error)
                found = False
            self.idle = not found
            if not found:
                self._stopping.wait(_POLL_SECONDS)

    def look(self) -> bool:
        """Replay what is due; return whether that changed anything. Raises Stopping."""
        changed = False
        seen: set[Key] = set()
        for row in self._replays.due():
            key = None if row.key is None else (row.source, row.key)
            if key is None or key not in seen:
                changed |= self._replay(row, key)
            if key is not None:
                seen.add(key)
        return changed

    def _replay(self, row: Row[Any], key: Key | None) -> bool:
        def give_up(aside: Aside) -> list[Settled]:
            return self._replays.set_aside_again(row.id, key, aside)

        # A replay that did not end may have killed the process: it runs alone, and brings nobody else's message along.
        begun_before = row.starts > 0
        with self._turnstile.alone() if begun_before else self._turnstile.shared():
            settled = None
            if key is not None and self._batch > 1 and not begun_before:
                settled = self._together(row.id, key)
            if settled is None:
                settled = self._attempts.persist(lambda: self._watched(row.id, key, 1), give_up)
        telemetry.settled(self._service, settled)
        return bool(settled)

    def _together(self, row_id: int, key: Key) -> list[Settled] | None:
        self._attempts.pause.wait()
        try:
            return self._watched(row_id, key, self._batch)
        except Stopping:
            raise
        except Exception:  # noqa: BLE001 - whatever it was, it is looked at when the first is alone
            return None

    def _watched(self, row_id: int, key: Key | None, limit: int) -> list[Settled]:
        begun = self._replays.begin(row_id, key)
        if begun == 0:
            return []
        if begun > self._attempts.policy.max_attempts:
            raise GivenUp(crashed(begun - 1, "replaying"))
        try:
            return self._replays.replay(row_id, key, limit)
        except Exception:
            self._attempts.until_written(lambda: self._replays.end(row_id))
            raise
