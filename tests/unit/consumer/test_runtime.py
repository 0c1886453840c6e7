"""A running service in one process, on the embedded broker: failures at each step of its work."""

from __future__ import annotations

import socket
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from outbox.consumer import Service, operating, runtime
from outbox.consumer.link import Link
from outbox.consumer.retries import Attempts
from outbox.embedded.queues import Queues
from outbox.embedded.urls import path_of
from outbox.errors import BrokerError, ConfigurationError, Unavailable
from outbox.process import failpoints
from outbox.process.backoff import Backoff
from outbox.settings import Settings, load
from tests.kit.consuming import EXCHANGE, Desk, Recorder, Running, message, running, series, settings_for
from tests.kit.ports import free_port
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUEUE = f"{EXCHANGE}.exports"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(f"embedded:///{tmp_path}/broker.db", f"sqlite:///{tmp_path}/service.db")


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm({})


@pytest.mark.parametrize("point", ["K1", "K2", "K3", "K4", "K5", "K6"])
def test_a_failure_at_any_step_costs_no_message_and_no_second_effect(settings: Settings, point: str) -> None:
    def fail(received: Any, _session: Any) -> None:
        if received.data["number"] == 7:
            raise ValueError("no")

    recorder = Recorder(before=fail)
    failpoints.arm({"OUTBOX_FAILPOINTS": f"{point}=raise@{1 if point == 'K6' else 3}"})
    with running(recorder.service, settings) as service:
        desk = Desk(str(settings.broker_url))
        for number in range(1, 13):  # 7 and 10 are of one key: the second waits behind the first
            desk.publish(message(number, key=f"key:{number % 3}", sequence=(number + 2) // 3))
        eventually(lambda: service.status().applied_total == 10, 20, "the others to be applied")
        eventually(lambda: service.status().parked == 2, what="the failing one and the one behind it to be parked")
        assert sorted(recorder.numbers(service.engine)) == [1, 2, 3, 4, 5, 6, 8, 9, 11, 12]
        eventually(lambda: desk.left(QUEUE) == 0, what="everything to be acknowledged, also what came twice")


def test_a_worker_that_crashes_ends_the_process_with_1_and_its_messages_stay(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(*_: Any) -> None:
        raise MemoryError("a bug in the runtime")

    monkeypatch.setattr(Attempts, "settle", crash)
    recorder = Recorder()
    service = Running(recorder.service, settings).start()
    Desk(str(settings.broker_url)).publish(message(1))
    assert service.join() == 1
    assert "a worker ended: MemoryError" in caplog.messages
    assert "a bug in the runtime" not in caplog.text.replace("MemoryError: a bug in the runtime", "")
    assert Desk(str(settings.broker_url)).left(QUEUE) == 1


def test_a_service_needs_its_urls_handlers_and_receivers_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"BROKER_URL is not set(.|\n)*CONSUMER_DATABASE_URL is not set"):
        runtime.run(Recorder().service, load({}))
    url = f"sqlite:///{tmp_path}/none.db"
    with pytest.raises(ConfigurationError, match="has no handlers"):
        runtime.run(Service("empty"), settings_for(f"embedded:///{tmp_path}/none.broker", url))
    assert list(tmp_path.iterdir()) == []


def test_each_service_has_a_database_of_its_own_name(tmp_path: Path) -> None:
    settings = settings_for("embedded:///x.db", f"sqlite:///{tmp_path}/{{service}}.db")
    assert operating.open_engine(Service("mail"), settings).url.database == f"{tmp_path}/mail.db"


def test_a_drain_without_a_broker_ends_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_DRAIN_PATIENCE_SECONDS", 0.0)
    settings = settings_for(f"amqp://guest:guest@127.0.0.1:{free_port()}/", f"sqlite:///{tmp_path}/mail.db")
    service = Recorder().service
    operating.migrate(service, operating.open_engine(service, settings))
    with pytest.raises(Unavailable, match=r"no connection to amqp://.*start the broker and drain again"):
        runtime.run(service, settings, drain=True)


def test_a_service_waits_for_its_database_whichever_statement_of_its_start_is_cut(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    service = Running(recorder.service, settings)
    plain, attempts, lost = operating.check, count(), []
    left = -1

    def check(*arguments: Any, **options: Any) -> None:
        nonlocal left
        left = next(attempts)  # one statement later each time
        plain(*arguments, **options)
        left = -1

    def cut(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            lost.append(statement)
            raise OperationalError(statement, None, Exception("the server is gone"), connection_invalidated=True)

    event.listen(service.engine, "before_cursor_execute", cut)
    monkeypatch.setattr(operating, "check", check)
    monkeypatch.setattr(runtime, "_DATABASE_SECONDS", 0.01)
    service.start()
    assert service.stop() == 0
    assert any("effects" in statement for statement in lost)  # up to the last question: are the service's own tables there?


def test_a_stop_is_obeyed_while_the_database_accepts_and_says_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://nobody@127.0.0.1:{silent.getsockname()[1]}/none"
        settings = settings_for(f"embedded:///{tmp_path}/broker.db", url)
        service = Running(Recorder().service, settings, migrate=False).start(ready=False)
        with silent.accept()[0]:
            assert service.stop() == 0


def test_a_queue_deleted_under_a_service_is_named_as_the_reason(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with running(Recorder().service, settings) as service, Queues(path_of(str(settings.broker_url))) as queues:
        queues.delete_queue(QUEUE)
        queues.declare_queue(QUEUE)  # a message makes the service look at it
        eventually(lambda: "consumer.disconnected" in events(caplog), what="it to notice")
        eventually(lambda: service.runtime.ready().ok, what="it to be back")
    assert "the broker delivers no more: the queue was deleted" in caplog.text


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [getattr(record, "outbox_event", "") for record in caplog.records if record.name.startswith("outbox")]


def test_each_reason_for_having_no_connection_is_said_once_until_there_is_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reasons = [OSError("refused"), BrokerError("check the password"), OSError("refused"), BrokerError("check the password")]

    def connect(*arguments: Any, **options: Any) -> Link:
        if reasons:
            raise reasons.pop(0)
        return Link(*arguments, **options)

    monkeypatch.setattr(runtime, "_RECONNECT", Backoff(0.001, 0.002))
    with running(Recorder().service, settings) as service, Queues(path_of(str(settings.broker_url))) as queues:
        monkeypatch.setattr(runtime, "Link", connect)
        queues.delete_queue(QUEUE)
        queues.declare_queue(QUEUE)
        eventually(lambda: not reasons and service.runtime.ready().ok, what="it to be back")
    said = [record.message for record in caplog.records if getattr(record, "outbox_event", "") == "consumer.disconnected"]
    assert [reason for reason in ("deleted", "refused", "password") if any(reason in each for each in said)] == [
        "deleted",
        "refused",
        "password",
    ]
    assert len(said) == 3


def test_a_drain_without_a_database_ends_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_DRAIN_PATIENCE_SECONDS", 0.0)
    url = f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/none"
    settings = settings_for(f"embedded:///{tmp_path}/broker.db", url)
    with pytest.raises(OperationalError, match="connection failed"):
        runtime.run(Recorder().service, settings, drain=True)


def test_no_payload_is_logged_whatever_fails(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    def fail(received: Any, _session: Any) -> None:
        raise ValueError(f"secret payload {received.data}")

    recorder = Recorder(before=fail)
    with caplog.at_level("INFO"), running(recorder.service, settings) as service:
        Desk(str(settings.broker_url)).publish(message(1), b'{"secret": "payload"}')
        eventually(lambda: service.status().parked == 2)
    assert "secret" not in caplog.text
    parked = [record.message for record in caplog.records if getattr(record, "outbox_event", "") == "consumer.parked"]
    assert len(parked) == 2
    assert all("outbox consumer parked show exports" in line for line in parked)


def test_a_state_is_said_once_when_it_changes(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    with caplog.at_level("INFO", "outbox.consumer"), running(recorder.service, settings) as service:
        Desk(str(settings.broker_url)).publish(*series("a", 20))
        eventually(lambda: service.status().applied_total == 20)
    assert events(caplog) == ["consumer.started", "consumer.connected", "consumer.stopping", "consumer.stopped"]
