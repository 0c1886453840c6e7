"""All that differs per database and driver in connecting: a class per database, and each names the drivers it knows."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from sqlalchemy import event

from outbox.database.errors import Meaning, meaning
from outbox.errors import ConfigurationError, install

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.engine import URL, Connection, Engine, ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

PREPARED = "outbox_prepared"
#: On a connection: `prepare` has begun its transactions, this one too.
BEGUN = "outbox_begun"


#: On a connection: a pooler stands between, so what a session is told may be another's.
POOLED = "outbox_pooled"
#: On an engine: prepared statements were neither asked for nor forbidden.
_MAY_PREPARE = "outbox_may_prepare"
#: How often a statement is executed before psycopg prepares it: its own default.
_THRESHOLD = 5
#: PostgreSQL cuts an application_name here.
_LONGEST_NAME = 63


def process_name() -> str:
    """Return how this process is called where others see it: on which host, and which."""
    return f"{socket.gethostname()[:30]}:{os.getpid()}"


class Role(Enum):
    """Who uses an engine of ours; the database's administrator sees it as `application_name`."""

    APP = "app"
    RELAY = "relay"
    SERVICE = "service"
    COMMAND = "command"


@dataclass(frozen=True)
class Dialect:
    """A database and how it is connected to."""

    role: Role = Role.APP
    #: What more exactly uses it: a service's name.
    name: str = ""
    #: Driver → whether it is asynchronous; drivers that are not here are refused: what they do with types is a guess.
    drivers: ClassVar[Mapping[str, bool]] = MappingProxyType({})
    #: What to do where the driver is missing or another.
    fix: ClassVar[str] = ""

    def complete(self, url: URL, options: dict[str, Any]) -> URL:
        """Add what is needed to *options* of an engine of ours; return the URL to be used. Raises ConfigurationError."""
        options.setdefault("hide_parameters", True)
        return url

    def set_up(self, engine: Engine) -> None:
        """Listen on an engine of ours."""

    def prepare(self, engine: Engine) -> None:
        """Listen on anybody's engine."""
        raise NotImplementedError

    def reading(self, engine: Engine) -> Engine:
        """See `engines.reading`."""
        raise NotImplementedError

    def autocommitting(self, engine: Engine) -> Engine:
        """See `engines.autocommitting`."""
        raise NotImplementedError


class Server(Dialect):
    """A database reached over the network."""

    def complete(self, url: URL, options: dict[str, Any]) -> URL:
        options.setdefault("pool_pre_ping", True)
        return super().complete(url, options)

    def prepare(self, engine: Engine) -> None:
        event.listen(engine, "handle_error", _drop_demoted_primary)

    def reading(self, engine: Engine) -> Engine:
        return self.autocommitting(engine)

    def autocommitting(self, engine: Engine) -> Engine:
        return engine.execution_options(isolation_level="AUTOCOMMIT")


