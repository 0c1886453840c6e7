"""What an error of a database means: the one place that reads SQLSTATE codes, SQLite's codes and the words of servers.

It says what the database said, never what to do about it: a relay waits, a service counts attempts, a command ends.
"""

from __future__ import annotations

import sqlite3
from enum import Enum, auto
from typing import TYPE_CHECKING

from sqlalchemy import exc

if TYPE_CHECKING:
    from collections.abc import Mapping


class Meaning(Enum):
    """What a database said."""

    #: It can't be reached, starts, shuts down, or has no room or memory: nothing of the kind works now.
    AWAY = auto()
    #: Another transaction holds a lock for longer than was to be waited.
    BUSY = auto()
    #: The transaction was given up for another's sake (deadlock, serialization) or by a pooler: again at once may do.
    CONFLICT = auto()
    #: It takes no writes: a standby, or a primary that was demoted under its connections.
    READ_ONLY = auto()
    #: It is there and lets us not in: password, name, pg_hba.conf, a file that can't be opened. A person has to act.
    REFUSED = auto()
    #: We are in, and this statement is not permitted.
    FORBIDDEN = auto()
    #: It ended the statement, which took longer than `statement_timeout` or was cancelled by a person.
    CANCELLED = auto()
    #: A table or column is not there.
    UNMIGRATED = auto()
    #: Anything else: the statement's own fault, or its caller's.
    OTHER = auto()

    @property
    def is_passing(self) -> bool:
        """The same may succeed later, with nobody changing the statement or the settings."""
        return self in (Meaning.AWAY, Meaning.BUSY, Meaning.CONFLICT, Meaning.READ_ONLY)


#: SQLSTATE, or its first two characters. What is in neither form here is OTHER.
_STATES: Mapping[str, Meaning] = {
    "08": Meaning.AWAY,  # also what PgBouncer says of a server that is away, or full (08P01)
    "25006": Meaning.READ_ONLY,
    "25P03": Meaning.OTHER,  # idle in a transaction for too long: whoever was idle in it
    "26000": Meaning.CONFLICT,  # a prepared statement that is another server connection's: there is a pooler between
    "28": Meaning.REFUSED,
    "3D000": Meaning.REFUSED,
    "3F000": Meaning.UNMIGRATED,
    "40": Meaning.CONFLICT,
    "42501": Meaning.FORBIDDEN,
    "42703": Meaning.UNMIGRATED,
    "42P01": Meaning.UNMIGRATED,
    "42P05": Meaning.CONFLICT,  # as 26000
    "53": Meaning.AWAY,
    "53400": Meaning.OTHER,  # a limit set for statements: temp_file_limit
    "55P03": Meaning.BUSY,
    "57014": Meaning.CANCELLED,
    "57P01": Meaning.AWAY,
    "57P02": Meaning.AWAY,
    "57P03": Meaning.AWAY,
    "57P05": Meaning.AWAY,
    "58": Meaning.AWAY,
    "58P01": Meaning.OTHER,  # a file that the statement named
    "58P02": Meaning.OTHER,
}
#: SQLite's primary result codes.
_SQLITE: Mapping[int, Meaning] = {
    sqlite3.SQLITE_BUSY: Meaning.BUSY,
    sqlite3.SQLITE_LOCKED: Meaning.BUSY,
    sqlite3.SQLITE_IOERR: Meaning.AWAY,
    sqlite3.SQLITE_FULL: Meaning.AWAY,
    sqlite3.SQLITE_CANTOPEN: Meaning.REFUSED,
    sqlite3.SQLITE_READONLY: Meaning.READ_ONLY,
    sqlite3.SQLITE_NOTADB: Meaning.REFUSED,
}
#: MySQL's and MariaDB's numbers: handlers may use one.
_MYSQL: Mapping[int, Meaning] = {
    1020: Meaning.CONFLICT,
    1040: Meaning.AWAY,
    1044: Meaning.REFUSED,
    1045: Meaning.REFUSED,
    1049: Meaning.REFUSED,
    1205: Meaning.BUSY,
    1213: Meaning.CONFLICT,
    1290: Meaning.READ_ONLY,
    2002: Meaning.AWAY,
    2003: Meaning.AWAY,
    2006: Meaning.AWAY,
    2013: Meaning.AWAY,
}
#: Where there is no code: what drivers report of a connection that was not made is the server's text alone.
_WORDS: Mapping[str, Meaning] = {
    "authentication failed": Meaning.REFUSED,
    "no pg_hba.conf entry": Meaning.REFUSED,
    "is not permitted to log in": Meaning.REFUSED,
    "permission denied for database": Meaning.REFUSED,
    "does not exist": Meaning.REFUSED,
    "access denied": Meaning.REFUSED,
    "unknown database": Meaning.REFUSED,
    "unable to open": Meaning.REFUSED,
    "file is not a database": Meaning.REFUSED,
    "no such table": Meaning.UNMIGRATED,
    "no such column": Meaning.UNMIGRATED,
    "has no column": Meaning.UNMIGRATED,
    "is locked": Meaning.BUSY,
    "lock timeout": Meaning.BUSY,
}


def meaning(error: BaseException) -> Meaning:
    """Return what *error* means: SQLAlchemy's or a driver's own (psycopg, psycopg2, asyncpg, sqlite3, pymysql).

    What no database can have said is OTHER. Causes are not looked at.
    """
    if isinstance(error, exc.TimeoutError):  # every connection of the pool is in use
        return Meaning.BUSY
    driver = _driver_error(error)
    found = _by_code(driver)
    if found is None and sqlstate(driver) is None and _is_of_a_database(error):
        found = _by_words(str(driver))
    if found is None and (_is_of_a_connection(error) or getattr(error, "connection_invalidated", False)):
        found = Meaning.AWAY
    return found or Meaning.OTHER


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of *error*, or of the driver's error in it: psycopg and asyncpg call it so, psycopg2 `pgcode`."""
    driver = _driver_error(error)
    state = getattr(driver, "sqlstate", None) or getattr(driver, "pgcode", None)
    return state if isinstance(state, str) else None


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return the first line of what the driver said: the next may show a row. Parameters (hence payloads) are never in it."""
    lines = str(_driver_error(error)).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def _driver_error(error: BaseException) -> BaseException:
    return getattr(error, "orig", None) or error


def _by_code(driver: BaseException) -> Meaning | None:
    state = sqlstate(driver)
    if state is not None:
        return _STATES.get(state) or _STATES.get(state[:2])
    if isinstance(driver, sqlite3.Error):
        return _SQLITE.get(getattr(driver, "sqlite_errorcode", 0) & 0xFF)
    if _library(driver) in ("pymysql", "MySQLdb") and driver.args:
        return _MYSQL.get(driver.args[0])
    return None


def _by_words(said: str) -> Meaning | None:
    lowered = said.lower()
    return next((found for words, found in _WORDS.items() if words in lowered), None)


def _is_of_a_database(error: BaseException) -> bool:
    return isinstance(error, (exc.DBAPIError, sqlite3.Error)) or _library(error) in ("psycopg", "psycopg2", "asyncpg")


def _is_of_a_connection(error: BaseException) -> bool:
    """Say whether *error* came without a code and with a class that says so: the server had no part in it."""
    driver = _driver_error(error)
    if sqlstate(driver) is not None or isinstance(driver, sqlite3.Error):
        return False
    if isinstance(error, (exc.OperationalError, exc.InterfaceError)):
        return True
    return _library(driver) in ("psycopg", "psycopg2") and any(
        kind.__name__ == "OperationalError" for kind in type(driver).__mro__
    )


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]
