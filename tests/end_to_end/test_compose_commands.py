"""docker-compose.yml without an engine: its commands, environments and health checks, as processes on private servers."""

from __future__ import annotations

import json
import re
import urllib.request
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import yaml
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Message as Catcher

from outbox.process import duration
from tests.kit.ports import free_port
from tests.kit.processes import ROOT, run
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from email.message import Message
    from pathlib import Path

    from tests.conftest import Spawn
    from tests.kit.processes import Process
    from tests.kit.servers import ExternalRabbit, PostgresServer, RabbitServer

_COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
_OURS: dict[str, dict[str, Any]] = {
    name: service for name, service in _COMPOSE["services"].items() if service["image"] == "openevent"
}


class _Mail(Catcher):
    """Takes every letter."""

    def __init__(self) -> None:
        super().__init__()
        self.letters: list[Message] = []

    def handle_message(self, message: Message) -> None:
        self.letters.append(message)


@pytest.fixture
def mail() -> Iterator[Controller]:
    """A mail server; its letters are `mail.handler.letters`."""
    controller = Controller(_Mail(), hostname="127.0.0.1", port=free_port())
    controller.start()
    yield controller
    controller.stop()


@pytest.fixture
def postgres(private_postgres: Callable[..., PostgresServer]) -> PostgresServer:
    """A server with the role of the compose file, its database, and what its first start creates."""
    server = private_postgres()
    statements = ["CREATE ROLE openevent SUPERUSER LOGIN", "CREATE DATABASE openevent"]
    statements += _COMPOSE["configs"]["databases"]["content"].splitlines()
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())
    return server


class _Stack:
    """The services of the file; hosts and ports of containers are replaced by those of this test."""

    def __init__(self, addresses: dict[str, str], spawn: Spawn) -> None:
        self._addresses = addresses
        self._spawn = spawn
        self._ports = {name: {"8000": free_port(), "9101": free_port()} for name in _OURS}
        self.running: dict[str, Process] = {}

    def url(self, name: str, inside: str) -> str:
        """The address of the port that is *inside* in the container of *name*."""
        return f"http://127.0.0.1:{self._ports[name][inside]}"

    def _here(self, name: str, text: str) -> str:
        text = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", text)
        for theirs, ours in self._addresses.items():
            text = text.replace(theirs, ours)
        for inside, port in self._ports[name].items():
            text = re.sub(rf"(?:0\.0\.0\.0|127\.0\.0\.1):{inside}\b", f"127.0.0.1:{port}", text)
        return text

    def _command(self, name: str, command: list[str]) -> tuple[list[str], dict[str, str]]:
        environment = {key: self._here(name, value) for key, value in _OURS[name]["environment"].items()}
        return [self._here(name, word) for word in command], environment

    def up(self) -> None:
        """Start everything in an order that the conditions allow; a process counts once its health check passes."""
        waiting = dict(_OURS)
        while waiting:
            name = next(name for name, service in waiting.items() if not waiting.keys() & service["depends_on"].keys())
            command, environment = self._command(name, waiting.pop(name)["command"])
            if _OURS[name]["restart"] == "no":
                done = run(*command, env=environment)
                assert done.returncode == 0, done.stderr
            else:
                self.running[name] = self._spawn(*command, env=environment)
                eventually(partial(self.healthy, name), timeout=30, what=f"{name} to be healthy")

    def healthy(self, name: str) -> bool:
        """Whether the health check of *name* passes."""
        process = self.running[name]
        assert process.exit_code is None, process.output
        kind, *check = _OURS[name]["healthcheck"]["test"]
        assert kind == "CMD"
        return run(*self._command(name, check)[0]).returncode == 0

    def down(self) -> dict[str, int]:
        """Ask all to stop, as `docker compose down` does, and return their exit codes."""
        for process in self.running.values():
            process.terminate()
        return {name: process.wait(duration.parse(_OURS[name]["stop_grace_period"])) for name, process in self.running.items()}


def _post(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def test_the_commands_of_the_compose_file_carry_a_change_to_a_file_and_a_letter(
    postgres: PostgresServer,
    rabbit_server: RabbitServer | ExternalRabbit,
    broker_url: str,
    mail: Controller,
    spawn: Spawn,
    tmp_path: Path,
) -> None:
    stack = _Stack(
        {
            "@postgres/": f"@127.0.0.1:{postgres.port}/",
            "amqp://openevent:development@rabbitmq/%2F": broker_url,
            "http://openevent:development@rabbitmq:15672": rabbit_server.management_url,
            "smtp://mail:1025": f"smtp://127.0.0.1:{mail.port}",
            "/var/lib/exports": str(tmp_path / "exports"),
        },
        spawn,
    )
    stack.up()
    api = stack.url("publisher", "8000")
    event = _post(
        f"{api}/v1/events",
        {"name": "Conference", "starts_at": "2030-05-01T09:00:00Z", "ends_at": "2030-05-02T18:00:00Z"},
    )
    event_url = f"{api}/v1/events/{event['id']}"
    speaker = _post(f"{event_url}/speakers", {"name": "Ada", "email": "ada@conference.example"})
    talk = _post(f"{event_url}/sessions", {"title": "The first programme"})
    talk_url = f"{api}/v1/sessions/{talk['id']}"
    put = urllib.request.Request(f"{talk_url}/speakers/{speaker['id']}", method="PUT")
    urllib.request.urlopen(put, timeout=10).close()
    _post(f"{talk_url}/state", {"state": "accepted"})

    letters = eventually(lambda: mail.handler.letters, timeout=30, what="the letter to the speaker")
    assert letters[0]["To"].split() == ["Ada", "<ada@conference.example>"]  # it may be folded

    def exported() -> bool:
        files = list((tmp_path / "exports").rglob("*.json"))
        return any("The first programme" in file.read_text() for file in files)

    eventually(exported, timeout=30, what="the export of the conference")
    assert set(stack.down().values()) == {0}
    for name, process in stack.running.items():
        assert "Traceback" not in process.output, name
