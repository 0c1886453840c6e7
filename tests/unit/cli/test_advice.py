"""One sentence when something is stuck, and what to do about it."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from outbox.cli.advice import SILENT_SECONDS, advice, spokesman
from outbox.message import new_id
from outbox.store.status import Overview, Relay, Stuck

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_RELAY = Relay(
    id="relay-1",
    host="host",
    pid=1,
    version="1",
    state="running",
    started_at=_NOW,
    seen_age_seconds=0.5,
    shards=64,
    broker_connected=True,
    broker_blocked=False,
    broker_detail="",
)
_WELL = Overview(
    at=_NOW,
    pending=0,
    counted_all=True,
    retrying=0,
    scheduled=0,
    unroutable=0,
    dead=0,
    discarded=0,
    lag_seconds=0.0,
    held_keys=0,
    stuck=(),
    published_total=0,
    published_per_second=0.0,
    last_published_at=None,
    relays=(_RELAY,),
)


def _stuck(state: str, **values: Any) -> Stuck:
    given = {"key": None, "sequence": None, "attempts": 0, "last_error": None, "behind": 0, **values}
    return Stuck(id=new_id(), topic="session.modified", state=state, created_at=_NOW, available_at=_NOW, **given)


def _advice(**values: Any) -> str:
    sentence = advice(dataclasses.replace(_WELL, **values))
    assert sentence is not None
    return sentence


def test_nothing_is_said_while_all_is_well() -> None:
    assert advice(_WELL) is None
    assert advice(dataclasses.replace(_WELL, pending=500, lag_seconds=2.0)) is None
    assert advice(dataclasses.replace(_WELL, relays=())) is None  # nothing waits: nobody misses a relay


def test_waiting_without_a_relay_says_to_start_one() -> None:
    assert _advice(relays=(), pending=1) == "no relay is running and 1 message waits; start one: outbox relay"
    gone = dataclasses.replace(_RELAY, seen_age_seconds=185.0)
    assert _advice(relays=(gone,), pending=12) == (
        "no relay is running (the last one, relay-1, was seen 3 min 5 s ago) and 12 messages wait; start one: outbox relay"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"broker_connected": False, "broker_detail": "refused"}, "the broker is not connected: refused; nothing is lost"),
        ({"broker_connected": False}, "the broker is not connected; nothing is lost"),
        (
            {"broker_connected": False, "broker_detail": "refused the login; correct the user and password in BROKER_URL"},
            "the broker is not connected: refused the login; correct the user and password in BROKER_URL; nothing is lost, the "
            "relay goes on by itself once it is; after a change of BROKER_URL start it again: outbox doctor",
        ),
        (
            {"broker_blocked": True, "broker_detail": "low on memory"},
            "the broker takes no messages (low on memory); free memory",
        ),
    ],
)
def test_a_broker_that_is_away_comes_before_what_it_causes(change: dict[str, Any], said: str) -> None:
    relay = dataclasses.replace(_RELAY, **change)
    assert _advice(relays=(relay,), pending=9, lag_seconds=900.0, dead=1, stuck=(_stuck("dead"),)).startswith(said)


def test_a_dead_message_is_named_with_its_error_and_both_ways_out() -> None:
    dead = _stuck("dead", key="event:7", attempts=10, last_error="406 too\nlarge", behind=3)
    sentence = _advice(dead=2, stuck=(dead, _stuck("unroutable")))
    assert sentence == (
        f"message {dead.id} and 1 more: given up after 10 attempts (406 too large), 3 messages of key event:7 behind it; "
        f"outbox show {dead.id}, then outbox requeue or outbox discard"
    )


def test_an_unroutable_message_names_the_topic_that_nobody_takes() -> None:
    waiting = _stuck("unroutable")
    assert _advice(unroutable=1, stuck=(waiting,)) == (
        f"message {waiting.id}: no queue takes 'session.modified'; "
        "it goes out by itself when one is bound: outbox topology check"
    )


def test_a_refused_message_says_that_it_is_tried_again() -> None:
    refused = _stuck("retrying", attempts=3, last_error="nacked")
    assert _advice(retrying=1, pending=1, stuck=(refused,)).startswith(
        f"message {refused.id}: 'session.modified' is not taken (nacked); it is tried again by itself"
    )


def test_a_long_lag_beside_a_running_relay_is_said() -> None:
    assert _advice(pending=10, lag_seconds=61.0).startswith("the oldest message has waited 1 min 1 s although relay-1 runs")


def test_the_relay_that_owns_shards_speaks_for_the_broker() -> None:
    idle = dataclasses.replace(_RELAY, id="idle", shards=0, seen_age_seconds=0.1)
    gone = dataclasses.replace(_RELAY, id="gone", seen_age_seconds=SILENT_SECONDS + 1)
    assert spokesman(dataclasses.replace(_WELL, relays=(idle, _RELAY, gone))) == _RELAY
    assert spokesman(dataclasses.replace(_WELL, relays=(idle, gone))) == idle
    assert spokesman(dataclasses.replace(_WELL, relays=(gone,))) is None


def test_what_hinders_the_relay_is_said_before_what_waits_because_of_it() -> None:
    hindered = dataclasses.replace(_RELAY, trouble="process 7 keeps rows locked")
    assert _advice(relays=(hindered,), pending=9, stuck=(_stuck("retrying"),)) == "process 7 keeps rows locked"
