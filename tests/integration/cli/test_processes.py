"""Commands as processes: those that run until they are stopped, pipes that close, and the same group under flask."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outbox import database, migrations
from outbox.tables import State
from tests.kit import builders
from tests.kit.commands import Commands
from tests.kit.ports import free_port
from tests.kit.processes import Process, environment, run
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from click.testing import Result
    from sqlalchemy.engine import Engine

    from outbox.message import Message
    from tests.conftest import Spawn
    from tests.kit.servers import PostgresServer

_SERVICE = """
from outbox.consumer import Service

service = Service("exports")

@service.on("session.modified")
def rebuild(message, db_session, /, *, id, **extra):
    if id == 13:
        raise ValueError("thirteen has no room")
"""


_STOPPED_WHILE_LOADING = """
import os, signal, sys

class Stop:
    def find_spec(self, name, *_):
        if name == "outbox.settings":
            print("asked to end", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Stop())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a service, and without settings of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in _modules_of_the_folder():  # those of the checkout come back
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])  # the relay sets its own
    (tmp_path / "shop.py").write_text(_SERVICE)
    yield tmp_path
    for name in _modules_of_the_folder():
        del sys.modules[name]


def _modules_of_the_folder() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in ("shop", "shopapp", "consumers")]


@pytest.fixture
def env(folder: Path) -> dict[str, str]:
    return {
        "DATABASE_URL": f"sqlite:///{folder}/outbox.db",
        "BROKER_URL": f"embedded:///{folder}/broker.db",
        "CONSUMER_DATABASE_URL": f"sqlite:///{folder}/{{service}}.db",
    }


@pytest.fixture
def outbox(env: dict[str, str]) -> Commands:
    commands = Commands(env)
    commands.fine("migrate")
    return commands


@pytest.fixture
def engine(env: dict[str, str], outbox: Commands) -> Iterator[Engine]:
    made = database.create_engine(env["DATABASE_URL"])
    yield made
    made.dispose()


def _put(engine: Engine, *messages: Message, state: State = State.PENDING) -> list[str]:
    with engine.begin() as connection:
        builders.write(connection, *messages, state=state)
    return [str(message.id) for message in messages]


# --- until Ctrl-C -------------------------------------------------------------------------------------------------------


def test_tail_prints_messages_as_they_are_committed_and_ends_quietly(
    spawn: Spawn, env: dict[str, str], engine: Engine, folder: Path
) -> None:
    (old,) = _put(engine, builders.message())
    process = spawn("outbox", "tail", "--topic", "a.b", env=env, cwd=folder)
    _wait_until_it_tails(process, engine)
    _put(engine, builders.message("other"))
    (last,) = _put(engine, builders.message("a.b", key="event:7"))
    process.wait_for_line(f"{last}  a.b  event:7 #")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 0
    assert "Traceback" not in process.output
    assert old not in process.output
    assert "other" not in process.output


def _wait_until_it_tails(process: Process, engine: Engine) -> None:
    """Put messages until one is printed: started but not reading yet, it takes the first ones for old."""
    printed: list[str] = []

    def shown() -> bool:
        printed.extend(_put(engine, builders.message("a.b")))
        return any(id_ in process.output for id_ in printed)

    eventually(shown, 30, "tail to print a message", interval=0.7)


def test_status_watch_looks_again_and_again(spawn: Spawn, env: dict[str, str], engine: Engine, folder: Path) -> None:
    process = spawn("outbox", "status", "--json", "--watch", "--interval", "50ms", env=env, cwd=folder)
    process.wait_for_line('"pending": 0')
    _put(engine, builders.message())
    process.wait_for_line('"pending": 1')
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 0
    lines = process.output.splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_whoever_watches_sees_the_database_go_and_come_back(
    spawn: Spawn, folder: Path, private_postgres: Callable[[], PostgresServer]
) -> None:
    server = private_postgres()
    env = {"DATABASE_URL": server.url, "PGCONNECT_TIMEOUT": "5"}
    Commands(env).fine("migrate")
    status = spawn("outbox", "status", "--json", "--watch", "--interval", "100ms", env=env, cwd=folder)
    tail = spawn("outbox", "tail", env=env, cwd=folder)
    engine = database.create_engine(server.url)
    _wait_until_it_tails(tail, engine)
    status.wait_for_line('"pending": [1-9]')
    server.stop()
    for process in (status, tail):
        process.wait_for_line("start the database or correct the URL")
    server.start()
    seen = status.output.count('"pending"')
    (id_,) = _put(engine, builders.message())
    engine.dispose()
    tail.wait_for_line(id_)
    eventually(lambda: status.output.count('"pending"') > seen, what="status to go on")


