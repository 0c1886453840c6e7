"""What can be said of docker-compose.yml and the Dockerfile without an engine: each command exists, each wait can end."""

from __future__ import annotations

import re
import shlex
from typing import Any

import click
import pytest
import yaml

from outbox import settings
from outbox.cli import group
from outbox.process import duration
from publisher import create_app
from tests.kit.processes import ROOT, run

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
#: Those that run the project's own image.
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "openevent"}
#: Neither is connected to: the application starts before its servers are up.
UNUSED = {"DATABASE_URL": "postgresql+psycopg://unused/unused", "BROKER_URL": "amqp://unused:unused@unused"}
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def _parsed(words: list[str]) -> click.Context:
    """The context of the command of `outbox` that *words* name, its options and arguments checked; it is not run."""
    command: click.Command | None = group
    name: str | None = None
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(click.Context(command), words)
    assert command is not None
    return command.make_context(name, words)


@pytest.mark.parametrize("name", OURS)
def test_the_command_of_each_service_exists(name: str) -> None:
    program, *words = OURS[name]["command"]
    if program == "outbox":
        context = _parsed(words)
        assert context.params.get("name", name) == name.removesuffix("-migrate")
    elif program == "flask":
        assert words[:2] == ["--app", "publisher"]
        assert words[2] in create_app(UNUSED).cli.commands
    else:
        assert program == "gunicorn"
        _accepted_by_gunicorn(words)


def _accepted_by_gunicorn(words: list[str]) -> None:
    """It knows each option, and can load the application."""
    done = run("gunicorn", "--check-config", *words, env=UNUSED)
    assert done.returncode == 0, done.stderr
    assert words[:2] == ["--bind", "0.0.0.0:8000"]


def test_the_image_is_built_by_one_service_and_looked_for_nowhere_else() -> None:
    policies = {name: service["pull_policy"] for name, service in OURS.items()}
    assert [name for name, service in OURS.items() if "build" in service] == ["publisher"]
    assert policies == {name: "build" if name == "publisher" else "never" for name in OURS}


@pytest.mark.parametrize("name", SERVICES)
def test_each_wait_is_for_something_that_can_happen(name: str) -> None:
    for other, wait in SERVICES[name].get("depends_on", {}).items():
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert SERVICES[other]["restart"] == "no"


def test_whoever_uses_tables_waits_for_those_who_make_them() -> None:
    for name in ("publisher", "relay"):
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    for name in ("exports", "notifications"):
        assert SERVICES[name]["depends_on"][f"{name}-migrate"] == {"condition": "service_completed_successfully"}


def test_the_api_starts_without_the_broker() -> None:
    assert "rabbitmq" not in SERVICES["publisher"]["depends_on"]


@pytest.mark.parametrize("name", [name for name, service in OURS.items() if service["restart"] != "no"])
def test_an_orderly_end_has_more_time_than_it_takes(name: str) -> None:
    allowed = duration.parse(OURS[name]["environment"]["OUTBOX_SHUTDOWN_TIMEOUT"])
    assert duration.parse(OURS[name]["stop_grace_period"]) > allowed


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if service["restart"] != "no"])
def test_whatever_stays_up_is_looked_after(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] == "CMD"
    assert "stop_grace_period" in service


@pytest.mark.parametrize("name", SERVICES)
def test_every_command_is_in_exec_form_so_that_signals_arrive(name: str) -> None:
    assert isinstance(SERVICES[name].get("command", []), list)


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_those_of_this_machine_alone(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


def test_no_port_of_this_machine_is_given_twice() -> None:
    ports = [port.split(":")[1] for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == len(set(ports))


def test_every_image_is_pinned_to_a_minor_version() -> None:
    images = [service["image"] for name, service in SERVICES.items() if name not in OURS]
    images += re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(images) >= 5
    for image in images:
        assert re.search(r":v?\d+\.\d+", image), image


def test_the_broker_is_a_rabbitmq_4_with_management() -> None:
    assert re.match(r"rabbitmq:4\..*management", SERVICES["rabbitmq"]["image"])


@pytest.mark.parametrize("name", OURS)
def test_the_environment_of_each_service_is_made_of_settings(name: str) -> None:
    given = {key: _with_defaults(value) for key, value in OURS[name]["environment"].items()}
    known = settings.load(environ={key: value for key, value in given.items() if key in settings.NAMES})
    assert known.database_url == "postgresql+psycopg://openevent:development@postgres/openevent"
    assert given.keys() - set(settings.NAMES) <= {"EXPORTS_FOLDER", "NOTIFICATIONS_SMTP_URL"}


def _with_defaults(text: str) -> str:
    return re.sub(r"\$\{\w+:-(\w+)\}", r"\1", text)


def test_no_password_stands_in_the_file_but_as_a_default_of_a_variable() -> None:
    bare = re.sub(r"\$\{\w+_PASSWORD:-development\}", "", (ROOT / "docker-compose.yml").read_text())
    assert "development" not in bare
    assert not re.search(r"_PASS(WORD)?: \w", bare)


def test_each_service_has_a_database_of_its_own() -> None:
    made = re.findall(r"CREATE DATABASE (\w+);", COMPOSE["configs"]["databases"]["content"])
    running = [s["command"][3] for s in OURS.values() if s["command"][:3] == ["outbox", "consumer", "run"]]
    assert sorted(made) == sorted(running)
    assert SERVICES["postgres"]["configs"][0]["target"].startswith("/docker-entrypoint-initdb.d/")


def test_every_named_volume_is_declared() -> None:
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == COMPOSE["volumes"].keys()


def test_there_is_no_version_key() -> None:
    assert "version" not in COMPOSE


def test_the_image_does_not_run_as_root_and_starts_without_a_shell() -> None:
    last_stage = DOCKERFILE.split("\nFROM ")[-1]
    assert re.search(r"^USER (?!root|0\b)\S+", last_stage, re.MULTILINE)
    command = re.search(r"^CMD (\[.*\])$", last_stage, re.MULTILINE)
    assert command is not None
    program, *words = yaml.safe_load(command[1])
    assert program == "gunicorn"
    _accepted_by_gunicorn(words)


def test_the_image_gets_what_it_copies_and_no_more() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for source in shlex.split(line)[:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
