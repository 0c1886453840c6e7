"""What a command works on: the app's engine and topics under `flask outbox`, settings of the environment otherwise."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from outbox.cli.failures import database_failure
from outbox.errors import ConfigurationError, SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from blinker import Signal
    from sqlalchemy.engine import URL, Connection, Engine

    from outbox.capture.signals import Capture
    from outbox.settings import Settings

#: No statement of the relay or of a commit holds a lock for so long.
_LOCK_SECONDS = 10


@dataclass(frozen=True)
class Place:
    """A database, as its setting names it."""

    #: `DATABASE_URL` or `CONSUMER_DATABASE_URL`.
    setting: str
    url: URL
    #: The command that makes it.
    maker: str
    #: The command that says whether it can be used.
    check: str = "outbox doctor"

    @property
    def path(self) -> Path | None:
        """The absolute path of a SQLite file; None for servers and `file:` URIs."""
        if self.url.get_backend_name() != "sqlite" or not self.url.database or self.url.database.startswith("file:"):
            return None
        return Path(self.url.database).absolute()

    def __str__(self) -> str:
        return str(self.path) if self.path else self.shown

    @property
    def shown(self) -> str:
        """The URL without its passwords: also drivers' parameters (`?password=…`) hold them."""
        from outbox.process.masking import shown

        return shown(self.url.render_as_string(hide_password=True))

    def require_file(self) -> None:
        """Raise ConfigurationError for a SQLite file that is not there: opening it would make an empty one."""
        if self.path is not None and not self.path.exists():
            raise ConfigurationError(f"{self.setting}={self.url}: there is no file {self.path}; run: {self.maker}")

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Turn database errors inside into texts that name the database and what to do."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except SchemaError as error:
            raise SchemaError(f"{self}: {error}") from error
        except SQLAlchemyError as error:
            raise database_failure(f"{self.setting}={self.shown}", error, self.check) from error


@dataclass(frozen=True)
class Context:
    """Settings, topics and the database of one command."""

    settings: Settings
    #: What the app captures; None where no app was loaded, hence nobody knows.
    topics: tuple[str, ...] | None
    #: The app's own engine, under flask.
    app_engine: Engine | None = None
    #: The signals that the app captures.
    captures: tuple[tuple[Signal, Capture], ...] = ()

    @cached_property
    def place(self) -> Place:
        """The database of the outbox. Raises ConfigurationError when none is set."""
        from sqlalchemy import make_url

        if self.app_engine is not None:
            return Place("DATABASE_URL", self.app_engine.url, "flask outbox migrate")
        self.settings.require("DATABASE_URL")
        return Place("DATABASE_URL", make_url(str(self.settings.database_url)), "outbox migrate")

    @cached_property
    def engine(self) -> Engine:
        """The engine; connects to nothing yet. Raises ConfigurationError when its driver is missing."""
        from outbox import database

        if self.app_engine is not None:
            return self.app_engine
        return database.create_engine(str(self.settings.database_url), role=database.Role.COMMAND)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for reading, with tables of the right version; writes inside are rolled back."""
        from outbox import migrations

        self.place.require_file()
        with self.place.naming(), self.engine.connect() as plain:
            connection = plain.execution_options(outbox_read_only=True)
            prepare_transaction(connection)
            migrations.check(connection)
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, committed at the end, on tables of the right version."""
        from outbox import migrations

        self.place.require_file()
        with self.place.naming(), self.engine.begin() as connection:
            prepare_transaction(connection)
            migrations.check(connection)
            yield connection


def prepare_transaction(connection: Connection) -> None:
    """Let the transaction that begins here fail where a VACUUM FULL or a migration has locked the tables, instead of hang.

    On an engine of the app it also sees to it that psycopg can read the dates, whatever the app's sessions are set to.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
        connection.exec_driver_sql("SET LOCAL DateStyle = ISO")


def current(arguments: Mapping[str, object] = MappingProxyType({})) -> Context:
    """Return what this command works on; *arguments* are settings given on the command line."""
    from outbox import settings

    given = {name: value for name, value in arguments.items() if value is not None}
    app = _app()
    if app is None:
        return Context(settings.load(given, environ=os.environ, folder=Path.cwd()), topics=None)
    state = app.extensions["outbox"]
    return Context(
        settings.override(state.settings, given),
        topics=state.topics,
        app_engine=state.engine(),
        captures=state.outbox.captures,
    )


def announce(context: Context, *, as_json: bool = False) -> None:
    """Say which SQLite file a command works on: a relative path is another file in another folder, or in Flask's instance."""
    if context.place.path is not None and not as_json:
        click.secho(f"SQLite file {context.place.path}", err=True, dim=True)


def _app() -> Any:
    """Return the Flask app this command runs in, if it has an outbox; never loads flask."""
    flask, flask_cli = sys.modules.get("flask"), sys.modules.get("flask.cli")
    if flask is None:
        return None
    app = flask.current_app._get_current_object() if flask.has_app_context() else None
    if app is None and flask_cli is not None:  # as an app's test runner calls commands
        info = click.get_current_context().find_object(flask_cli.ScriptInfo)
        app = info.load_app() if info is not None else None
    return app if app is not None and "outbox" in app.extensions else None
