"""Databases that go away, brokers that refuse us, relays that hang, and others that take over."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from pika import spec

from outbox import migrations, tables
from outbox.errors import BrokerError
from outbox.process.backoff import Backoff
from outbox.relay.broker import Outcome
from outbox.relay.daemon import Mode, Relay, open_database
from outbox.relay.embedded import EmbeddedBroker
from outbox.relay.rabbitmq import RabbitBroker
from outbox.store import leases, relaying, settling, status
from outbox.tables import State
from tests.integration.relay.running import running
from tests.integration.relay.stage import Stage, settings
from tests.kit.builders import message, write
from tests.kit.fakes import FakeBroker
from tests.kit.scripted_amqp import ScriptedAmqp, acknowledge
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy.engine import Connection, Engine

    from outbox.message import Message
    from tests.kit.servers import PostgresServer


def keyed(key: str = "a") -> Message:
    return message("x", key)


def said(caplog: pytest.LogCaptureFixture, event: str) -> int:
    return sum(getattr(record, "outbox_event", "") == event for record in caplog.records)


def down() -> sa.exc.OperationalError:
    return sa.exc.OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))


# --- somebody's open transaction ---


@pytest.mark.postgres
def test_a_row_that_somebody_has_locked_stops_only_itself_and_status_says_who_it_is(
    postgres: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(postgres)
    stage.write(keyed("a"), keyed("b"))
    stage.write(keyed("c"), state=State.RETRYING)
    locked = [row.id for row in stage.rows() if row.key != "b"]
    with postgres.connect() as person:
        person.execute(sa.text("SET application_name = 'a console'"))
        person.execute(sa.select(tables.pending).where(tables.pending.c.id.in_(locked)).with_for_update())
        stage.until(lambda: len(stage.delivered()) == 3)
        stage.until(lambda: [row.id for row in stage.rows()] == locked)
        for key in ("a", "b", "d"):  # not c: a row that is not plain pending is the hold of its key
            stage.write(keyed(key))
        stage.until(lambda: len(stage.delivered()) == 6)
        stage.turn(20, seconds=0.5)
        assert said(caplog, "rows.locked") == 1
        with postgres.connect() as connection:
            (relay,) = status.overview(connection).relays
        pid = person.scalar(sa.select(sa.func.pg_backend_pid()))
        assert f"process {pid} 'a console'" in relay.trouble
        assert [row.id for row in stage.rows()] == locked
    stage.run_dry()
    stage.turn(3, seconds=1.0)
    with postgres.connect() as connection:
        assert status.overview(connection).relays[0].trouble == ""
    assert len(stage.broker.sent) == stage.published_total() == 6


# --- the database goes away ---


class Unreliable:
    """Settles as told: `before` fails without effect, `after` fails although it was committed (its reply was lost)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failures: str) -> None:
        self.failures = list(failures)
        self._settle = settling.settle
        monkeypatch.setattr(settling, "settle", self)

    def __call__(self, connection: Connection, *arguments: Any, **more: Any) -> settling.Settled:
        failure = self.failures.pop(0) if self.failures else ""
        if failure == "before":
            raise down()
        settled = self._settle(connection, *arguments, **more)
        if failure == "after":
            connection.commit()
            raise down()
        return settled


@pytest.mark.parametrize("failure", ["before", "after"])
def test_what_was_confirmed_is_never_sent_again_however_often_settling_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    caplog.set_level(logging.INFO)
    unreliable = Unreliable(monkeypatch, *[failure] * 4)
    stage = Stage(engine)
    stage.write(*(keyed() for _ in range(5)), message())
    stage.until(lambda: not unreliable.failures and not stage.rows())
    stage.turn(100)
    assert stage.sequences("a") == [1, 2, 3, 4, 5]
    assert len(stage.broker.sent) == 6
    assert stage.published_total() == 6
    assert said(caplog, "database.lost") == said(caplog, "database.answers") >= 1


