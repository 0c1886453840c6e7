"""What a database's error means, whichever driver reports it."""

from __future__ import annotations

import sqlite3
from typing import Any

import psycopg
import psycopg2
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, ProgrammingError

from outbox.database import Meaning, first_line, meaning
from outbox.database.errors import sqlstate

STATES = {
    "08006": Meaning.AWAY,
    "08P01": Meaning.AWAY,
    "25006": Meaning.READ_ONLY,
    "25P03": Meaning.OTHER,
    "26000": Meaning.CONFLICT,
    "28P01": Meaning.REFUSED,
    "3D000": Meaning.REFUSED,
    "3F000": Meaning.UNMIGRATED,
    "40001": Meaning.CONFLICT,
    "40P01": Meaning.CONFLICT,
    "42501": Meaning.FORBIDDEN,
    "42703": Meaning.UNMIGRATED,
    "42P01": Meaning.UNMIGRATED,
    "42P05": Meaning.CONFLICT,
    "53100": Meaning.AWAY,
    "53300": Meaning.AWAY,
    "53400": Meaning.OTHER,
    "55P03": Meaning.BUSY,
    "57014": Meaning.CANCELLED,
    "57P01": Meaning.AWAY,
    "57P03": Meaning.AWAY,
    "58030": Meaning.AWAY,
    "58P01": Meaning.OTHER,
    "22P05": Meaning.OTHER,
    "XX000": Meaning.OTHER,
}


class OfPsycopg2(psycopg2.OperationalError):
    """The driver sets `pgcode` in C, where a test can't."""

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code

    @property
    def pgcode(self) -> str:  # type: ignore[override]
        return self.code


class OfAsyncpg(Exception):
    """As SQLAlchemy hands on what asyncpg raised."""

    def __init__(self, text: str, sqlstate: str) -> None:
        super().__init__(text)
        self.sqlstate = self.pgcode = sqlstate


def of_psycopg(text: str, code: str) -> psycopg.Error:
    error = psycopg.OperationalError(text)
    error.sqlstate = code
    return error


def wrapped(error: BaseException, kind: type[DBAPIError] = OperationalError, *, lost: bool = False) -> DBAPIError:
    return kind("SELECT 1", {}, error, connection_invalidated=lost)


@pytest.mark.parametrize("made", [of_psycopg, OfPsycopg2, OfAsyncpg])
@pytest.mark.parametrize(("code", "means"), STATES.items())
def test_a_code_means_the_same_from_every_driver(made: Any, code: str, means: Meaning) -> None:
    assert sqlstate(wrapped(made("does not exist", code))) == code
    assert meaning(wrapped(made("does not exist", code))) is means
    assert meaning(made("does not exist", code)) is means


@pytest.mark.parametrize("kind", [psycopg.OperationalError, psycopg2.OperationalError])
@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("connection refused", Meaning.AWAY),
        ("connection timeout expired", Meaning.AWAY),
        ('FATAL:  password authentication failed for user "u"', Meaning.REFUSED),
        ('FATAL:  database "shop" does not exist', Meaning.REFUSED),
        ('FATAL:  no pg_hba.conf entry for host "h"', Meaning.REFUSED),
    ],
)
def test_a_connection_that_was_not_made_has_words_but_no_code(kind: type[Exception], said: str, means: Meaning) -> None:
    assert meaning(wrapped(kind(said))) is means
    assert meaning(kind(said)) is means


@pytest.mark.parametrize(
    ("code", "means"),
    [
        (sqlite3.SQLITE_BUSY, Meaning.BUSY),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, Meaning.BUSY),
        (sqlite3.SQLITE_LOCKED, Meaning.BUSY),
        (sqlite3.SQLITE_FULL, Meaning.AWAY),
        (sqlite3.SQLITE_IOERR, Meaning.AWAY),
        (sqlite3.SQLITE_CANTOPEN, Meaning.REFUSED),
        (sqlite3.SQLITE_READONLY, Meaning.READ_ONLY),
        (sqlite3.SQLITE_ERROR, Meaning.OTHER),
    ],
)
def test_sqlite_says_it_by_numbers(code: int, means: Meaning) -> None:
    error = sqlite3.OperationalError("x")
    error.sqlite_errorcode = code
    assert meaning(wrapped(error)) is meaning(error) is means


def test_what_a_real_sqlite_file_says(tmp_path: Any) -> None:
    with pytest.raises(OperationalError) as raised, sa.create_engine("sqlite://").connect() as connection:
        connection.exec_driver_sql("SELECT 1 FROM missing")
    assert meaning(raised.value) is Meaning.UNMIGRATED
    with pytest.raises(OperationalError) as raised:
        sa.create_engine(f"sqlite:///{tmp_path}/no/such.db").connect()
    assert meaning(raised.value) is Meaning.REFUSED
    (tmp_path / "x.db").write_text("no database " * 1_000)
    with pytest.raises(DBAPIError) as other, sa.create_engine(f"sqlite:///{tmp_path}/x.db").connect() as connection:
        connection.exec_driver_sql("SELECT * FROM sqlite_master")
    assert meaning(other.value) is Meaning.REFUSED


def test_a_lost_connection_without_a_word_is_a_database_that_is_away() -> None:
    assert meaning(wrapped(psycopg.InterfaceError("the connection is closed"), InterfaceError)) is Meaning.AWAY
    assert meaning(wrapped(psycopg.DatabaseError("lost"), DBAPIError, lost=True)) is Meaning.AWAY
    assert meaning(wrapped(psycopg.DatabaseError("lost"), DBAPIError)) is Meaning.OTHER


def test_a_pool_that_has_none_left_is_busy() -> None:
    assert meaning(sa.exc.TimeoutError("QueuePool limit reached")) is Meaning.BUSY


@pytest.mark.parametrize("error", [ValueError("it does not exist"), ConnectionRefusedError("refused"), KeyError("x")])
def test_what_no_database_said_means_nothing_here(error: Exception) -> None:
    assert meaning(error) is Meaning.OTHER


def test_the_first_line_shows_no_row() -> None:
    said = "duplicate key value\nDETAIL:  Key (name)=(secret) already exists."
    assert first_line(wrapped(psycopg.DatabaseError(said), ProgrammingError)) == "duplicate key value"
    assert first_line(wrapped(psycopg.DatabaseError(""), ProgrammingError)) == "ProgrammingError"
