"""What a session has done and holds between the begin and the end of its outermost transaction, and on which connections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakSet, ref

from sqlalchemy.engine import Connection, Engine, NestedTransaction
from sqlalchemy.orm import Session, SessionTransaction

from outbox.capture.outcomes import Followed, Sent

#: Where a session keeps its `Work`. Not in `session.info`: that is the application's, which may clear it.
_WORK = "_outbox_work"
#: In `connection.info`: weak references to the work that goes on there. That is of the driver's connection, which several
#: connections of SQLAlchemy may share (a database in memory); a commit on one of them is a commit on all.
_WORKS = "outbox_works"


@dataclass(slots=True, eq=False)
class Level:
    """What belongs to one transaction or savepoint of a session."""

    #: Waits for the outermost commit, in the order of sending.
    held: list[Sent] = field(default_factory=list)
    #: In the tables already.
    written: list[Sent] = field(default_factory=list)
    #: In the tables, on a connection whose end others may decide.
    entrusted: list[Followed] = field(default_factory=list)
    #: Why this can only be rolled back: a message is missing from it.
    doomed: str | None = None
    committed: bool = False
    rolled_back: bool = False

    def hand_to(self, outer: Level) -> None:
        """Let *outer* have everything: this savepoint was released."""
        outer.held += self.held
        outer.written += self.written
        outer.entrusted += self.entrusted
        self.held, self.written, self.entrusted = [], [], []


@dataclass(slots=True, eq=False)
class Used:
    """A connection that a session has begun on."""

    connection: Connection
    #: The session was given it and did not open it: whoever did may end its transaction without a word to the session.
    joined: bool
    #: Something may have been written on it since, by whomever.
    wrote: bool = False
    #: The driver was in a transaction since the session holds messages.
    seen_open: bool = False


@dataclass(slots=True, eq=False, weakref_slot=True)
class Work:
    """What a session does from the begin to the end of its outermost transaction."""

    session: ref[Session]
    levels: dict[SessionTransaction, Level] = field(default_factory=dict)
    #: Of savepoints that were closed, neither released nor rolled back: the outermost transaction's end says what that was.
    closed: list[Sent] = field(default_factory=list)
    #: The batch of the outermost transaction is written: what comes now is written at once.
    late: bool = False
    flushing: bool = False
    had_savepoint: bool = False
    #: The outbox's, where the session alone does not say.
    engine: Engine | None = None
    used: dict[Connection, Used] = field(default_factory=dict)
    #: Savepoints on these connections that the session made itself.
    savepoints: WeakSet[NestedTransaction] = field(default_factory=WeakSet)
    #: Work of other sessions that got a message because this one had written nothing.
    passed_over_for: WeakSet[Work] = field(default_factory=WeakSet)

    def level(self, transaction: SessionTransaction) -> Level:
        """Return what belongs to *transaction*."""
        found = self.levels.get(transaction)
        if found is None:
            found = self.levels[transaction] = Level()
        return found

    def held(self) -> Sequence[Sent]:
        """Return what waits for the outermost commit."""
        if not self.levels:  # asked at every statement: most transactions send nothing, or late
            return ()
        return [sent for level in self.levels.values() for sent in level.held]

    def pending(self) -> list[Sent]:
        """Return what neither committed nor was rolled back."""
        return [sent for level in self.levels.values() if not level.committed for sent in (*level.held, *level.written)]

    def on(self, engine: Engine) -> Used | None:
        """Return the connection to the database of *engine*; engines with other execution options share their pool."""
        return next((used for used in self.used.values() if used.connection.engine.pool is engine.pool), None)


def known(session: Session) -> Work | None:
    """Return the work of *session*, None if it has none."""
    return session.__dict__.get(_WORK)


def of(session: Session) -> Work:
    """Return the work of *session*, begun now if it has none."""
    work = known(session)
    if work is None:
        work = session.__dict__[_WORK] = Work(ref(session))
    return work


def end(session: Session) -> None:
    """Forget the work of *session*: its outermost transaction has ended."""
    del session.__dict__[_WORK]


def begin_on(connection: Connection, work: Work, *, joined: bool) -> None:
    """Note that *work* goes on on *connection*, too; *joined*: others opened it."""
    work.used[connection] = Used(connection, joined)
    connection.info[_WORKS] = (*(weak for weak in connection.info.get(_WORKS, ()) if weak() is not None), ref(work))


def on(connection: Connection) -> list[Work]:
    """Return the work of every session on *connection*; one that was lost has none, and no `info` either."""
    if connection.invalidated:
        return []
    return [work for weak in connection.info.get(_WORKS, ()) if (work := weak()) is not None]


def owner_of(connection: Connection) -> Work | None:
    """Return the work of the session that opened *connection*: its transaction is that of the session; None: nobody's."""
    for work in on(connection):
        used = work.used.get(connection)
        if used is not None and not used.joined:
            return work
    return None
