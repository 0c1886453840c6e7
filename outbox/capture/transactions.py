"""Messages held with a SQLAlchemy transaction until it commits: who owns them, when they are written, when dropped.

A held message belongs to the innermost savepoint, or else to the transaction. A released savepoint hands what it holds to
its parent; what a transaction still holds when it ends is dropped. So a message shares the fate of the rows beside it, and
no event of a rollback has to be interpreted (`after_soft_rollback` fires for the wrong transaction after a failed flush).

Where the session does not decide alone (it was joined to a transaction on a connection, or somebody made a savepoint on the
connection itself) a message is written at once: then the database gives it the fate of its neighbours.

`before_commit` and `after_commit` also fire for the release of a savepoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, TwoPhaseTransaction
from sqlalchemy.exc import MissingGreenlet, SQLAlchemyError, StatementError, UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction

from outbox import database, tables
from outbox.capture import beneath, outcomes, work
from outbox.capture.outcomes import Sent, savepoints
from outbox.capture.work import Level, Used, Work
from outbox.errors import CaptureError
from outbox.process import failpoints
from outbox.store.capturing import write
from outbox.store.wakeup import Throttle

#: One for each database: a notification to one wakes nobody at the other.
_throttles: WeakKeyDictionary[Engine, Throttle] = WeakKeyDictionary()


def hold(session: Session, engine: Engine | None, sent: Sent) -> None:
    """Keep *sent* with the open transaction of *session*; *engine* is the outbox's, None: where the session puts its tables.

    Raises CaptureError where the message could miss the commit, or commit alone.
    """
    transaction = _open_transaction(session)
    doing = work.of(session)
    doing.engine = engine or doing.engine
    bind = _bind(session, doing)
    used = None if bind is None else _used(doing, bind)
    if bind is not None:
        _refuse_unsafe(bind if used is None else used.connection)
        _refuse_second_database(doing, bind.engine)
        _refuse_savepoint_without_begin(session, doing, bind, used)
    level = doing.level(transaction)
    if isinstance(bind, Connection) or (used is not None and (used.joined or _is_in_foreign_savepoint(doing, used))):
        level.entrusted.append(outcomes.follow(_write_now(session, doing, sent), sent))
    elif doing.late:
        _write_now(session, doing, sent)
        level.written.append(sent)
    else:
        beneath.check_open(doing)
        level.held.append(sent)
    if sent.context is not None:
        sent.context.watch(doing)


def hold_on_connection(connection: Connection, sent: Sent) -> None:
    """Write *sent* at once in the transaction that is open on *connection*."""
    if not connection.in_transaction():
        raise CaptureError("no transaction is open on the connection; send inside `with connection.begin():`")
    _refuse_unsafe(connection)
    with _on_greenlet():
        if connection.dialect.name == "sqlite":
            _secure_sqlite(connection, had_savepoint=False)
        _write_one(connection, sent)
    outcomes.follow(connection, sent)


def session_of(connection: Connection) -> Session | None:
    """Return the session that began the transaction of *connection*; None where the connection is nobody's but its own.

    What the listener of a mapper sends on its connection has its place among what the session sends, however many others
    were joined to the connection meanwhile.
    """
    owner = work.owner_of(connection)
    return None if owner is None else owner.session()


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
            doom(target, f"{by}: {error}")
        raise


def doom(session: Session, reason: str) -> None:
    """Let the innermost transaction of *session* end in nothing but a rollback: a message is missing from it."""
    owner = session.get_nested_transaction() or session.get_transaction()
    if owner is None:
        return  # it has done nothing that could commit without the message
    doing = work.of(session)
    level = doing.level(owner)
    level.doomed = level.doomed or reason
    for used in doing.used.values():
        if used.joined:
            _roll_back(used.connection)  # its owner may commit without asking the session


# --- which of several sessions a message belongs to ---------------------------------------------------------------------


def has_written(session: Session) -> bool:
    """Say whether *session* has changed something in its open transaction, flushed or not, or has sent something."""
    doing = work.known(session)
    if session.new or session.dirty or session.deleted:
        return True
    return doing is not None and (any(used.wrote for used in doing.used.values()) or bool(doing.pending()))


def uses_database_of(session: Session, other: Session, engine: Engine | None) -> bool:
    """Say whether *session* could hold what *other* could; *engine* is the outbox's, None: where *other* puts its tables."""
    bind = engine or _bind(other, work.of(other))
    doing = work.of(session)
    own: Sequence[Connection | Engine | None] = list(doing.used) or [_bind(session, doing)]
    return bind is None or any(found is None or _is_same_database(found.engine, bind.engine) for found in own)


