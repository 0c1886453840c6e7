"""Engines as this project needs them: one place for what each database must be told."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import NoSuchModuleError

from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine, ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry

AnyEngine = TypeVar("AnyEngine", "Engine", "AsyncEngine")

_PREPARED = "outbox_prepared"
#: The drivers that our extras bring; another one is the application's to install.
_DRIVERS = {
    "postgresql": "use postgresql+psycopg:// and pip install 'outbox[postgres]'",
    "mysql": "use mysql+pymysql:// and pip install 'outbox[mysql]'",
}
#: On a connection: `_begin_immediate` has begun its transactions, this one too.
_BEGUN = "outbox_begun"
#: How long a statement waits for another writer of the SQLite file: where nothing is said, and with us.
_DRIVERS_WAIT_MS, _WAIT_MS = 5_000, 30_000
#: A failed-over primary answers reads and refuses writes: the connection must go, or the pool keeps offering it.
_READ_ONLY = "25006"


def create_engine(url: str, **options: Any) -> Engine:
    """Return an engine of ours for *url*: parameters (hence payloads) are in no error, and a server's restart is survived.

    On SQLite it is prepared, and what this project needs of a file is set beside that (`_configure_own`): a long wait for the
    writer before, commits that survive a power failure, foreign keys. Makes the folder of a SQLite file. Raises
    ConfigurationError where it can't, and for a driver that is not installed or asynchronous.
    """
    options.setdefault("hide_parameters", True)
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        options.setdefault("pool_pre_ping", True)
    elif parsed.database and not parsed.database.startswith("file:"):
        _make_folder(Path(parsed.database).parent)
    try:
        engine = sa.create_engine(url, **options)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        fix = _DRIVERS.get(parsed.get_backend_name(), "correct the URL")
        raise ConfigurationError(f"{parsed.drivername}://…: its driver is not installed ({error}); {fix}") from error
    if engine.dialect.is_async:
        fix = "use postgresql+psycopg:// or sqlite:///"
        raise ConfigurationError(
            f"{parsed.drivername}://…: its driver is asynchronous, which commands and processes can't use; {fix}"
        )
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_own)
    return prepare(engine)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"the folder {folder.absolute()} of the SQLite file can't be made: {error.strerror}"
        raise ConfigurationError(f"{said}; correct the URL or the folder's permissions") from error


def prepare(engine: AnyEngine) -> AnyEngine:
    """Give *engine* (also one made elsewhere) what correctness needs; doing so again changes nothing.

    On SQLite a transaction begins at its first statement (BEGIN IMMEDIATE), so that its savepoints are inside it; for the
    writer before it waits 30 seconds instead of the driver's five, because transactions that only read wait now, too.
    Foreign keys, journal mode, `synchronous` and any other time to wait stay the application's choice: whatever they are, a
    message has the fate of the rows beside it. Elsewhere connections to a demoted primary are dropped.
    """
    if not is_prepared(synchronous(engine)):
        _prepare(synchronous(engine))
    return engine


def synchronous(engine: Any) -> Any:
    """Return the engine behind an AsyncEngine, anything else as it is."""
    return getattr(engine, "sync_engine", engine)


def _prepare(engine: Engine) -> None:
    engine.update_execution_options(**{_PREPARED: True})
    if engine.dialect.name == "sqlite":
        # At checkout, not at connect: connections that were made before are configured, too, and none has to be closed
        # (a database in memory is its connection).
        event.listen(engine, "checkout", _configure_once)
        event.listen(engine, "begin", _begin_immediate)
    else:
        event.listen(engine, "handle_error", _drop_demoted_primary)


def reading(engine: Engine) -> Engine:
    """Return *engine* for reads: outside a transaction, or on SQLite in one that does not lock writers out."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(outbox_read_only=True)
    return autocommitting(engine)


def autocommitting(engine: Engine) -> Engine:
    """Return *engine* for single statements that commit by themselves: a process stopped meanwhile leaves no lock behind."""
    if engine.dialect.name == "sqlite":
        return engine  # a statement is as short as its transaction: nothing is asked of a server in between
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def autocommits(bind: Engine | Connection) -> bool:
    """Say whether every statement on *bind* commits by itself."""
    # Where an engine is told at its making, only this name says so; asking the connection would be a round trip.
    at_connect = getattr(bind.dialect, "_on_connect_isolation_level", None)
    return (bind.get_execution_options().get("isolation_level") or at_connect) == "AUTOCOMMIT"


def begins_early(connection: Connection) -> bool:
    """Say whether an SQLite transaction gets its BEGIN before anything else: `prepare` or the application saw to it."""
    driver: Any = connection.connection.driver_connection
    follows_the_recipe = driver.isolation_level is None and bool(connection.engine.dispatch.begin)
    since_python_3_12 = getattr(driver, "autocommit", None) is False
    return _BEGUN in connection.info or (follows_the_recipe and not is_prepared(connection.engine)) or since_python_3_12


def begin_now(connection: Connection) -> bool:
    """Send the BEGIN that an SQLite engine not prepared has put off: a savepoint made later is inside the transaction.

    Returns False for asynchronous drivers: they can't, in a plain call.
    """
    driver: Any = connection.connection.driver_connection
    if driver.in_transaction:
        return True
    if connection.dialect.is_async:
        return False
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    return True


def is_prepared(engine: Engine) -> bool:
    """Say whether `prepare` has seen *engine*."""
    return bool(engine.get_execution_options().get(_PREPARED))


def _configure_once(connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object) -> None:
    driver: Any = record.driver_connection
    if _PREPARED in record.info or driver.in_transaction:  # shared by threads, it may be in use: next time
        return
    # The driver's legacy mode sends BEGIN only before DML, so a SAVEPOINT before it would be outside any transaction and
    # survive a rollback. With isolation_level None it sends none, and `_begin_immediate` does.
    connection.isolation_level = None
    if _pragma(connection, "busy_timeout") == _DRIVERS_WAIT_MS:
        _pragma(connection, f"busy_timeout={_WAIT_MS}")
    record.info[_PREPARED] = True


def _configure_own(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    for pragma in (f"busy_timeout={_WAIT_MS}", "synchronous=FULL", "foreign_keys=ON"):
        _pragma(connection, pragma)
    # Rollback journal: before 3.51.3 two processes that checkpoint a WAL at once can lose a commit. TRUNCATE, because DELETE
    # does not sync the folder after it removed the journal: after a power failure it may be back and undo a reported commit.
    journal = "WAL" if sqlite3.sqlite_version_info >= (3, 51, 3) else "TRUNCATE"
    # A WAL is of the file, not of the connection. Where there is one the application chose it, has it open, and would fail.
    if _pragma(connection, "journal_mode") != "wal":
        _pragma(connection, f"journal_mode={journal}")


def _pragma(connection: DBAPIConnection, text: str) -> Any:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA {text}")
    row = cursor.fetchone()
    cursor.close()
    return row[0] if row else None


def _begin_immediate(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    # Told so by the application, which will not commit: what it writes would be lost.
    if autocommits(connection):
        return
    connection.info[_BEGUN] = True
    if driver.in_transaction:  # the application has a listener of its own that begins
        return
    # A deferred transaction that reads and then writes fails at once with SQLITE_BUSY_SNAPSHOT, whatever the timeout.
    mode = "DEFERRED" if connection.get_execution_options().get("outbox_read_only") else "IMMEDIATE"
    connection.exec_driver_sql(f"BEGIN {mode}")


def _drop_demoted_primary(context: ExceptionContext) -> None:
    if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
        context.is_disconnect = True