class PostgreSQL(Server):
    """PostgreSQL through psycopg or psycopg2; an application's own engine may use asyncpg."""

    drivers: ClassVar = MappingProxyType({"psycopg": False, "psycopg2": False, "asyncpg": True})
    fix: ClassVar = f"use postgresql+psycopg:// and {install('postgres')}"

    #: A connection that hears nothing for so long is dead: 5 + 3 x 5 s for an answer that never comes, 15 s for what was
    #: sent and is not acknowledged. The kernel's own answer would be two hours.
    _KEEPALIVES: ClassVar[Mapping[str, int]] = {
        "keepalives": 1, "keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 15_000
    }  # fmt: skip
    #: Long enough for a busy server, short enough for a person: a firewall that swallows packets would cost minutes.
    _CONNECT_SECONDS = 10
    #: The same for the server's side of the connection: it rolls back the transaction of a machine that is gone.
    _SERVERS_SIDE: ClassVar[Mapping[str, str]] = {
        "tcp_keepalives_idle": "5", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3", "tcp_user_timeout": "15000"
    }  # fmt: skip

    def complete(self, url: URL, options: dict[str, Any]) -> URL:
        super().complete(url, options)
        given = {**options.get("connect_args", {}), **url.query}
        defaults = {"connect_timeout": self._CONNECT_SECONDS, "client_encoding": "utf8", **self._KEEPALIVES}
        if self.role is not Role.APP:
            defaults["application_name"] = f"outbox {self.name or self.role.value} {process_name()}"[:_LONGEST_NAME]
        arguments = {name: value for name, value in defaults.items() if name not in given} | options.get("connect_args", {})
        if driver(url) == "psycopg":
            arguments["prepare_threshold"] = _threshold(given.get("prepare_threshold"))
            if self.role is Role.SERVICE and "prepare_threshold" not in given:
                options["execution_options"] = {**options.get("execution_options", {}), _MAY_PREPARE: True}
        options["connect_args"] = arguments
        return url.difference_update_query(["prepare_threshold"])

    def set_up(self, engine: Engine) -> None:
        @event.listens_for(engine, "connect")
        def configure(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
            with _autocommitting(connection) as cursor:
                if not _reads_dates(connection):
                    cursor.execute("SET DateStyle TO ISO")
                with contextlib.suppress(engine.dialect.loaded_dbapi.Error):  # not every server has them
                    cursor.execute(self._servers_side(connection))
                    record.info[POOLED] = cursor.fetchone() is None
            if engine.get_execution_options().get(_MAY_PREPARE) and record.info.get(POOLED) is False:
                # A service repeats few statements for ever: a third more messages a second where nobody is between.
                cast("Any", connection).prepare_threshold = _THRESHOLD

        if self.role is Role.SERVICE:
            event.listen(engine, "begin", _let_it_wait)

    def _servers_side(self, connection: Any) -> str:
        settings = dict(self._SERVERS_SIDE)
        if self.role is Role.SERVICE:
            # A handler may wait for a mail server for longer than the server lets a transaction wait: it is not idle, and
            # a machine that is gone is noticed by the above.
            settings["idle_in_transaction_session_timeout"] = "0"
        calls = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in settings.items())
        # Not through a pooler, which makes up process ids: they would stay on a connection that others use.
        return f"SELECT {calls} WHERE pg_backend_pid() = {backend_pid(connection)}"


class MySQL(Server):
    """MySQL and MariaDB: engines can be made, the outbox can't be kept there yet."""

    drivers: ClassVar = MappingProxyType({"pymysql": False, "mysqldb": False, "aiomysql": True, "asyncmy": True})
    fix: ClassVar = f"use mysql+pymysql:// and {install('mysql')}"

    def complete(self, url: URL, options: dict[str, Any]) -> URL:
        options["connect_args"] = {"connect_timeout": 10, **options.get("connect_args", {})}
        return super().complete(url, options)


