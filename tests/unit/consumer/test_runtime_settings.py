"""Each setting of a service reaches what it is about: the runtime does another thing when it changes."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from outbox.consumer import key_lanes, tables
from tests.kit.consuming import EXCHANGE, Desk, Recorder, Running, message, rows, running, settings_for
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from outbox.settings import Settings

QUEUE = f"{EXCHANGE}.exports"


def settings(tmp_path: Path, **more: str) -> Settings:
    return settings_for(f"embedded:///{tmp_path}/broker.db", f"sqlite:///{tmp_path}/service.db", **more)


class Gate:
    """Holds handlers back until it opens, and notes which of them shared a transaction."""

    def __init__(self) -> None:
        self._open = threading.Event()
        #: That of each message; kept, so that no two have the same identity.
        self.transactions: list[Any] = []

    def __call__(self, _message: Any, session: Any) -> None:
        self.transactions.append(session.get_transaction())
        assert self._open.wait(20), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()

    @property
    def most_at_once(self) -> int:
        return max(self.transactions.count(each) for each in self.transactions)


def test_the_prefetch_is_how_many_messages_leave_the_queue_at_once(tmp_path: Path) -> None:
    gate = Gate()
    recorder = Recorder(before=gate)
    with running(recorder.service, settings(tmp_path, CONSUMER_PREFETCH="3")) as service:
        desk = Desk(f"embedded:///{tmp_path}/broker.db")
        desk.publish(*(message(number) for number in range(10)))
        eventually(lambda: desk.waiting(QUEUE) == 7, what="three of ten messages to be delivered")
        gate.open()
        eventually(lambda: service.status().applied_total == 10)


@pytest.mark.parametrize(("of_service", "of_settings", "most"), [(None, "2", 2), (1, "50", 1), (None, "50", 9)])
def test_the_batch_is_how_many_messages_share_a_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_service: int | None, of_settings: str, most: int
) -> None:
    monkeypatch.setattr(key_lanes, "_BATCH_SECONDS", 3600.0)  # the gate makes a slow handler
    gate = Gate()
    recorder = Recorder(before=gate, batch=of_service)
    with running(recorder.service, settings(tmp_path, CONSUMER_BATCH=of_settings)) as service:
        desk = Desk(f"embedded:///{tmp_path}/broker.db")
        desk.publish(message(0))
        eventually(lambda: gate.transactions, what="the first message to be in hand")
        desk.publish(*(message(number) for number in range(1, 10)))
        eventually(lambda: desk.waiting(QUEUE) == 0, what="the others to wait behind it")
        gate.open()
        eventually(lambda: service.status().applied_total == 10)
    assert gate.most_at_once == most


def test_the_attempts_are_how_often_a_handler_fails_before_its_message_is_parked(tmp_path: Path) -> None:
    def fail(_message: Any, _session: Any) -> None:
        raise ValueError("no")

    recorder = Recorder(before=fail)
    with running(recorder.service, settings(tmp_path, CONSUMER_MAX_ATTEMPTS="2"), policy=None) as service:
        Desk(f"embedded:///{tmp_path}/broker.db").publish(message(1))
        eventually(lambda: service.status().parked == 1)
        assert [row.attempts for row in rows(service.engine, tables.parked)] == [2]


def test_the_retention_is_how_long_ids_are_remembered(tmp_path: Path) -> None:
    recorder = Recorder()
    process = Running(recorder.service, settings(tmp_path, OUTBOX_RETENTION="1h", CONSUMER_INBOX_RETENTION="2h"))
    with process.engine.begin() as connection:
        connection.execute(
            tables.inbox.insert(),
            [
                {"service": "exports", "source": "/s", "message_id": f"{minutes} minutes", "taken_at": ago(minutes)}
                for minutes in (0, 90, 180)  # by the first the service was at work until now
            ],
        )
    process.start()
    eventually(lambda: [row.message_id for row in rows(process.engine, tables.inbox)] == ["0 minutes", "90 minutes"])
    process.stop()
    process.engine.dispose()


def ago(minutes: int) -> datetime:
    return datetime.now(UTC) - timedelta(minutes=minutes)


def test_sqlite_has_one_writer_and_a_service_on_it_one_worker(tmp_path: Path) -> None:
    names = set()
    recorder = Recorder(before=lambda *_: names.add(threading.current_thread().name))
    with running(recorder.service, settings(tmp_path, CONSUMER_WORKERS="7", CONSUMER_BATCH="1")) as service:
        Desk(f"embedded:///{tmp_path}/broker.db").publish(*(message(number) for number in range(20)))
        eventually(lambda: service.status().applied_total == 20)
    assert len(names) == 1


def test_of_a_small_prefetch_no_worker_takes_all(tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lanes, "_BATCH_SECONDS", 3600.0)  # the gate makes a slow handler
    gate = Gate()
    broker = f"embedded:///{tmp_path}/broker.db"
    recorder = Recorder(before=gate)
    given = settings_for(broker, postgres_url, CONSUMER_PREFETCH="8", CONSUMER_WORKERS="4")
    with running(recorder.service, given) as service:
        desk = Desk(broker)
        for number in range(4):
            desk.publish(message(number))
            eventually(lambda: len(gate.transactions) > number, what="the next worker to have a message in hand")  # noqa: B023
        desk.publish(*(message(number) for number in range(4, 8)))
        eventually(lambda: desk.waiting(QUEUE) == 0, what="the others to wait behind them")
        gate.open()
        eventually(lambda: service.status().applied_total == 8, 20, "all to be applied")
    assert gate.most_at_once <= 2  # whoever was free first, of the four that waited


def test_a_handler_beyond_the_limit_makes_the_process_no_good(tmp_path: Path) -> None:
    gate = Gate()
    recorder = Recorder(before=gate)
    with running(recorder.service, settings(tmp_path, CONSUMER_HANDLER_LIMIT="1s")) as service:
        assert service.runtime.live().ok
        Desk(f"embedded:///{tmp_path}/broker.db").publish(message(1))
        eventually(lambda: not service.runtime.live().ok, what="the limit to be passed")
        assert service.runtime.live().detail["oldest_handler_seconds"] > 1.0
        gate.open()
        eventually(lambda: service.runtime.live().ok, what="the handler to return")
