"""What the broker has, seen through RabbitMQ's management API and in the embedded broker's file; and the doctor."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

import pika
import pytest
import sqlalchemy as sa

from outbox import database, tables, topology
from outbox.embedded.queues import Queues
from outbox.errors import BrokerError, ConfigurationError, Unavailable
from outbox.settings import Settings, load
from tests.kit import builders
from tests.kit.commands import Commands
from tests.kit.ports import free_port
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy.engine import Engine

    from tests.kit.servers import ExternalRabbit, RabbitServer

_EXCHANGE = "openevent"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the checkout, whose pyproject.toml has settings."""
    monkeypatch.chdir(tmp_path)


class Vhost:
    """One virtual host of the broker, changed through its management API."""

    def __init__(self, url: str, server: RabbitServer | ExternalRabbit) -> None:
        self.url = url
        self.management_url = server.management_url
        self._management = server.management
        self._name = quote(unquote(urlsplit(url).path[1:]), safe="")

    def declare(self, kind: str, name: str, **options: Any) -> None:
        """Make an exchange or a queue."""
        self._management.request("PUT", f"{kind}s/{self._name}/{name}", {"durable": True, **options})

    def delete(self, kind: str, name: str) -> None:
        """Delete an exchange or a queue."""
        self._management.request("DELETE", f"{kind}s/{self._name}/{name}")

    def bind(self, destination: str, pattern: str, kind: str = "q") -> None:
        """Bind a queue, or with kind `e` an exchange."""
        path = f"bindings/{self._name}/e/{_EXCHANGE}/{kind}/{destination}"
        self._management.request("POST", path, {"routing_key": pattern})

    @property
    def env(self) -> dict[str, str]:
        """The settings of a process that works here."""
        return {"BROKER_URL": self.url, "BROKER_MANAGEMENT_URL": self.management_url, "OUTBOX_EXCHANGE": _EXCHANGE}


@pytest.fixture
def vhost(broker_url: str, rabbit_server: RabbitServer | ExternalRabbit) -> Vhost:
    return Vhost(broker_url, rabbit_server)


@pytest.fixture
def engine(sqlite_url: str) -> Iterator[Engine]:
    """An outbox that has seen three topics."""
    Commands({"DATABASE_URL": sqlite_url}).fine("migrate")
    made = database.create_engine(sqlite_url)
    with made.begin() as connection:
        builders.write(connection, *(builders.message(topic) for topic in ("event.modified", "session.modified", "a.b.c")))
    yield made
    made.dispose()


def _verdicts(commands: Commands, *arguments: str) -> list[tuple[str, str]]:
    result = commands(*arguments, "--json")
    return [(item["check"], item["verdict"]) for item in json.loads(result.stdout)]


# --- RabbitMQ -----------------------------------------------------------------------------------------------------------


def test_a_missing_exchange_is_found_made_and_then_fine(vhost: Vhost, engine: Engine, sqlite_url: str) -> None:
    outbox = Commands({**vhost.env, "DATABASE_URL": sqlite_url})
    assert _verdicts(outbox, "topology", "check") == [("exchange", "FAIL")]
    assert "'openevent': missing; run: outbox topology apply" in outbox.fine("topology", "show")
    for _ in range(2):
        assert outbox.fine("topology", "apply") == "The durable topic exchange 'openevent' is there.\n"
    found = topology.read(load(environ=vhost.env))
    assert found is not None
    assert (found.exchange_type, found.durable, found.bindings) == ("topic", True, ())
    assert engine


def test_each_known_topic_is_looked_up_in_the_bindings(vhost: Vhost, engine: Engine, sqlite_url: str) -> None:
    vhost.declare("exchange", _EXCHANGE, type="topic")
    vhost.declare("queue", "quorum", arguments={"x-queue-type": "quorum"})
    vhost.declare("queue", "classic", arguments={"x-queue-type": "classic"})
    vhost.bind("quorum", "*.modified")
    vhost.bind("quorum", "session.#")
    vhost.bind("classic", "event.modified")
    outbox = Commands({**vhost.env, "DATABASE_URL": sqlite_url})
    result = outbox("topology", "check")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert "FAIL     a.b.c             no queue on exchange 'openevent' takes it; its messages wait" in lines
    assert "OK       event.modified    classic, quorum" in lines
    assert "OK       session.modified  quorum" in lines
    assert any(line.startswith("WARN     queue             queue classic is classic: it confirms before") for line in lines)
    vhost.bind("quorum", "a.*.c")
    assert outbox("topology", "check").exit_code == 0
    shown = outbox.fine("topology", "show").splitlines()
    assert [line.split()[:3] for line in shown[3:]] == [
        ["*.modified", "quorum", "quorum"],
        ["a.*.c", "quorum", "quorum"],
        ["event.modified", "classic", "classic"],
        ["session.#", "quorum", "quorum"],
    ]