def _is_same_database(one: Engine, other: Engine) -> bool:
    """Say whether the two are of one database, whatever their drivers: an application may have one of each kind."""
    return one.pool is other.pool or _address(one) == _address(other)


def _address(engine: Engine) -> tuple[object, ...]:
    return engine.dialect.name, engine.url.host, engine.url.port, engine.url.database


def pass_over(others: Iterable[Session], chosen: Session) -> None:
    """Let *others*, which have written nothing, write nothing before *chosen* has committed what it is given now.

    Else it would turn out that the message might have been theirs.
    """
    for other in others:
        work.of(other).passed_over_for.add(work.of(chosen))


# --- the life of a transaction ------------------------------------------------------------------------------------------


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    doing = work.of(session)
    if connection not in doing.used:
        # SQLAlchemy has no public name for who opened it; a test holds on to this one.
        *_, opened_by_session = transaction._connections[connection]
        work.begin_on(connection, doing, joined=not opened_by_session)
    if savepoint := connection.get_nested_transaction():
        doing.savepoints.add(savepoint)


@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    # Made here if there is none: a flush inside this very commit may be the first to send.
    doing = work.of(session)
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:
        return
    _refuse_doomed(doing.level(transaction))
    if transaction.nested:
        return
    if doing.level(transaction).held:
        # Counters are locked from their statement to the commit: everything else that can be slow comes before.
        doing.flushing = True
        try:
            session.flush()
        finally:
            doing.flushing = False
    _write_batch(session, doing, transaction)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    doing = work.known(session)
    transaction = session.get_nested_transaction() or session.get_transaction()
    if doing is None or transaction is None:
        return
    level = doing.level(transaction)
    level.committed = True
    if not transaction.nested:
        failpoints.reached("C4")
        outcomes.committed(level.written)
        outcomes.let_go(level.entrusted)
        return
    level.hand_to(doing.level(_enclosing(transaction)))


@event.listens_for(Session, "after_rollback")
def _after_rollback(session: Session) -> None:
    doing = work.known(session)
    transaction = session.get_nested_transaction() or session.get_transaction()
    if doing is not None and transaction is not None:
        doing.level(transaction).rolled_back = True


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    doing = work.known(session)
    if doing is None or (transaction.parent is not None and not transaction.nested):
        return  # the inner mark of a flush is no transaction
    level = doing.levels.pop(transaction, None) or Level()
    rest = [*level.held, *level.written]
    if not transaction.nested:
        work.end(session)
        if level.committed:
            outcomes.rolled_back(doing.closed)
        elif level.rolled_back:
            outcomes.rolled_back([*doing.closed, *rest])
        else:
            outcomes.abandoned([*doing.closed, *rest])
        return
    doing.had_savepoint = True
    if level.rolled_back:
        outcomes.rolled_back(rest)
    else:
        doing.closed += rest
    root = session.get_transaction()
    if root is None or session.in_nested_transaction() or doing.flushing:
        return
    if is_under_way(root) and (level.committed or level.rolled_back):
        # `transaction.commit()` of the outermost one while this savepoint was open: its before_commit came earlier.
        _write_batch(session, doing, root)


def _write_batch(session: Session, doing: Work, root: SessionTransaction) -> None:
    """Write what the outermost transaction holds; from here on everything is written at once."""
    level = doing.level(root)
    _refuse_doomed(level)
    if level.held:
        failpoints.reached("C2")
        with dooming(session, "the messages of this transaction"):
            beneath.check_open(doing)
            used = _used_by_root(session, doing)
            write(used.connection, level.held, notify=_may_notify(used.connection) and _throttle(used.connection).due())
        if used.joined:
            level.entrusted += [outcomes.follow(used.connection, sent) for sent in level.held]
        else:
            level.written += level.held
        level.held = []
        failpoints.reached("C3")
    doing.late = True


def _write_now(session: Session, doing: Work, sent: Sent) -> Connection:
    with _on_greenlet():
        bind = _known_bind(session, doing)
        used = _used(doing, bind)
        # By way of the session, so that its own savepoint is there before the message.
        connection = session.connection(bind_arguments={"bind": bind if used is None else used.connection.engine})
        _refuse_on(connection, doing)
        _write_one(connection, sent)
    return connection


def _write_one(connection: Connection, sent: Sent) -> None:
    _refuse_to_overtake(connection, sent)
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
    if work.of(session).level(transaction).committed:
        raise CaptureError("the transaction has committed already; send before the commit")
    if not transaction.is_active:
        raise CaptureError(
            "the session takes no more work in this transaction (a flush failed in it, or it is prepared for its commit); "
            "send before that, or roll back first"
        )
    return transaction


