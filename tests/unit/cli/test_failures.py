"""What went wrong, for the person at the keyboard."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner, Result
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError, ProgrammingError

from outbox.cli.failures import Group, database_failure
from outbox.errors import BrokerError, ConfigurationError, OutboxError, Unavailable
from tests.kit.processes import run

if TYPE_CHECKING:
    from pathlib import Path


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


def test_a_mistake_of_the_program_is_one_line_without_what_it_may_quote() -> None:
    result = _run(ZeroDivisionError("a payload"))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ZeroDivisionError at test_failures.py, line ")
    assert "please report it; OUTBOX_DEBUG=1 shows the traceback" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "payload" not in result.stderr


def test_who_asks_for_it_gets_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_DEBUG", "1")
    assert isinstance(_run(ZeroDivisionError("a mistake")).exception, ZeroDivisionError)


def test_a_module_of_an_extra_that_is_missing_is_named_with_what_to_type() -> None:
    result = _run(ModuleNotFoundError("No module named 'kombu.pools'", name="kombu.pools"))
    assert (result.exit_code, result.stderr) == (1, "Error: kombu is not installed: pip install 'flask-outbox[rabbitmq]'\n")


@pytest.mark.parametrize("error", [click.UsageError("wrong"), click.exceptions.Exit(3), click.Abort()])
def test_what_click_raises_stays_clicks(error: Exception) -> None:
    assert _run(error).exit_code == {click.UsageError: 2, click.exceptions.Exit: 3, click.Abort: 1}[type(error)]


_COMMANDS = (["--help"], ["config"], ["config", "--json"], ["status"], ["doctor"], ["consumer", "--help"], ["list"])


@pytest.mark.parametrize("arguments", _COMMANDS, ids=" ".join)
def test_no_command_fails_on_a_terminal_that_lacks_letters(arguments: list[str], tmp_path: Path) -> None:
    environ = {"PYTHONIOENCODING": "latin-1", "LANG": "C", "DATABASE_URL": f"sqlite:///{tmp_path}/\u6f22.db"}
    done = run("outbox", *arguments, env=environ, cwd=tmp_path)
    assert "Traceback" not in done.stderr + done.stdout
    assert "UnicodeEncodeError" not in done.stderr + done.stdout
    if "--json" in arguments:
        assert "\u6f22.db" in {row["name"]: row["value"] for row in json.loads(done.stdout)}["DATABASE_URL"]


_WITHOUT = """
import sys
for name in {absent!r}:
    sys.modules[name] = None  # as if it were not installed
from outbox.cli import main
sys.argv = ["outbox", *{arguments!r}]
main()
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["relay", "--once"], "BROKER_URL names RabbitMQ, and pika is not installed: pip install 'flask-outbox[rabbitmq]'"),
        (["doctor"], "FAIL     broker                BROKER_URL names RabbitMQ, and pika is not installed"),
        (["topology", "apply"], "pip install 'flask-outbox[rabbitmq]'"),
    ],
)
def test_without_an_extra_commands_say_which_and_doctor_goes_on(arguments: list[str], said: str, tmp_path: Path) -> None:
    environ = {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db", "BROKER_URL": "amqp://guest:guest@127.0.0.1:1/"}
    assert run("outbox", "migrate", env=environ, cwd=tmp_path).returncode == 0
    program = _WITHOUT.format(absent=("pika", "kombu", "amqp"), arguments=arguments)
    done = run("python", "-c", program, env=environ, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if arguments == ["doctor"]:
        assert "FAIL     relay" in done.stdout
        assert done.stdout.splitlines()[-1].startswith("2 FAIL")


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