def test_what_goes_to_another_exchange_is_unknown(vhost: Vhost, engine: Engine, sqlite_url: str) -> None:
    vhost.declare("exchange", _EXCHANGE, type="topic")
    vhost.declare("exchange", "elsewhere", type="fanout")
    vhost.bind("elsewhere", "#", kind="e")
    outbox = Commands({**vhost.env, "DATABASE_URL": sqlite_url})
    assert {verdict for check, verdict in _verdicts(outbox, "topology", "check") if check != "exchange"} == {"UNKNOWN"}
    assert outbox("topology", "check").exit_code == 1


def test_without_the_management_api_nothing_is_ok(vhost: Vhost, engine: Engine, sqlite_url: str) -> None:
    vhost.declare("exchange", _EXCHANGE, type="topic")
    outbox = Commands({**vhost.env, "DATABASE_URL": sqlite_url, "BROKER_MANAGEMENT_URL": ""})
    assert {verdict for _, verdict in _verdicts(outbox, "topology", "check")} == {"UNKNOWN"}
    result = outbox("topology", "check")
    assert result.exit_code == 1
    assert "set BROKER_MANAGEMENT_URL=http://user:password@host:15672" in result.stdout
    assert "RabbitMQ tells its bindings through the management API only" in outbox.refused("topology", "show")


def test_an_exchange_of_another_kind_is_refused_not_replaced(vhost: Vhost, engine: Engine, sqlite_url: str) -> None:
    vhost.declare("exchange", _EXCHANGE, type="direct")
    outbox = Commands({**vhost.env, "DATABASE_URL": sqlite_url})
    assert "'openevent' is durable, direct; it must be durable and topic" in outbox("topology", "check").stdout
    said = outbox.refused("topology", "apply")
    assert "it must be a durable topic exchange; delete it, or choose another OUTBOX_EXCHANGE" in said


def test_a_refused_password_is_said_without_it(vhost: Vhost) -> None:
    host = urlsplit(vhost.management_url).netloc.rpartition("@")[2]
    wrong = load(environ={**vhost.env, "BROKER_MANAGEMENT_URL": f"http://guest:hunter2@{host}"})
    with pytest.raises(BrokerError, match="user 'guest' or its password is refused") as refused:
        topology.read(wrong)
    assert "hunter2" not in str(refused.value)
    amqp = vhost.url.replace("guest:guest", "guest:hunter2")
    said = Commands({**vhost.env, "BROKER_URL": amqp}).refused("topology", "apply")
    assert "hunter2" not in said


def test_a_server_that_is_something_else_is_said(vhost: Vhost) -> None:
    amqp_port = urlsplit(vhost.url).port
    with pytest.raises((Unavailable, ConfigurationError), match=f"BROKER_MANAGEMENT_URL=http://127.0.0.1:{amqp_port}"):
        topology.read(load(environ={**vhost.env, "BROKER_MANAGEMENT_URL": f"http://u:p@127.0.0.1:{amqp_port}"}))


def test_a_server_that_is_down_is_a_matter_of_waiting() -> None:
    env = {"BROKER_URL": f"amqp://u:p@127.0.0.1:{free_port()}/", "BROKER_MANAGEMENT_URL": f"http://u:p@127.0.0.1:{free_port()}"}
    assert "start RabbitMQ with its management plugin or correct the URL" in Commands(env).refused("topology", "show", code=75)
    assert "start the broker or correct BROKER_URL" in Commands(env).refused("topology", "apply", code=75)


