"""The versions of the tables. `outbox migrate` runs `upgrade`; so may a revision of your own Alembic history:

    def upgrade():
        outbox.migrations.upgrade(op.get_bind())

A history is a list of steps; each step gets Alembic's operations as an argument, so that running inside another Alembic
run disturbs nothing. What was done is kept in `outbox_version`, a row a history.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox.errors import SchemaError
from outbox.migrations import m0001_initial, m0002_trouble, m0003_reads, shards
from outbox.tables import SHARDS, VERSION_TABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from alembic.operations import Operations
    from sqlalchemy.engine import Connection, Engine

Step = Callable[["Operations"], None]


@dataclass(frozen=True, slots=True)
class History:
    """A set of tables that is versioned by itself; version *n* is the state after the first *n* steps."""

    name: str
    steps: tuple[Step, ...]
    #: What to type when the tables are behind.
    command: str


OUTBOX = History(
    name="outbox", steps=(m0001_initial.upgrade, m0002_trouble.upgrade, m0003_reads.upgrade), command="outbox migrate"
)


def _version_columns() -> tuple[sa.Column[str], sa.Column[int]]:
    return sa.Column("history", sa.String(100), primary_key=True), sa.Column("version", sa.Integer, nullable=False)


_versions = sa.Table(VERSION_TABLE, sa.MetaData(), *_version_columns())
#: Any number, the same in all our processes: two migrations at once wait for each other.
_LOCK = 7_225_514_401


def upgrade(bind: Engine | Connection, history: History = OUTBOX) -> int:
    """Bring the tables of *history* to this code's version and return how many steps were needed.

    Puts back what rows the outbox can't do without.
    On a Connection it runs in the transaction that is open there and commits nothing. Raises SchemaError for tables newer
    than this code.
    """
    with _connection(bind) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        _versions.create(connection, checkfirst=True)
        version = _version(connection, history)
        _refuse_newer(version, history)
        operations = _operations(connection=connection)
        for step in history.steps[version:]:
            step(operations)
        _write_version(connection, history, version)
        if history.name == OUTBOX.name:
            shards.restore(connection)
        return len(history.steps) - version


def check(bind: Engine | Connection, history: History = OUTBOX) -> None:
    """Raise SchemaError, saying what to do, unless the tables are of exactly this code's version, and whole."""
    with _connection(bind) as connection:
        found = _version(connection, history) if sa.inspect(connection).has_table(VERSION_TABLE) else 0
        lost = shards.missing(connection) if found == len(history.steps) and history.name == OUTBOX.name else []
    _refuse_newer(found, history)
    if lost:
        raise SchemaError(f"outbox_shard lacks {len(lost)} of its {SHARDS} rows, so no relay works; run: {history.command}")
    if found < len(history.steps):
        state = "do not exist" if found == 0 else f"are of version {found}, this code needs {len(history.steps)}"
        raise SchemaError(f"the {history.name} tables {state}; run: {history.command}")


def sql(dialect: str, history: History = OUTBOX) -> str:
    """Return the statements that `upgrade` would run on an empty database of *dialect*."""
    buffer = io.StringIO()
    operations = _operations(dialect_name=dialect, opts={"as_sql": True, "output_buffer": buffer, "literal_binds": True})
    operations.create_table(VERSION_TABLE, *_version_columns())
    for step in history.steps:
        step(operations)
    operations.execute(_versions.insert().values(history=history.name, version=len(history.steps)))
    return buffer.getvalue()


def _operations(**context: Any) -> Operations:
    # Imported here: every command and process checks the version, and only this needs Alembic, which takes its time to load.
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    return Operations(MigrationContext.configure(**context))


@contextmanager
def _connection(bind: Engine | Connection) -> Iterator[Connection]:
    if isinstance(bind, sa.Connection):
        yield bind
        return
    with bind.begin() as connection:
        yield connection


def _version(connection: Connection, history: History) -> int:
    query = sa.select(_versions.c.version).where(_versions.c.history == history.name)
    return connection.scalar(query) or 0


def _refuse_newer(version: int, history: History) -> None:
    known = len(history.steps)
    if version > known:
        raise SchemaError(
            f"the {history.name} tables are of version {version}, newer than this code ({known}); upgrade the package"
        )


def _write_version(connection: Connection, history: History, before: int) -> None:
    after = len(history.steps)
    if before == 0:
        connection.execute(_versions.insert().values(history=history.name, version=after))
    elif before != after:
        connection.execute(_versions.update().where(_versions.c.history == history.name).values(version=after))
