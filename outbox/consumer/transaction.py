"""The transaction that inbox, handlers and parking share, and the session that handlers see of it."""

from __future__ import annotations

import contextlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from outbox.consumer.failures import is_aborted, is_transient
from outbox.consumer.outcomes import HandlerMistake

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Connection, Engine


class Transient(Exception):
    """The service's database was away, busy, or rolled back for another's sake. Nothing was written; try again."""


class HandlerSession(Session):
    """A session whose transaction belongs to the runtime: it holds the inbox rows of other messages too."""

    def _refuse(self, call: str) -> NoReturn:
        raise HandlerMistake(
            f"a handler called db_session.{call}(): the runtime commits when the handler returns and rolls back when it "
            "raises; to undo a part, use `with db_session.begin_nested():`"
        )

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
        connection = session.connection()
        yield session
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
    """A transaction that only reads: on SQLite it keeps no writer waiting. Raises Transient as `transaction` does."""
    try:
        with engine.connect().execution_options(outbox_read_only=True) as connection:
            yield connection
    except SQLAlchemyError as error:
        if is_transient(error):
            raise Transient(str(error)) from error
        raise
