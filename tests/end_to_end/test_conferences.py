"""Whole conferences go the whole way, through the public commands alone: import, relay, services, files."""

from __future__ import annotations

import json
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from aiosmtpd.controller import Controller
from icalendar import Calendar

from tests.kit.api import Api
from tests.kit.conferences import FOSSASIA, INVENTED, PYCON, Export, together
from tests.kit.ports import free_port
from tests.kit.processes import run
from tests.kit.world import World, embedded_world, rabbit_world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Spawn
    from tests.kit.servers import ExternalPostgres, PostgresServer

SERVICES = ("exports", "notifications")


class Mailbox:
    """A mail server's memory."""

    def __init__(self) -> None:
        self.recipients: list[str] = []

    async def handle_DATA(self, server: object, session: object, envelope: Any) -> str:  # noqa: N802
        self.recipients += envelope.rcpt_tos
        return "250 OK"


@pytest.fixture
def mailbox() -> Iterator[tuple[Mailbox, int]]:
    """A mail server that takes everything, and its port."""
    box, port = Mailbox(), free_port()
    controller = Controller(box, hostname="127.0.0.1", port=port)
    controller.start()
    yield box, port
    controller.stop()


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=[pytest.mark.postgres, pytest.mark.rabbitmq])])
def world(request: pytest.FixtureRequest, spawn: Spawn, tmp_path: Path, mailbox: tuple[Mailbox, int]) -> Iterator[World]:
    """The application in the box, its tables and queues made; the test runs without servers and with them."""
    more = {"EXPORTS_FOLDER": str(tmp_path / "exports"), "NOTIFICATIONS_SMTP_URL": f"smtp://127.0.0.1:{mailbox[1]}"}
    if request.param == "embedded":
        yield _prepared(embedded_world(spawn, tmp_path, **more))
        return
    server: PostgresServer | ExternalPostgres = request.getfixturevalue("postgres_server")
    with server.database() as url, server.database() as service_url:
        yield _prepared(rabbit_world(spawn, url, request.getfixturevalue("broker_url"), service_url, **more))


def _prepared(world: World) -> World:
    _run(world, "flask", "--app", "publisher", "migrate")
    world.ask.fine("topology", "apply")
    for name in SERVICES:
        world.ask.fine("consumer", "migrate", name)
        world.ask.fine("consumer", "topology", name, "--apply")
    return world


def _run(world: World, *command: str) -> str:
    done = run(*command, env=world.env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("exports", [together("invented", *INVENTED), together("real", FOSSASIA, PYCON)])
def test_conferences_reach_every_service_once_and_whole(
    world: World, tmp_path: Path, mailbox: tuple[Mailbox, int], exports: tuple[Export, ...]
) -> None:
    reports = [json.loads(_run(world, "flask", "--app", "publisher", "import", *export.arguments)) for export in exports]
    for report, export in zip(reports, exports, strict=True):
        assert {kind: count["created"] for kind, count in report["counts"].items() if count["created"]} == export.created
    port = free_port()
    publisher = world.start("flask", "--app", "publisher", "run", "--port", str(port))
    publisher.wait_for_http(f"http://127.0.0.1:{port}/readyz")
    api = Api(f"http://127.0.0.1:{port}")
    concerned = _cancel_a_session(api, reports[0]["event_id"])

    for command in (("relay",), ("consumer", "run", "exports"), ("consumer", "run", "notifications")):
        process = world.start("outbox", *command, "--drain")
        assert process.wait(60) == 0, process.output

    _everything_was_applied_once(world, 3 + sum(export.messages for export in exports))
    assert mailbox[0].recipients == [concerned]
    for report in reports:
        folder = tmp_path / "exports" / f"event-{report['event_id']}"
        told = _told(api, report["event_id"])
        assert json.loads((folder / "open-event.json").read_text(encoding="utf-8")) == told
        _the_calendar_is_right(folder / "schedule.ics", told)


def _cancel_a_session(api: Api, event_id: int) -> str:
    """Cancel an accepted session of one speaker; return the address that should hear of it. Three more messages."""
    session = next(
        session
        for session in api.all(f"/v1/events/{event_id}/sessions")
        if session["state"] == "accepted" and len(session["speaker_ids"]) == 1
    )
    address = "speaker@example.org"  # exports name none
    api.send("PATCH", f"/v1/speakers/{session['speaker_ids'][0]}", {"email": address})
    api.send("POST", f"/v1/sessions/{session['id']}/state", {"state": "canceled"})
    return address


def _everything_was_applied_once(world: World, expected: int) -> None:
    """Nothing waits, nothing is parked, and the counts of the services are those of the messages on their topics."""
    status = world.status()
    assert [name for name in ("pending", "retrying", "unroutable", "dead", "held_keys") if status[name]] == []
    messages = world.ask.json("list", "--state", "published", "--limit", "10000")
    assert status["published_total"] == len(messages) == expected
    moves = [message for message in messages if message["topic"] == "session.state_changed"]
    assert len(moves) == 1
    for name, applied in (("exports", len(messages) - len(moves)), ("notifications", len(moves))):
        found = world.service_status(name)
        assert found["applied_total"] == applied
        assert [count for count in ("duplicates_total", "late_total", "parked", "held_keys") if found[count]] == []


def _told(api: Api, event_id: int) -> dict[str, Any]:
    """Everything that the API answers about an event."""
    event = api.get(f"/v1/events/{event_id}")
    kinds = ("tracks", "microlocations", "speakers", "sessions")
    told = {kind: api.all(f"/v1/events/{event_id}/{kind}") for kind in kinds}
    assert all(api.get(f"/v1/{kind}/{told[kind][-1]['id']}") == told[kind][-1] for kind in kinds if told[kind])
    return {"event": event, **told}


def _the_calendar_is_right(path: Path, told: dict[str, Any]) -> None:
    """One VEVENT, at the right time, for each accepted session that has a time; none for the others."""
    calendar = Calendar.from_ical(path.read_bytes())
    found = {
        int(str(component["uid"]).removeprefix("session-").partition(".")[0]): component
        for component in calendar.walk("VEVENT")
    }
    assert len(found) == len(list(calendar.walk("VEVENT")))
    expected = {
        session["id"]: session
        for session in told["sessions"]
        if session["state"] in ("accepted", "confirmed") and session["starts_at"] and session["ends_at"]
    }
    assert found.keys() == expected.keys()
    assert expected
    moment = partial(map, datetime.fromisoformat)
    for id_, session in expected.items():
        assert [found[id_].decoded("dtstart"), found[id_].decoded("dtend")] == [
            *moment((session["starts_at"], session["ends_at"]))
        ]
