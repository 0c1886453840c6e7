from __future__ import annotations

import logging

import pytest

from outbox.relay import telemetry
from outbox.relay.broker import Answer, Cause, Outcome


@pytest.mark.parametrize(
    ("outcome", "cause", "label"),
    [
        (Outcome.RETURNED, Cause.OURS, "returned"),
        (Outcome.NACKED, Cause.OURS, "nacked"),
        (Outcome.REFUSED, Cause.MESSAGE, "refused"),
        (Outcome.LOST, Cause.CLOSED, "lost"),
        (Outcome.NOT_SENT, Cause.OURS, "lost"),
        (Outcome.LOST, Cause.SILENCE, "silent"),
        (Outcome.LOST, Cause.BLOCKED, "blocked"),
    ],
)
def test_each_failure_has_its_label(outcome: Outcome, cause: Cause, label: str) -> None:
    assert telemetry.reason(Answer(1, outcome, cause=cause)) == label


def test_a_change_of_state_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    announcer = telemetry.Announcer(logging.getLogger("outbox.test"))
    announcer.first("database", "answers")
    for state in ("answers", "lost", "lost", "answers", "answers", "lost"):
        announcer.state("database", state, logging.INFO, f"it is {state}" if state == "lost" else "")
    assert [record.getMessage() for record in caplog.records] == ["it is lost", "", "it is lost"]