def _refuse_doomed(level: Level) -> None:
    if level.doomed is not None:
        raise CaptureError(f"a message could not be captured, so this can only be rolled back: {level.doomed}")


def _refuse_unsafe(bind: Engine | Connection) -> None:
    if database.autocommits(bind):
        raise CaptureError(
            "the connection is in AUTOCOMMIT: every statement commits by itself, so the message could be sent without the "
            "rows beside it; use an engine with transactions"
        )
    if isinstance(bind, Connection) and database.is_foreign(bind):
        raise CaptureError(
            "the connection was made by the process that this one was forked from, which may use it at the same time; open "
            "sessions and connections after the fork"
        )


def _refuse_second_database(doing: Work, engine: Engine) -> None:
    """Raise CaptureError if the session wrote elsewhere than in the database of *engine*; where it only read does not count."""
    for used in doing.used.values():
        # What others wrote on a connection before the session was joined to it is not known.
        if (used.wrote or used.joined) and used.connection.engine.pool is not engine.pool:
            raise CaptureError(
                f"this transaction uses a second database: it wrote to {_name(used.connection.engine)}, and the outbox tables "
                f"are in {_name(engine)} (another place is said by Outbox(engine=…)). The two can't commit together; write to "
                "one database, and let a consumer write to the other"
            )


def _name(engine: Engine) -> str:
    return engine.url.set(query={}).render_as_string()  # without the password


def _refuse_to_overtake(connection: Connection, sent: Sent) -> None:
    key = sent.message.key
    if key is not None and any(held.message.key == key for each in work.on(connection) for held in each.held()):
        raise CaptureError(
            f"an earlier message of key {key!r} waits for the commit of its session, and written at once on the connection "
            "this one would be numbered before it; send both with that session, and for a part of its transaction use "
            "session.begin_nested() instead of connection.begin_nested()"
        )


def _refuse_savepoint_without_begin(session: Session, doing: Work, bind: Engine | Connection, used: Used | None) -> None:
    if bind.dialect.name != "sqlite":
        return
    connection = used.connection if used is not None else bind
    if isinstance(connection, Connection):
        _secure_sqlite(connection, had_savepoint=doing.had_savepoint or session.in_nested_transaction())
    else:
        database.prepare(connection)  # nothing is open on it here: from its first statement on all is well


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


def _bind(session: Session, doing: Work) -> Engine | Connection | None:
    """Return where the outbox tables of *session* are: a connection, where it is joined to one; None: nothing says it yet."""
    try:
        bind = session.get_bind(clause=tables.message)
    except UnboundExecutionError:  # it binds single classes: the database that it uses is the one
        engines = {used.connection.engine for used in doing.used.values()}
        return doing.engine or (engines.pop() if len(engines) == 1 else None)
    # Engines with other execution options share their pool: they are one database.
    return bind if doing.engine is None or bind.engine.pool is doing.engine.pool else doing.engine


def _known_bind(session: Session, doing: Work) -> Engine | Connection:
    bind = _bind(session, doing)
    if bind is None:
        raise CaptureError("the session does not say in which database the outbox tables are; say it with Outbox(engine=…)")
    return bind


def _used(doing: Work, bind: Engine | Connection) -> Used | None:
    """Return the connection to *bind* that the session has begun on; None: it has not."""
    return doing.used.get(bind) if isinstance(bind, Connection) else doing.on(bind)


def _used_by_root(session: Session, doing: Work) -> Used:
    bind = _known_bind(session, doing)
    # Not by way of the session where it can be helped: it refuses work at the end of `with session.begin_nested():`.
    used = _used(doing, bind) or doing.used[session.connection(bind_arguments={"bind": bind})]
    _refuse_on(used.connection, doing)
    return used


def _refuse_on(connection: Connection, doing: Work) -> None:
    _refuse_unsafe(connection)
    _refuse_second_database(doing, connection.engine)


def _is_in_foreign_savepoint(doing: Work, used: Used) -> bool:
    """Say whether somebody else made a savepoint on the connection: only rows written at once share its fate."""
    return any(savepoint not in doing.savepoints for savepoint in savepoints(used.connection))


def is_under_way(transaction: SessionTransaction) -> bool:
    """Say whether *transaction* itself is being ended, not only a savepoint in it; after an error it is no longer."""
    return transaction._current_fn is not None  # SQLAlchemy has no public name for it; a test holds on to this one


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
