"""Rows that must wait, and topics that are slow, leave the others their way through the relay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox import tables
from outbox.relay import census as counting
from outbox.relay import telemetry
from outbox.relay.broker import Outcome
from outbox.store import relaying
from outbox.store.clock import clock, now
from outbox.tables import State
from tests.integration.relay.stage import Stage
from tests.kit.builders import message, write

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from outbox.message import Message


def make_due(engine: Engine, id_: int) -> None:
    dialect = engine.dialect.name
    with engine.begin() as connection:
        connection.execute(
            sa.update(tables.pending).where(tables.pending.c.id == id_).values(available_at=now(dialect, "ago")),
            clock(dialect, ago=-1.0),
        )


def test_rows_behind_a_topic_that_refuses_keep_no_due_row_beyond_them_from_being_read(engine: Engine) -> None:
    """More keys than a batch has rows, each with a message of the full topic and behind it one of a healthy topic."""
    stage = Stage(engine, lambda each: Outcome.NACKED if each.topic == "full" else Outcome.CONFIRMED, batch_size=20, window=40)
    with engine.begin() as connection:
        write(connection, *(message(topic, f"k{n}") for n in range(60) for topic in ("full", "well")))
        retry = write(connection, message("retry"), state=State.RETRYING, available_in=600.0)
        write(connection, message("last"))
    stage.turn(60)  # the full topic is asked with one message at a time now, and reads have passed the end
    assert [each.topic for each in stage.delivered()] == ["last"]
    make_due(engine, *retry)
    stage.until(lambda: len(stage.delivered()) == 2, "a retry that is due")
    assert stage.delivered()[1].topic == "retry"


def test_what_is_free_behind_more_rows_than_a_page_has_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    read = relaying.read
    monkeypatch.setattr(relaying, "read", lambda *args, **options: read(*args, **options, scanned=10))
    stage = Stage(engine)
    with engine.begin() as connection:
        write(connection, message("t", "k"), state=State.DEAD)
        write(connection, *(message("t", "k") for _ in range(95)))
        retry = write(connection, message("retry"), state=State.RETRYING, available_in=600.0)
        write(connection, message("last"))
    stage.until(lambda: len(stage.delivered()) == 1)
    make_due(engine, *retry)
    stage.until(lambda: len(stage.delivered()) == 2)
    stage.write(message("fresh"))
    stage.relay.wake()
    stage.turn(4)  # not more than a page later
    assert [each.topic for each in stage.delivered()] == ["last", "retry", "fresh"]


def test_a_relay_that_begins_among_many_rows_that_must_wait_reads_the_newest_at_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = relaying.read
    monkeypatch.setattr(relaying, "read", lambda *args, **options: read(*args, **options, scanned=10))
    monkeypatch.setattr(relaying, "SCANNED", 10)
    stage = Stage(engine)
    with engine.begin() as connection:
        write(connection, message("t", "k"), state=State.DEAD)
        write(connection, *(message("t", "k") for _ in range(600)))
        write(connection, message("lately"))
    stage.until(lambda: stage.relay.shards.owned)
    stage.turn(4)
    assert [each.topic for each in stage.delivered()] == ["lately"]
    for number in range(5):
        stage.write(message("fresh"))
        stage.turn(5)
        assert len(stage.delivered()) == 2 + number
    with engine.begin() as connection:  # the first one is given up, so the whole way is free
        connection.execute(sa.update(tables.pending).where(tables.pending.c.state == State.DEAD).values(state=State.DISCARDED))
    stage.until(lambda: len(stage.delivered()) == 606)
    assert stage.sequences("k") == list(range(2, 602))


@pytest.mark.parametrize("keys", [0, 6, 20, 60])
def test_a_slow_topic_leaves_others_room_however_many_keys_it_has(engine: Engine, keys: int) -> None:
    """It is never confirmed here, and has far more than the relay can hold."""

    def slow_or_not(each: Message) -> Outcome | None:
        return None if each.topic == "slow" and stage.delivered() else Outcome.CONFIRMED

    stage = Stage(engine, slow_or_not, batch_size=20, window=40)
    with engine.begin() as connection:
        write(connection, message("well"), *(message("slow", f"k{n % keys}" if keys else None) for n in range(300)))
    stage.turn(100)
    for _ in range(5):
        before = len(stage.delivered())
        stage.write(message("well"), message("well", "a key"))
        stage.relay.wake()
        stage.turn(6)
        assert len(stage.delivered()) == before + 2
    for each in list(stage.broker.flying):
        stage.broker.answer(each)
    stage.broker.script = lambda _: Outcome.CONFIRMED
    stage.run_dry()
    assert all(stage.sequences(f"k{n}") == list(range(1, 300 // keys + 1)) for n in range(keys))


def test_what_waits_is_counted_at_times_and_its_age_always(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    monkeypatch.setattr(telemetry, "show", lambda census: shown.append(census.by_state.get("pending", 0)))
    times = iter([0.0, 2.0, 50.0, 101.9, 102.1, 103.0])
    numbers = counting.Counting(engine, lambda: next(times))
    for _ in range(4):  # counting took two seconds: again after a hundred
        with engine.begin() as connection:
            write(connection, message())
        numbers.count()
    assert shown == [1, 4]
