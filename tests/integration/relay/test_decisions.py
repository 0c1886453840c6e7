"""What people decide about messages while the relay has them in hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from outbox.relay.broker import Outcome
from outbox.store import operating
from outbox.tables import State
from tests.integration.relay.stage import Stage
from tests.kit.builders import message

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from outbox.message import Message


def keyed(key: str, topic: str = "x") -> Message:
    return message(topic, key)


def act(stage: Stage, verb: str) -> int:
    """Discard or requeue all rows that are held; returns how many may be on the way."""
    rows = [row.message_row for row in stage.rows() if row.state != State.PENDING]
    with stage.engine.begin() as connection:
        flying = operating.perhaps_flying(connection, rows)
        if verb == "discard":
            operating.discard(connection, rows, actor="ada@host", reason="a test message")
        else:
            operating.requeue(connection, rows, actor="ada@host")
    return flying


def refused_first(stage: Stage) -> None:
    """Have the first of key a refused; its second try is not answered."""
    stage.broker.script = lambda each: Outcome.NACKED if each.sequence == 1 else Outcome.CONFIRMED
    stage.write(keyed("a"), keyed("a"))
    stage.until(lambda: "retrying" in stage.states())
    stage.broker.script = lambda each: None if each.sequence == 1 else Outcome.CONFIRMED


def test_a_message_discarded_while_its_connection_is_away_is_not_sent_when_it_is_back(engine: Engine) -> None:
    stage = Stage(engine)
    refused_first(stage)
    stage.broker.disconnect()
    stage.make_due()
    stage.turn(20)  # it is in memory now
    sent = len(stage.broker.sent)
    assert act(stage, "discard") == 1  # nobody can tell from outside
    stage.turn(1, seconds=2.0)
    stage.broker.connect()
    stage.until(lambda: stage.states() == ["discarded"])
    assert [each.sequence for each in stage.broker.sent[sent:]] == [2]


@pytest.mark.parametrize("outcome", [Outcome.CONFIRMED, Outcome.NACKED, Outcome.RETURNED, Outcome.LOST])
def test_a_message_discarded_while_it_flies_arrives_before_what_waits_behind_it_or_never(
    engine: Engine, outcome: Outcome
) -> None:
    stage = Stage(engine)
    refused_first(stage)
    stage.make_due()
    stage.until(lambda: stage.broker.flying)
    assert act(stage, "discard") == 1
    stage.turn(20)
    assert stage.delivered() == []
    stage.broker.script = lambda _: Outcome.CONFIRMED
    if outcome is Outcome.LOST:
        stage.broker.disconnect()
        stage.broker.connect()
    else:
        stage.broker.answer(stage.broker.flying[0], outcome)
    stage.until(lambda: len(stage.rows()) == (outcome is not Outcome.CONFIRMED))
    stage.turn(50)
    assert stage.sequences("a") == ([1, 2] if outcome is Outcome.CONFIRMED else [2])
    assert stage.states() == ([] if outcome is Outcome.CONFIRMED else ["discarded"])


def test_a_discarded_message_that_is_not_due_is_not_on_the_way(engine: Engine) -> None:
    stage = Stage(engine)
    stage.turn()
    stage.write(keyed("a"), state=State.RETRYING, available_in=60.0)
    stage.write(keyed("b"), state=State.DEAD)
    assert act(stage, "discard") == 0


def test_a_message_requeued_while_it_flies_counts_its_attempts_anew(engine: Engine) -> None:
    stage = Stage(engine, lambda each: Outcome.REFUSED if each.sequence == 1 else Outcome.CONFIRMED, max_attempts=2)
    stage.write(keyed("a"), keyed("a"))
    stage.until(lambda: "retrying" in stage.states())
    stage.broker.script = lambda _: None
    stage.make_due()
    stage.until(lambda: stage.broker.flying)
    act(stage, "requeue")
    stage.broker.answer(stage.broker.flying[0], Outcome.REFUSED)  # the last attempt of those before
    stage.until(lambda: stage.broker.flying, "it to be tried again")
    assert stage.states() == ["pending", "pending"]
    stage.broker.script = lambda _: Outcome.CONFIRMED
    stage.broker.answer(stage.broker.flying[0])
    stage.run_dry()
    assert stage.sequences("a") == [1, 2]
