"""The versions of the tables: made once, alone or inside a user's own history, and never taken for the user's."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

import outbox
from outbox import database, migrations, tables
from outbox.errors import SchemaError
from outbox.migrations import OUTBOX, History
from outbox.store import relaying
from outbox.store.relaying import Exclusions
from tests.kit.builders import message, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from alembic.operations import Operations
    from sqlalchemy.engine import Connection, Engine

_ENV = """
from alembic import context
import outbox
import sqlalchemy as sa

metadata = sa.MetaData()
sa.Table("talk", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("title", sa.Text))

with sa.create_engine(context.config.get_main_option("sqlalchemy.url")).connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, include_object=outbox.include_object)
    with context.begin_transaction():
        context.run_migrations()
"""
_REVISION = """
revision, down_revision = "1", None

from alembic import op
import outbox
import sqlalchemy as sa

def upgrade():
    op.create_table("talk", sa.Column("id", sa.Integer, primary_key=True), sa.Column("title", sa.Text))
    outbox.migrations.upgrade(op.get_bind())
    op.execute("INSERT INTO talk VALUES (1, 'still the same operations')")
"""


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = database.create_engine(database_url)
    yield made
    made.dispose()


def _names(engine: Engine) -> set[str]:
    return set(sa.inspect(engine).get_table_names())


def _differences(connection: Connection) -> list[Any]:
    """What Alembic would change in the database to get to `outbox.tables`; it knows neither versions nor partitions."""

    def ours(_object: object, name: str | None, kind: str, _reflected: bool, _compared: object) -> bool:
        return kind != "table" or name not in (tables.VERSION_TABLE, "outbox_message_default")

    options = {"compare_type": True, "compare_server_default": True, "include_object": ours}
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata))


# --- making the tables --------------------------------------------------------------------------------------------------


def test_an_empty_database_gets_all_tables_and_the_second_time_nothing(engine: Engine) -> None:
    assert migrations.upgrade(engine) == len(OUTBOX.steps)
    assert _names(engine) >= tables.TABLE_NAMES
    assert migrations.upgrade(engine) == 0
    migrations.check(engine)
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.shard)) == tables.SHARDS


def test_the_tables_are_what_the_statements_are_built_from(engine: Engine) -> None:
    migrations.upgrade(engine)
    with engine.connect() as connection:
        assert _differences(connection) == []


def test_on_a_connection_nothing_is_committed(engine: Engine) -> None:
    with engine.connect() as connection:
        transaction = connection.begin()
        assert migrations.upgrade(connection) == len(OUTBOX.steps)
        transaction.rollback()
    assert _names(engine) == set()


def test_the_printed_statements_make_the_same_tables(engine: Engine) -> None:
    printed = migrations.sql(engine.dialect.name)
    with engine.begin() as connection:
        for statement in printed.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement.strip())
    migrations.check(engine)
    assert migrations.upgrade(engine) == 0
    with engine.connect() as connection:
        assert _differences(connection) == []


def test_two_that_migrate_at_once_do_it_once(database_url: str) -> None:
    engines = [database.create_engine(database_url) for _ in range(2)]
    together = threading.Barrier(2)
    steps: list[int] = []

    def migrate(engine: Engine) -> None:
        together.wait(10)
        steps.append(migrations.upgrade(engine))

    threads = [threading.Thread(target=migrate, args=[each]) for each in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(steps) == [0, len(OUTBOX.steps)]
    for each in engines:
        each.dispose()


def test_a_message_finds_a_place_whatever_its_row_number(postgres_url: str) -> None:
    engine = database.create_engine(postgres_url)
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT setval('outbox_message_id_seq', 9000000000000000000)")
        partition = connection.exec_driver_sql(
            "INSERT INTO outbox_message (message_id, source, topic, content_type, body, created_at) "
            "VALUES (gen_random_uuid(), '/s', 't', 'application/json', '1', now()) RETURNING tableoid::regclass::text"
        ).scalar()
    engine.dispose()
    assert partition == "outbox_message_default"


def test_topics_and_keys_compare_byte_by_byte_whatever_the_locale(postgres_url: str) -> None:
    """An index in a locale's order is broken by an upgrade of the operating system."""
    engine = database.create_engine(postgres_url)
    migrations.upgrade(engine)
    query = (
        "SELECT table_name || '.' || column_name, collation_name FROM information_schema.columns "
        "WHERE table_name IN ('outbox_message', 'outbox_pending', 'outbox_key') AND column_name IN ('topic', 'key')"
    )
    with engine.connect() as connection:
        found = {row[0]: row[1] for row in connection.exec_driver_sql(query)}
    engine.dispose()
    names = ("outbox_message.topic", "outbox_message.key", "outbox_pending.topic", "outbox_pending.key", "outbox_key.key")
    assert found == dict.fromkeys(names, "C")