class SQLite(Dialect):
    """A SQLite file, or a database in memory."""

    drivers: ClassVar = MappingProxyType({"pysqlite": False, "pysqlcipher": False, "aiosqlite": True})
    fix: ClassVar = "use sqlite:///"

    #: How long a statement waits for another writer of the file: where nothing is said, and with us.
    _DRIVERS_WAIT_MS, _WAIT_MS = 5_000, 30_000

    def complete(self, url: URL, options: dict[str, Any]) -> URL:
        if url.database and not url.database.startswith("file:"):
            _make_folder(Path(url.database).parent)
        return super().complete(url, options)

    def set_up(self, engine: Engine) -> None:
        event.listen(engine, "connect", self._configure_own)

    def prepare(self, engine: Engine) -> None:
        # At checkout, not at connect: connections that were made before are configured, too, and none has to be closed
        # (a database in memory is its connection).
        event.listen(engine, "checkout", self._configure_once)
        event.listen(engine, "begin", _begin_immediate)

    def reading(self, engine: Engine) -> Engine:
        return engine.execution_options(outbox_read_only=True)

    def autocommitting(self, engine: Engine) -> Engine:
        return engine  # a statement is as short as its transaction: nothing is asked of a server in between

    def _configure_once(self, connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object) -> None:
        driver: Any = record.driver_connection
        if PREPARED in record.info or driver.in_transaction:  # shared by threads, it may be in use: next time
            return
        # The driver's legacy mode sends BEGIN only before DML, so a SAVEPOINT before it would be outside any transaction and
        # survive a rollback. With isolation_level None it sends none, and `_begin_immediate` does.
        connection.isolation_level = None
        if _pragma(connection, "busy_timeout") == self._DRIVERS_WAIT_MS:
            _pragma(connection, f"busy_timeout={self._WAIT_MS}")
        record.info[PREPARED] = True

    def _configure_own(self, connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
        for pragma in (f"busy_timeout={self._WAIT_MS}", "synchronous=FULL", "foreign_keys=ON"):
            _pragma(connection, pragma)
        # Rollback journal: before 3.51.3 two processes that checkpoint a WAL at once can lose a commit. TRUNCATE, because
        # DELETE does not sync the folder after it removed the journal: after a power failure it may be back and undo a
        # reported commit.
        journal = "WAL" if sqlite3.sqlite_version_info >= (3, 51, 3) else "TRUNCATE"
        # A WAL is of the file, not of the connection. Where there is one the application chose it, has it open, and would fail.
        if _pragma(connection, "journal_mode") != "wal":
            _pragma(connection, f"journal_mode={journal}")


_DIALECTS: Mapping[str, type[Dialect]] = {"postgresql": PostgreSQL, "mysql": MySQL, "mariadb": MySQL, "sqlite": SQLite}


def of(backend: str, driver: str, role: Role = Role.APP, name: str = "") -> Dialect:
    """Return the dialect of *backend*. Raises ConfigurationError for a database or driver that this project does not know."""
    dialect = _DIALECTS.get(backend)
    if dialect is None:
        raise ConfigurationError(f"{backend} is not supported; use postgresql+psycopg:// or sqlite:///")
    if driver not in dialect.drivers:
        known = ", ".join(name for name, asynchronous in dialect.drivers.items() if not asynchronous)
        raise ConfigurationError(
            f"the driver {driver} is not supported (supported: {known}): what it stores would be a guess; {dialect.fix}"
        )
    return dialect(role, name)


def of_url(url: URL, role: Role = Role.APP, name: str = "") -> Dialect:
    """Return the dialect of *url*. Raises ConfigurationError as `of`."""
    return of(url.get_backend_name(), driver(url), role, name)


def driver(url: URL) -> str:
    """Return the driver that *url* names, or the one that its database has where it names none."""
    _, named, driver = url.drivername.partition("+")
    return driver if named or url.get_backend_name() not in _DIALECTS else url.get_driver_name()


def of_engine(engine: Engine | Connection) -> Dialect:
    """Return the dialect of *engine*. Raises ConfigurationError as `of`."""
    return of(engine.dialect.name, engine.dialect.driver)


def autocommits(bind: Engine | Connection) -> bool:
    """Say whether every statement on *bind* commits by itself."""
    # Where an engine is told at its making, only this name says so; asking the connection would be a round trip.
    at_connect = getattr(bind.dialect, "_on_connect_isolation_level", None)
    return (bind.get_execution_options().get("isolation_level") or at_connect) == "AUTOCOMMIT"


# --- servers ------------------------------------------------------------------------------------------------------------


def backend_pid(connection: Any) -> int:
    """Return the server process of a driver's *connection* as it was told at connecting: a pooler makes one up."""
    if hasattr(connection, "get_backend_pid"):  # psycopg2
        return int(connection.get_backend_pid())
    return int(connection.info.backend_pid)


def _let_it_wait(connection: Connection) -> None:
    """Tell each transaction through a pooler what a connection of one's own was told once: a handler may wait."""
    if connection.info.get(POOLED):
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")


def _reads_dates(connection: Any) -> bool:
    """Say whether the driver reads the dates of this session: psycopg2 has set it to ISO itself, psycopg does not."""
    return hasattr(connection, "get_backend_pid") or str(connection.info.parameter_status("DateStyle")).startswith("ISO")


@contextlib.contextmanager
def _autocommitting(connection: Any) -> Any:
    before = connection.autocommit
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.autocommit = before


def _threshold(given: Any) -> int | None:
    """Return psycopg's `prepare_threshold`: none unless asked for, because a pooler gives prepared statements to others."""
    if given is None or str(given).lower() in ("", "none"):
        return None
    try:
        return int(given)
    except ValueError:
        raise ConfigurationError(
            f"prepare_threshold={given}: it must be a number of executions, or none for no prepared statements; correct the URL"
        ) from None


def _drop_demoted_primary(context: ExceptionContext) -> None:
    """A failed-over primary answers reads and refuses writes: the connection must go, or the pool keeps offering it."""
    if context.sqlalchemy_exception is not None and meaning(context.original_exception) is Meaning.READ_ONLY:
        context.is_disconnect = True


# --- SQLite -------------------------------------------------------------------------------------------------------------


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"the folder {folder.absolute()} of the SQLite file can't be made: {error.strerror}"
        raise ConfigurationError(f"{said}; correct the URL or the folder's permissions") from error


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
    connection.info[BEGUN] = True
    if driver.in_transaction:  # the application has a listener of its own that begins
        return
    # A deferred transaction that reads and then writes fails at once with SQLITE_BUSY_SNAPSHOT, whatever the timeout.
    mode = "DEFERRED" if connection.get_execution_options().get("outbox_read_only") else "IMMEDIATE"
    connection.exec_driver_sql(f"BEGIN {mode}")
