"""What keeps a handler from ending the transaction of its batch, whatever it ends it with.

A transaction that handlers see is sealed: the database itself refuses a COMMIT that is not the runtime's, as a text behind a
comment, through the driver, or on the way to an autocommit. No statement is read for it.

PostgreSQL: the transaction holds a row that a deferred constraint forbids, until its last statement deletes it. Where that
finds no row, this is no longer the transaction that wrote it: somebody rolled back. SQLite asks before it prepares a
statement, and is told no for BEGIN, COMMIT and ROLLBACK, and for everything once it has rolled back by itself.
"""

from __future__ import annotations

import random
import sqlite3
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event

from outbox.consumer import tables
from outbox.consumer.failures import causes
from outbox.consumer.outcomes import HandlerMistake

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine, ExceptionContext

#: On the connection of a transaction that only the runtime may end: its seal.
_SEAL = "outbox_seal"
#: On a connection to SQLite: what it asks.
_GATE = "outbox_gate"
#: What libpq knows of a transaction without asking the server (psycopg and psycopg2 pass it on).
_IDLE, _IN_TRANSACTION, _FAILED, _UNKNOWN = 0, 2, 3, 4
_ADVICE = (
    "the runtime commits when the handler returns and rolls back when it raises; to undo a part, use `with "
    "db_session.begin_nested():`"
)


#: What a handler did that left the transaction failed.
SWALLOWED = (
    "a handler caught an error of the database, and PostgreSQL takes nothing more in this transaction; put what may fail into "
    "`with db_session.begin_nested():`"
)


def ended(how: str) -> HandlerMistake:
    """Return the mistake of a handler that ended, or tried to end, the transaction by *how*."""
    return HandlerMistake(f"a handler {how}: {_ADVICE}")


class Gate:
    """What SQLite asks before it prepares a statement; one for each connection."""

    def __init__(self) -> None:
        self.closed = False
        #: What a handler did that was refused since it was closed.
        self.refused = ""
        #: SQLite itself rolled back: whatever came now would be outside of any transaction, and kept.
        self.is_over = False

    def close(self) -> None:
        """A transaction began that only the runtime may end."""
        self.closed, self.refused, self.is_over = True, "", False

    def __call__(self, action: int, word: str | None, *_: object) -> int:
        if not self.closed or not (self.is_over or action == sqlite3.SQLITE_TRANSACTION):
            return sqlite3.SQLITE_OK
        self.refused = "went on after an error that ended the transaction" if self.is_over else f"called {word}"
        return sqlite3.SQLITE_DENY


