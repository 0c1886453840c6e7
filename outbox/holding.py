"""Messages held with a SQLAlchemy transaction until it commits: who owns them, when they are written, when dropped.

A held message belongs to the innermost savepoint, or else to the transaction. A released savepoint hands what it holds to
its parent; what a transaction still holds when it ends is dropped. So a message shares the fate of the rows beside it, and
no event of a rollback has to be interpreted (`after_soft_rollback` fires for the wrong transaction after a failed flush).

Where the session does not decide alone (it was joined to a transaction on a connection, or somebody made a savepoint on the
connection itself) a message is written at once: then the database gives it the fate of its neighbours.

`before_commit` and `after_commit` also fire for the release of a savepoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, NestedTransaction, TwoPhaseTransaction
from sqlalchemy.exc import MissingGreenlet, SQLAlchemyError, StatementError, UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction

from outbox import database, failpoints, fates, tables
from outbox.errors import CaptureError
from outbox.fates import Sent, savepoints
from outbox.store.write import write
from outbox.wakeup import Throttle

#: Where a session keeps its `_Work`. Not in `session.info`: that is the application's, which may clear it.
_WORK = "_outbox_work"
#: In `connection.info`: a weak reference to the session that last began on it.
_SESSION = "outbox_session"
#: One for each database: a notification to one wakes nobody at the other.
_throttles: WeakKeyDictionary[Engine, Throttle] = WeakKeyDictionary()


@dataclass(slots=True, eq=False)
class _Level:
    """What belongs to one transaction or savepoint of a session."""

    #: Waits for the outermost commit, in the order of sending.
    held: list[Sent] = field(default_factory=list)
    #: In the tables already.
    written: list[Sent] = field(default_factory=list)
    #: Why this can only be rolled back: a message is missing from it.
    doomed: str | None = None
    committed: bool = False
    rolled_back: bool = False


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Work:
    """What a session does from the begin to the end of its outermost transaction."""

    levels: dict[SessionTransaction, _Level] = field(default_factory=dict)
    #: Of savepoints that were closed, neither released nor rolled back: the outermost transaction's end says what that was.
    closed: list[Sent] = field(default_factory=list)
    #: before_commit seen without its after_commit: commits that are under way, outermost first.
    committing: int = 0
    #: The batch of the outermost transaction is written: what comes now is written at once.
    late: bool = False
    flushing: bool = False
    had_savepoint: bool = False
    #: The outbox's, where the session alone does not say.
    engine: Engine | None = None
    connections: list[Connection] = field(default_factory=list)
    #: Savepoints on these connections that the session made itself.
    savepoints: WeakSet[NestedTransaction] = field(default_factory=WeakSet)

    def level(self, transaction: SessionTransaction) -> _Level:
        found = self.levels.get(transaction)
        if found is None:
            found = self.levels[transaction] = _Level()
        return found

    def pending(self) -> list[Sent]:
        return [sent for level in self.levels.values() if not level.committed for sent in (*level.held, *level.written)]


def hold(session: Session, engine: Engine | None, sent: Sent) -> None:
    """Keep *sent* with the open transaction of *session*; *engine* is the outbox's, None: where the session puts its tables.

    Raises CaptureError where the message could miss the commit, or commit alone.
    """
    transaction = _open_transaction(session)
    work = _work_of(session)
    work.engine = engine or work.engine
    bind = _bind(session, work)
    if bind is not None:
        for used in work.connections or (bind,):
            _refuse_autocommit(used)
        _refuse_second_database(work, bind.engine)
        _refuse_savepoint_without_begin(session, work, bind)
    if isinstance(bind, Connection):
        fates.follow(_write_now(session, work, sent), sent)
    elif _is_in_foreign_savepoint(work):
        _refuse_to_overtake(work, sent)
        fates.follow(_write_now(session, work, sent), sent)
    else:
        level = work.level(transaction)
        if work.late:
            _write_now(session, work, sent)
            level.written.append(sent)
        else:
            level.held.append(sent)
            for used in work.connections:
                _watch_commits(used)
        if sent.context is not None:
            sent.context.watch(work)


def hold_on_connection(connection: Connection, sent: Sent) -> None:
    """Write *sent* at once in the transaction that is open on *connection*."""
    if not connection.in_transaction():
        raise CaptureError("no transaction is open on the connection; send inside `with connection.begin():`")
    _refuse_autocommit(connection)
    with _on_greenlet():
        if connection.dialect.name == "sqlite":
            _secure_sqlite(connection, had_savepoint=False)
        _write_one(connection, sent)
    fates.follow(connection, sent)


def session_of(connection: Connection) -> Session | None:
    """Return the session that began the transaction of *connection*; None where the connection is nobody's but its own.

    What the listener of a mapper sends on its connection has its place among what the session sends.
    """
    weak: ref[Session] | None = connection.info.get(_SESSION)
    session = None if weak is None else weak()
    work = None if session is None else _known_work(session)
    if session is None or work is None or connection not in work.connections or isinstance(_bind(session, work), Connection):
        return None
    return session


@contextmanager
def dooming(target: Session | Connection, by: str) -> Iterator[None]:
    """After an error inside, the innermost transaction of *target* can't commit: *by*'s message is missing from it.

    That of a session refuses to commit, that of a connection is rolled back.
    """
    try:
        yield
    except BaseException as error:  # time-outs of gevent and Ctrl-C are no Exception
        if isinstance(target, Connection):
            _roll_back(target)
        else:
            _doom(target, f"{by}: {error}")
        raise


def _doom(session: Session, reason: str) -> None:
    owner = session.get_nested_transaction() or session.get_transaction()
    if owner is None:
        return  # it has done nothing that could commit without the message
    level = _work_of(session).level(owner)
    level.doomed = level.doomed or reason
    if isinstance(session.bind, Connection):
        _roll_back(session.bind)  # its owner may commit without asking the session


# --- the life of a transaction ------------------------------------------------------------------------------------------


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    work = _work_of(session)
    if connection not in work.connections:
        work.connections.append(connection)
        connection.info[_SESSION] = ref(session)
        if any(level.held for level in work.levels.values()):
            _watch_commits(connection)
    if savepoint := connection.get_nested_transaction():
        work.savepoints.add(savepoint)


def _watch_commits(connection: Connection) -> None:
    if not event.contains(connection.engine, "commit", _refuse_commit_beneath):
        event.listen(connection.engine, "commit", _refuse_commit_beneath)


def _refuse_commit_beneath(connection: Connection) -> None:
    """`session.connection().commit()` passes the session: it would commit its rows without its messages."""
    session = session_of(connection)
    work = None if session is None else _known_work(session)
    held = [] if work is None else [sent for level in work.levels.values() for sent in level.held]
    if held:
        raise CaptureError(
            f"commit() on the connection beneath the session would commit its rows without what {held[0].by} sent; call "
            "session.commit()"
        )


@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    # Made here if there is none: a flush inside this very commit may be the first to send.
    work = _work_of(session)
    work.committing += 1
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:
        return
    _refuse_doomed(work.level(transaction))
    if transaction.nested:
        return
    if work.level(transaction).held:
        # Counters are locked from their statement to the commit: everything else that can be slow comes before.
        work.flushing = True
        try:
            session.flush()
        finally:
            work.flushing = False
    _write_batch(session, work, transaction)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    work = _known_work(session)
    transaction = session.get_nested_transaction() or session.get_transaction()
    if work is None or transaction is None:
        return
    work.committing -= 1
    level = work.level(transaction)
    level.committed = True
    if not transaction.nested:
        failpoints.reached("C4")
        fates.committed(level.written)
        return
    outer = work.level(_enclosing(transaction))
    outer.held += level.held
    outer.written += level.written
    level.held, level.written = [], []


@event.listens_for(Session, "after_rollback")
def _after_rollback(session: Session) -> None:
    work = _known_work(session)
    transaction = session.get_nested_transaction() or session.get_transaction()
    if work is not None and transaction is not None:
        work.level(transaction).rolled_back = True


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    work = _known_work(session)
    if work is None or (transaction.parent is not None and not transaction.nested):
        return  # the inner mark of a flush is no transaction
    level = work.levels.pop(transaction, None) or _Level()
    rest = [*level.held, *level.written]
    if not transaction.nested:
        del session.__dict__[_WORK]
        if level.committed:
            fates.rolled_back(work.closed)
        elif level.rolled_back:
            fates.rolled_back([*work.closed, *rest])
        else:
            fates.abandoned([*work.closed, *rest])
        return
    work.had_savepoint = True
    if level.rolled_back:
        fates.rolled_back(rest)
    else:
        work.closed += rest
    root = session.get_transaction()
    if root is None or session.in_nested_transaction() or work.flushing:
        return
    if work.committing > 0 and (level.committed or level.rolled_back):
        # `transaction.commit()` of the outermost one while this savepoint was open: its before_commit came earlier. (After a
        # commit that an error stopped this may be another's release; then the batch is only written earlier than need be.)
        _write_batch(session, work, root)


def _write_batch(session: Session, work: _Work, root: SessionTransaction) -> None:
    """Write what the outermost transaction holds; from here on everything is written at once."""
    level = work.level(root)
    _refuse_doomed(level)
    if level.held:
        failpoints.reached("C2")
        with dooming(session, "the messages of this transaction"):
            connection = _connection_of_root(session, work)
            write(connection, level.held, notify=_may_notify(connection) and _throttle(connection).due())
        level.written += level.held
        level.held = []
        failpoints.reached("C3")
    work.late = True


def _write_now(session: Session, work: _Work, sent: Sent) -> Connection:
    with _on_greenlet():
        # By way of the session, so that its own savepoint is there before the message.
        connection = session.connection(bind_arguments={"bind": _known_bind(session, work)})
        _refuse_on(connection, work)
        _write_one(connection, sent)
    return connection


def _write_one(connection: Connection, sent: Sent) -> None:
    # Its commit may be far away, where the throttle of today says nothing: one more hint harms nobody.
    write(connection, [sent], notify=_may_notify(connection))


@contextmanager
def _on_greenlet() -> Iterator[None]:
    """asyncio's drivers work inside an awaited call of SQLAlchemy only, which a plain `send()` is not."""
    try:
        yield
    except (MissingGreenlet, StatementError) as error:
        if not isinstance(error, MissingGreenlet) and not isinstance(error.orig, MissingGreenlet):
            raise
        raise CaptureError(
            "it must be written at once here (the commit is under way, or the transaction belongs to a connection), which "
            "asyncio can't do inside a plain call; use `await session.run_sync(lambda session: …)`, or the connection's, and "
            "send in there"
        ) from error


