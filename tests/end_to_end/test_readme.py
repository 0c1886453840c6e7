"""The README is true: its quickstarts run as they stand, from the wheel, in an empty environment outside the checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox.settings import Settings
from tests.kit.guides import page
from tests.kit.ports import free_port
from tests.kit.processes import ROOT, Process
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def quickstart(name: str) -> str:
    """Return the code block of the README that is marked with *name*."""
    match = re.search(rf"<!-- quickstart: {re.escape(name)} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert match, f"README.md has no quickstart {name}"
    return match[1]


def commands() -> list[list[str]]:
    """Return the commands of the shell quickstart that end by themselves, comments and prompts removed."""
    lines = [line.removeprefix("$ ").partition("#")[0].strip() for line in quickstart("shell").splitlines()]
    return [line.split() for line in lines if line.startswith("outbox ") and not line.endswith("&")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and what it asks for, nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", folder, str(ROOT)], check=True)
    (wheel,) = folder.glob("flask_outbox-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    wanted = [f"{wheel}[rabbitmq,postgres,metrics]", "flask-sqlalchemy"]
    subprocess.run([*PIP, "--python", python, "install", *wanted], check=True)
    return folder / "venv" / "bin"


@contextmanager
def shop(environment: Path, folder: Path, environ: dict[str, str]) -> Iterator[str]:
    """Run the Flask application of the README; yield its address."""
    port = free_port()
    command = (environment / "flask", "--app", "shop", "run", "--port", str(port))
    with Process(*command, log=folder / "shop.log", env=environ, cwd=folder) as process:
        address = f"http://127.0.0.1:{port}"
        eventually(lambda: "Running on" in process.output, 60, what="the application to run")
        yield address


@pytest.mark.timeout(300)
@pytest.mark.parametrize("servers", ["embedded", pytest.param("servers", marks=[pytest.mark.postgres, pytest.mark.rabbitmq])])
def test_the_quickstarts_run_as_they_stand(
    environment: Path, tmp_path: Path, servers: str, request: pytest.FixtureRequest
) -> None:
    for name in ("shop.py", "exports.py"):
        (tmp_path / name).write_text(quickstart(name))
    if servers == "embedded":
        database, broker, service = "sqlite:///shop.db", "embedded:///broker.db", f"sqlite:///{tmp_path}/exports.db"
        flask = f"sqlite:///{tmp_path}/shop.db"
    else:
        database, broker = request.getfixturevalue("postgres_url"), request.getfixturevalue("broker_url")
        service = flask = database
    environ = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": database,
        "BROKER_URL": broker,
        "CONSUMER_DATABASE_URL": service,
        "FLASK_SQLALCHEMY_DATABASE_URI": flask,
    }

    def outbox(*arguments: str) -> str:
        result = subprocess.run(
            [environment / "outbox", *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"outbox {' '.join(arguments)}: {result.stdout}{result.stderr}"
        return result.stdout

    setup = [command for command in commands() if command[-1] in ("migrate", "apply") or command[2:3] == ["migrate"]]
    looks = [command for command in commands() if "status" in command]
    assert (len(setup), len(looks)) == (3, 2)
    for command in setup:
        outbox(*command[1:])
    outbox("consumer", "run", "exports:service", "--drain")  # binds the queue
    with shop(environment, tmp_path, environ) as address:
        request_ = urllib.request.Request(f"{address}/events/3/sessions", method="POST")
        with urllib.request.urlopen(request_) as answer:
            created = json.loads(answer.read())["id"]
    outbox("relay", "--drain")
    outbox("consumer", "run", "exports:service", "--drain")
    engine = sa.create_engine(service)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT session_id, event_id FROM seen")).all() == [(created, 3)]
    engine.dispose()
    for command in looks:
        outbox(*command[1:])
    status = json.loads(outbox("status", "--json"))
    assert (status["pending"], status["published_total"]) == (0, 1)


def test_the_table_of_settings_is_the_one_in_force() -> None:
    block = re.search(r"<!-- settings -->\n(.*?)<!-- /settings -->", page("settings.md"), re.DOTALL)
    assert block
    assert block[1].strip() == settings_table()


def settings_table() -> str:
    """Return all settings as a Markdown table."""
    rows = [f"| `{row.name}` | {f'`{row.default}`' if row.default else ''} | {row.text} |" for row in Settings().rows()]
    return "\n".join(["| name | default | |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":  # what to paste when a setting changed
    print(settings_table())
