"""A message that kills its process: it is set aside, and nobody else is, whoever was in hand beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from outbox.consumer import operating, provisioning
from outbox.consumer.tables import Reason
from tests.faults.crashing import KILLER, recorder, service
from tests.kit.consuming import EXCHANGE, Desk, message, series, settings_for
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Spawn

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("broker", ["rabbitmq", "embedded"])
@pytest.mark.timeout(120)
def test_a_crash_loop_ends_with_the_culprit_parked_and_the_innocents_applied(
    request: pytest.FixtureRequest, spawn: Spawn, tmp_path: Path, broker: str
) -> None:
    if broker == "rabbitmq":
        broker_url, database_url = request.getfixturevalue("broker_url"), request.getfixturevalue("postgres_url")
    else:
        broker_url, database_url = f"embedded:///{tmp_path}/broker.db", f"sqlite:///{tmp_path}/service.db"
    given = {"CONSUMER_MAX_ATTEMPTS": "1", "CONSUMER_PREFETCH": "50", "CONSUMER_BATCH": "10"}
    settings = settings_for(broker_url, database_url, **given)
    engine = operating.open_engine(service, settings)
    operating.migrate(service, engine)
    provisioning.apply(service, settings)
    desk = Desk(broker_url)
    killer = message(KILLER, key="bad", sequence=1)
    desk.publish(*series("before", 10), killer, message(100, key="bad", sequence=2), *series("after", 10, first=20))
    env = {
        **given,
        "BROKER_URL": broker_url,
        "CONSUMER_DATABASE_URL": database_url,
        "OUTBOX_EXCHANGE": EXCHANGE,
    }
    command = ("outbox", "consumer", "run", "tests.faults.crashing:service", "--drain")

    deaths = 0
    while (code := spawn(*command, env=env).wait(40)) != 0:
        assert code == -9
        deaths += 1
        assert deaths < 12, "the crash loop does not end"
    assert deaths == 4  # three before it is suspected, one on record

    entries = operating.parked_list(engine, service)
    assert [entry.reason for entry in entries] == [Reason.CRASHED, Reason.BEHIND]
    assert entries[0].id == str(killer.id)
    assert recorder.numbers(engine, "before") == list(range(1, 11))
    assert recorder.numbers(engine, "after") == list(range(20, 30))
    assert desk.left(f"{EXCHANGE}.crashing") == 0
    if broker == "rabbitmq":
        return  # from here on it is the database alone that counts

    # Requeued, it kills again, on record from the first time, and is parked again without taking others along.
    operating.requeue(engine, service, [str(killer.id)], actor="me@here")
    deaths = 0
    while spawn(*command, env=env).wait(40) != 0:
        deaths += 1
        assert deaths < 6
    assert deaths == 1
    assert operating.parked_list(engine, service)[0].reason == Reason.CRASHED
    operating.requeue(engine, service, [str(killer.id)], actor="me@here")
    assert spawn(*command, env={**env, "KILLER_IS_HARMLESS": "yes"}).wait(40) == 0
    assert recorder.numbers(engine, "bad") == [KILLER, 100]
    engine.dispose()


@pytest.mark.timeout(60)
def test_the_first_signal_ends_a_service_in_order_and_the_second_at_once(spawn: Spawn, tmp_path: Path) -> None:
    env = {
        "BROKER_URL": f"embedded:///{tmp_path}/broker.db",
        "CONSUMER_DATABASE_URL": f"sqlite:///{tmp_path}/service.db",
        "OUTBOX_EXCHANGE": EXCHANGE,
    }
    calm = spawn("outbox", "consumer", "run", "tests.faults.crashing:service", env=env)
    calm.wait_for_line("consumer.connected")
    calm.terminate()
    assert calm.wait(20) == 0
    assert "consumer.stopped" in calm.output

    blocked = spawn("outbox", "consumer", "run", "tests.faults.crashing:service", env={**env, "OUTBOX_FAILPOINTS": "K2=block"})
    blocked.wait_for_line("consumer.connected")
    Desk(env["BROKER_URL"]).publish(message(1))
    eventually(lambda: Desk(env["BROKER_URL"]).waiting(f"{EXCHANGE}.crashing") == 0, what="the message to be in hand")
    blocked.terminate()
    blocked.wait_for_line("consumer.stopping")
    blocked.terminate()
    assert blocked.wait(5) == 128 + 15
