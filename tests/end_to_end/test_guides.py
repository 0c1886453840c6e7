"""The guides in docs/ are true: each block of Python is a file of a small project, and the project runs."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox import tables
from tests.kit.guides import write
from tests.kit.ports import free_port
from tests.kit.processes import Process, environment, run
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Spawn


def python(folder: Path, *arguments: str, **environ: str) -> str:
    """Run Python in *folder* and return what it printed."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def keys(url: str) -> list[str | None]:
    """Return the keys of the messages that were committed, in their order."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        found = list(connection.scalars(sa.select(tables.message.c.key).order_by(tables.message.c.id)))
    engine.dispose()
    return found


@pytest.fixture
def box_office(tmp_path: Path) -> Path:
    """The project of docs/flask.md."""
    write("flask.md", tmp_path, "python")
    return tmp_path


# --- docs/flask.md ------------------------------------------------------------------------------------------------------


def test_the_tests_of_the_flask_guide_pass(box_office: Path) -> None:
    assert "5 passed" in python(box_office, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def test_plain_and_asynchronous_sessions_send_as_the_flask_guide_says(box_office: Path) -> None:
    url = f"sqlite:///{box_office}/plain.db"
    program = (
        "import asyncio, plain, asynchronous\n"
        "from sqlalchemy.ext.asyncio import create_async_engine\n"
        f"plain.sell_one({url!r})\n"
        f"engine = create_async_engine({url.replace('sqlite', 'sqlite+aiosqlite')!r})\n"
        "async def main():\n"
        "    await asynchronous.sell(engine, 8)\n"
        "    await engine.dispose()\n"
        "asyncio.run(main())\n"
    )
    python(box_office, "-c", program)
    assert keys(url) == ["event:7", "event:7", "event:7", "event:8"]


def test_alembic_makes_the_tables_and_leaves_them_alone_and_jobs_send_too(box_office: Path) -> None:
    url = f"sqlite:///{box_office}/shop.db"
    environ = {"FLASK_SQLALCHEMY_DATABASE_URI": url}
    (box_office / "alembic.ini").write_text("[alembic]\nscript_location = migrations\npath_separator = os\n")
    (box_office / "migrations" / "script.py.mako").write_text("${upgrades}")
    python(box_office, "-m", "alembic", "upgrade", "head", **environ)
    python(box_office, "-c", "import shop\nwith shop.create_app().app_context(): shop.db.create_all()", **environ)
    assert "No new upgrade operations detected" in python(box_office, "-m", "alembic", "check", **environ)
    python(box_office, "-c", "import jobs, shop\njobs.sell_out(shop.create_app(), 7, ['A1', 'A2'])", **environ)
    assert keys(url) == ["event:7", "event:7"]


@pytest.mark.postgres
def test_gunicorn_forks_an_application_that_was_loaded_before(box_office: Path, spawn: Spawn, postgres_url: str) -> None:
    environ = {"FLASK_SQLALCHEMY_DATABASE_URI": postgres_url}
    assert run("flask", "--app", "shop", "outbox", "migrate", cwd=box_office, env=environ).returncode == 0
    python(box_office, "-c", "import shop\nwith shop.create_app().app_context(): shop.db.create_all()", **environ)
    port = free_port()
    command = ("gunicorn", "--preload", "--workers", "2", "--bind", f"127.0.0.1:{port}", "shop:create_app()")
    server: Process = spawn(*command, env=environ, cwd=box_office)
    eventually(lambda: server.output.count("Booting worker") == 2, 30, what="both workers to boot")
    for seat in ("A1", "A2", "A3", "A4"):
        address = f"http://127.0.0.1:{port}/events/7/tickets/{seat}"
        with urllib.request.urlopen(urllib.request.Request(address, method="POST")) as answer:
            assert answer.status == 201
    assert keys(postgres_url) == ["event:7"] * 4


# --- docs/services.md ---------------------------------------------------------------------------------------------------


@pytest.fixture
def venue(tmp_path: Path) -> Path:
    """The project of docs/services.md."""
    write("services.md", tmp_path, "python")
    return tmp_path


def test_the_tests_of_the_services_guide_pass(venue: Path) -> None:
    assert "7 passed" in python(venue, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def test_the_commands_of_the_services_guide_run_a_service_and_its_own_check_ends_it(venue: Path) -> None:
    environ = {"CONSUMER_DATABASE_URL": "sqlite:///venue.db", "BROKER_URL": f"embedded:///{venue}/broker.db"}
    for command in (("migrate", "seats:service"), ("run", "seats:service", "--drain")):
        assert run("outbox", "consumer", *command, env=environ, cwd=venue).returncode == 0
    refused = run("outbox", "consumer", "run", "badges:service", env=environ, cwd=venue)
    assert (refused.returncode, "PRINTER is not set" in refused.stderr) == (1, True), refused.stderr