class Seal:
    """What was done to keep one transaction whole, and what is known of it without asking the server."""

    def __init__(self, connection: Connection) -> None:
        #: The primary key of its row.
        self.number = random.getrandbits(62)
        #: Whether the row is there, as far as we know.
        self.is_put = False
        #: Whether only the runtime may end the transaction now.
        self.closed = True
        #: What the database refused on this connection: an error that is not here may be another database's.
        self.errors: list[BaseException] = []
        self._driver: Any = connection.connection.driver_connection
        self._gate = _gate(connection, self._driver)
        connection.execution_options(**{_SEAL: self})

    def put(self, connection: Connection) -> None:
        """Write the row of the seal, unless it is there."""
        if self._gate is None and not self.is_put:
            connection.execute(sa.insert(tables.seal).values(id=self.number))
            self.is_put = True

    def lift(self, connection: Connection) -> None:
        """Delete the row of the seal, unless that was done. Raises HandlerMistake where it is not there any more."""
        if self.is_put:
            lifted = connection.execute(sa.delete(tables.seal).where(tables.seal.c.id == self.number))
            self.is_lifted(found=lifted.rowcount == 1)

    def is_lifted(self, *, found: bool) -> None:
        """The row of the seal was deleted if it was *found*. Raises HandlerMistake if not."""
        if not found:
            raise ended("ended the transaction, and another one began")
        self.is_put = False

    def open(self) -> None:
        """Let the runtime end the transaction."""
        self.closed = False
        if self._gate is not None:
            self._gate.closed = False

    def note(self, error: BaseException) -> None:
        """A statement failed with *error*. SQLite may have ended the transaction for it: `OR ROLLBACK`, a disk that is full."""
        self.errors.append(error)
        if self._gate is not None and self.is_gone:
            self._gate.is_over = True
            self._driver.set_authorizer(self._gate)  # so that it is asked again about statements it has prepared

    def saw(self, error: BaseException | None) -> bool:
        """Say whether *error*, or what it was raised from, came over this connection."""
        return any(cause in self.errors for cause in causes(error))

    @property
    def keeps_settings(self) -> bool:
        """Whether what a handler SETs outlives its transaction."""
        return self._gate is None

    def check(self) -> None:
        """Raise HandlerMistake if the transaction was ended, or nobody can go on with it; asks no server."""
        state = self._state()
        if mistake := self.mistake(None):
            raise mistake
        if state == _FAILED:
            raise HandlerMistake(SWALLOWED) from self._last_error
        if state == _UNKNOWN:
            raise HandlerMistake("a handler lost the connection of db_session and went on") from self._last_error
        if state != _IN_TRANSACTION:
            raise ended("ended the transaction")

    def mistake(self, error: BaseException | None) -> HandlerMistake | None:
        """Return the mistake if a handler tried to end the transaction and the database refused, which *error* may say."""
        if self._gate is not None and self._gate.refused:
            return ended(self._gate.refused)
        refused = any(tables.ONLY_THE_RUNTIME_COMMITS in str(cause) for cause in causes(error))
        return ended("called COMMIT, or SET CONSTRAINTS ALL (name your own constraints)") if refused else None

    @property
    def is_whole(self) -> bool:
        """Whether the transaction is open, and nothing has failed in it that was not undone; asks no server."""
        return self._state() == _IN_TRANSACTION

    @property
    def is_gone(self) -> bool:
        """Whether the transaction is over; asks no server."""
        return self._state() not in (_IN_TRANSACTION, _FAILED)

    @property
    def is_lost(self) -> bool:
        """Whether the connection is closed; asks no server."""
        return self._state() == _UNKNOWN

    @property
    def _last_error(self) -> BaseException | None:
        return self.errors[-1] if self.errors else None

    def _state(self) -> int:
        if self._gate is not None:
            return _IN_TRANSACTION if self._driver.in_transaction else _IDLE
        # Drivers other than psycopg don't tell: then it shows at the end, from the row.
        return int(getattr(getattr(self._driver, "info", None), "transaction_status", _IN_TRANSACTION))


def _gate(connection: Connection, driver: Any) -> Gate | None:
    """Return the gate of a connection to SQLite, closed."""
    if connection.dialect.name != "sqlite":
        return None
    gate = connection.info.get(_GATE)
    if gate is None:
        gate = connection.info[_GATE] = Gate()
        driver.set_authorizer(gate)
    gate.close()
    return gate


def protect(engine: Engine) -> None:
    """Let *engine* know seals; again changes nothing."""
    if not event.contains(engine, "commit", _refuse_commit):
        event.listen(engine, "commit", _refuse_commit)
        event.listen(engine, "handle_error", _note)


def _refuse_commit(connection: Connection) -> None:
    # The database would refuse it too; here the mistake can be named, and the transaction goes on.
    seal = of(connection)
    if seal is not None and seal.closed:
        raise ended("called commit() on the connection or the transaction of db_session")


def _note(context: ExceptionContext) -> None:
    if context.connection is not None and (seal := of(context.connection)) is not None:
        seal.note(context.original_exception)


def of(connection: Connection) -> Seal | None:
    """Return the seal of the transaction on *connection*."""
    found: Seal | None = connection.get_execution_options().get(_SEAL)
    return found