# --- versions that do not fit -------------------------------------------------------------------------------------------


def test_tables_that_do_not_exist_are_said_with_the_command(engine: Engine) -> None:
    with pytest.raises(SchemaError, match="the outbox tables do not exist; run: outbox migrate"):
        migrations.check(engine)


def test_older_tables_are_said_with_both_versions_and_upgraded_by_the_steps_that_miss(engine: Engine) -> None:
    migrations.upgrade(engine)
    done: list[str] = []

    def second(op: Operations) -> None:
        op.add_column("outbox_action", sa.Column("note", sa.Text))
        done.append("second")

    newer = History(name="outbox", steps=(*OUTBOX.steps, second), command="outbox migrate")
    now = len(OUTBOX.steps)
    with pytest.raises(
        SchemaError, match=f"the outbox tables are of version {now}, this code needs {now + 1}; run: outbox migrate"
    ):
        migrations.check(engine, newer)
    assert migrations.upgrade(engine, newer) == 1
    assert done == ["second"]
    migrations.check(engine, newer)
    for call in (migrations.check, migrations.upgrade):
        with pytest.raises(SchemaError, match=f"version {now + 1}, newer than this code \\({now}\\); upgrade the package"):
            call(engine)


def test_rows_that_the_first_version_wrote_are_there_after_an_upgrade(engine: Engine) -> None:
    first = History(name="outbox", steps=OUTBOX.steps[:1], command="outbox migrate")
    migrations.upgrade(engine, first)
    with engine.begin() as connection:
        ids = write(connection, message("t", "k"), message("t", "k"), message("t"))
    migrations.upgrade(engine)
    with engine.connect() as connection:
        assert [row.id for row in relaying.read(connection, after=0, limit=10, exclude=Exclusions()).rows] == ids


def test_histories_do_not_mix(engine: Engine) -> None:
    def first(op: Operations) -> None:
        op.create_table("other", sa.Column("id", sa.Integer))

    other = History(name="other", steps=(first,), command="x")
    migrations.upgrade(engine)
    with pytest.raises(SchemaError, match="the other tables do not exist; run: x"):
        migrations.check(engine, other)
    assert migrations.upgrade(engine, other) == 1
    migrations.check(engine)
    migrations.check(engine, other)


def test_a_step_that_fails_leaves_nothing_behind(engine: Engine) -> None:
    def broken(op: Operations) -> None:
        op.create_table("half", sa.Column("id", sa.Integer))
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        migrations.upgrade(engine, History(name="broken", steps=(broken,), command="x"))
    assert _names(engine) == set()


# --- in a user's own history --------------------------------------------------------------------------------------------


@pytest.fixture
def history(tmp_path: Path, database_url: str) -> Config:
    """A user's Alembic history whose first revision calls ours."""
    (tmp_path / "history" / "versions").mkdir(parents=True)
    (tmp_path / "history" / "env.py").write_text(_ENV)
    (tmp_path / "history" / "versions" / "1_first.py").write_text(_REVISION)
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(tmp_path / "history"))
    config.set_main_option("sqlalchemy.url", database_url)
    return config


def test_a_users_revision_makes_our_tables_in_its_own_transaction(history: Config, engine: Engine) -> None:
    command.upgrade(history, "head")
    migrations.check(engine)
    assert {"talk", "alembic_version"} | tables.TABLE_NAMES <= _names(engine)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT title FROM talk").scalar() == "still the same operations"


def test_a_users_autogenerate_sees_nothing_to_change(history: Config) -> None:
    command.upgrade(history, "head")
    command.check(history)  # raises when autogenerate would write something


def test_without_include_object_autogenerate_would_drop_our_tables(history: Config, tmp_path: Path) -> None:
    command.upgrade(history, "head")
    (tmp_path / "history" / "env.py").write_text(_ENV.replace(", include_object=outbox.include_object", ""))
    with pytest.raises(Exception, match=r"New upgrade operations detected.*outbox_message"):
        command.check(history)


@pytest.mark.parametrize(
    ("name", "kind", "reflected", "kept"),
    [
        ("outbox_message", "table", True, False),
        ("outbox_message_p3", "table", True, False),
        ("outbox_version", "table", True, False),
        ("outbox_of_mine", "table", True, True),
        ("outbox_message", "table", False, True),
        ("outbox_message", "column", True, True),
        (None, "table", True, True),
    ],
)
def test_only_our_own_reflected_tables_are_hidden_from_autogenerate(
    name: str | None, kind: str, reflected: bool, kept: bool
) -> None:
    assert outbox.include_object(None, name, kind, reflected, None) is kept
