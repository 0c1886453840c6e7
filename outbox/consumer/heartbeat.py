"""What a running service writes about itself, and what it forgets: its row in `consumer_process`, and old inbox ids."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

import outbox
from outbox.consumer import inbox, parking, tables, telemetry
from outbox.consumer.blocked import Blocked
from outbox.consumer.clock import DatabaseClock
from outbox.consumer.transaction import reading
from outbox.database import autocommitting
from outbox.process.logs import say

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

    from outbox.consumer.link import Link
    from outbox.consumer.service import Service
    from outbox.consumer.topology import Topology

log = logging.getLogger(__name__)
_process = tables.process

#: How often the row is written. `operating.status` takes one that is several times older for a dead process.
SEEN_SECONDS = 2.0
_LOOK_SECONDS = 0.5
_PRUNE_SECONDS = 60.0
#: How long the end of the process waits for its last row: on SQLite a handler that hangs keeps it from being written.
_LAST_WRITE_SECONDS = 2.0
#: Ids forgotten in one transaction: small, so that no handler waits for it.
_PRUNE_ROWS = 1_000
_PROCESS_DAYS = 1


@dataclass(frozen=True, slots=True)
class _View:
    """What the receiving thread last saw."""

    connected: bool = False
    #: When the oldest message was sent that is in hand, or was last known to be; None: the queue was seen empty since.
    oldest_at: datetime | None = None
    #: When last nothing was in hand and the queue was seen empty.
    caught_up_at: datetime | None = None


class Upkeep:
    """A thread of its own, so that neither a slow handler nor a slow broker makes a living process look dead."""

    def __init__(self, service: Service, engine: Engine, topology: Topology, *, retention_seconds: float) -> None:
        self._service = service
        self._topology = topology
        self._engine = engine
        self._retention = timedelta(seconds=retention_seconds)
        #: For all of the process that writes times into the service's tables, or compares them.
        self.clock = DatabaseClock()
        #: When the service last took a message before this process, and the monotonic clock when that was read.
        self._before: tuple[datetime, float] | None = None
        #: By which the tables know this process.
        self.id = str(uuid.uuid4())
        #: How many messages its connection may hold at once.
        self.prefetch: int | None = None
        self._queue_was_empty = False
        self._started_at: datetime | None = None
        self._view = _View()
        self._looked_at = self._asked_at = 0.0
        self._pruned_at = 0.0
        self._ended = threading.Event()
        self._complained = False
        self._blocked = Blocked(service.name)
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def prepare(self) -> None:
        """Look at the database before anything is written."""
        with reading(self._engine) as connection:
            self._started_at = self.clock.set(connection)
            newest = inbox.newest(connection, self._service.name)
        self._before = (newest or self._started_at, time.monotonic())

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """Write that the process ended; doing so again changes nothing."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_LAST_WRITE_SECONDS)

    def look(self, link: Link | None, *, now: bool = False) -> None:
        """Take notice of how the receiving thread stands; called by it at every turn, it looks only now and then."""
        recently = time.monotonic() - self._looked_at < _LOOK_SECONDS
        if recently and not now and self._view.connected == (link is not None):
            return
        self._looked_at = time.monotonic()
        # What was last known stays known until the queue is seen empty: between two handfuls, and while the broker is away.
        view = replace(self._view, connected=link is not None)
        if link is not None:
            in_hand = link.in_hand()
            sent = [each.message.created_at for each in in_hand if each.message and each.message.created_at]
            if sent:
                view = replace(view, oldest_at=min(sent))
            elif not in_hand and self._has_caught_up(link):
                view = replace(view, oldest_at=None, caught_up_at=self.clock())
        self._view = view

    def _has_caught_up(self, link: Link) -> bool:
        """Say whether nothing waits in the queue, and nothing is in hand; asks the broker seldom while that stays so."""
        if self._view.oldest_at is None and time.monotonic() - self._asked_at < SEEN_SECONDS:
            return False
        self._asked_at = time.monotonic()
        return link.backlog(self._topology) == 0 and not link.in_hand()

    def queue_was_empty(self) -> None:
        """Take notice that nothing is left of what earlier processes held."""
        self._queue_was_empty = True

    def _run(self) -> None:
        while not self._ended.wait(SEEN_SECONDS if self._looked_at else 0.1):
            self._try_to_write("running")
        self._try_to_write("stopped")

    def _try_to_write(self, state: str) -> None:
        try:
            if self._started_at is None:
                self.prepare()
            self._look_for_blockers()
            self._write(state)
            if state == "running" and time.monotonic() - self._pruned_at > _PRUNE_SECONDS:
                self._prune()
                self._pruned_at = time.monotonic()
            self._complained = False
        except Exception as error:  # noqa: BLE001 - the top of a thread; the workers say when the database is away
            if not self._complained:
                say(log, logging.DEBUG, "consumer.upkeep_failed", f"upkeep failed: {type(error).__name__}")
            self._complained = True

    def _look_for_blockers(self) -> None:
        with autocommitting(self._engine).connect() as connection:
            self._blocked.look(connection)

    def _write(self, state: str) -> None:
        view, name = self._view, self._service.name
        with self._engine.begin() as connection:
            now = self.clock.set(connection)
            if self._queue_was_empty:  # those that live write their own again
                others = sa.and_(_process.c.service == name, _process.c.id != self.id)
                connection.execute(sa.update(_process).where(others).values(prefetch=None))
                self._queue_was_empty = False
            statement = inbox.insert(connection.dialect.name, _process).values(
                service=name,
                id=self.id,
                host=socket.gethostname(),
                pid=os.getpid(),
                version=outbox.__version__,
                state=state,
                connected=view.connected and state == "running",
                started_at=self._started_at,
                seen_at=now,
                oldest_at=view.oldest_at,
                caught_up_at=view.caught_up_at,
                prefetch=self.prefetch,
            )
            changing = ("prefetch", "state", "connected", "seen_at", "oldest_at", "caught_up_at")
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=[_process.c.service, _process.c.id],
                    set_={column: statement.excluded[column] for column in changing},
                )
            )
            telemetry.parked_messages.labels(name).set(parking.count(connection, name))

    def _prune(self) -> None:
        """Forget what is older than the retention, a little at a time."""
        before = self._moment() - self._retention
        while not self._ended.is_set():
            with self._engine.begin() as connection:
                forgotten = prune(connection, self._service.name, before, _PRUNE_ROWS)
            if forgotten < _PRUNE_ROWS:
                break
        with self._engine.begin() as connection:
            old = _process.c.seen_at < self._moment() - timedelta(days=_PROCESS_DAYS)
            connection.execute(sa.delete(_process).where(_process.c.service == self._service.name, old))

    def _moment(self) -> datetime:
        """Return the moment by which things get old: never later than the last message before us, and our time since.

        A clock that is weeks ahead, the database's or that of SQLite's host, would make everything old at once.
        """
        now = self.clock()
        if self._before is None:
            return now
        newest, at = self._before
        return min(now, newest + timedelta(seconds=time.monotonic() - at))


def largest_prefetch(engine: Engine, service: str) -> int:
    """Return how many messages an earlier process of *service* may have held, since its queue was last seen empty."""
    query = sa.select(sa.func.max(_process.c.prefetch)).where(_process.c.service == service)
    with reading(engine) as connection:
        return int(connection.scalar(query) or 0)


def lives(connection: Connection, service: str, process: str, now: datetime) -> bool:
    """Say whether the process *process* of *service* still runs, as far as its row tells."""
    query = sa.select(_process).where(_process.c.service == service, _process.c.id == process)
    row = connection.execute(query).one_or_none()
    if row is None or row.state != "running" or now - row.seen_at > timedelta(seconds=8 * SEEN_SECONDS):
        return False
    return row.host != socket.gethostname() or _is_there(row.pid)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def prune(connection: Connection, service: str, before: datetime, limit: int) -> int:
    """Forget ids taken and messages discarded before *before*, at most *limit* of each; return the larger number."""
    return max(inbox.prune(connection, service, before, limit), parking.prune(connection, service, before, limit))