def _throttle(connection: Connection) -> Throttle:
    return _throttles.setdefault(connection.engine, Throttle())


def _may_notify(connection: Connection) -> bool:
    # PostgreSQL refuses to PREPARE a transaction that has notified.
    return not isinstance(connection.get_transaction(), TwoPhaseTransaction)


# --- what is refused ----------------------------------------------------------------------------------------------------


def _open_transaction(session: Session) -> SessionTransaction:
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:
        raise CaptureError(
            "no transaction is open on the session (nothing was done in it since it was made, committed or rolled back); "
            "send before the commit, after the first query or flush, or inside `with session.begin():`"
        )
    if _work_of(session).level(transaction).committed:
        raise CaptureError("the transaction has committed already; send before the commit")
    if not transaction.is_active:
        raise CaptureError(
            "the session takes no more work in this transaction (a flush failed in it, or it is prepared for its commit); "
            "send before that, or roll back first"
        )
    return transaction


def _refuse_doomed(level: _Level) -> None:
    if level.doomed is not None:
        raise CaptureError(f"a message could not be captured, so this can only be rolled back: {level.doomed}")


def _refuse_autocommit(bind: Engine | Connection) -> None:
    if database.autocommits(bind):
        raise CaptureError(
            "the connection is in AUTOCOMMIT: every statement commits by itself, so the message could be sent without the "
            "rows beside it; use an engine with transactions"
        )


