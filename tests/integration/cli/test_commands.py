"""The operator's commands on a database, as they are typed."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox import database, migrations, tables
from outbox.cli import context
from outbox.message import new_id
from outbox.store import operating
from outbox.tables import State
from tests.kit import builders
from tests.kit.commands import Commands
from tests.kit.ports import free_port
from tests.kit.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from uuid import UUID

    from sqlalchemy.engine import Connection, Engine

    from outbox.message import Message


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the checkout, whose pyproject.toml has settings."""
    monkeypatch.chdir(tmp_path)


#: For commands whose statements differ between databases; the others are about words.
both = pytest.mark.parametrize("database_url", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str:
    """A new, empty SQLite file, or what `both` asks for."""
    url: str = request.getfixturevalue(f"{getattr(request, 'param', 'sqlite')}_url")
    return url


@pytest.fixture
def outbox(database_url: str, tmp_path: Path) -> Commands:
    commands = Commands({"DATABASE_URL": database_url, "BROKER_URL": f"embedded:///{tmp_path}/broker.db"})
    commands.fine("migrate")
    return commands


@pytest.fixture
def engine(database_url: str, outbox: Commands) -> Iterator[Engine]:
    made = database.create_engine(database_url)
    yield made
    made.dispose()


def _put(engine: Engine, *messages: Message, state: State = State.PENDING, error: str | None = None) -> list[str]:
    with engine.begin() as connection:
        ids = builders.write(connection, *messages, state=state)
        connection.execute(sa.update(tables.pending).where(tables.pending.c.id.in_(ids)).values(error=error))
    return [str(message.id) for message in messages]


def _states(outbox: Commands) -> dict[str, str]:
    return {row["id"]: row["state"] for row in outbox.json("list")}


# --- migrate, and tables that do not fit --------------------------------------------------------------------------------


@both
def test_migrate_makes_the_tables_once(database_url: str) -> None:
    outbox = Commands({"DATABASE_URL": database_url})
    version = len(migrations.OUTBOX.steps)
    assert outbox.fine("migrate").startswith(f"The outbox tables upgraded by {version} steps to version {version}: ")
    assert outbox.fine("migrate").startswith(f"The outbox tables are of version {version} already: ")


@pytest.mark.parametrize("command", [["status"], ["list"], ["show", str(new_id())], ["tail"], ["requeue", str(new_id())]])
def test_tables_that_are_not_there_are_said_with_the_command_that_makes_them(
    database_url: str, tmp_path: Path, command: list[str]
) -> None:
    database.create_engine(database_url).connect().close()
    said = Commands({"DATABASE_URL": database_url}).refused(*command)
    assert f"Error: {tmp_path}/outbox.db: the outbox tables do not exist; run: outbox migrate\n" in said


@both
def test_tables_that_are_newer_ask_for_a_newer_package(outbox: Commands, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE outbox_version SET version = 99")
    for command in ("migrate", "status"):
        newer = (
            f"the outbox tables are of version 99, newer than this code ({len(migrations.OUTBOX.steps)}); upgrade the package"
        )
        assert newer in outbox.refused(command)


# --- status -------------------------------------------------------------------------------------------------------------


@both
def test_status_has_the_promised_names_and_numbers(outbox: Commands, engine: Engine) -> None:
    now = datetime.now(UTC)
    _put(engine, builders.message(key="k", created_at=now - timedelta(seconds=90)), state=State.DEAD, error="406")
    _put(engine, builders.message(key="k", created_at=now - timedelta(seconds=30)), builders.message())
    _put(engine, builders.message(), state=State.UNROUTABLE)
    with engine.begin() as connection:
        values = {"host": "h", "pid": 1, "version": "1", "started_at": now, "seen_at": now, "state": "running"}
        connection.execute(sa.insert(tables.relay).values(id="relay-1", broker_connected=True, broker_blocked=False, **values))
    found = outbox.json("status")
    assert (found["pending"], found["scheduled"], found["unroutable"], found["dead"]) == (2, 0, 1, 1)
    assert (found["held_keys"], found["published_total"]) == (1, 0)
    assert 25 < found["lag_seconds"] < 300
    assert [(item["key"], item["state"], item["behind"], item["last_error"]) for item in found["held_by"]] == [
        ("k", "dead", 1, "406")
    ]
    (relay,) = found["relays"]
    assert (relay["id"], relay["shards"], relay["state"]) == ("relay-1", 0, "running")
    assert relay["seen_age_seconds"] < 60
    assert found["broker"] == {"connected": True, "blocked": False, "detail": ""}
    assert found["stuck"].startswith(f"message {found['held_by'][0]['id']}: given up")
    documented = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in (*found, *relay, *found["held_by"][0]) if f"`{name}`" not in documented] == []
    page = outbox.fine("status")
    assert found["stuck"] in page
    assert "pending               2" in page


def test_without_a_relay_the_broker_is_unknown(outbox: Commands, engine: Engine) -> None:
    _put(engine, builders.message())
    found = outbox.json("status")
    assert (found["relays"], found["broker"]) == ([], None)
    assert found["stuck"].endswith("start one: outbox relay")
    assert "broker     unknown: only a running relay can tell" in outbox.fine("status")


def test_fail_lag_ends_with_3_when_the_oldest_message_is_older(outbox: Commands, engine: Engine) -> None:
    outbox.fine("status", "--fail-lag", "1s")
    _put(engine, builders.message(created_at=datetime.now(UTC) - timedelta(minutes=5)))
    outbox.fine("status", "--fail-lag", "10m")
    result = outbox("status", "--json", "--fail-lag", "60s")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["pending"] == 1
    assert "a duration is a number and a unit" in outbox.refused("status", "--fail-lag", "60", code=2)
    assert "it goes without --watch" in outbox.refused("status", "--watch", "--fail-lag", "60s", code=2)


# --- list and show ------------------------------------------------------------------------------------------------------


@both
def test_list_has_the_promised_names(outbox: Commands, engine: Engine) -> None:
    (id_,) = _put(engine, builders.message("a.b", key="k"), state=State.DEAD, error="406 too large")
    (row,) = outbox.json("list", "--state", "dead", "--topic", "a.b", "--key", "k")
    assert datetime.fromisoformat(row.pop("created_at")).tzinfo is not None
    del row["available_at"]
    assert row == {
        "id": id_,
        "topic": "a.b",
        "key": "k",
        "sequence": 1,
        "state": "dead",
        "attempts": 0,
        "last_error": "406 too large",
    }


def test_list_is_newest_first_and_says_how_to_go_on(outbox: Commands, engine: Engine) -> None:
    ids = _put(engine, *(builders.message() for _ in range(5)))
    result = outbox("list", "--limit", "2")
    head, first, second = result.stdout.splitlines()
    assert head.split() == ["ID", "STATE", "TOPIC", "KEY", "SEQUENCE", "ATTEMPTS", "CREATED", "LAST", "ERROR"]
    assert [first.split()[0], second.split()[0]] == ids[:2:-1]
    assert f"There are more: add --before {ids[3]}" in result.stderr
    assert [row["id"] for row in outbox.json("list", "--before", ids[3])] == ids[2::-1]


def test_an_empty_list_is_said_in_words(outbox: Commands) -> None:
    assert outbox.fine("list") == "No message.\n"
    assert outbox.json("list") == []


@both
def test_show_prints_body_headers_errors_and_what_it_waits_for(outbox: Commands, engine: Engine) -> None:
    (dead,) = _put(engine, builders.message(key="k", body='{"title":"Grüße","n":[1]}'.encode()), state=State.DEAD, error="406")
    (waiting,) = _put(engine, builders.message(key="k"))
    with engine.begin() as connection:
        connection.execute(sa.update(tables.message).values(headers='{"traceparent":"00-ab"}'))
    page = outbox.fine("show", dead)
    for line in ("topic      session.modified", "key        k, sequence 1", "last error 406", "header     traceparent=00-ab"):
        assert f"  {line}" in page.splitlines()
    assert page.endswith('{\n  "title": "Grüße",\n  "n": [\n    1\n  ]\n}\n')
    assert f"waits for  {dead} (dead), an earlier message of its key" in outbox.fine("show", waiting)
    found = outbox.json("show", waiting)
    assert (found["held_by"]["id"], found["data"], found["published"]) == (dead, {"id": 1}, [])


@pytest.mark.parametrize(
    ("body", "shown", "field"),
    [
        (b"", "(no data)", {"data": None}),
        (b"null", "null", {"data": None}),
        (b"\x00\xff", "(2 bytes of application/json; --json shows them in base64)", {"data_base64": "AP8="}),
        (b'"\\u001b[31m\x7f"', '"\\u001b[31m "', {"data": "\x1b[31m\x7f"}),
    ],
)
def test_any_body_can_be_shown(outbox: Commands, engine: Engine, body: bytes, shown: str, field: dict[str, object]) -> None:
    (id_,) = _put(engine, builders.message(body=body))
    assert outbox.fine("show", id_).splitlines()[-1].strip() == shown
    assert field.items() <= outbox.json("show", id_).items()


def test_an_unknown_id_is_named_and_a_part_of_one_is_no_id(outbox: Commands, engine: Engine) -> None:
    (id_,) = _put(engine, builders.message(), state=State.DEAD)
    stranger = str(new_id())
    assert f"message {stranger} is not in this outbox" in outbox.refused("show", stranger)
    for part in (id_[:8], id_.replace("-", ""), id_ + "0", "1"):
        assert "is no message id; ids are whole" in outbox.refused("show", part, code=2)
        assert "is no message id; ids are whole" in outbox.refused("requeue", part, "--yes", code=2)
    assert id_ in outbox.fine("show", id_.upper())


# --- requeue and discard ------------------------------------------------------------------------------------------------


@both
def test_requeue_says_what_it_would_do_and_asks(outbox: Commands, engine: Engine) -> None:
    (id_,) = _put(engine, builders.message(key="k"), state=State.DEAD, error="406 too large")
    for answer, ending in (("n\n", "Nothing was changed."), ("", "nobody confirmed and nothing was changed; say --yes")):
        said = outbox.refused("requeue", id_, input=answer)
        assert "This would requeue 1 message." in said
        assert "406 too large" in said
        assert ending in said
        assert _states(outbox) == {id_: "dead"}
    assert outbox.fine("requeue", id_, input="y\n") == "Requeued 1 message.\n"
    assert _states(outbox) == {id_: "pending"}
    (action,) = outbox.json("show", id_)["actions"]
    assert (action["action"], action["reason"]) == ("requeue", "was dead: 406 too large")
    assert "@" in action["actor"]


def test_discard_needs_a_reason_and_keeps_it(outbox: Commands, engine: Engine) -> None:
    first, second = _put(engine, builders.message(), builders.message(), state=State.UNROUTABLE)
    assert "Missing option '--reason'" in outbox.refused("discard", first, "--yes", code=2)
    assert "say why" in outbox.refused("discard", first, "--reason", " ", "--yes", code=2)
    assert outbox.fine("discard", first, second, "--reason", "sent by mistake", "--yes") == "Discarded 2 messages.\n"
    assert set(_states(outbox).values()) == {"discarded"}
    assert "sent by mistake" in outbox.fine("show", first)


def test_one_id_that_can_not_be_acted_on_leaves_all_as_they_are(outbox: Commands, engine: Engine) -> None:
    (dead,) = _put(engine, builders.message(), state=State.DEAD)
    (pending,) = _put(engine, builders.message())
    (discarded,) = _put(engine, builders.message(), state=State.DISCARDED)
    said = outbox.refused("requeue", dead, pending, discarded, "--yes")
    assert f"message {pending} is pending: the relay sends it by itself" in said
    assert f"message {discarded} was discarded: its key went on without it" in said
    assert "nothing was changed; requeue takes dead, unroutable, retrying messages" in said
    stranger = str(new_id())
    assert f"message {stranger} is not in this outbox" in outbox.refused("requeue", dead, stranger, "--yes")
    assert _states(outbox)[dead] == "dead"


@both
def test_a_state_and_a_topic_act_on_all_of_them(outbox: Commands, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.store.operating.CHUNK", 4)
    wanted = _put(engine, *(builders.message("a") for _ in range(11)), state=State.UNROUTABLE)
    others = _put(engine, builders.message("b"), state=State.UNROUTABLE) + _put(engine, builders.message("a"), state=State.DEAD)
    result = outbox("requeue", "--state", "unroutable", "--topic", "a", "--yes")
    assert result.stdout == "Requeued 11 messages.\n"
    assert "This would requeue 11 unroutable messages of topic 'a'." in result.stderr
    assert "and 1 more" in result.stderr
    states = _states(outbox)
    assert {states[id_] for id_ in wanted} == {"pending"}
    assert [states[id_] for id_ in others] == ["unroutable", "dead"]
    again = outbox.fine("requeue", "--state", "unroutable", "--topic", "a", "--yes")
    assert again == "No unroutable message of topic 'a': nothing to requeue.\n"


def test_a_relay_that_sets_messages_aside_again_does_not_make_a_requeue_endless(
    outbox: Commands, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = _put(engine, *(builders.message() for _ in range(5)), state=State.UNROUTABLE)

    def in_vain(connection: Connection, rows: list[int], *, actor: str) -> list[UUID]:
        return [entry.id for entry in operating.by_rows(connection, rows)]  # at once unroutable again

    monkeypatch.setattr(operating, "CHUNK", 2)
    monkeypatch.setattr(operating, "requeue", in_vain)
    assert outbox.fine("requeue", "--state", "unroutable", "--yes") == "Requeued 5 messages.\n"
    assert set(_states(outbox)) == set(ids)


@pytest.mark.parametrize(
    "arguments",
    [[], [str(new_id()), "--state", "dead"], [str(new_id()), "--topic", "a"], ["--topic", "a"], ["--state", "pending"]],
)
def test_what_is_meant_must_be_clear(outbox: Commands, arguments: list[str]) -> None:
    outbox.refused("requeue", *arguments, "--yes", code=2)


# --- servers that do not answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["migrate"], ["status"], ["list"], ["requeue", "--state", "dead", "--yes"]])
def test_a_database_that_is_down_is_one_sentence_without_its_password(command: list[str]) -> None:
    port = free_port()
    url = f"postgresql+psycopg://ada:hunter2@127.0.0.1:{port}/openevent"
    said = Commands({"DATABASE_URL": url}).refused(*command, code=75)
    assert said.startswith(f"Error: DATABASE_URL=postgresql+psycopg://ada:***@127.0.0.1:{port}/openevent: ")
    assert said.endswith("start the database or correct the URL, then: outbox doctor\n")
    assert len(said.splitlines()) == 1
    assert "hunter2" not in said


@pytest.mark.parametrize("command", [["migrate"], ["status"], ["list"], ["doctor"]])
def test_a_password_in_the_query_of_a_url_is_not_printed_either(command: list[str]) -> None:
    url = f"postgresql+psycopg://127.0.0.1:{free_port()}/openevent?user=ada&password=hunter2"
    said = Commands({"DATABASE_URL": url, "BROKER_URL": "embedded:///broker.db"})(*command).output
    assert "password=***" in said
    assert "hunter2" not in said


@pytest.mark.postgres
def test_a_database_that_refuses_us_is_no_matter_of_waiting(postgres_url: str) -> None:
    url = postgres_url.rpartition("/")[0] + "/nowhere"
    said = Commands({"DATABASE_URL": url}).refused("status")
    assert 'database "nowhere" does not exist; correct it, then: outbox doctor' in said


@pytest.mark.postgres
@pytest.mark.parametrize(("command", "code"), [("status", 75), ("list", 75), ("doctor", 1)])
def test_tables_that_somebody_has_locked_are_said_with_how_to_find_him(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, command: str, code: int
) -> None:
    outbox = Commands({"DATABASE_URL": postgres_url, "BROKER_URL": f"amqp://ada:hunter2@127.0.0.1:{free_port()}/"})
    outbox.fine("migrate")
    monkeypatch.setattr(context, "_LOCK_SECONDS", 1)
    engine = database.create_engine(postgres_url)
    with engine.begin() as vacuum:
        vacuum.exec_driver_sql("LOCK TABLE outbox_message, outbox_pending IN ACCESS EXCLUSIVE MODE")
        result = outbox(command)
    assert result.exit_code == code
    said = "canceling statement due to lock timeout; another session has locked the tables: SELECT pid, state, query"
    assert said in result.output
    with engine.connect() as connection:
        connection.exec_driver_sql(result.output.partition("tables: ")[2].splitlines()[0])
    engine.dispose()


@pytest.mark.parametrize("command", ["status", "list", "doctor", "config", "tail"])
def test_settings_that_can_not_be_are_said_all_together(command: str) -> None:
    outbox = Commands({"DATABASE_URL": "postgres://u:hunter2@host/db", "OUTBOX_WINDOW": "x", "OUTBOX_LAESE": "1s"})
    result = outbox(command)
    assert result.exit_code == 1
    for said in ("the scheme is postgresql+psycopg://", "OUTBOX_WINDOW=x", "did you mean OUTBOX_LEASE?"):
        assert said in result.output
    assert "hunter2" not in result.output


def test_a_command_without_a_database_says_which_setting_is_missing() -> None:
    assert "DATABASE_URL is not set (the database of the outbox); set it" in Commands({}).refused("status")


def test_a_database_that_is_not_supported_yet_is_refused() -> None:
    said = Commands({"DATABASE_URL": "mysql+pymysql://u:hunter2@127.0.0.1/db"}).refused("status")
    assert "MySQL and MariaDB are not supported yet; use postgresql+psycopg:// or sqlite:///" in said
    assert "hunter2" not in said


# --- SQLite files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["status"], ["list"], ["show", str(new_id())], ["tail"], ["requeue", "--state", "dead", "--yes"]]
)
def test_a_missing_file_is_an_error_and_is_not_made(tmp_path: Path, command: list[str]) -> None:
    said = Commands({"DATABASE_URL": "sqlite:///instance/x.db"}).refused(*command)
    assert f"DATABASE_URL=sqlite:///instance/x.db: there is no file {tmp_path}/instance/x.db; run: outbox migrate" in said
    assert not (tmp_path / "instance").exists()


def test_migrate_makes_the_file_and_its_folder(tmp_path: Path) -> None:
    outbox = Commands({"DATABASE_URL": "sqlite:///instance/x.db"})
    assert outbox.fine("migrate").endswith(f"to version {len(migrations.OUTBOX.steps)}: {tmp_path}/instance/x.db\n")
    assert outbox.fine("status").startswith(f"{tmp_path}/instance/x.db  ")


def test_commands_for_people_say_which_file_they_mean(sqlite_url: str, tmp_path: Path) -> None:
    outbox = Commands({"DATABASE_URL": sqlite_url})
    outbox.fine("migrate")
    assert outbox("list").stderr == f"SQLite file {tmp_path}/outbox.db\n"
    assert outbox("list", "--json").stderr == ""


def test_a_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("no database, but text that is long enough to look at")
    said = Commands({"DATABASE_URL": "sqlite:///x.db"}).refused("status")
    assert "file is not a database; name another file" in said


# --- config -------------------------------------------------------------------------------------------------------------


def test_config_shows_values_with_their_origin_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.outbox]\ndatabase_url = "sqlite:///instance/x.db"\n')
    outbox = Commands({"BROKER_URL": "amqp://ada:hunter2@host/vhost", "OUTBOX_LEASE": "90s"})
    rows = {row["name"]: (row["value"], row["origin"]) for row in outbox.json("config")}
    assert rows["BROKER_URL"] == ("amqp://ada:***@host/vhost", "environment")
    assert rows["OUTBOX_LEASE"] == ("90s", "environment")
    assert rows["DATABASE_URL"] == ("sqlite:///instance/x.db", "pyproject.toml")
    assert rows["OUTBOX_RETENTION"] == ("7d", "default")
    page = outbox.fine("config")
    assert f"The SQLite file is {tmp_path}/instance/x.db (not there; `outbox migrate` makes it)" in page
    assert "hunter2" not in page


# --- the group ----------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_every_command_has_help() -> None:
    outbox = Commands({})
    page = outbox.fine("--help")
    names = [
        "migrate",
        "relay",
        "status",
        "list",
        "show",
        "tail",
        "requeue",
        "discard",
        "topology",
        "doctor",
        "config",
        "consumer",
    ]
    assert [line.split()[0] for line in page.partition("Commands:\n")[2].splitlines()] == names
    for name in names:
        assert outbox.fine(name, "--help").startswith(f"Usage: outbox {name}")


@pytest.mark.parametrize("group", [[], ["topology"], ["consumer"], ["consumer", "parked"]])
def test_no_line_of_help_is_cut_short(group: list[str]) -> None:
    assert "..." not in Commands({}).fine(*group, "--help").partition("Commands:")[2]


def test_an_unknown_command_is_wrong_usage() -> None:
    assert "No such command 'nope'" in Commands({}).refused("nope", code=2)


def test_the_sql_of_the_tables_needs_no_database() -> None:
    port = free_port()
    printed = Commands({"DATABASE_URL": f"postgresql+psycopg://u:p@127.0.0.1:{port}/x"}).fine("migrate", "--sql")
    assert "CREATE TABLE outbox_message_default PARTITION OF outbox_message DEFAULT" in printed
    assert f"VALUES ('outbox', {len(migrations.OUTBOX.steps)})" in printed
