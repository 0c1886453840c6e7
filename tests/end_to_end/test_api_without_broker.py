"""While RabbitMQ is stopped the API answers as always and as fast; all of it is delivered when the broker is back."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.kit.api import Api
from tests.kit.ports import free_port
from tests.kit.processes import run
from tests.kit.waiting import eventually
from tests.kit.world import World, end, rabbit_world

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Spawn
    from tests.kit.processes import Process
    from tests.kit.servers import ExternalPostgres, PostgresServer, RabbitServer

WRITES = 200
#: What no write may take, whatever else the machine does: an API that waits for the broker would.
BROKEN_SECONDS = 5.0
CONFERENCE = {
    "name": "Blinker Day",
    "timezone": "Europe/Berlin",
    "starts_at": "2027-05-23T09:00:00+02:00",
    "ends_at": "2027-05-23T18:00:00+02:00",
}


@pytest.mark.timeout(180)
def test_two_hundred_writes_do_not_notice_that_the_broker_is_away(
    spawn: Spawn,
    tmp_path: Path,
    postgres_server: PostgresServer | ExternalPostgres,
    private_rabbit: Callable[[], RabbitServer],
) -> None:
    rabbit = private_rabbit()
    with postgres_server.database() as url, postgres_server.database() as service_url:
        world = rabbit_world(spawn, url, rabbit.url, service_url, EXPORTS_FOLDER=str(tmp_path / "exports"))
        api, processes = _running(world)
        event = api.send("POST", "/v1/events", CONFERENCE)["id"]
        session = api.send("POST", f"/v1/events/{event}/sessions", {"title": "Signals"})["id"]
        _writes(api, event, session, 20)  # connections and caches
        with_broker = _writes(api, event, session, WRITES)
        _all_applied(world)

        rabbit.kill()
        without = _writes(api, event, session, WRITES)
        assert world.status()["pending"] == WRITES
        rabbit.start()
        began = time.monotonic()
        _all_applied(world)
        delivered_seconds = time.monotonic() - began

        assert without.answers == with_broker.answers
        ratio = without.median / with_broker.median
        print(f"median write {with_broker.median * 1000:.1f} ms; without a broker {ratio:.2f} times that, slowest ", end="")
        print(f"{max(without.seconds) * 1000:.0f} ms; all delivered {delivered_seconds:.1f} s after its return")
        assert max(without.seconds) < BROKEN_SECONDS
        assert ratio < 5
        end(*processes)
        assert world.service_status("exports")["duplicates_total"] == 0


class _Writes:
    """What was answered, without what can't be the same twice, and how long each took."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.seconds: list[float] = []

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _writes(api: Api, event: int, session: int, count: int) -> _Writes:
    """Make *count* changes, half of them new speakers, half of them changes of one session."""
    made = _Writes()
    for number in range(count):
        began = time.monotonic()
        if number % 2:
            status, answer = api.request("PATCH", f"/v1/sessions/{session}", {"comments": f"change {began} {number}"})
            answer.pop("comments", None)
        else:
            status, answer = api.request("POST", f"/v1/events/{event}/speakers", {"name": f"Speaker {number}"})
            answer.pop("id", None)
        made.seconds.append(time.monotonic() - began)
        made.answers.append((status, answer))
    return made


def _running(world: World) -> tuple[Api, list[Process]]:
    """Start the application: tables, API under gunicorn, relay, one service. Return also relay and service."""
    done = run("flask", "--app", "publisher", "migrate", env=world.env)
    assert done.returncode == 0, done.stderr
    world.ask.fine("consumer", "migrate", "exports")
    service, relay = world.service(name="exports"), world.relay()
    service.wait_for_line("consumer.connected")
    relay.wait_for_line("works on all")
    port = free_port()
    address = f"127.0.0.1:{port}"
    server = world.start("gunicorn", "--workers", "2", "--bind", address, "publisher:create_app()")
    server.wait_for_http(f"http://{address}/readyz")
    return Api(f"http://{address}"), [relay, service]


def _all_applied(world: World) -> None:
    """Wait until nothing is pending and the service has everything that was published."""

    def done() -> bool:
        status = world.status()
        return bool(status["pending"] == 0 and world.service_status("exports")["applied_total"] == status["published_total"])

    eventually(done, 60, "everything to be delivered", interval=0.1)
