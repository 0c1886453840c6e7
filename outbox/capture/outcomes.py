"""What becomes of a message that was sent: it commits, it is rolled back, or nobody ends its transaction.

Tests that record, the counters, and the warning about forgotten commits all live on this.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, NestedTransaction
from sqlalchemy.pool import Pool

from outbox.message import Message
from outbox.process import metrics
from outbox.process.logs import say
from outbox.store.capturing import Held

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.pool import ConnectionPoolEntry

log = logging.getLogger(__name__)

CAPTURED = metrics.counter("outbox_captured_total", "messages whose transaction committed", ["topic"])
UNCOMMITTED = metrics.counter("outbox_uncommitted_total", "messages sent, but neither committed nor rolled back", ["topic"])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sent(Held):
    """A held message, and who wants to know what becomes of it."""

    #: What sent it, for texts: "signal 'sessions_modified'".
    by: str
    #: Lists that show it unless it is rolled back.
    recorders: tuple[list[Message], ...] = ()
    #: The application context it was sent in.
    context: Context | None = None


class Holder(Protocol):
    """Has messages whose transaction is still open."""

    def pending(self) -> Iterable[Sent]: ...


class Context:
    """An application context; at its end it says what was sent in it and then forgotten."""

    def __init__(self) -> None:
        self._holders: WeakSet[Any] = WeakSet()  # of Holder
        self._abandoned: list[Sent] = []

    def watch(self, holder: Holder) -> None:
        """Ask *holder* at the end what is still open."""
        self._holders.add(holder)

    def abandon(self, sent: Sent) -> None:
        """Note that the session of *sent* was closed without commit or rollback."""
        self._abandoned.append(sent)

    def end(self, *, failed: bool) -> None:
        """Report, once, what nobody committed or rolled back; *failed*: an error ended the context, so nobody forgot."""
        pending = [sent for holder in self._holders for sent in holder.pending() if sent.context is self]
        if not failed:
            _report([*self._abandoned, *pending])


# --- the three fates ----------------------------------------------------------------------------------------------------


def committed(batch: Iterable[Sent]) -> None:
    """Count what is durable now."""
    for topic, count in Counter(sent.message.topic for sent in batch).items():
        CAPTURED.labels(topic).inc(count)


def rolled_back(batch: Iterable[Sent]) -> None:
    """Take what nobody will hear of from the recordings."""
    for sent in batch:
        for recorder in sent.recorders:
            # By identity: what only looks the same may have been sent twice. The list itself stays: a test holds it.
            recorder[:] = [message for message in recorder if message is not sent.message]


def abandoned(batch: Iterable[Sent]) -> None:
    """The session was closed without commit or rollback: report it here, or at the end of the application context."""
    lost = list(batch)
    rolled_back(lost)
    homeless = [sent for sent in lost if sent.context is None]
    for sent in lost:
        if sent.context is not None:
            sent.context.abandon(sent)
    # `with Session() as session:` closes on the way of an exception, too: then nobody has forgotten a commit.
    if sys.exc_info()[0] is None:
        _report(homeless)


def _report(batch: list[Sent]) -> None:
    if not batch:
        return
    for topic, count in Counter(sent.message.topic for sent in batch).items():
        UNCOMMITTED.labels(topic).inc(count)
    senders = Counter(f"{sent.by} as {sent.message.topic!r}" for sent in batch)
    listed = ", ".join(f"{sender} ({count})" for sender, count in sorted(senders.items()))
    say(
        log,
        logging.WARNING,
        "capture.uncommitted",
        f"sent, but neither committed nor rolled back, so nobody will hear of it: {listed}; call session.commit() after send()",
    )


# --- messages whose fate is the connection's ----------------------------------------------------------------------------


def savepoints(connection: Connection) -> list[NestedTransaction]:
    """Return the savepoints that are open on *connection*, innermost first."""
    found = []
    savepoint = connection.get_nested_transaction()
    while savepoint is not None:
        found.append(savepoint)
        savepoint = savepoint._previous_nested  # SQLAlchemy has no public name for it; a test holds on to this one
    return found


@dataclass(slots=True, eq=False)
class Followed:
    """A message that was written at once on a connection."""

    sent: Sent
    #: The names of the savepoints it is in.
    inside: frozenset[str]
    #: The session that sent it has committed. If the owner of the connection does not, nobody has forgotten it.
    let_go: bool = False


class _Trail:
    """What was written at once on a connection that others commit and roll back."""

    def __init__(self, connection: Connection) -> None:
        self._open: list[Followed] = []
        #: The COMMIT is on its way, and no event tells that it came back; the next thing that happens on the connection does.
        self._committing: list[Followed] = []
        for name in ("commit", "commit_twophase"):
            event.listen(connection, name, self._commit)
        for name in ("begin", "begin_twophase"):
            event.listen(connection, name, self.has_committed)
        for name in ("rollback", "rollback_twophase"):
            event.listen(connection, name, self._roll_back)
        event.listen(connection, "rollback_savepoint", self._roll_back_savepoint)

    def add(self, connection: Connection, sent: Sent) -> Followed:
        followed = Followed(sent, frozenset(savepoint._savepoint for savepoint in savepoints(connection)))
        self._open.append(followed)
        return followed

    def pending(self) -> Iterable[Sent]:
        return [each.sent for each in self._open if not each.let_go]

    def _commit(self, *_: object) -> None:
        self._committing, self._open = self._open, []

    def has_committed(self, *_: object) -> None:
        """The COMMIT before, if there was one, did not fail."""
        done, self._committing = self._committing, []
        committed(each.sent for each in done)

    def has_failed(self, connection: Connection) -> None:
        """The COMMIT that is on its way failed."""
        lost, self._committing = self._committing, []
        rolled_back(each.sent for each in lost)
        if lost and connection.dialect.name == "sqlite":
            # There the transaction goes on, and SQLAlchemy thinks it over: what comes next on the connection would commit it.
            connection.connection.rollback()

    def _roll_back(self, *_: object) -> None:
        self.has_committed()
        lost, self._open = self._open, []
        rolled_back(each.sent for each in lost)

    def _roll_back_savepoint(self, _connection: object, name: str, _context: object) -> None:
        rolled_back(each.sent for each in self._open if name in each.inside)
        self._open = [each for each in self._open if name not in each.inside]


_trails: WeakKeyDictionary[Connection, _Trail] = WeakKeyDictionary()
#: In `connection.info`: a weak reference to its trail, for the event of the pool, which knows no other connection.
_TRAIL = "outbox_trail"


def follow(connection: Connection, sent: Sent) -> Followed:
    """*sent* was written on *connection*: it commits or goes with its transaction, or with one of its open savepoints."""
    trail = _trails.get(connection)
    if trail is None:
        trail = _trails[connection] = _Trail(connection)
        connection.info[_TRAIL] = ref(trail)
    if sent.context is not None:
        sent.context.watch(trail)
    return trail.add(connection, sent)


def let_go(batch: Iterable[Followed]) -> None:
    """The session that sent *batch* has committed: it is the end of whoever gave it its connection that decides."""
    for followed in batch:
        followed.let_go = True


# Of all engines and pools, from the import on: to listen on one that is in use breaks what other threads do with it meanwhile.


@event.listens_for(Engine, "handle_error")
def _on_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is not None and connection in _trails:
        _trails[connection].has_failed(connection)


@event.listens_for(Pool, "checkin")
def _on_checkin(_connection: object, record: ConnectionPoolEntry) -> None:
    weak: ref[_Trail] | None = record.info.pop(_TRAIL, None)
    trail = None if weak is None else weak()
    if trail is not None:
        trail.has_committed()