def _refuse_second_database(work: _Work, engine: Engine) -> None:
    if any(connection.engine is not engine for connection in work.connections):
        raise CaptureError(
            "this transaction uses a second database, and the two can't commit together; "
            "write to one database, and let a consumer write to the other"
        )


def _refuse_to_overtake(work: _Work, sent: Sent) -> None:
    key = sent.message.key
    if key is not None and any(held.message.key == key for level in work.levels.values() for held in level.held):
        raise CaptureError(
            f"an earlier message of key {key!r} waits for the commit, and inside a savepoint of the connection itself this one "
            "would be numbered before it; use session.begin_nested() instead of connection.begin_nested()"
        )


def _refuse_savepoint_without_begin(session: Session, work: _Work, bind: Engine | Connection) -> None:
    if bind.dialect.name != "sqlite":
        return
    connection = bind if isinstance(bind, Connection) else next(iter(work.connections), None)
    if connection is None:
        database.prepare(bind.engine)  # nothing is open on it here: from its first statement on all is well
    else:
        _secure_sqlite(connection, had_savepoint=work.had_savepoint or session.in_nested_transaction())


def _secure_sqlite(connection: Connection, *, had_savepoint: bool) -> None:
    """SQLite's driver begins no transaction before a SAVEPOINT: its rows would survive the rollback of the outer one."""
    if database.begins_early(connection):
        return
    if had_savepoint or connection.in_nested_transaction() or not database.begin_now(connection):
        raise CaptureError(
            "this SQLite engine sends no BEGIN before a SAVEPOINT, so rows would survive a rollback; "
            "call outbox.database.prepare(engine) once after making it (in Flask: db.init_app(app), then outbox.init_app(app))"
        )


