"""Engines: made by us, or made elsewhere and prepared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from outbox.database import dialects, forks
from outbox.database.dialects import Role, autocommits
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = [
    "Role",
    "autocommits",
    "autocommitting",
    "begin_now",
    "begins_early",
    "create_engine",
    "in_transaction",
    "is_prepared",
    "prepare",
    "reading",
    "synchronous",
]

AnyEngine = TypeVar("AnyEngine", "Engine", "AsyncEngine")


def create_engine(url: str, *, role: Role = Role.APP, name: str = "", **options: Any) -> Engine:
    """Return an engine of ours for *url*: parameters (hence payloads) are in no error, and a server's restart is survived.

    What *url* and *options* say wins over what is set here. PostgreSQL: a connection whose other end is gone is noticed within
    some 20 seconds, on both sides; no prepared statements, which poolers mix up, unless `prepare_threshold` asks for them
    (a service prepares them on a connection that is certainly nobody else's);
    dates and texts are read right whatever the server's defaults. SQLite: prepared, a long wait for the writer before,
    commits that survive a power failure, foreign keys; makes the folder of the file. Raises ConfigurationError where it
    can't, and for a driver that is unknown, not installed or asynchronous.
    """
    parsed = sa.make_url(url)
    dialect = dialects.of_url(parsed, role, name)
    _refuse_asynchronous(parsed, dialect)
    completed = dialect.complete(parsed, options)
    try:
        engine = sa.create_engine(completed, **options)
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{parsed.drivername}://…: its driver is not installed ({error}); {dialect.fix}") from error
    dialect.set_up(engine)
    return prepare(engine)


def _refuse_asynchronous(url: URL, dialect: dialects.Dialect) -> None:
    if dialect.drivers[dialects.driver(url)]:
        raise ConfigurationError(
            f"{url.drivername}://…: its driver is asynchronous, which commands and processes can't use; "
            "use postgresql+psycopg:// or sqlite:///"
        )


def prepare(engine: AnyEngine) -> AnyEngine:
    """Give *engine* (also one made elsewhere) what correctness needs; doing so again changes nothing.

    On SQLite a transaction begins at its first statement (BEGIN IMMEDIATE), so that its savepoints are inside it; for the
    writer before it waits 30 seconds instead of the driver's five, because transactions that only read wait now, too.
    Foreign keys, journal mode, `synchronous` and any other time to wait stay the application's choice: whatever they are, a
    message has the fate of the rows beside it. Elsewhere connections to a demoted primary are dropped; timeouts, keepalives and
    prepared statements stay the application's choice. A child of this process gets connections of its own. Raises
    ConfigurationError for a database or driver that is not supported.
    """
    if not is_prepared(synchronous(engine)):
        _prepare(synchronous(engine))
    return engine


def synchronous(engine: Any) -> Any:
    """Return the engine behind an AsyncEngine, anything else as it is."""
    return getattr(engine, "sync_engine", engine)


def _prepare(engine: Engine) -> None:
    dialect = dialects.of_engine(engine)
    engine.update_execution_options(**{dialects.PREPARED: True})
    dialect.prepare(engine)
    forks.watch(engine)


def reading(engine: Engine) -> Engine:
    """Return *engine* for reads: outside a transaction, or on SQLite in one that does not lock writers out."""
    return dialects.of_engine(engine).reading(engine)


def autocommitting(engine: Engine) -> Engine:
    """Return *engine* for single statements that commit by themselves: a process stopped meanwhile leaves no lock behind."""
    return dialects.of_engine(engine).autocommitting(engine)


def begins_early(connection: Connection) -> bool:
    """Say whether an SQLite transaction gets its BEGIN before anything else: `prepare` or the application saw to it."""
    driver: Any = connection.connection.driver_connection
    follows_the_recipe = driver.isolation_level is None and bool(connection.engine.dispatch.begin)
    since_python_3_12 = getattr(driver, "autocommit", None) is False
    return dialects.BEGUN in connection.info or (follows_the_recipe and not is_prepared(connection.engine)) or since_python_3_12


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


def in_transaction(connection: Connection) -> bool | None:
    """Say whether the driver of *connection* is in a transaction; None: it does not tell. No server is asked."""
    if connection.closed or connection.invalidated:
        return None
    driver: Any = connection.connection.driver_connection
    info = getattr(driver, "info", None)
    if info is not None:  # psycopg and psycopg2, in libpq's numbers
        return _LIBPQ.get(int(info.transaction_status))
    if hasattr(driver, "is_in_transaction"):
        return bool(driver.is_in_transaction())  # asyncpg
    found = getattr(driver, "in_transaction", None)  # sqlite3 and aiosqlite
    return found if isinstance(found, bool) else None


#: Idle, in a transaction, in one that failed.
_LIBPQ = {0: False, 2: True, 3: True}


def is_prepared(engine: Engine) -> bool:
    """Say whether `prepare` has seen *engine*."""
    return bool(engine.get_execution_options().get(dialects.PREPARED))
