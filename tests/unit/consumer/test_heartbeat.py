"""What a service writes about itself, and what it forgets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from outbox.consumer import heartbeat, operating, tables, topology
from outbox.consumer.heartbeat import Upkeep
from outbox.database import create_engine
from tests.kit.consuming import Recorder, arrival, message, rows
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

SERVICE = Recorder().service
TOPOLOGY = topology.of(SERVICE, "openevent")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR_AGO = datetime.now(UTC) - timedelta(hours=1)


@pytest.fixture
def engine(sqlite_url: str) -> Engine:
    engine = create_engine(sqlite_url)
    operating.migrate(SERVICE, engine)
    return engine


def test_ids_older_than_the_retention_are_forgotten_in_several_transactions(engine: Engine) -> None:
    old, young = datetime.now(UTC) - timedelta(days=20), datetime.now(UTC)
    with engine.begin() as connection:
        connection.execute(
            tables.inbox.insert(),
            [
                {"service": "exports", "source": "/s", "message_id": str(number), "taken_at": old if number < 2500 else young}
                for number in range(2600)
            ],
        )
    keeper = Upkeep(SERVICE, engine, TOPOLOGY, retention_seconds=14 * 86_400.0)
    keeper.start()
    eventually(lambda: len(rows(engine, tables.inbox)) == 100, what="the old ids to be forgotten")
    keeper.stop()


def test_a_process_is_seen_running_and_then_stopped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SEEN_SECONDS", 0.05)
    keeper = Upkeep(SERVICE, engine, TOPOLOGY, retention_seconds=3600.0)
    keeper.start()
    eventually(lambda: operating.status(engine, SERVICE).running)
    (process,) = operating.status(engine, SERVICE).processes
    assert process["connected"] is False
    keeper.stop()
    assert not operating.status(engine, SERVICE).running


def process(**values: object) -> dict[str, object]:
    given = {"service": "exports", "id": "1", "host": "h", "pid": 1, "version": "1", "state": "running", "connected": True}
    return {**given, "started_at": NOW - timedelta(hours=9), "seen_at": NOW, **values}


@pytest.mark.parametrize(
    ("processes", "lag"),
    [
        ([], None),  # it never ran
        ([process(caught_up_at=NOW)], 0.0),
        ([process(oldest_at=NOW - timedelta(seconds=40))], 40.0),
        ([process(oldest_at=NOW + timedelta(seconds=5))], 0.0),  # the publisher's clock is ahead
        ([process(), process(id="2", oldest_at=NOW - timedelta(seconds=7))], 7.0),  # one works, one waits for its turn
        ([process(seen_at=NOW - timedelta(seconds=6))], 6.0),  # alive, but its row is not written: nobody knows
        ([process(connected=False, caught_up_at=NOW - timedelta(minutes=2))], 120.0),
        ([process(seen_at=NOW - timedelta(minutes=1), caught_up_at=NOW - timedelta(minutes=2))], 120.0),  # killed
        ([process(state="stopped", caught_up_at=NOW - timedelta(minutes=3))], 180.0),
        ([process(state="stopped")], 9 * 3600.0),  # it never caught up
        ([process(id="2", state="stopped", caught_up_at=NOW - timedelta(minutes=3)), process(caught_up_at=NOW)], 0.0),
        # The broker went: what was in hand is as old as it was, however short the queue had looked a moment before.
        ([process(connected=False, oldest_at=NOW - timedelta(hours=1), caught_up_at=NOW - timedelta(seconds=9))], 3600.0),
        # It was killed with messages in hand, and nobody has been through with everything since.
        ([process(state="stopped", oldest_at=NOW - timedelta(hours=1), caught_up_at=NOW - timedelta(seconds=9))], 3600.0),
        (
            [
                process(state="stopped", seen_at=NOW - timedelta(minutes=9), oldest_at=NOW - timedelta(hours=1)),
                process(id="2", state="stopped", caught_up_at=NOW - timedelta(minutes=2)),
            ],
            120.0,
        ),
        # Something waits in the queue, and nobody is given it.
        ([process(caught_up_at=NOW - timedelta(minutes=1))], 60.0),
    ],
)
def test_the_lag_is_never_less_than_what_may_be_waiting(
    engine: Engine, processes: list[dict[str, object]], lag: float | None
) -> None:
    with engine.begin() as connection:
        for each in processes:
            connection.execute(sa.insert(tables.process).values(each))
    assert operating.status(engine, SERVICE, now=NOW).lag_seconds == lag


class FakeLink:
    """A link with so many messages in hand, and so many in the queue."""

    def __init__(self, in_hand: list[datetime | None], backlog: int) -> None:
        self._in_hand = [arrival(message(created_at=sent)) for sent in in_hand]
        self._backlog = backlog
        self.asked = 0

    def in_hand(self) -> list[Any]:
        return self._in_hand

    def backlog(self, _topology: Any) -> int:
        self.asked += 1
        return self._backlog


def lag_after(engine: Engine, *links: FakeLink | None) -> float | None:
    """The lag that is seen after the receiving thread stood like this, time after time."""
    keeper = Upkeep(SERVICE, engine, TOPOLOGY, retention_seconds=3600.0)
    keeper.prepare()
    for link in links:
        keeper.look(link, now=True)  # type: ignore[arg-type]
    keeper.start()
    eventually(lambda: operating.status(engine, SERVICE).running)
    lag = operating.status(engine, SERVICE).lag_seconds
    keeper.stop()
    return lag


@pytest.mark.parametrize(
    ("links", "at_least", "at_most"),
    [
        ([FakeLink([], 0)], 0.0, 0.0),
        ([FakeLink([HOUR_AGO], 5)], 3600.0, 9 * 3600.0),
        ([FakeLink([HOUR_AGO], 5), FakeLink([], 5)], 3600.0, 9 * 3600.0),  # between two handfuls
        ([FakeLink([HOUR_AGO], 5), FakeLink([], 0)], 0.0, 0.0),
        ([FakeLink([HOUR_AGO], 5), FakeLink([], 5), None], 3600.0, 9 * 3600.0),  # the broker went in that moment
        ([FakeLink([], 0), None], 0.0, 60.0),
        ([FakeLink([HOUR_AGO], 5), FakeLink([], 0), None], 0.0, 60.0),
    ],
    ids=["idle", "busy", "between", "done", "broker-gone", "broker-gone-idle", "broker-gone-after-all"],
)
def test_the_lag_falls_only_when_the_queue_is_seen_empty(
    engine: Engine, links: list[FakeLink | None], at_least: float, at_most: float
) -> None:
    lag = lag_after(engine, *links)
    assert lag is not None
    assert at_least <= lag <= at_most


def test_an_idle_service_asks_its_broker_seldom(engine: Engine) -> None:
    keeper = Upkeep(SERVICE, engine, TOPOLOGY, retention_seconds=3600.0)
    link = FakeLink([], 0)
    for _ in range(5):
        keeper.look(link, now=True)  # type: ignore[arg-type]
    assert link.asked == 1
