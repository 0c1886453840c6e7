from __future__ import annotations

import random

import pytest

from outbox.process.backoff import Backoff
from outbox.relay import verdict
from outbox.relay.broker import Answer, Outcome
from outbox.relay.verdict import AGAIN, DONE, Hold, Policy
from outbox.store.relaying import Row
from outbox.tables import State

POLICY = Policy(exchange="openevent", max_attempts=3, backoff=Backoff(1.0, 300.0), unheard_seconds=5.0)


def row(state: State = State.PENDING, attempts: int = 0, unheard: str = "hold") -> Row:
    return Row(1, 1, 0, "session.modified", "event:1", 4, attempts, state.value, unheard)


def of(outcome: Outcome, row: Row, detail: str = "") -> verdict.Verdict:
    return verdict.of(row, Answer(1, outcome, detail), POLICY, random.Random(0))


@pytest.mark.parametrize("state", [State.PENDING, State.RETRYING, State.UNROUTABLE])
def test_a_confirm_is_a_fact_whatever_the_row_waited_for(state: State) -> None:
    assert of(Outcome.CONFIRMED, row(state, 5)) is DONE


@pytest.mark.parametrize("outcome", [Outcome.LOST, Outcome.NOT_SENT])
def test_a_lost_message_goes_again_and_no_attempt_is_counted(outcome: Outcome) -> None:
    assert of(outcome, row(attempts=2)) is AGAIN


def test_a_returned_message_waits_as_unroutable_and_says_what_to_do() -> None:
    found = of(Outcome.RETURNED, row())
    assert isinstance(found, Hold)
    assert (found.state, found.attempts, found.wait_seconds) == (State.UNROUTABLE, 1, 5.0)
    assert "'openevent'" in found.error
    assert "'session.modified'" in found.error
    assert "outbox topology check" in found.error


def test_an_unroutable_message_is_tried_again_at_the_same_pace_for_ever() -> None:
    found = of(Outcome.RETURNED, row(State.UNROUTABLE, 1000))
    assert isinstance(found, Hold)
    assert (found.state, found.attempts, found.wait_seconds) == (State.UNROUTABLE, 1001, 5.0)


def test_a_returned_message_of_which_nobody_needs_to_hear_is_done() -> None:
    assert of(Outcome.RETURNED, row(unheard="drop")) is DONE


def test_a_nacked_message_never_gives_up_and_backs_off_with_full_jitter() -> None:
    waits = []
    for nacks in range(40):
        answer = Answer(1, Outcome.NACKED)
        found = verdict.of(row(State.RETRYING, 2), answer, POLICY, random.Random(nacks), nacks)
        assert isinstance(found, Hold)
        assert (found.state, found.attempts) == (State.RETRYING, 2)  # one more of its own fault would be the last
        assert 0.0 <= found.wait_seconds <= POLICY.backoff.ceiling(nacks + 1)
        waits.append(found.wait_seconds)
    assert max(waits) > 60.0


@pytest.mark.parametrize("state", [State.PENDING, State.RETRYING])
def test_a_message_of_a_silent_topic_waits_and_no_attempt_is_counted(state: State) -> None:
    found = of(Outcome.SILENT, row(state, 0 if state is State.PENDING else 2))
    assert isinstance(found, Hold)
    assert (found.state, found.attempts) == (State.RETRYING, 0 if state is State.PENDING else 2)
    assert "'session.modified' is silent" in found.error


def test_a_refused_message_is_retried_and_then_dead_until_a_person_decides() -> None:
    first = of(Outcome.REFUSED, row(), "406 PRECONDITION_FAILED")
    assert isinstance(first, Hold)
    assert (first.state, first.attempts) == (State.RETRYING, 1)
    assert "attempt 1 of 3: 406 PRECONDITION_FAILED" in first.error
    last = of(Outcome.REFUSED, row(State.RETRYING, 2))
    assert isinstance(last, Hold)
    assert (last.state, last.attempts, last.wait_seconds) == (State.DEAD, 3, 0.0)
    assert "outbox requeue" in last.error


def test_attempts_count_in_the_state_they_were_made_in() -> None:
    found = of(Outcome.REFUSED, row(State.UNROUTABLE, 1000))
    assert isinstance(found, Hold)
    assert (found.state, found.attempts) == (State.RETRYING, 1)


def test_what_the_broker_said_is_kept_short_and_storable() -> None:
    found = of(Outcome.NACKED, row(), "bad\x00 \ud800 words " + "x" * 10_000)
    assert isinstance(found, Hold)
    assert "\x00" not in found.error
    assert len(found.error.encode()) < 700
