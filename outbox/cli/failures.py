"""What went wrong, for the person at the keyboard: one clear text, an exit code, never a traceback."""

from __future__ import annotations

import io
import os
import sys
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from outbox.errors import ConfigurationError, OutboxError, Unavailable, missing

if TYPE_CHECKING:
    from sqlalchemy.exc import SQLAlchemyError

#: Exit codes; 0 is fine, 1 failed, and 2 (wrong usage) is click's own.
THRESHOLD = 3
TRY_LATER = 75
#: The environment variable that lets a mistake of the program end with its traceback.
DEBUG = "OUTBOX_DEBUG"

#: Who keeps others waiting in PostgreSQL.
_BLOCKERS = (
    "SELECT pid, state, query FROM pg_stat_activity WHERE pid IN (SELECT unnest(pg_blocking_pids(pid)) FROM pg_stat_activity)"
)


class Failure(click.ClickException):
    """Printed as `Error: …`, further lines below each other; the command ends with 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the text to standard error."""
        lead = click.style("Error:", fg="red", bold=True)
        click.echo(f"{lead} " + self.message.replace("\n", "\n       "), file=file or sys.stderr)


class TryLater(Failure):
    """As Failure, but the same command may succeed later: it ends with 75."""

    exit_code = TRY_LATER


class Group(click.Group):
    """A group whose commands end with a clear text instead of a traceback, also as `flask outbox`."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Begin; from here on a terminal that lacks a character shows another one instead."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="replace")
        return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; translate what it raised."""
        try:
            return super().invoke(ctx)
        except OutboxError as error:
            raise _failure(error) from error
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):  # click's own affairs
            raise
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            raise _failure(_meaning(error)) from error


def _meaning(error: Exception) -> OutboxError:
    """Return what an exception that nobody expected means to the person at the keyboard."""
    # Only where SQLAlchemy was loaded can its errors have been raised; `outbox --help` never loads it.
    database_error = getattr(sys.modules.get("sqlalchemy.exc"), "SQLAlchemyError", None)
    if database_error is not None and isinstance(error, database_error):
        return database_failure("the database", error)
    if isinstance(error, ImportError) and (fix := missing(error)):
        return ConfigurationError(fix)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    # Not its text: that may hold what a message says.
    return OutboxError(
        f"{type(error).__name__} at {place}: a mistake in this program, please report it; "
        f"{DEBUG}=1 shows the traceback, which may hold data"
    )


def _failure(error: OutboxError) -> Failure:
    return TryLater(str(error)) if isinstance(error, Unavailable) else Failure(str(error))


def database_failure(where: str, error: SQLAlchemyError, check: str = "outbox doctor") -> OutboxError:
    """Return what *error* means to an operator; *where* names the setting and its masked URL, *check* a command to look."""
    from outbox.database import Meaning, first_line, meaning

    text = " ".join(first_line(error).split())
    match meaning(error):
        case Meaning.REFUSED if "file is not a database" in text:
            return ConfigurationError(f"{where}: {text}; name another file, or move this one away and make the tables anew")
        case Meaning.REFUSED:
            return ConfigurationError(f"{where}: {text}; correct it, then: {check}")
        case Meaning.BUSY if "lock timeout" in text:
            return Unavailable(f"{where}: {text}; another session has locked the tables: {_BLOCKERS}")
        case Meaning.BUSY:
            return Unavailable(f"{where}: {text}; another process is writing for a long time, try again")
        case Meaning.CONFLICT:
            return Unavailable(f"{where}: {text}; another transaction came between, try again")
        case Meaning.READ_ONLY:
            return Unavailable(f"{where}: {text}; name the server that takes writes, or wait for this one, then: {check}")
        case Meaning.AWAY:
            return Unavailable(f"{where}: {text}; start the database or correct the URL, then: {check}")
        case Meaning.FORBIDDEN:
            return OutboxError(f"{where}: {text}; grant it to the user of the URL, then: {check}")
        case _:
            return OutboxError(f"{where}: {text}")
