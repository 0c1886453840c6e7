"""Whether the database answers, as a relay's probes see it."""

from __future__ import annotations

import logging

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import errors
from sqlalchemy.exc import OperationalError

from outbox.relay.database_health import Availability


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_call_that_hangs_is_complained_of_while_it_hangs() -> None:
    clock = Clock()
    database = Availability(clock)
    with database.attempt():
        clock.now += 9.0
        assert (database.in_use, database.complaint()) == (True, "")
        clock.now += 14.0
        assert (database.in_use, database.complaint()) == (True, "no answer for 23 s")
    assert (database.in_use, database.complaint()) == (False, "")


def test_a_failure_is_complained_of_until_a_call_works() -> None:
    database = Availability(Clock())
    with database.attempt():
        raise sa.exc.OperationalError("SELECT 1", {}, Exception("the server is gone"))
    assert database.complaint() == "the server is gone"
    with database.attempt():
        assert database.complaint() == "the server is gone"
    assert database.complaint() == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (psycopg.OperationalError("connection refused"), "the database does not answer"),
        (psycopg.OperationalError("password authentication failed"), "the database does not let the relay in"),
        (errors.InsufficientPrivilege("permission denied"), "the database does not permit what the relay must do"),
        (errors.ReadOnlySqlTransaction("read-only transaction"), "the database takes no writes"),
        (errors.LockNotAvailable("lock timeout"), "the database is busy with others for too long"),
        (errors.UndefinedTable("no table"), "the database lacks a table or column"),
    ],
)
def test_a_database_that_is_there_and_refuses_is_not_said_to_be_silent(
    error: Exception, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    availability = Availability(lambda: 0.0)
    with availability.attempt():
        raise OperationalError("SELECT 1", {}, error)
    assert words in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING
