"""A clock that is wrong, and what a service forgets, writes and says: nothing durable hangs on the clock of one host."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from outbox.consumer import heartbeat, operating, tables
from tests.kit.consuming import Desk, Recorder, Running, message, rows, running, series, settings_for
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from outbox.settings import Settings

_DAYS = 15


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def settings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a service whose heart beats fast."""
    monkeypatch.setattr(heartbeat, "SEEN_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "_PRUNE_SECONDS", 0.1)
    url = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return settings_for(f"embedded:///{tmp_path}/broker.db", url)


@pytest.fixture
def prunes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each look for old ones took away."""
    seen: list[int] = []
    real = heartbeat.prune

    def prune(*arguments: Any) -> int:
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(heartbeat, "prune", prune)
    return seen


def set_host_clock(monkeypatch: pytest.MonkeyPatch, **ahead: int) -> None:
    """Let every module of the library that asks this host for the time be told another one."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(**ahead)

    for name, module in list(sys.modules.items()):
        if name.startswith("outbox.") and getattr(module, "datetime", None) is datetime:
            monkeypatch.setattr(module, "datetime", Wrong)


def applied(service: Running, count: int) -> None:
    eventually(lambda: service.status().applied_total >= count, what=f"{count} messages to be applied")


@pytest.mark.parametrize("days", [_DAYS, -_DAYS], ids=["ahead", "behind"])
def test_a_process_with_a_wrong_clock_forgets_nothing_that_may_come_again(
    settings: Settings, prunes: list[int], monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    recorder, desk = Recorder(), Desk(str(settings.broker_url))
    sent = series("a", 20)
    with running(recorder.service, settings) as service:
        desk.publish(*sent)
        applied(service, 20)
    with monkeypatch.context() as wrong:
        set_host_clock(wrong, days=days)
        prunes.clear()
        with running(recorder.service, settings):
            eventually(lambda: len(prunes) >= 2, what="two looks for what is old")
    with running(recorder.service, settings) as service:
        desk.publish(*sent)
        eventually(lambda: service.status().duplicates_total == 20, what="the repetitions to be recognised")
        assert recorder.numbers(service.engine) == list(range(1, 21))


@pytest.mark.postgres
def test_what_a_service_writes_bears_the_databases_time(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_host_clock(monkeypatch, days=_DAYS)
    settings = settings_for(f"embedded:///{tmp_path}/broker.db", postgres_url)

    def fails(*_: Any) -> None:
        raise ValueError("a bug")

    recorder = Recorder(before=fails)
    with running(recorder.service, settings) as service:
        Desk(str(settings.broker_url)).publish(message(1))
        eventually(lambda: service.status().parked == 1, what="the message to be parked")
        eventually(lambda: service.status().running, what="its first heartbeat")  # it writes that beside its work
        (entry,) = operating.parked_list(service.engine, recorder.service)
        operating.requeue(service.engine, recorder.service, [entry.id], actor="me@here")
        written = {
            "taken": rows(service.engine, tables.inbox)[0].taken_at,
            "parked": rows(service.engine, tables.parked)[0].parked_at,
            "ordered": rows(service.engine, tables.parked)[0].acted_at,
            "started": rows(service.engine, tables.process)[0].started_at,
            "seen": rows(service.engine, tables.process)[0].seen_at,
        }
        eventually(lambda: rows(service.engine, tables.process)[0].caught_up_at is not None, what="it to catch up")
        written["caught up"] = rows(service.engine, tables.process)[0].caught_up_at
    now = datetime.now(UTC)
    assert [name for name, moment in written.items() if abs(now - moment) > timedelta(minutes=5)] == []
