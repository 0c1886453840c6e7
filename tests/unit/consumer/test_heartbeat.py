"""What a service writes about itself, and what it forgets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox.consumer import heartbeat, operating, tables
from outbox.consumer.heartbeat import Upkeep
from outbox.database import create_engine
from tests.kit.consuming import Recorder, rows
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

SERVICE = Recorder().service
NOW = datetime(2026, 1, 1, tzinfo=UTC)


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
    keeper = Upkeep(SERVICE, engine, retention_seconds=14 * 86_400.0)
    keeper.start()
    eventually(lambda: len(rows(engine, tables.inbox)) == 100, what="the old ids to be forgotten")
    keeper.stop()


def test_a_process_is_seen_running_and_then_stopped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SEEN_SECONDS", 0.05)
    keeper = Upkeep(SERVICE, engine, retention_seconds=3600.0)
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
    ],
)
def test_the_lag_is_never_less_than_what_may_be_waiting(
    engine: Engine, processes: list[dict[str, object]], lag: float | None
) -> None:
    with engine.begin() as connection:
        for each in processes:
            connection.execute(sa.insert(tables.process).values(each))
    assert operating.status(engine, SERVICE, now=NOW).lag_seconds == lag
