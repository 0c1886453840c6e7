"""What went wrong, for the person at the keyboard."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner, Result
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError, ProgrammingError

from outbox.cli.failures import Group, database_failure
from outbox.errors import BrokerError, ConfigurationError, OutboxError, Unavailable


def _run(error: Exception) -> Result:
    @click.group(cls=Group)
    def group() -> None:
        """Commands."""

    @group.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(group, ["fail"])


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigurationError("wrong"), 1), (BrokerError("wrong"), 1), (OutboxError("wrong"), 1), (Unavailable("wrong"), 75)],
)
def test_our_errors_are_one_text_and_an_exit_code(error: OutboxError, code: int) -> None:
    result = _run(error)
    assert (result.exit_code, result.stderr, result.stdout) == (code, "Error: wrong\n", "")


def test_several_problems_are_lines_below_each_other() -> None:
    assert _run(ConfigurationError("first\nsecond")).stderr == "Error: first\n       second\n"


def test_a_database_error_that_nobody_named_is_still_no_traceback() -> None:
    result = _run(OperationalError("SELECT secret", {"payload": 1}, Exception("connection refused")))
    assert result.exit_code == 75
    assert result.stderr == (
        "Error: the database: connection refused; start the database or correct the URL, then: outbox doctor\n"
    )


def test_a_mistake_of_the_program_keeps_its_traceback() -> None:
    assert isinstance(_run(ZeroDivisionError("a mistake")).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("kind", "said", "means", "text"),
    [
        (OperationalError, "connection refused\nIs the server running?", Unavailable, "connection refused; start the database"),
        (InterfaceError, "the connection is closed", Unavailable, "start the database"),
        (
            OperationalError,
            'FATAL:  password authentication failed for user "u"',
            ConfigurationError,
            "correct it, then: outbox doctor",
        ),
        (OperationalError, 'database "x" does not exist', ConfigurationError, "correct it"),
        (OperationalError, "unable to open database file", ConfigurationError, "correct it"),
        (OperationalError, "database is locked", Unavailable, "another process is writing for a long time, try again"),
        (DatabaseError, "file is not a database", ConfigurationError, "X=y: file is not a database; name another file"),
        (ProgrammingError, "permission denied for table outbox_message", OutboxError, "permission denied"),
    ],
)
def test_what_a_database_says_is_sorted_by_whether_waiting_helps(
    kind: type[DatabaseError], said: str, means: type[OutboxError], text: str
) -> None:
    found = database_failure("X=y", kind("SELECT 1", {"payload": "secret"}, Exception(said)))
    assert type(found) is means
    assert text in str(found)
    assert "secret" not in str(found)
    assert len(str(found).splitlines()) == 1


def test_an_error_without_words_is_named_by_its_kind() -> None:
    assert str(database_failure("X=y", ProgrammingError("SELECT 1", {}, Exception("")))) == "X=y: ProgrammingError"