def test_the_doctor_finds_a_working_broker_and_what_it_lacks(vhost: Vhost, engine: Engine, sqlite_url: str) -> None:
    outbox = Commands({**vhost.env, "DATABASE_URL": sqlite_url})
    found = dict(_verdicts(outbox, "doctor"))
    assert (found["settings"], found["database"], found["broker"], found["relay"]) == ("OK", "OK", "FAIL", "FAIL")
    assert "create the exchange: outbox topology apply" in outbox("doctor").stdout
    outbox.fine("topology", "apply")
    found = dict(_verdicts(outbox, "doctor"))
    assert (found["broker"], found["exchange"], found["a.b.c"]) == ("OK", "OK", "FAIL")
    with engine.begin() as connection:
        now = sa.func.current_timestamp()
        values = {"host": "h", "pid": 1, "version": "1", "started_at": now, "seen_at": now, "state": "running"}
        connection.execute(sa.insert(tables.relay).values(id="relay-1", broker_connected=True, broker_blocked=False, **values))
    vhost.declare("queue", "all", arguments={"x-queue-type": "quorum"})
    vhost.bind("all", "#")
    result = outbox("doctor")
    assert result.exit_code == 0, result.stdout
    assert result.stdout.endswith("\nAll is well.\n")


def test_a_queue_shows_how_many_consume_it(vhost: Vhost) -> None:
    vhost.declare("exchange", _EXCHANGE, type="topic")
    vhost.declare("queue", "openevent.exports", arguments={"x-queue-type": "quorum"})
    vhost.bind("openevent.exports", "#")
    connection = pika.BlockingConnection(pika.URLParameters(vhost.url))
    for _ in range(2):
        connection.channel().basic_consume("openevent.exports", lambda *_: None)

    def consumers() -> int | None:
        found = topology.read(load(environ=vhost.env))
        assert found is not None
        return found.queues["openevent.exports"].consumers

    eventually(lambda: consumers() == 2, what="the consumers to be counted")
    connection.close()
    eventually(lambda: consumers() == 0, what="the consumers to be gone")


def test_a_service_whose_queue_lost_its_bindings_is_named(vhost: Vhost, engine: Engine, sqlite_url: str) -> None:
    vhost.declare("exchange", _EXCHANGE, type="topic")
    for name in ("openevent.exports", "openevent.audit", "openevent.audit.dead", "somebodys"):
        vhost.declare("queue", name, arguments={"x-queue-type": "quorum"})
    vhost.bind("openevent.exports", "#")
    outbox = Commands({**vhost.env, "DATABASE_URL": sqlite_url})
    said = outbox("topology", "check")
    assert said.exit_code == 1
    assert "queue openevent.audit is bound to nothing: service 'audit' gets nothing" in said.stdout
    assert "outbox consumer topology NAME --apply" in said.stdout
    assert said.stdout.count("is bound to nothing") == 1


def test_making_the_exchange_names_the_services_that_messages_would_pass(vhost: Vhost) -> None:
    outbox = Commands(vhost.env)
    first = outbox("topology", "apply")
    assert (first.exit_code, first.stderr) == (0, "")
    vhost.declare("queue", "openevent.exports", arguments={"x-queue-type": "quorum"})
    assert "Before messages flow openevent.exports must be bound" in outbox("topology", "apply").stderr
    vhost.bind("openevent.exports", "#")
    assert outbox("topology", "apply").stderr == ""
    blind = Commands({**vhost.env, "BROKER_MANAGEMENT_URL": ""})
    assert blind("topology", "apply").stderr == ""
    vhost.delete("exchange", _EXCHANGE)
    assert "Before messages flow the queues of services must be bound" in blind("topology", "apply").stderr