# --- helpers ------------------------------------------------------------------------------------------------------------


def _known_work(session: Session) -> _Work | None:
    return session.__dict__.get(_WORK)


def _work_of(session: Session) -> _Work:
    work = _known_work(session)
    if work is None:
        work = session.__dict__[_WORK] = _Work()
    return work


def _bind(session: Session, work: _Work) -> Engine | Connection | None:
    """Return where the outbox tables of *session* are: a connection, where it is joined to one; None: nothing says it yet."""
    try:
        bind = session.get_bind(clause=tables.message)
    except UnboundExecutionError:  # it binds single classes: the database that it uses is the one
        engines = {connection.engine for connection in work.connections}
        return work.engine or (engines.pop() if len(engines) == 1 else None)
    # Engines with other execution options share their pool: they are one database.
    return bind if work.engine is None or bind.engine.pool is work.engine.pool else work.engine


def _known_bind(session: Session, work: _Work) -> Engine | Connection:
    bind = _bind(session, work)
    if bind is None:
        raise CaptureError("the session does not say in which database the outbox tables are; say it with Outbox(engine=…)")
    return bind


def _connection_of_root(session: Session, work: _Work) -> Connection:
    bind = _known_bind(session, work)
    # Not by way of the session where it can be helped: it refuses work at the end of `with session.begin_nested():`.
    known = [connection for connection in work.connections if connection.engine is bind.engine]
    connection = known[0] if known else session.connection(bind_arguments={"bind": bind})
    _refuse_on(connection, work)
    return connection


def _refuse_on(connection: Connection, work: _Work) -> None:
    _refuse_autocommit(connection)
    _refuse_second_database(work, connection.engine)


def _is_in_foreign_savepoint(work: _Work) -> bool:
    """Say whether somebody else made a savepoint on the connection: only rows written at once share its fate."""
    return any(savepoint not in work.savepoints for connection in work.connections for savepoint in savepoints(connection))


def _enclosing(transaction: SessionTransaction) -> SessionTransaction:
    parent = transaction.parent
    while parent is not None and parent.parent is not None and not parent.nested:
        parent = parent.parent  # the inner mark of a flush
    if parent is None:
        raise AssertionError("a savepoint is inside a transaction")
    return parent


def _roll_back(connection: Connection) -> None:
    """Roll back the innermost savepoint or the transaction of *connection*: its owner can't commit without the message."""
    transaction = connection.get_nested_transaction() or connection.get_transaction()
    if transaction is not None:
        with suppress(SQLAlchemyError):  # the error that led here is the one to be seen
            transaction.rollback()
