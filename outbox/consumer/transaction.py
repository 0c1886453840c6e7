"""The transaction that inbox, handlers and parking share, and the session that handlers see of it."""

from __future__ import annotations

import contextlib
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from outbox.consumer.failures import is_aborted, is_transient
from outbox.consumer.outcomes import HandlerMistake

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Connection, Engine


class Transient(Exception):
    """The service's database was away, busy, or rolled back for another's sake. Nothing was written; try again."""


#: On the connection of a transaction that only the runtime may commit.
_SHARED = "outbox_shared"
#: A statement that ends the transaction; `ROLLBACK TO` a savepoint does not.
_ENDS = re.compile(r"\s*(COMMIT|END|ABORT|ROLLBACK(?!\s+(WORK\s+|TRANSACTION\s+)?TO\b))\b", re.IGNORECASE)


def _refused(call: str) -> HandlerMistake:
    return HandlerMistake(
        f"a handler called {call}: the runtime commits when the handler returns and rolls back when it raises; to undo a "
        "part, use `with db_session.begin_nested():`"
    )


def protect(engine: Engine) -> None:
    """Refuse handlers that end the transaction past their session, on its connection or by SQL; again changes nothing.

    A commit would keep the inbox rows of the whole batch without the effects, and the messages behind would be lost as
    duplicates; a rollback would lose the messages before. What goes through the driver's own connection is not seen.
    """
    if not event.contains(engine, "commit", _refuse_commit):
        event.listen(engine, "commit", _refuse_commit)
        event.listen(engine, "before_cursor_execute", _refuse_end)


def _refuse_commit(connection: Connection) -> None:
    if connection.get_execution_options().get(_SHARED):
        raise _refused("commit() on the connection or the transaction of db_session")


def _refuse_end(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
    if _ENDS.match(statement) and connection.get_execution_options().get(_SHARED):
        raise _refused(statement.split(maxsplit=1)[0].rstrip(";").upper())


class HandlerSession(Session):
    """A session whose transaction belongs to the runtime: it holds the inbox rows of other messages too."""

    def _refuse(self, call: str) -> NoReturn:
        raise _refused(f"db_session.{call}()")

    def commit(self) -> None:
        self._refuse("commit")

    def rollback(self) -> None:
        self._refuse("rollback")

    def close(self) -> None:
        self._refuse("close")

    def reset(self) -> None:
        self._refuse("reset")

    def invalidate(self) -> None:
        self._refuse("invalidate")


@contextmanager
def transaction(engine: Engine) -> Iterator[HandlerSession]:
    """Commit what the block did, or nothing of it. Raises Transient where only waiting helps, else what the block raised."""
    session = HandlerSession(engine)
    connection = None
    try:
        work = session.begin()
        connection = session.connection(execution_options={_SHARED: True})
        yield session
        connection.execution_options(**{_SHARED: False})
        work.commit()
    except Exception as error:
        lost = connection is not None and not connection.closed and connection.invalidated
        with contextlib.suppress(SQLAlchemyError):  # a dead connection can't roll back either; its transaction is gone
            Session.rollback(session)
        if lost or is_transient(error):
            raise Transient(str(error)) from error
        if is_aborted(error):
            raise HandlerMistake(
                "a handler caught an error of the database, and PostgreSQL takes nothing more in this transaction; put what "
                "may fail into `with db_session.begin_nested():`"
            ) from error
        raise
    finally:
        with contextlib.suppress(SQLAlchemyError):
            Session.close(session)


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads: on SQLite it keeps no writer waiting. Errors of the database leave it as they are."""
    with engine.connect().execution_options(outbox_read_only=True) as connection:
        yield connection
