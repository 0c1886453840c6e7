"""Whose fault an exception is: the message's, or the database's for the moment."""

from __future__ import annotations

import sqlite3
import traceback
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from collections.abc import Iterator

_BUSY = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)
# PostgreSQL: 08 connection, 40 rollback (deadlock, serialization), 53 resources (disk, memory, connections), 57P0x shutting
# down, 58 system, 25006 a demoted primary, 55P03 a lock not available. Not 57014: a statement that is always too slow.
_CLASSES = ("08", "40", "53", "58")
_STATES = frozenset({"25006", "55P03", "57P01", "57P02", "57P03", "57P05"})
_MYSQL = frozenset({1020, 1040, 1205, 1213, 2002, 2003, 2006, 2013})
#: A server that says one of these is up, and waiting would not help.
_REFUSALS = ("password authentication failed", "does not exist", "no pg_hba.conf entry", "Access denied", "Unknown database")
_MAX_ERROR = 1_000
_MAX_DETAIL = 16_000


def is_transient(error: BaseException) -> bool:
    """Say whether a database was away, busy, or had to roll back for another's sake: trying again is all that helps.

    Looks at *error* and at what it was raised `from`.
    """
    return any(_is_transient(each) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or (error.orig is not None and _is_transient(error.orig))
    if isinstance(error, sqlite3.OperationalError):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in _BUSY
    module = type(error).__module__.partition(".")[0]
    if module == "psycopg":
        state = getattr(error, "sqlstate", None)
        if state is None:  # the connection failed without a word from the server
            return any(kind.__name__ == "OperationalError" for kind in type(error).__mro__)
        return state[:2] in _CLASSES or state in _STATES
    return module in ("pymysql", "MySQLdb") and bool(error.args) and error.args[0] in _MYSQL


def is_aborted(error: BaseException) -> bool:
    """Say whether PostgreSQL refuses a statement because an earlier one of the transaction failed."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == "25P02"


def is_refusal(error: BaseException) -> bool:
    """Say whether a database is there and refuses us as configured."""
    return any(text in str(error) for text in _REFUSALS)


def first_line(error: BaseException) -> str:
    """Return what a database says, without the line that may show a row."""
    original = getattr(error, "orig", None) or error
    lines = storable(str(original)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def describe(error: BaseException) -> tuple[str, str]:
    """Return one line and the traceback, as texts that every database takes."""
    line = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    detail = "".join(traceback.format_exception(error))
    return storable(line)[:_MAX_ERROR], storable(detail)[-_MAX_DETAIL:]


def place(error: BaseException) -> str:
    """Return the type of *error* and where it was raised, without its text: that may hold payload."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def storable(text: str) -> str:
    """Return *text* without what PostgreSQL refuses: NUL, and lone surrogates."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
