from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from outbox import ConfigurationError, include_object
from publisher import CHECKOUT, create_app, database, migrations
from publisher.conference.models import Base
from tests.integration.publisher.conftest import EVENT, Api, application

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outbox import Message

BROKER = "amqp://nobody:secret@127.0.0.1:1/"


def flask(*arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `flask --app publisher …` as a person does."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    command = [sys.executable, "-m", "flask", "--app", "publisher", *arguments]
    return subprocess.run(command, env=kept | dict(env), cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)


def test_the_tables_that_migrate_makes_are_those_of_the_models(empty_url: str) -> None:
    engine = database.of(application(empty_url)).engine

    with engine.connect() as connection:
        options = {"compare_type": True, "include_object": include_object}
        differences = compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata)

    assert differences == []
    engine.dispose()


def test_migrate_makes_the_tables_of_both_once(empty_url: str) -> None:
    env = {"DATABASE_URL": empty_url, "BROKER_URL": BROKER}

    first, second = flask("migrate", env=env), flask("migrate", env=env)

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.endswith("step(s) done\n")
    assert second.stdout.endswith("up to date\n")
    engine = sa.create_engine(empty_url)
    assert {"events", "session_speakers", "outbox_message", "outbox_pending"} <= set(sa.inspect(engine).get_table_names())
    engine.dispose()


def test_the_conference_of_the_demo_is_imported_without_a_remark(api: Api, sent: list[Message]) -> None:
    result = api.app.test_cli_runner().invoke(args=["import", str(CHECKOUT / "publisher" / "demo_conference"), "--json"])

    summary = json.loads(result.stdout)
    assert summary["notes"] == []
    assert summary["counts"]["sessions"] == {"created": 9, "updated": 0, "unchanged": 0, "skipped": 0}
    assert len(sent) == 1 + 3 + 6 + 9


def test_in_embedded_mode_a_new_application_makes_its_folders_and_tables(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "instance"
    config = {"DATABASE_URL": f"sqlite:///{folder / 'o.db'}", "BROKER_URL": f"embedded:///{folder / 'b.db'}"}

    for _ in range(2):
        app = create_app(config)
        assert app.test_client().post("/v1/events", json=EVENT).status_code == 201
        assert app.test_client().get("/readyz").status_code == 200
        database.of(app).engine.dispose()


def test_elsewhere_tables_are_made_by_the_command_only(sqlite_url: str) -> None:
    app = create_app({"DATABASE_URL": sqlite_url, "BROKER_URL": BROKER})

    assert sa.inspect(database.of(app).engine).get_table_names() == []


def test_an_import_before_migrate_says_what_to_type(sqlite_url: str) -> None:
    result = flask(
        "import", str(CHECKOUT / "tests" / "data" / "open_event_2018"), env={"DATABASE_URL": sqlite_url, "BROKER_URL": BROKER}
    )

    assert result.returncode == 1
    assert result.stderr == "Error: the publisher tables do not exist; run: flask --app publisher migrate\n"


def test_a_wrong_setting_ends_the_command_with_its_text_alone(tmp_path: Path) -> None:
    result = flask("migrate", env={"DATABASE_URL": "postgres://localhost/x", "OUTBOX_WINDOW": "many"})

    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "DATABASE_URL=postgres://localhost/x (environment): the scheme is postgresql+psycopg://" in result.stderr
    assert "OUTBOX_WINDOW=many (environment): it must be a whole number" in result.stderr


def test_a_wrong_setting_of_the_factory_is_an_exception_of_its_kind(sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"OUTBOX_WINDO .* did you mean OUTBOX_WINDOW\?"):
        create_app({"DATABASE_URL": sqlite_url, "OUTBOX_WINDO": 1})


def test_a_database_that_is_away_ends_the_command_with_its_text_alone(tmp_path: Path) -> None:
    env = {"DATABASE_URL": "postgresql+psycopg://ada:geheim@127.0.0.1:1/x", "BROKER_URL": BROKER}

    result = flask("import", str(CHECKOUT / "tests" / "data" / "open_event_2018"), env=env)

    assert result.returncode == 1
    assert result.stderr.startswith("Error: the database can't be used: connection failed")
    assert "Traceback" not in result.stderr
    assert "geheim" not in result.stderr


def test_a_folder_that_can_not_be_made_ends_the_command_with_its_text_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    env = {"DATABASE_URL": f"sqlite:///{tmp_path / 'file' / 'o.db'}", "BROKER_URL": f"embedded:///{tmp_path / 'b.db'}"}

    result = flask("migrate", env=env)

    assert result.returncode == 1
    assert result.stderr.startswith(
        f"Error: the folder {tmp_path / 'file'} of the SQLite file can't be made: File exists; correct"
    )
    assert result.stderr.count("\n") == 1


def test_two_applications_in_one_process_do_not_mix(tmp_path: Path) -> None:
    one, two = (application(f"sqlite:///{tmp_path / name}.db") for name in ("one", "two"))

    Api(one).event(name="Only here")

    with one.app_context(), two.app_context():  # the inner one is current; the sender decides
        assert Api(two).get("/v1/events") == {"items": [], "next": None}
    for app, expected in ((one, 1), (two, 0)):
        with database.of(app).engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM outbox_message")) == expected


def test_the_outbox_commands_work_on_the_application(sqlite_url: str) -> None:
    app = application(sqlite_url)
    Api(app).event()

    result = flask("outbox", "status", "--json", env={"DATABASE_URL": sqlite_url, "BROKER_URL": BROKER})

    assert json.loads(result.stdout)["pending"] == 1


def test_migrations_know_their_tables_only_in_order(sqlite_url: str) -> None:
    engine = database.of(application(sqlite_url)).engine

    assert migrations.upgrade(engine) == 0
    migrations.check(engine)
