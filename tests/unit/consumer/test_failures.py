"""Whose fault an exception is."""

from __future__ import annotations

import sqlite3
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import errors
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from outbox.consumer.failures import describe, first_line, is_transient, place, storable


def wrapped(error: BaseException, kind: type[DBAPIError] = OperationalError, *, lost: bool = False) -> DBAPIError:
    return kind("SELECT 1", {}, error, connection_invalidated=lost)


def sqlite_error(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("x")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    "error",
    [
        wrapped(errors.DeadlockDetected("deadlock detected")),
        wrapped(errors.SerializationFailure("could not serialize")),
        wrapped(errors.AdminShutdown("terminating connection")),
        wrapped(errors.LockNotAvailable("lock timeout")),
        wrapped(errors.ReadOnlySqlTransaction("cannot execute INSERT in a read-only transaction")),
        wrapped(errors.DiskFull("disk full")),
        wrapped(psycopg.OperationalError("connection refused")),
        wrapped(psycopg.InterfaceError("the connection is closed"), DBAPIError, lost=True),
        wrapped(sqlite_error(sqlite3.SQLITE_BUSY)),
        wrapped(sqlite_error(sqlite3.SQLITE_BUSY_SNAPSHOT)),
        wrapped(sqlite_error(sqlite3.SQLITE_LOCKED)),
        wrapped(sqlite_error(sqlite3.SQLITE_FULL)),
        errors.DeadlockDetected("from a cursor of the driver"),
    ],
)
def test_a_database_that_is_away_or_rolls_back_for_others_is_nobodys_fault(error: BaseException) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        wrapped(errors.UniqueViolation("duplicate key"), IntegrityError),
        wrapped(errors.QueryCanceled("canceling statement due to statement timeout")),
        wrapped(errors.UndefinedTable("no such table")),
        wrapped(sqlite_error(sqlite3.SQLITE_ERROR)),
        wrapped(sqlite3.OperationalError("no such table: x")),
        OSError("connection refused by something that is not the database"),
    ],
)
def test_everything_else_is_an_attempt(error: BaseException) -> None:
    assert not is_transient(error)


def test_what_an_error_was_raised_from_counts_but_not_what_was_merely_being_handled() -> None:
    def raised(from_it: bool) -> BaseException:
        try:
            try:
                raise wrapped(errors.DeadlockDetected("x"))
            except OperationalError as error:
                if from_it:
                    raise RuntimeError("my words") from error
                raise RuntimeError("a bug while handling it")  # noqa: B904
        except RuntimeError as error:
            return error

    assert is_transient(raised(from_it=True))
    assert not is_transient(raised(from_it=False))


def test_causes_that_go_round_in_circles_end() -> None:
    one, two = ValueError("1"), ValueError("2")
    one.__cause__, two.__cause__ = two, one
    assert not is_transient(one)


def test_a_real_locked_sqlite_database_is_transient(tmp_path: Any) -> None:
    one = sqlite3.connect(tmp_path / "x.db", timeout=0)
    one.execute("BEGIN IMMEDIATE")
    engine = sa.create_engine(f"sqlite:///{tmp_path}/x.db", connect_args={"timeout": 0})
    with pytest.raises(OperationalError) as failure, engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE x (a)")
    assert is_transient(failure.value)


def test_what_is_stored_of_an_error_fits_every_database() -> None:
    line, detail = describe(ValueError("a\0b \ud800 " + "x" * 5000))
    assert line.startswith("ValueError: a\\0b \\ud800 xx")
    assert len(line) <= 1000
    assert "\0" not in detail
    detail.encode()


def test_the_place_of_an_error_shows_nothing_of_its_text() -> None:
    with pytest.raises(ValueError, match="secret") as failure:
        int("secret payload")
    assert place(failure.value).startswith("ValueError at ")
    assert "secret" not in place(failure.value)


def test_the_first_line_of_a_database_error_leaves_out_the_row() -> None:
    error = wrapped(errors.UniqueViolation("duplicate key value\nDETAIL:  Key (mail)=(a@b.c) already exists."))
    assert first_line(error) == "duplicate key value"


def test_text_that_every_database_takes_is_left_as_it_is() -> None:
    assert storable("Zürich 🎉") == "Zürich 🎉"
