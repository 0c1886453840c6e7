"""What `outbox consumer status` says about a service that is stuck."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from outbox.cli.consumers import advise
from outbox.consumer.operating import Status

_PROCESS: dict[str, Any] = {"id": "1", "host": "host", "pid": 1, "connected": True, "seen_age_seconds": 0.5}
_WELL = Status(
    service="mail",
    applied_total=1,
    duplicates_total=0,
    late_total=0,
    gaps_total=0,
    parked=0,
    waiting_for_a_person=0,
    held_keys=0,
    lag_seconds=0.0,
    running=True,
    processes=[_PROCESS],
)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({}, ""),
        (
            {"waiting_for_a_person": 1},
            "1 parked message of 'mail' needs a person: outbox consumer parked list shop.mail:service",
        ),
        (
            {"waiting_for_a_person": 2},
            "2 parked messages of 'mail' need a person: outbox consumer parked list shop.mail:service",
        ),
        ({"running": False, "processes": []}, "service 'mail' is not running: outbox consumer run shop.mail:service"),
        ({"processes": [_PROCESS | {"connected": False}]}, "service 'mail' has no connection to the broker"),
        ({"processes": [_PROCESS | {"connected": False}, _PROCESS]}, ""),
    ],
)
def test_what_is_stuck_is_one_sentence_with_the_next_step(
    capsys: pytest.CaptureFixture[str], what: dict[str, Any], said: str
) -> None:
    advise(dataclasses.replace(_WELL, **what), "shop.mail:service")
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(printed) == bool(said)
