"""Probes go on a connection of their own, which is there only as long as something is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pika import spec

from outbox.process.backoff import Backoff
from outbox.relay.broker import Cause, Outcome
from outbox.relay.rabbitmq import RabbitBroker
from tests.kit.outgoing import answered, batch, connected
from tests.kit.scripted_amqp import ScriptedAmqp, SilentQueue, acknowledge
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

AT_ONCE = Backoff(0.001, 0.01)


@pytest.fixture
def server() -> Iterator[ScriptedAmqp]:
    with ScriptedAmqp(SilentQueue("s")) as server:
        yield server


@pytest.fixture
def broker(server: ScriptedAmqp) -> Iterator[RabbitBroker]:
    relay = RabbitBroker(server.url, exchange="openevent", reconnect=AT_ONCE, refused=AT_ONCE, confirm_timeout_seconds=0.4)
    relay.start()
    connected(relay)
    yield relay
    relay.stop(5)


def test_a_probe_flies_apart_is_answered_through_the_same_seam_and_leaves_no_connection_behind(
    server: ScriptedAmqp, broker: RabbitBroker
) -> None:
    broker.probe(batch(1)[0])
    assert answered(broker, 1)[1].outcome is Outcome.CONFIRMED
    apart = server.session(2)
    assert apart.ended.wait(5)
    assert spec.Connection.Close in apart.methods
    assert server.session(1).publishes == []
    assert not server.session(1).ended.is_set()


def test_a_probe_without_an_answer_is_lost_with_its_own_connection_and_nothing_else(
    server: ScriptedAmqp, broker: RabbitBroker
) -> None:
    broker.probe(batch(1, topic="s")[0])
    server.session(2).wait_for(1)
    broker.send(batch(3, first=10))
    answers = answered(broker, 4)
    assert {token for token, each in answers.items() if each.outcome is Outcome.CONFIRMED} == {10, 11, 12}
    assert (answers[1].outcome, answers[1].cause) == (Outcome.LOST, Cause.SILENCE)
    assert broker.state().connected
    assert not server.session(1).ended.is_set()


def test_a_silent_topic_keeps_no_other_probe_waiting_for_long(server: ScriptedAmqp, broker: RabbitBroker) -> None:
    broker.probe(batch(1, topic="s")[0])
    server.session(2).wait_for(1)
    broker.probe(batch(1, first=2, topic="r")[0])
    first = eventually(lambda: broker.answers(0.01), what="an answer")
    assert [(answer.token, answer.outcome) for answer in first] == [(2, Outcome.CONFIRMED)]
    second = answered(broker, 1)
    assert second[1].outcome in (Outcome.SILENT, Outcome.LOST)


def test_each_probe_gets_its_answer_whatever_ends_the_connection(server: ScriptedAmqp, broker: RabbitBroker) -> None:
    broker.probe(batch(1, topic="s")[0])
    server.session(2).wait_for(1)
    server.session(2).reset()
    lost = answered(broker, 1)[1]
    assert (lost.outcome, lost.cause) == (Outcome.LOST, Cause.CLOSED)
    server.refusals[spec.Connection.Open] = (530, "NOT_ALLOWED - connection limit (1) is reached")
    broker.probe(batch(1, first=2)[0])
    refused = answered(broker, 1)[2]
    assert refused.outcome is Outcome.NOT_SENT
    assert "connection limit" in refused.detail
    server.refusals.clear()
    server.script = acknowledge
    broker.probe(batch(1, first=3)[0])
    assert answered(broker, 1)[3].outcome is Outcome.CONFIRMED


def test_a_probe_that_is_asked_while_the_connection_closes_is_sent_on_the_next_one(
    server: ScriptedAmqp, broker: RabbitBroker
) -> None:
    for token in range(1, 30):
        broker.probe(batch(1, first=token)[0])
        assert answered(broker, 1)[token].outcome is Outcome.CONFIRMED


def test_stop_answers_the_probes_and_waits_for_nobody(server: ScriptedAmqp, broker: RabbitBroker) -> None:
    broker.probe(batch(1, topic="s")[0])
    server.session(2).wait_for(1)
    broker.stop(60)
    assert answered(broker, 1, timeout=1)[1].outcome is Outcome.LOST
    assert server.session(2).ended.wait(5)
