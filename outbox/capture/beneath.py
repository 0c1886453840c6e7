"""What passes beneath the sessions, on their connections: statements and commits that no event of a session tells of.

Everything that is done on a connection concerns every session on it. Two things are looked at: whether a transaction has
written something (one that only read is no reason to refuse a message), and whether it is ended past a session that holds
messages. That would leave rows without them, so it is refused: `commit()` on the connection; COMMIT, ROLLBACK and the like
as text. What is not seen before, on the driver's own connection, is noticed by the driver's transaction being over.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from outbox import database
from outbox.capture import work
from outbox.capture.outcomes import Sent
from outbox.capture.work import Work
from outbox.errors import CaptureError
from outbox.process.logs import say

log = logging.getLogger(__name__)

#: What is no command: comments, texts, names.
_OPAQUE = re.compile(r"--[^\n]*|/\*.*?\*/|\b[eE]'(?:[^'\\]|\\.)*'|'[^']*'|\"[^\"]*\"|\$(\w*)\$.*?\$\1\$", re.DOTALL)
#: Cheap, and said by every statement that may end a transaction or a savepoint.
_SUSPICIOUS = re.compile(r"\b(?:COMMIT|ROLLBACK|END|ABORT|PREPARE)\b", re.IGNORECASE)
#: SQLAlchemy names its own savepoints so, and tells the sessions of their end.
_ENDS = re.compile(
    r"\s*(COMMIT|ROLLBACK(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\s+(?:SAVEPOINT\s+)?sa_savepoint_)|PREPARE\s+TRANSACTION)\b",
    re.IGNORECASE,
)
#: Only as the first word: bodies of triggers and functions end so, too.
_ENDS_ALONE = re.compile(r"\s*(END|ABORT)\b", re.IGNORECASE)
_READS = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/|\()*"
    r"(?:SELECT|VALUES|TABLE|SHOW|EXPLAIN|PRAGMA|SET|FETCH|DECLARE|BEGIN|SAVEPOINT|RELEASE|ROLLBACK"
    r"|WITH(?!.*\b(?:INSERT|UPDATE|DELETE|MERGE)\b))\b",
    re.IGNORECASE | re.DOTALL,
)


def check_open(doing: Work) -> None:
    """Raise CaptureError if a transaction of *doing* was ended past its session since that holds a message."""
    held = doing.held()
    for used in doing.used.values():
        is_open = database.in_transaction(used.connection)
        if held and used.seen_open and is_open is False:
            _refuse_ended(doing, held[0])
        used.seen_open = bool(is_open) or (used.seen_open and bool(held))


def ends(statement: str) -> str | None:
    """Return the command of *statement*, in capitals, that ends a transaction, or a savepoint of somebody's own."""
    if not _SUSPICIOUS.search(statement):
        return None
    commands = _OPAQUE.sub(" ", statement).split(";")
    found = _ENDS_ALONE.match(commands[0]) or next(filter(None, map(_ENDS.match, commands)), None)
    return None if found is None else " ".join(found[1].upper().split())


def only_reads(statement: str) -> bool:
    """Say whether *statement* is plainly one that writes nothing; what a function does that it calls is not seen."""
    return _READS.match(statement) is not None


# --- events of connections ----------------------------------------------------------------------------------------------
# Of all engines, from the import on: to listen on one that is in use breaks the statements that other threads send meanwhile.


@event.listens_for(Engine, "commit")
def _before_commit(connection: Connection) -> None:
    for each in work.on(connection):
        if held := each.held():
            raise CaptureError(
                "commit() on the connection beneath the session would commit its rows without what "
                f"{held[0].by} sent; call session.commit()"
            )


@event.listens_for(Engine, "rollback")
def _before_rollback(connection: Connection) -> None:
    for each in work.on(connection):
        used, held = each.used.get(connection), each.held()
        if used is None or not held or any(level.doomed for level in each.levels.values()):
            continue  # nothing is lost, or it was said already
        if used.seen_open and database.in_transaction(connection) is False:
            say(
                log,
                logging.WARNING,
                "capture.ended",
                f"the transaction was ended past the session before this rollback, after {held[0].by} sent: if that was a "
                "commit on the driver's own connection, its rows are there without the message; use session.commit()",
            )


@event.listens_for(Engine, "before_cursor_execute")
def _before_statement(connection: Connection, _cursor: object, statement: str, *_: Any) -> None:
    for each in work.on(connection):
        used = each.used.get(connection)
        if used is not None and not used.wrote and not only_reads(statement):
            _refuse_to_write_after_all(each)
            used.wrote = True
        if held := each.held():
            check_open(each)
            _refuse_to_end(statement, held[0])


@event.listens_for(Engine, "after_cursor_execute")
def _after_statement(connection: Connection, *_: Any) -> None:
    for each in work.on(connection):
        if each.held():
            check_open(each)


def _refuse_to_end(statement: str, sent: Sent) -> None:
    if command := ends(statement):
        raise CaptureError(
            f"{command} as text would end the transaction without what {sent.by} sent; call session.commit() or "
            "session.rollback(), and for a part of it use session.begin_nested()"
        )


def _refuse_ended(doing: Work, sent: Sent) -> None:
    reason = (
        f"the transaction was ended past the session after {sent.by} sent, by a statement or on the driver's own connection, "
        "and what that may have committed is there without the message; end transactions with session.commit() and "
        "session.rollback()"
    )
    for level in doing.levels.values():
        level.doomed = level.doomed or reason
    raise CaptureError(reason)


def _refuse_to_write_after_all(late: Work) -> None:
    for other in late.passed_over_for:
        for sent in other.pending():
            raise CaptureError(
                f"this session had written nothing when {sent.by} sent a message, so the message went with the session that "
                "had; to write in both, say which one it belongs to: signal.send(session, …) or outbox.send(…, session=session)"
            )
