"""The page of `outbox status`."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import click

from outbox.cli.status import as_text
from outbox.message import new_id
from outbox.store.status import Overview, Relay, Stuck

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_RELAY = Relay("relay-1", "host", 1, "1", "running", _NOW, 0.5, 64, True, False, "")
_STUCK = Stuck(new_id(), "session.modified", "event:7", 1, "dead", 10, "406", _NOW, _NOW, 3)


def _page(**values: object) -> list[str]:
    found = Overview(
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
    return click.unstyle(as_text(dataclasses.replace(found, **values), "the database")).splitlines()  # type: ignore[arg-type]


def test_a_quiet_outbox_is_a_quiet_page() -> None:
    assert _page() == [
        "the database  2026-01-01T00:00:00.000Z",
        "",
        "  pending               0",
        "  scheduled             0",
        "  unroutable            0",
        "  dead                  0",
        "  held keys             0",
        "  published             0",
        "",
        "  relay      relay-1  running  64 shards  seen 0.5 s ago",
        "  broker     connected",
    ]


def test_numbers_say_what_is_behind_them() -> None:
    other = dataclasses.replace(_STUCK, key="event:9", behind=0, state="unroutable")
    page = _page(
        pending=12345,
        counted_all=False,
        retrying=2,
        lag_seconds=185.0,
        dead=1,
        held_keys=7,
        stuck=(_STUCK, other),
        published_total=1000,
        published_per_second=12.34,
        last_published_at=_NOW,
    )
    assert page[2] == "  pending         12,345+   the oldest for 3 min 5 s, 2 retrying"
    assert page[6] == f"  held keys             7   event:7  by {_STUCK.id}  dead, 3 behind it"
    assert page[7].strip() == f"event:9  by {other.id}  unroutable"
    assert page[8].strip() == "…"
    assert page[9] == "  published         1,000   12.3 a second over the last minute"


def test_relays_that_ended_without_a_word_do_not_fill_the_page() -> None:
    silent = [dataclasses.replace(_RELAY, id=f"gone-{number}", seen_age_seconds=60.0 + number, shards=0) for number in range(5)]
    page = _page(relays=(_RELAY, *silent))
    assert [line.strip() for line in page[9:12]] == [
        "relay      relay-1  running  64 shards  seen 0.5 s ago",
        "relay      gone-0  silent  0 shards  seen 1 min ago",
        "and 4 more silent within a day",
    ]


def test_the_broker_is_as_the_relay_sees_it() -> None:
    blocked = dataclasses.replace(_RELAY, broker_blocked=True, broker_detail="low on memory")
    away = dataclasses.replace(_RELAY, broker_connected=False, broker_detail="refused")
    assert "  broker     blocked  low on memory" in _page(relays=(blocked,))
    assert "  broker     not connected  refused" in _page(relays=(away,))
    assert "  broker     unknown: only a running relay can tell" in _page(relays=())
