from __future__ import annotations

import logging

import pytest

from outbox.relay import telemetry
from outbox.relay.broker import NOT_SENT, Outcome


@pytest.mark.parametrize(
    ("outcome", "detail", "label"),
    [
        (Outcome.RETURNED, "312 NO_ROUTE", "returned"),
        (Outcome.NACKED, "", "nacked"),
        (Outcome.REFUSED, "406 PRECONDITION_FAILED", "refused"),
        (Outcome.LOST, "the connection to amqp://host was lost: reset by peer", "lost"),
        (Outcome.LOST, NOT_SENT + "not connected to amqp://host yet", "lost"),
        (Outcome.LOST, "dropped the connection to amqp://host: no confirm came for 10 s", "silent"),
        (Outcome.LOST, "dropped the connection to amqp://host: it takes no messages for 10 s", "blocked"),
    ],
)
def test_each_failure_has_its_label(outcome: Outcome, detail: str, label: str) -> None:
    assert telemetry.reason(outcome, detail) == label


def test_a_change_of_state_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    announcer = telemetry.Announcer(logging.getLogger("outbox.test"))
    announcer.first("database", "answers")
    for state in ("answers", "lost", "lost", "answers", "answers", "lost"):
        announcer.state("database", state, logging.INFO, f"it is {state}" if state == "lost" else "")
    assert [record.getMessage() for record in caplog.records] == ["it is lost", "", "it is lost"]