def test_user_and_password_go_to_the_named_host_alone(vhost: Vhost, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", "http://u:p@127.0.0.1:9/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://guest:hunter2@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("http_proxy", url)
        assert topology.read(load(environ=vhost.env)) is not None
        assert asked == []
        with pytest.raises(ConfigurationError, match=r"it redirects to http://.*name the right host") as refusal:
            topology.read(load(environ={**vhost.env, "BROKER_MANAGEMENT_URL": url}))
        server.shutdown()
    assert len(asked) == 1
    assert "hunter2" not in str(refusal.value)
    assert "u:p" not in str(refusal.value)


# --- the embedded broker ------------------------------------------------------------------------------------------------


def _embedded(folder: Path) -> Settings:
    return load(environ={"BROKER_URL": f"embedded:///{folder}/broker.db", "OUTBOX_EXCHANGE": _EXCHANGE})


def test_the_embedded_brokers_bindings_are_in_its_file(tmp_path: Path) -> None:
    with Queues(tmp_path / "broker.db") as queues:
        queues.declare_queue("openevent.exports")
        queues.bind("openevent.exports", "session.*", exchange=_EXCHANGE)
        queues.bind("openevent.exports", "#.modified", exchange=_EXCHANGE)
    found = topology.read(_embedded(tmp_path))
    assert found is not None
    assert found.exchange_type == "topic"
    assert [item.destination for item in found.destinations("session.modified")] == ["openevent.exports"]
    assert found.destinations("event.created") == []
    assert found.queues["openevent.exports"].type == "embedded"


def test_looking_makes_no_file(tmp_path: Path, sqlite_url: str, engine: Engine) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no file .*broker.db"):
        topology.read(_embedded(tmp_path))
    outbox = Commands({"DATABASE_URL": sqlite_url, "BROKER_URL": f"embedded:///{tmp_path}/broker.db"})
    assert dict(_verdicts(outbox, "doctor"))["broker"] == "FAIL"
    assert not (tmp_path / "broker.db").exists()
    assert engine


def test_the_embedded_broker_has_every_exchange(tmp_path: Path) -> None:
    outbox = Commands({"BROKER_URL": f"embedded:///{tmp_path}/broker.db"})
    assert "The embedded broker has every exchange" in outbox.fine("topology", "apply")


# --- the doctor ---------------------------------------------------------------------------------------------------------


def test_the_doctor_goes_on_after_a_failure_and_says_each_next_step(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://ada:hunter2@127.0.0.1:{free_port()}/x"
    broker = f"amqp://ada:hunter2@127.0.0.1:{free_port()}/"
    outbox = Commands({"DATABASE_URL": url, "BROKER_URL": broker})
    assert _verdicts(outbox, "doctor") == [("settings", "OK"), ("database", "FAIL"), ("broker", "FAIL")]
    result = outbox("doctor")
    assert result.exit_code == 1
    assert "start the database or correct the URL" in result.stdout
    assert "Connection refused" in result.stdout
    assert "→ start the broker or correct BROKER_URL" in result.stdout
    assert result.stdout.endswith("\n2 FAIL\n")
    assert "hunter2" not in result.output
    assert result.stderr == ""


def test_the_doctor_says_settings_that_can_not_be_and_stops_there() -> None:
    assert _verdicts(Commands({"OUTBOX_WINDOW": "x"}), "doctor") == [("settings", "FAIL")]
    assert _verdicts(Commands({}), "doctor") == [("settings", "FAIL")]


@pytest.mark.parametrize(("pragma", "said"), [("synchronous=NORMAL", "synchronous=1"), ("synchronous=OFF", "synchronous=0")])
def test_the_doctor_warns_of_a_database_that_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sqlite_url: str, engine: Engine, pragma: str, said: str
) -> None:
    made = sa.create_engine(sqlite_url)
    sa.event.listen(made, "connect", lambda connection, _: connection.execute(f"PRAGMA {pragma}"))
    monkeypatch.setattr(database, "create_engine", lambda *_, **__: made)
    result = Commands({"DATABASE_URL": sqlite_url, "BROKER_URL": f"embedded:///{tmp_path}/broker.db"})("doctor")
    assert f"WARN     durability            {said}: a commit that was acknowledged can be gone" in result.stdout
    made.dispose()
    assert engine


def test_the_doctor_warns_of_a_postgresql_that_does_not_wait_for_its_disk(postgres_url: str, tmp_path: Path) -> None:
    outbox = Commands({"DATABASE_URL": postgres_url, "BROKER_URL": f"embedded:///{tmp_path}/broker.db"})
    outbox.fine("migrate")
    engine = database.create_engine(postgres_url)
    with engine.connect() as connection:
        off = [name for name in ("fsync", "full_page_writes") if connection.exec_driver_sql(f"SHOW {name}").scalar() == "off"]
    engine.dispose()
    shown = outbox("doctor").stdout
    assert [name for name in ("fsync", "full_page_writes") if f"{name}=off" in shown] == off
