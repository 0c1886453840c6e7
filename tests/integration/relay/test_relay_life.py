"""The life of a relay as a process: start, wake, probes, one pass, drain, stop."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from outbox import database, migrations, tables
from outbox.errors import ConfigurationError, SchemaError
from outbox.process import stopping
from outbox.relay import daemon, open_broker
from outbox.relay.broker import Outcome
from outbox.relay.daemon import Mode, Relay, open_database
from outbox.relay.embedded import EmbeddedBroker
from outbox.relay.rabbitmq import RabbitBroker
from outbox.settings import Settings
from outbox.store.wakeup import CHANNEL
from outbox.tables import State
from tests.integration.relay.running import running
from tests.integration.relay.stage import Stage, settings
from tests.kit.builders import message, write
from tests.kit.fakes import FakeBroker
from tests.kit.ports import free_port
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy.engine import Engine

    from tests.conftest import Spawn
    from tests.kit.servers import PostgresServer


def said(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if getattr(record, "outbox_event", "") == event]


def commit(engine: Engine, *messages: Any, **how: Any) -> None:
    with engine.begin() as connection:
        write(connection, *messages, **how)


def relay_rows(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(tables.relay)))


# --- start ---


def test_the_broker_is_chosen_by_the_scheme_of_its_url(tmp_path: Path) -> None:
    assert isinstance(open_broker(Settings(broker_url="amqp://user:secret@host/")), RabbitBroker)
    assert isinstance(open_broker(Settings(broker_url=f"embedded:///{tmp_path}/broker.db")), EmbeddedBroker)
    with pytest.raises(ConfigurationError, match="BROKER_URL"):
        open_broker(Settings())


def test_tables_that_do_not_fit_are_refused_with_the_next_step(database_url: str) -> None:
    with pytest.raises(SchemaError, match="outbox migrate"):
        daemon.run(Settings(database_url=database_url, broker_url="amqp://user:secret@broker.invalid/"))
    engine = database.create_engine(database_url)
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE outbox_version SET version = 999"))
    engine.dispose()
    with pytest.raises(SchemaError, match="upgrade the package"):
        daemon.run(Settings(database_url=database_url, broker_url="amqp://user:secret@broker.invalid/"))


def test_the_embedded_mode_makes_its_tables_by_itself(tmp_path: Path) -> None:
    embedded = Settings(database_url=f"sqlite:///{tmp_path}/new.db", broker_url=f"embedded:///{tmp_path}/broker.db")
    assert daemon.run(embedded, drain=True) == 0


@pytest.mark.faults
def test_a_relay_that_starts_before_its_servers_begins_when_they_are_up(
    private_postgres: Callable[[], PostgresServer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = private_postgres()
    engine = open_database(server.url)
    migrations.upgrade(engine)
    commit(engine, message())
    engine.dispose()
    server.kill()
    broker = FakeBroker(connected=False)
    relays_engine = open_database(server.url)
    with running(Relay(settings(), relays_engine, broker)):
        eventually(lambda: said(caplog, "database.lost"), what="the relay to miss its database")
        server.start()
        eventually(lambda: said(caplog, "shards.taken"), 20.0, "the relay to begin")
        assert broker.sent == []
        broker.connect()
        eventually(lambda: broker.delivered, what="the message")
    assert len(said(caplog, "database.lost")) == len(said(caplog, "database.answers")) == 1
    relays_engine.dispose()


# --- wake-up ---


def test_on_postgresql_a_commit_is_heard_of_long_before_the_next_poll(
    postgres: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    broker = FakeBroker()
    with running(Relay(settings(poll_seconds=3600.0), postgres, broker)):
        eventually(lambda: said(caplog, "wakeup.listening"), what="the relay to listen")
        for count in range(1, 4):
            began = time.monotonic()
            with postgres.begin() as connection:
                write(connection, message())
                connection.execute(sa.select(sa.func.pg_notify(CHANNEL, "")))
            eventually(lambda count=count: len(broker.delivered) == count, interval=0.001)  # type: ignore[misc]
            assert time.monotonic() - began < 5.0


def test_a_relay_that_lost_its_ear_says_so_polls_and_listens_again(postgres: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    broker = FakeBroker()
    with running(Relay(settings(poll_seconds=0.05), postgres, broker)):
        eventually(lambda: said(caplog, "wakeup.listening"), what="the relay to listen")
        with postgres.connect() as connection:
            connection.execute(sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"))
        eventually(lambda: said(caplog, "wakeup.polling"), what="the relay to notice")
        commit(postgres, message())
        eventually(lambda: broker.delivered, what="a message found by polling")
        eventually(lambda: len(said(caplog, "wakeup.listening")) == 2, what="the relay to listen again")
    assert "looked for every 50ms" in said(caplog, "wakeup.polling")[0]


def test_without_notifications_new_messages_are_found_by_polling(engine: Engine) -> None:
    broker = FakeBroker()
    with running(Relay(settings(poll_seconds=0.05), engine, broker)):
        for count in range(1, 4):
            commit(engine, message())
            eventually(lambda count=count: len(broker.delivered) == count, what="the message")  # type: ignore[misc]


# --- one pass, and drain ---


def once(engine: Engine, broker: FakeBroker, mode: Mode, **changes: Any) -> int:
    return Relay(settings(**changes), engine, broker, mode, patience_seconds=0.5).run()


def test_one_pass_sends_one_batch_and_ends(engine: Engine) -> None:
    commit(engine, *(message() for _ in range(30)))
    broker = FakeBroker()
    assert once(engine, broker, Mode.ONCE, batch_size=20) == 0
    assert len(broker.delivered) == 20
    assert once(engine, broker, Mode.ONCE, batch_size=20) == 0
    assert once(engine, broker, Mode.ONCE) == 0
    assert len(broker.delivered) == 30


def test_a_drain_sends_everything_and_ends_well(engine: Engine) -> None:
    commit(engine, *(message("x", f"k{n % 3}") for n in range(300)), *(message() for _ in range(300)))
    broker = FakeBroker()
    assert once(engine, broker, Mode.DRAIN, batch_size=50, window=60) == 0
    assert len(broker.delivered) == 600
    assert relay_rows(engine) == []


def test_a_drain_ends_with_try_later_and_says_what_remains(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    commit(engine, message("x"), message("y", "a"), message("x", "a"))
    commit(engine, message("z", "b"), state=State.DEAD)
    commit(engine, message("z", "b"), available_in=3600.0)
    commit(engine, message("z", "c"), state=State.DISCARDED)
    broker = FakeBroker(lambda each: Outcome.RETURNED if each.topic == "x" else Outcome.CONFIRMED)
    assert once(engine, broker, Mode.DRAIN) == 75
    assert len(broker.delivered) == 1
    assert said(caplog, "relay.remaining") == [
        "not everything could be sent now: 1 dead, 1 pending, 2 unroutable: outbox status"
    ]


def test_discarded_messages_are_nothing_to_wait_for(engine: Engine) -> None:
    commit(engine, message(), state=State.DISCARDED)
    assert once(engine, FakeBroker(), Mode.DRAIN) == 0


@pytest.mark.parametrize("mode", [Mode.ONCE, Mode.DRAIN])
def test_a_drain_without_a_broker_gives_up_and_says_why(engine: Engine, caplog: pytest.LogCaptureFixture, mode: Mode) -> None:
    commit(engine, message())
    assert once(engine, FakeBroker(connected=False), mode) == 75
    assert "the broker takes nothing: the fake is not connected" in caplog.text


def test_a_drain_without_a_database_gives_up_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    engine = open_database(f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/nothing")
    assert once(engine, FakeBroker(), Mode.DRAIN) == 75
    assert "the database does not answer" in caplog.text


def test_an_empty_outbox_needs_no_broker_to_be_drained(engine: Engine) -> None:
    assert once(engine, FakeBroker(connected=False), Mode.DRAIN) == 0


# --- stop ---


def test_a_relay_that_stops_waits_for_what_is_in_flight_settles_it_and_gives_its_shards_back(engine: Engine) -> None:
    broker = FakeBroker(lambda each: None if each.key == "slow" else Outcome.CONFIRMED)
    commit(engine, message())
    relay = Relay(settings(poll_seconds=0.05), engine, broker)
    with running(relay) as codes:
        eventually(lambda: broker.delivered, what="the first message")
        commit(engine, message("x", "slow"), message("x", "slow"))
        eventually(lambda: broker.flying, what="the slow one to be in flight")
        relay.stop()
        eventually(lambda: relay_rows(engine)[0].state == "draining", what="the relay to say that it drains")
        broker.answer(broker.flying[0])
    assert codes == [0]
    with engine.connect() as connection:
        assert connection.scalars(sa.select(tables.pending.c.sequence)).all() == [2]  # nothing new was begun
        assert set(connection.scalars(sa.select(tables.shard.c.owner))) == {None}
    assert relay_rows(engine) == []


def test_a_relay_does_not_wait_for_ever_for_what_is_in_flight(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    commit(engine, message())
    broker = FakeBroker(lambda _: None)
    with running(Relay(settings(shutdown_timeout_seconds=0.2), engine, broker)) as codes:
        eventually(lambda: broker.flying, what="a message in flight")
    assert codes == [0]
    assert "1 unanswered" in said(caplog, "relay.stopped")[0]
    with engine.connect() as connection:
        assert connection.scalar(sa.select(tables.pending.c.state)) == "pending"


def test_the_first_signal_asks_and_the_second_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    before = signal.getsignal(signal.SIGTERM)
    with stopping.on_signals(lambda: asked.append(True)):
        signal.raise_signal(signal.SIGTERM)
        eventually(lambda: asked, what="it to be asked to end")
        signal.raise_signal(signal.SIGINT)
        eventually(lambda: ended, what="the end")
        assert ended == [130]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.postgres
def test_a_relay_whose_call_of_the_database_hangs_ends_all_the_same(spawn: Spawn, postgres_url: str) -> None:
    engine = open_database(postgres_url)
    migrations.upgrade(engine)
    env = {"DATABASE_URL": postgres_url, "BROKER_URL": "amqp://user:secret@127.0.0.1:1/", "OUTBOX_SHUTDOWN_TIMEOUT": "100ms"}
    with engine.begin() as person:
        person.execute(sa.text("LOCK TABLE outbox_shard IN SHARE MODE"))
        hung, impatient = (spawn("outbox", "relay", env=env) for _ in range(2))
        for each in (hung, impatient):
            each.wait_for_line("publishes to exchange")
        waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'outbox_shard'::regclass")
        eventually(lambda: person.scalar(waiting) == 2, what="both to wait for the lock")
        for each in (hung, impatient):
            each.terminate()
        os.kill(impatient.pid, signal.SIGINT)
        assert impatient.wait(10) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        assert hung.wait(30) == 128 + signal.SIGTERM
        assert "does not return" in hung.output
    engine.dispose()


# --- seen from outside ---


def test_a_call_of_the_database_that_lasts_longer_than_any_outage_is_no_life(engine: Engine) -> None:
    stage = Stage(engine, lease_seconds=20.0)
    for waited, alive in ((59.0, True), (79.0, True), (81.0, False)):
        stage.turn()
        with stage.relay._database.attempt():
            stage.clock.now += waited
            assert stage.relay._live().ok is alive


def probe(port: int, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except urllib.error.URLError as error:
        raise AssertionError(f"nobody listens on port {port}: {error}") from error


def test_probes_tell_a_living_relay_from_a_ready_one(engine: Engine) -> None:
    port = free_port()
    broker = FakeBroker(connected=False)
    with running(Relay(settings(http_address=f"127.0.0.1:{port}"), engine, broker)):
        eventually(lambda: json.loads(probe(port, "/readyz")[1])["role"] == "working", what="the relay to work")
        assert probe(port, "/livez")[0] == 200
        status, body = probe(port, "/readyz")
        assert (status, json.loads(body)["broker"]) == (503, "the fake is not connected")
        broker.connect()
        eventually(lambda: probe(port, "/readyz")[0] == 200, what="the relay to be ready")
        standby_port = free_port()
        with running(Relay(settings(http_address=f"127.0.0.1:{standby_port}"), engine, FakeBroker())):
            eventually(lambda: probe(standby_port, "/readyz")[0] == 200, what="the second relay to be ready")
            assert json.loads(probe(standby_port, "/readyz")[1])["role"] == "standby"


def test_a_scrape_shows_what_was_published_and_what_is_stuck(engine: Engine) -> None:
    before = samples(probe_metrics())
    topic = f"topic.{engine.dialect.name}"
    port = free_port()
    commit(engine, message(topic, "a"), message(topic), message("nobody", "b"), message("nobody", "b"))
    broker = FakeBroker(lambda each: Outcome.RETURNED if each.topic == "nobody" else Outcome.CONFIRMED)
    with running(Relay(settings(http_address=f"127.0.0.1:{port}"), engine, broker)):
        # The numbers of tables come from a count now and then, never from the scrape.
        after = eventually(lambda: counted(samples(probe(port, "/metrics")[1]), topic), 15.0, "the count")
    returned = 'outbox_publish_failures_total{reason="returned"}'
    assert after[returned] - before.get(returned, 0.0) >= 1.0
    assert after["outbox_held_keys"] == 1.0
    assert after["outbox_shards_owned"] == 64.0
    assert after["outbox_broker_connected"] == 1.0
    assert after["outbox_broker_blocked"] == 0.0
    assert after["outbox_lag_seconds"] >= 0.0
    assert after["outbox_delivery_seconds_count"] - before.get("outbox_delivery_seconds_count", 0.0) == 2.0
    assert after["outbox_confirm_seconds_count"] - before.get("outbox_confirm_seconds_count", 0.0) == 2.0


def counted(found: dict[str, float], topic: str) -> dict[str, float]:
    assert found.get(f'outbox_published_total{{topic="{topic}"}}') == 2.0
    assert found['outbox_pending_messages{state="unroutable"}'] == found['outbox_pending_messages{state="pending"}'] == 1.0
    return found


def probe_metrics() -> str:
    from outbox.process import metrics

    rendered = metrics.render()
    assert rendered is not None
    return rendered[0].decode()


def samples(text: str) -> dict[str, float]:
    return {
        name: float(value)
        for line in text.splitlines()
        if not line.startswith("#")
        for name, _, value in [line.rpartition(" ")]
    }


def test_a_heartbeat_tells_how_the_relay_finds_its_broker_about_every_second(engine: Engine) -> None:
    stage = Stage(engine)
    stage.turn()
    (row,) = relay_rows(engine)
    assert (row.id, row.state, row.broker_connected, row.broker_blocked) == (stage.relay.id, "running", True, False)
    stage.broker.block()
    stage.turn(60)  # 1.2 seconds
    (later,) = relay_rows(engine)
    assert later.broker_blocked
    assert later.seen_at > row.seen_at
    other = Stage(engine)
    other.turn()
    assert {row.state for row in relay_rows(engine)} == {"running", "idle"}


# --- settings ---


def test_the_poll_interval_is_how_often_an_idle_relay_looks(engine: Engine) -> None:
    stage = Stage(engine, poll_seconds=10.0)
    stage.turn(3)
    stage.write(message())
    stage.turn(seconds=6.0)
    stage.turn()
    assert stage.delivered() == []
    stage.clock.now += 6.0
    stage.turn(3)
    assert len(stage.delivered()) == 1


def test_the_backoff_is_how_long_a_refused_message_waits(engine: Engine) -> None:
    stage = Stage(engine, lambda _: Outcome.NACKED, backoff_base_seconds=3600.0, backoff_max_seconds=3600.0)
    stage.write(*(message(f"topic.{number}") for number in range(5)))
    stage.until(lambda: set(stage.states()) == {"retrying"})
    latest = max(row.available_at for row in stage.rows())
    # Drawn between 0 and an hour each: all five below what the defaults allow is a matter of millions of runs.
    assert latest > datetime.now(UTC) + timedelta(minutes=5)
