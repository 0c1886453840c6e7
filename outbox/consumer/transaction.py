"""The transaction that inbox, handlers and parking share, and the session that handlers see of it."""

from __future__ import annotations

import contextlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from outbox.consumer.failures import is_aborted, is_conflict, is_transient
from outbox.consumer.outcomes import HandlerMistake
from outbox.consumer.seal import SWALLOWED, Seal, ended

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Connection, Engine


class Transient(Exception):
    """The service's database was away, busy, or rolled back for another's sake. Nothing was written; try again."""

    def __init__(self, words: str, *, handled: bool = False, lost: bool = False) -> None:
        super().__init__(words)
        #: A handler had begun: it may be what brought this about.
        self.handled = handled
        #: The connection died, or was closed.
        self.lost = lost


class Conflict(Transient):
    """Another transaction was in the way."""


class Cut(Exception):
    """The transaction was ended from outside, for the sake of the messages that waited in it. Nothing was written."""


class HandlerSession(Session):
    """A session whose transaction belongs to the runtime: it holds the inbox rows of other messages too."""

    seal: Seal
    #: A handler was called.
    handed_over = False

    def hand_over(self) -> None:
        """Get ready for the first, or the next, handler."""
        self.seal.put(self.connection())
        self.handed_over = True

    def _refuse(self, call: str) -> NoReturn:
        raise ended(f"called db_session.{call}()")

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
    # When it is over, who still has the session (a thread that a handler began) can do nothing with it.
    session = HandlerSession(engine, close_resets_only=False)
    connection, seal = None, None
    try:
        work = session.begin()
        connection = session.connection()
        session.seal = seal = Seal(connection)
        yield session
        seal.lift(connection)
        seal.open()
        work.commit()
    except BaseException as error:
        told = _told(error, connection, seal, handled=session.handed_over)
        with contextlib.suppress(SQLAlchemyError):  # a dead connection can't roll back either; its transaction is gone
            _undo(session, connection, seal, error, is_conflict=isinstance(told, Conflict))
        if told is error:
            raise
        raise told from error
    finally:
        with contextlib.suppress(SQLAlchemyError):
            Session.close(session)


def _undo(
    session: HandlerSession, connection: Connection | None, seal: Seal | None, error: BaseException, *, is_conflict: bool
) -> None:
    if connection is not None and seal is not None:
        seal.open()
        if not connection.invalidated:  # whatever a handler did to it stays with it
            _replace(connection, seal, None if is_conflict else error)
    Session.rollback(session)


def _replace(connection: Connection, seal: Seal, error: BaseException | None) -> None:
    """Let the next transaction have another connection where this one may be to blame for *error*."""
    if seal.is_gone:
        connection.invalidate()
    elif seal.keeps_settings and seal.saw(error):
        # A handler may have said `SET statement_timeout` for all that come after it. In use until it is rolled back.
        connection.connection.invalidate(soft=True)


def _told(error: BaseException, connection: Connection | None, seal: Seal | None, *, handled: bool) -> BaseException:
    """Return what *error* means for whoever wanted the transaction."""
    if isinstance(error, Cut):  # that its connection is dead says nothing about the database
        return error
    if connection is None or seal is None:
        return Transient(str(error)) if is_transient(error) else error
    if mistake := seal.mistake(error):
        return mistake
    if connection.invalidated or seal.is_lost:
        return Transient(str(error), handled=handled, lost=True)
    # An error of another database that a handler uses says nothing about ours; it left no trace on our connection.
    ours = not handled or not seal.closed or not seal.is_whole or seal.saw(error)
    if ours and is_transient(error):
        return (Conflict if is_conflict(error) else Transient)(str(error), handled=handled)
    return HandlerMistake(SWALLOWED) if is_aborted(error) else error


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads: on SQLite it keeps no writer waiting. Errors of the database leave it as they are."""
    with engine.connect().execution_options(outbox_read_only=True) as connection:
        yield connection