def test_a_failed_settle_of_an_undelivered_message_is_made_up_for_and_its_key_waits_all_along(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreliable = Unreliable(monkeypatch, "before", "after", "before")
    stage = Stage(engine, lambda each: Outcome.RETURNED if each.sequence == 1 else Outcome.CONFIRMED)
    stage.write(keyed(), keyed())
    stage.until(lambda: stage.states() == ["unroutable", "pending"] and not unreliable.failures)
    stage.turn(50)
    assert [each.sequence for each in stage.broker.sent] == [1]
    assert stage.rows()[0].attempts == 1


def test_while_the_database_is_away_what_is_loaded_goes_out_and_is_settled_later(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(engine, lambda _: None if stage.delivered() else Outcome.CONFIRMED)
    stage.write(*(keyed() for _ in range(10)))
    stage.until(lambda: len(stage.broker.flying) == 1)
    with monkeypatch.context() as away:

        def fail(*_: object, **__: object) -> None:
            raise down()

        for module, name in ((relaying, "read"), (relaying, "predecessors"), (settling, "settle")):
            away.setattr(module, name, fail)
        away.setattr(leases, "renew", fail)
        stage.broker.script = lambda _: Outcome.CONFIRMED
        stage.broker.answer(stage.broker.flying[0])
        stage.turn(50)
        assert stage.sequences("a") == list(range(1, 11))
        assert len(stage.rows()) >= 9
    stage.run_dry()
    assert len(stage.broker.sent) == 10


def test_without_a_database_nothing_is_sent_beyond_the_lease(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(engine, lambda _: None if stage.delivered() else Outcome.CONFIRMED)
    stage.write(*(keyed() for _ in range(3)))
    stage.until(lambda: len(stage.broker.flying) == 1)
    with monkeypatch.context() as away:

        def fail(*_: object, **__: object) -> None:
            raise down()

        away.setattr(leases, "renew", fail)
        away.setattr(settling, "settle", fail)
        stage.clock.now += 16.0
        stage.broker.answer(stage.broker.flying[0])
        stage.turn(20)
        assert len(stage.broker.sent) == 2
    stage.broker.script = lambda _: Outcome.CONFIRMED
    stage.run_dry()
    assert stage.sequences("a") == [1, 2, 3]


def test_a_database_that_is_full_is_not_said_to_answer_because_it_can_be_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stage = Stage(engine)
    stage.turn()
    with monkeypatch.context() as full:

        def fail(*_: object, **__: object) -> None:
            raise down()

        full.setattr(leases, "beat", fail)
        stage.turn(150)  # 3 seconds: the lease is not renewed yet
        assert (said(caplog, "database.lost"), said(caplog, "database.answers")) == (1, 0)
    stage.turn(100)
    assert (said(caplog, "database.lost"), said(caplog, "database.answers")) == (1, 1)


@pytest.mark.faults
def test_a_relay_survives_a_crash_of_postgresql_and_the_loss_of_its_connections(
    private_postgres: Callable[[], PostgresServer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = private_postgres()
    engine, relays_engine = open_database(server.url), open_database(server.url)
    migrations.upgrade(engine)
    broker = FakeBroker()
    numbers = iter(range(1, 10_000))

    def commit(count: int) -> list[int]:
        with engine.begin() as connection:
            write(connection, *(keyed("k") for _ in range(count)))
        return [next(numbers) for _ in range(count)]

    try:
        with running(Relay(settings(poll_seconds=0.05), relays_engine, broker)):
            expected = commit(20)
            eventually(lambda: len(broker.delivered) == len(expected), what="the first messages")
            server.terminate_backends()
            engine.dispose()
            expected += commit(20)
            eventually(lambda: len(broker.delivered) == len(expected), 20.0, "messages after the connections were lost")
            broker.script = lambda _: None
            expected += commit(20)
            eventually(lambda: broker.flying, what="an unconfirmed message")
            server.kill()
            broker.script = lambda _: Outcome.CONFIRMED
            broker.answer(broker.flying[0])
            eventually(lambda: said(caplog, "database.lost"), what="the relay to notice")
            server.start()
            engine.dispose()
            eventually(lambda: len(broker.delivered) == len(expected), 30.0, "messages after the crash")
            eventually(lambda: not rows(engine), 20.0, "all to be settled")
        assert [each.sequence for each in broker.delivered] == expected
        assert len(broker.sent) == len(expected)
        assert said(caplog, "database.lost") == said(caplog, "database.answers") <= 3
    finally:
        engine.dispose()
        relays_engine.dispose()


def rows(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(tables.pending.c.id)))


# --- the broker refuses us ---

_LOGIN = (spec.Connection.StartOk, 403, "ACCESS_REFUSED - Login was refused", "correct the user and password in BROKER_URL")
_VHOST = (spec.Connection.Open, 530, "NOT_ALLOWED - vhost nowhere not found", "rabbitmqctl add_vhost")


def rabbit(server: ScriptedAmqp) -> RabbitBroker:
    at_once = Backoff(0.01, 0.05)
    return RabbitBroker(server.url, exchange="openevent", reconnect=at_once, refused=at_once)


@pytest.mark.parametrize("mode", [Mode.RUN, Mode.DRAIN])
@pytest.mark.parametrize(("method", "code", "words", "step"), [_LOGIN, _VHOST])
def test_a_broker_that_never_let_the_relay_in_ends_it_with_a_named_error(
    engine: Engine, caplog: pytest.LogCaptureFixture, method: type, code: int, words: str, step: str, mode: Mode
) -> None:
    with engine.begin() as connection:
        write(connection, message())
    with ScriptedAmqp() as server:
        server.refusals[method] = (code, words)
        with pytest.raises(BrokerError, match=f"{code} {words}") as refusal:
            Relay(settings(), engine, rabbit(server), mode).run()
    assert step in str(refusal.value)
    assert "secret" not in str(refusal.value) + caplog.text
    assert "trying again" not in caplog.text
    with engine.connect() as connection:
        assert set(connection.scalars(sa.select(tables.shard.c.owner))) == {None}
        assert connection.scalars(sa.select(tables.relay.c.id)).all() == []


def test_a_file_that_is_no_broker_ends_the_relay_with_a_named_error(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "broker.db").write_text("the notes of somebody, who is not to lose them")
    with pytest.raises(BrokerError, match="file is not a database; correct BROKER_URL"):
        Relay(settings(), engine, EmbeddedBroker(f"embedded:///{tmp_path}/broker.db", exchange="openevent")).run()


def test_a_broker_that_let_the_relay_in_before_is_waited_for_whatever_it_refuses(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedAmqp(acknowledge) as server:
        broker = rabbit(server)
        with running(Relay(settings(poll_seconds=0.05), engine, broker)) as codes:
            server.session(1)
            eventually(lambda: broker.state().connected, what="the connection")
            server.refusals[spec.Connection.StartOk] = _LOGIN[1:3]
            server.session(1).hang_up()
            eventually(lambda: broker.state().refused, what="the refusal")
            server.session(4)
            with engine.begin() as connection:
                write(connection, message())
            assert codes == []
            server.refusals.clear()
            eventually(lambda: not rows(engine), what="the message to be sent")
    assert codes == [0]
    assert said(caplog, "broker.refused") == 1
    assert "trying again until it is allowed" in caplog.text


def test_an_exchange_that_is_not_there_yet_is_waited_for(engine: Engine) -> None:
    with engine.begin() as connection:
        write(connection, message())
    with ScriptedAmqp(acknowledge) as server:
        server.refusals[spec.Exchange.Declare] = (404, "NOT_FOUND - no exchange 'openevent' in vhost '/'")
        broker = rabbit(server)
        with running(Relay(settings(poll_seconds=0.05), engine, broker)) as codes:
            eventually(lambda: broker.state().refused, what="the refusal")
            server.session(4)
            assert codes == []
            server.refusals.clear()
            eventually(lambda: not rows(engine), what="the message to be sent")
    assert codes == [0]


# --- another relay ---


def test_a_second_relay_waits_says_so_once_and_takes_over_when_the_first_leaves(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, second = Stage(engine), Stage(engine)
    first.turn()
    second.turn(30)
    first.write(keyed(), keyed())
    first.run_dry()
    second.turn(30)
    assert second.broker.sent == []
    waiting = [record.getMessage() for record in caplog.records if getattr(record, "outbox_event", "") == "shards.waiting"]
    assert len(waiting) == 1
    assert first.relay.id in waiting[0]
    first.relay.shards.release()
    first.write(keyed())
    second.run_dry()
    assert second.sequences("a") == [3]


def hang_and_take_over(engine: Engine, answer: Outcome | None) -> tuple[Stage, Stage]:
    """Hang a relay with the first message of a key in flight, let another deliver the key, then wake the first up."""
    hung = Stage(engine, lambda each: None if each.key else Outcome.CONFIRMED)
    hung.write(message(), *(keyed() for _ in range(4)))
    hung.until(lambda: len(hung.broker.flying) == 1)
    hung.expire_leases()
    other = Stage(engine)
    other.until(lambda: other.sequences("a") == [1, 2])
    hung.clock.now += 60.0
    if answer is not None:
        hung.broker.answer(hung.broker.flying[0], answer)
    else:
        hung.broker.disconnect()
        hung.broker.connect()
    hung.broker.script = lambda _: Outcome.CONFIRMED
    hung.turn(50)
    return hung, other


@pytest.mark.parametrize("answer", [Outcome.CONFIRMED, Outcome.NACKED, Outcome.RETURNED, None])
def test_a_relay_that_hung_while_another_took_over_sends_no_more_and_changes_nothing(
    engine: Engine, answer: Outcome | None
) -> None:
    hung, other = hang_and_take_over(engine, answer)
    assert [each.sequence for each in hung.broker.sent if each.key] == [1]
    assert not hung.relay.shards.owned
    other.run_dry()
    assert other.sequences("a") == [1, 2, 3, 4]
    assert hung.relay.forwarder.lanes.idle
    assert hung.published_total() == 5


def test_a_hung_relay_that_gets_its_shards_back_goes_on_where_the_other_left_off(engine: Engine) -> None:
    hung, other = hang_and_take_over(engine, None)
    other.relay.forwarder.settle()
    other.relay.shards.release()
    hung.run_dry()
    arrived = [*other.sequences("a"), *hung.sequences("a")]
    assert arrived == sorted(arrived, key=lambda sequence: sequence or 0)


def test_a_message_discarded_by_a_person_while_it_waits_is_not_sent(engine: Engine) -> None:
    stage = Stage(engine, lambda _: None if stage.delivered() else Outcome.CONFIRMED)
    stage.write(keyed(), keyed(), keyed())
    stage.until(lambda: len(stage.broker.flying) == 1)
    with engine.begin() as connection:
        connection.execute(sa.update(tables.pending).where(tables.pending.c.sequence == 3).values(state=State.DISCARDED.value))
    stage.relay.forwarder.abandon()  # it was loaded already: only then would it go out, as one that was about to
    stage.broker.script = lambda _: Outcome.CONFIRMED
    stage.broker.answer(stage.broker.flying[0])
    stage.until(lambda: stage.states() == ["discarded"])
    assert stage.sequences("a") == [1, 2]


def test_once_and_drain_say_that_another_relay_has_the_shards(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    first = Stage(engine)
    first.turn()
    broker = FakeBroker()
    second = Relay(settings(lease_seconds=1.0, confirm_timeout_seconds=0.5), engine, broker, Mode.DRAIN, patience_seconds=0.5)
    assert second.run() == 75
    assert f"relay {first.relay.id} has the shards" in caplog.text