def test_a_pipe_that_closes_early_is_no_failure_to_talk_about(env: dict[str, str], engine: Engine, folder: Path) -> None:
    _put(engine, *(builders.message() for _ in range(2000)))  # more than any pipe holds
    command = [str(Path(sys.executable).parent / "outbox"), "list", "--limit", "2000"]
    with subprocess.Popen(command, env=environment(env), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"ID")
        process.stdout.close()
        said = process.stderr.read().decode()
        process.wait(30)
    assert "Traceback" not in said
    assert "Broken" not in said


def test_an_output_that_can_not_be_written_is_said(env: dict[str, str], engine: Engine, folder: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():  # only Linux has a disk that is always full
        return
    for command in (["config"], ["status", "--json"]):
        program = [str(Path(sys.executable).parent / "outbox"), *command]
        with full.open("w") as output:
            done = subprocess.run(program, env=environment(env), cwd=folder, stdout=output, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr == "Error: what it printed could not be written: No space left on device\n"


# --- relay and services -------------------------------------------------------------------------------------------------


def test_a_message_goes_the_whole_way_by_commands_alone(
    outbox: Commands, env: dict[str, str], engine: Engine, folder: Path
) -> None:
    assert "exports" in outbox.fine("consumer", "topology", "shop:service", "--apply")
    good, poison = _put(engine, builders.message(body=b'{"id":1}'), builders.message(body=b'{"id":13}'))
    before = datetime.now(UTC)
    relayed = run("outbox", "relay", "--drain", env=env, cwd=folder)
    assert relayed.returncode == 0, relayed.stderr
    found = outbox.json("show", good)
    (publication,) = found["published"]
    assert found["state"] == "published"
    assert abs((datetime.fromisoformat(publication["at"]) - before).total_seconds()) < 60
    assert publication["relay"] in outbox.fine("show", good)
    assert outbox.json("status")["published_total"] == 2

    consumed = run("outbox", "consumer", "run", "shop:service", "--drain", env=env, cwd=folder)
    assert consumed.returncode == 0, consumed.stderr
    status = outbox.json("consumer", "status", "shop:service")
    assert (status["service"], status["applied_total"], status["parked"], status["running"]) == ("exports", 1, 1, False)
    (parked,) = outbox.json("consumer", "parked", "list", "shop:service")
    assert (parked["id"], parked["reason"], parked["last_error"]) == (poison, "failed", "ValueError: thirteen has no room")
    page = outbox.fine("consumer", "parked", "show", "shop:service", poison)
    assert "thirteen has no room" in page
    assert '"id": 13' in page
    assert outbox("consumer", "parked", "requeue", "shop:service", poison, input="n\n").exit_code == 1
    assert outbox.fine("consumer", "parked", "requeue", "shop:service", poison, "--yes") == "Requeued 1 message.\n"
    assert [row["state"] for row in outbox.json("consumer", "parked", "list", "shop:service")] == ["due"]
    gone = outbox.fine("consumer", "parked", "discard", "shop:service", poison, "--reason", "a test", "--yes")
    assert gone == "Discarded 1 message.\n"
    assert outbox.fine("consumer", "parked", "list", "shop:service") == "No message is parked.\n"
    assert "a test" in outbox.fine("consumer", "parked", "show", "shop:service", poison)


def test_the_relay_serves_its_probes_and_stops_on_sigterm(spawn: Spawn, env: dict[str, str], folder: Path) -> None:
    port = free_port()
    process = spawn("outbox", "relay", "--http-port", str(port), env=env, cwd=folder)
    assert json.loads(process.wait_for_http(f"http://127.0.0.1:{port}/livez"))["ok"] is True
    process.wait_for_http(f"http://127.0.0.1:{port}/readyz")
    outbox = Commands(env)
    (relay,) = eventually(lambda: outbox.json("status")["relays"], what="the relay's heartbeat")
    assert relay["shards"] == 64
    process.terminate()
    assert process.wait() == 0
    assert outbox.json("status")["relays"] == []


@pytest.mark.parametrize("command", [("relay",), ("consumer", "run", "shop:service")])
def test_a_process_that_is_stopped_while_it_still_loads_ends_well(
    spawn: Spawn, env: dict[str, str], folder: Path, command: tuple[str, ...]
) -> None:
    # The command is loaded, what it runs is not.
    (folder / "sitecustomize.py").write_text(_STOPPED_WHILE_LOADING)
    process = spawn("outbox", *command, env={**env, "PYTHONPATH": str(folder)}, cwd=folder)
    assert process.wait() == 0
    assert process.output == "asked to end\n"


def test_a_process_without_its_settings_says_which(folder: Path) -> None:
    outbox = Commands({})
    said = "Error: BROKER_URL is not set (RabbitMQ, or the embedded broker); set it in the environment\n"
    assert outbox.refused("relay") == said
    first, second = outbox.refused("consumer", "run", "shop:service").splitlines()
    assert "CONSUMER_DATABASE_URL is not set" in first
    assert "BROKER_URL is not set" in second
    assert "exclude each other" in outbox.refused("relay", "--once", "--drain", code=2)


def test_a_relay_for_a_server_does_not_make_a_database_file(env: dict[str, str], folder: Path) -> None:
    broker = f"amqp://u:p@127.0.0.1:{free_port()}/"
    said = Commands({**env, "BROKER_URL": broker}).refused("relay", "--once")
    assert f"there is no file {folder}/outbox.db; run: outbox migrate" in said
    assert not (folder / "outbox.db").exists()


def test_failpoints_that_are_none_are_refused_before_anything_runs(env: dict[str, str]) -> None:
    assert "is not NAME=ACTION[@COUNT]" in Commands({**env, "OUTBOX_FAILPOINTS": "R1=explode"}).refused("relay")


def test_a_service_whose_tables_are_not_there_says_what_to_type(outbox: Commands, folder: Path) -> None:
    said = outbox.refused("consumer", "status", "shop:service")
    assert f"there is no file {folder}/exports.db; run: outbox consumer migrate shop:service" in said
    assert outbox.fine("consumer", "migrate", "shop:service").endswith(f"{folder}/exports.db\n")
    assert outbox.json("consumer", "status", "shop:service")["applied_total"] == 0
    shown = outbox.fine("consumer", "status", "shop:service")
    assert "! service 'exports' is not running: outbox consumer run shop:service" in shown


def test_every_advice_about_a_service_names_it_as_it_was_typed(outbox: Commands) -> None:
    outbox.fine("consumer", "migrate", "shop:service")
    said = outbox.refused("consumer", "parked", "show", "shop:service", "no-such-id")
    assert said.endswith("outbox consumer parked list shop:service\n")
    checked = outbox("consumer", "topology", "shop:service", "--check").stdout
    assert "outbox consumer topology shop:service --apply, or start it" in checked
    outbox.env["CONSUMER_DATABASE_URL"] = f"postgresql+psycopg://ada:hunter2@127.0.0.1:{free_port()}/x"
    said = outbox.refused("consumer", "status", "shop:service", code=75)
    assert said.endswith("start the database or correct the URL, then: outbox consumer status shop:service\n")


def test_a_service_that_was_never_migrated_does_not_hide_the_others(outbox: Commands, folder: Path) -> None:
    for name in ("exports", "mails"):
        (folder / "consumers" / name).mkdir(parents=True)
        (folder / "consumers" / name / "__init__.py").write_text(_SERVICE.replace("exports", name))
    (folder / "consumers" / "__init__.py").touch()
    outbox.fine("consumer", "migrate", "exports")
    result = outbox("consumer", "status")
    assert result.exit_code == 1
    assert "exports  stopped" in result.stdout
    assert "run: outbox consumer migrate mails" in result.stderr
    assert [row["service"] for row in json.loads(outbox("consumer", "status", "--json").stdout)] == ["exports"]


def test_a_services_queues_are_shown_made_checked_and_taken_away(outbox: Commands) -> None:
    topology = ("consumer", "topology", "shop:service")
    assert [row["name"] for row in outbox.json(*topology)] == ["outbox.exports", "outbox.exports.dead"]
    outbox.fine(*topology, "--apply")
    checked = outbox.fine(*topology, "--check")
    assert "OK       queue  'outbox.exports' is bound to session.modified" in checked.splitlines()
    assert "exclude each other" in outbox.refused(*topology, "--apply", "--check", code=2)
    assert "nothing was changed" in outbox.refused("consumer", "retire", "shop:service", input="")
    gone = outbox.fine("consumer", "retire", "shop:service", "--yes")
    assert gone.splitlines() == ["Deleted queue 'outbox.exports'.", "Deleted queue 'outbox.exports.dead'."]
    assert outbox(*topology, "--check").exit_code == 1
    assert outbox.fine("consumer", "retire", "shop:service", "--yes") == "Service 'exports' has no queues.\n"


def test_the_doctor_says_a_failure_once(env: dict[str, str], folder: Path) -> None:
    broker = f"amqp://ada:hunter2@127.0.0.1:{free_port()}/"
    done = run("outbox", "doctor", env={**env, "BROKER_URL": broker}, cwd=folder)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.count("Connection refused") == 1


# --- under flask --------------------------------------------------------------------------------------------------------

_APP = """
import sqlalchemy as sa
from blinker import Namespace
from flask import Flask
from sqlalchemy.orm import Session

from outbox import Outbox, database

signals = Namespace()
changed = signals.signal("changed")
outbox = Outbox()
outbox.capture(changed, topic="talk.changed", key="talk:{{talk_id}}")


def create_app():
    app = Flask("shop")
    app.config["BROKER_URL"] = "embedded:///{folder}/broker.db"
    engine = database.create_engine("sqlite:///{folder}/app.db")
    session = Session(engine)
    outbox.init_app(app, session=session, engine=engine)

    @app.cli.command("change")
    def change():
        with session.begin():
            changed.send(app, talk_id=7)

    return app
"""


def test_flask_outbox_works_on_the_apps_engine_and_topics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "shopapp.py").write_text(_APP.format(folder=folder))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    app = importlib.import_module("shopapp").create_app()
    runner = app.test_cli_runner()

    def flask(*arguments: str, code: int = 0) -> Result:
        result: Result = runner.invoke(args=["outbox", *arguments])
        assert result.exit_code == code, result.output
        return result

    assert f"there is no file {folder}/app.db; run: flask outbox migrate" in flask("status", code=1).stderr
    assert flask("migrate").stdout.endswith(f"to version {len(migrations.OUTBOX.steps)}: {folder}/app.db\n")
    assert runner.invoke(args=["change"]).exit_code == 0
    assert flask("list").stderr == f"SQLite file {folder}/app.db\n"
    (row,) = json.loads(flask("list", "--json").stdout)
    assert (row["topic"], row["key"], row["sequence"]) == ("talk.changed", "talk:7", 1)
    flask("relay", "--drain", code=75)  # the message remains
    assert json.loads(flask("status", "--json").stdout)["unroutable"] == 1
    assert "FAIL     talk.changed  no queue on exchange 'outbox' takes it" in flask("topology", "check", code=1).stdout
    assert "OK       signal                changed is captured as 'talk.changed'" in flask("doctor", code=1).stdout
    origins = {row["name"]: row["origin"] for row in json.loads(flask("config", "--json").stdout)}
    assert origins["BROKER_URL"] == "app.config"


def test_log_lines_are_for_people_or_for_machines(env: dict[str, str], folder: Path) -> None:
    assert run("outbox", "migrate", env=env, cwd=folder).returncode == 0
    people = run("outbox", "relay", "--drain", env=env, cwd=folder).stderr
    assert " INFO    relay.started: relay " in people
    machines = run("outbox", "relay", "--drain", env={**env, "OUTBOX_LOG_FORMAT": "json"}, cwd=folder).stderr
    events = [json.loads(line)["event"] for line in machines.splitlines() if line.startswith("{")]
    assert {"relay.started", "relay.stopped"} <= set(events)
    assert " INFO " not in machines


def test_the_flask_command_knows_the_group(folder: Path) -> None:
    (folder / "shopapp.py").write_text(_APP.format(folder=folder))
    done = run("python", "-m", "flask", "--app", "shopapp:create_app", "outbox", "show", "nonsense", env={}, cwd=folder)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "Error: Invalid value for 'ID': 'nonsense' is no message id; ids are whole: 019ab6f0-5f4e-7c1d-9d3c-0a5b1c2d3e4f",
    )
