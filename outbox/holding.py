"""Messages held with a SQLAlchemy transaction until it commits: who owns them, when they are written, when dropped.

A held message belongs to the innermost savepoint, or else to the transaction. A released savepoint hands what it holds to
its parent; what a transaction still holds when it ends is dropped. So a message shares the fate of the rows beside it, and
no event of a rollback has to be interpreted (`after_soft_rollback` fires for the wrong transaction after a failed flush).

`before_commit` and `after_commit` also fire for the release of a savepoint.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction

from outbox import database, failpoints, metrics
from outbox.errors import CaptureError
from outbox.logs import say
from outbox.message import Message
from outbox.store.write import Held, write
from outbox.wakeup import Throttle

log = logging.getLogger(__name__)

CAPTURED = metrics.counter("outbox_captured_total", "messages whose transaction committed", ["topic"])
UNCOMMITTED = metrics.counter("outbox_uncommitted_total", "messages sent, but neither committed nor rolled back", ["topic"])

_STATE = "outbox"
_throttle = Throttle()
#: The lists of the tests that are recording.
_recorders: list[list[Message]] = []


@dataclass(slots=True)
class _State:
    """What one session holds."""

    #: In the order of sending, by the transaction or savepoint that owns them.
    held: dict[SessionTransaction, list[Held]] = field(default_factory=dict)
    #: Transactions and savepoints in which a capture failed: they can only be rolled back.
    doomed: dict[SessionTransaction, str] = field(default_factory=dict)
    #: Written in the present transaction, to be counted at its commit.
    written: list[Message] = field(default_factory=list)
    #: The batch of the outermost transaction is written: what comes now is written at once.
    late: bool = False
    #: before_commit seen without its after_commit: commits that are under way, outermost first.
    committing: int = 0
    #: Of the outbox, where the session has several; None: the session's own.
    engine: Engine | None = None
    rolled_back: bool = False
    committed: bool = False
    warned: bool = False
    connections: WeakSet[Connection] = field(default_factory=WeakSet)
    #: Savepoints of these connections that the session made, or found when it began.
    known_savepoints: WeakSet[sa.NestedTransaction] = field(default_factory=WeakSet)


def hold(session: Session, engine: Engine | None, held: Held) -> None:
    """Keep *held* with the open transaction of *session*. Raises CaptureError where it could miss the commit."""
    root = session.get_transaction()
    if root is None:
        raise CaptureError(
            "no transaction is open on the session (nothing was done in it since it was made, committed or rolled back); "
            "send before the commit, after the first query or flush, or inside `with session.begin():`"
        )
    state = _state_of(session)
    if state.committed:
        raise CaptureError("the transaction has committed already; send before the commit")
    state.engine = engine or state.engine
    _check_engine(state, (engine or session.get_bind()).engine, nested=session.in_nested_transaction())
    if state.late or _in_foreign_savepoint(state):
        _write(session, state, [held])
        return
    state.held.setdefault(session.get_nested_transaction() or root, []).append(held)


def doom(session: Session, reason: str) -> None:
    """Let the innermost transaction of *session* end only in a rollback: what was to be sent is missing from it."""
    owner = session.get_nested_transaction() or session.get_transaction()
    if owner is not None:
        _state_of(session).doomed.setdefault(owner, reason)


def hold_on_connection(connection: Connection, held: Held) -> None:
    """Write *held* at once in the transaction that is open on *connection*."""
    if not connection.in_transaction():
        raise CaptureError("no transaction is open on the connection; send inside `with connection.begin():`")
    _refuse_autocommit(connection)
    _check_engine(_State(), connection.engine, nested=connection.in_nested_transaction())
    write(connection, [held], notify=_throttle.due())
    for recorder in _recorders:
        recorder.append(held.message)


@contextmanager
def recording() -> Iterator[list[Message]]:
    """Collect the messages whose transactions commit inside the block."""
    messages: list[Message] = []
    _recorders.append(messages)
    try:
        yield messages
    finally:
        # By identity: two lists that hold the same messages are equal, and the other one may be still in use.
        _recorders[:] = [recorder for recorder in _recorders if recorder is not messages]


def warn_of_uncommitted(session: Session, *, failed: bool) -> None:
    """Say, once, which messages are in a transaction that nobody has ended; *failed*: an error ends it."""
    state: _State | None = session.info.get(_STATE)
    if state is not None and not state.warned and not state.committed:
        state.warned = True
        if not failed:
            _report_uncommitted([*_all_held(state), *state.written])


# --- the life of a transaction ------------------------------------------------------------------------------------------


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    state = _state_of(session)
    state.connections.add(connection)
    if savepoint := connection.get_nested_transaction():
        state.known_savepoints.add(savepoint)


@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    # Made here if there is none: a flush inside this very commit may be the first to send.
    state = _state_of(session)
    state.committing += 1
    nested = session.get_nested_transaction()
    owner = nested or session.get_transaction()
    if owner is not None and owner in state.doomed:
        raise CaptureError(f"a message could not be captured, so this can only be rolled back: {state.doomed[owner]}")
    if nested is None:
        _write_batch(session, state)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    state: _State | None = session.info.get(_STATE)
    if state is None:
        return
    state.committing -= 1
    nested = session.get_nested_transaction()
    if nested is None:
        _finish(state)
        return
    handed = state.held.pop(nested, [])
    if handed and nested.parent is not None:
        state.held.setdefault(nested.parent, []).extend(handed)


@event.listens_for(Session, "after_rollback")
def _after_rollback(session: Session) -> None:
    # Also for a savepoint's. Not after_soft_rollback: that one comes after the end of the transaction.
    state: _State | None = session.info.get(_STATE)
    if state is not None:
        state.rolled_back = True
        state.committing = 0


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    state: _State | None = session.info.get(_STATE)
    if state is None:
        return
    if transaction.parent is None:
        forgotten = [] if state.committed or state.rolled_back or state.warned else [*_all_held(state), *state.written]
        del session.info[_STATE]
        _report_uncommitted(forgotten)
    else:
        state.held.pop(transaction, None)
        state.doomed.pop(transaction, None)
        if transaction.nested:
            state.rolled_back = False
        if transaction.nested and state.committing > 0 and not session.in_nested_transaction():
            # `transaction.commit()` of the outermost one while this savepoint was open: its before_commit came earlier.
            _write_batch(session, state)


def _write_batch(session: Session, state: _State) -> None:
    if not state.held:
        state.late = True
        return
    # Counters are locked from their statement to the commit: everything else that can be slow comes before.
    session.flush()
    failpoints.reached("C2")
    _write_held(session, state)
    state.late = True
    failpoints.reached("C3")


def _write_held(session: Session, state: _State) -> None:
    batch = [held for owned in state.held.values() for held in owned]
    _write(session, state, batch)
    state.held.clear()


def _write(session: Session, state: _State, batch: list[Held]) -> None:
    connection = session.connection(bind_arguments={"bind": state.engine}) if state.engine else session.connection()
    _refuse_autocommit(connection)
    _check_engine(state, connection.engine, nested=False)
    write(connection, batch, notify=_throttle.due())
    state.written += [held.message for held in batch]


def _finish(state: _State) -> None:
    state.committed = True
    for topic, count in Counter(message.topic for message in state.written).items():
        CAPTURED.labels(topic).inc(count)
    for recorder in _recorders:
        recorder.extend(state.written)


# --- what is refused ----------------------------------------------------------------------------------------------------


def _check_engine(state: _State, engine: Engine, *, nested: bool) -> None:
    # Where an engine is told at its making, only this name says so; asking the connection would be a round trip.
    at_connect = getattr(engine.dialect, "_on_connect_isolation_level", None)
    if "AUTOCOMMIT" in (at_connect, engine.get_execution_options().get("isolation_level")):
        raise CaptureError(_AUTOCOMMIT)
    _refuse_savepoint_without_begin(engine, nested=nested)
    if any(connection.engine is not engine for connection in state.connections if connection.in_transaction()):
        raise CaptureError(
            "this transaction uses a second database, and the two can't commit together; "
            "write to one database, and let a consumer write to the other"
        )


def _refuse_autocommit(connection: Connection) -> None:
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        raise CaptureError(_AUTOCOMMIT)


_AUTOCOMMIT = (
    "the connection is in AUTOCOMMIT: every statement commits by itself, so the message could be sent without the rows "
    "beside it; use an engine with transactions"
)


def _refuse_savepoint_without_begin(engine: Engine, *, nested: bool) -> None:
    """SQLite's driver begins no transaction before a SAVEPOINT: its rows would survive the rollback of the outer one."""
    if nested and engine.dialect.name == "sqlite" and not database.is_prepared(engine):
        raise CaptureError(
            "this SQLite engine sends no BEGIN before a SAVEPOINT, so rows would survive a rollback; "
            "call outbox.database.prepare(engine) once after making it"
        )


def _in_foreign_savepoint(state: _State) -> bool:
    """Say whether somebody made a savepoint on the connection itself: only rows written at once share its fate."""
    for connection in state.connections:
        savepoint = connection.get_nested_transaction()
        if savepoint is not None and savepoint not in state.known_savepoints:
            return True
    return False


# --- helpers ------------------------------------------------------------------------------------------------------------


def _state_of(session: Session) -> _State:
    state: _State | None = session.info.get(_STATE)
    if state is None:
        state = session.info[_STATE] = _State()
    return state


def _all_held(state: _State) -> list[Message]:
    return [held.message for owned in state.held.values() for held in owned]


def _report_uncommitted(messages: list[Message]) -> None:
    if not messages:
        return
    topics = Counter(message.topic for message in messages)
    for topic, count in topics.items():
        UNCOMMITTED.labels(topic).inc(count)
    listed = ", ".join(f"{topic} ({count})" for topic, count in sorted(topics.items()))
    say(
        log,
        logging.WARNING,
        "capture.uncommitted",
        f"sent, but neither committed nor rolled back, so nobody will hear of it: {listed}; call session.commit() after send()",
    )
