"""One transaction of a service, on both databases: what is applied, what is a duplicate, what is parked."""

from __future__ import annotations

import dataclasses
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox.consumer import Outcome, operating, tables
from outbox.consumer.delivery import read
from outbox.consumer.heartbeat import prune
from outbox.consumer.outcomes import HandlerMistake
from outbox.consumer.tables import Reason, State
from outbox.message import cloud_event
from tests.kit.consuming import Stage, message, rows, series

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


@pytest.fixture
def stage(engine: Engine) -> Stage:
    return Stage(engine)


# --- once --------------------------------------------------------------------------------------------------------------


def test_the_same_id_is_applied_once_within_a_batch_and_across_batches(stage: Stage) -> None:
    one, two = message(1), message(2)
    assert stage.settle(one, two, one) == [Outcome.APPLIED, Outcome.APPLIED, Outcome.DUPLICATE]
    assert stage.settle(two, one) == [Outcome.DUPLICATE, Outcome.DUPLICATE]
    assert [effect.number for effect in stage.seen] == [1, 2]
    assert (stage.status.applied_total, stage.status.duplicates_total) == (2, 3)


def test_only_source_and_id_together_say_duplicate(stage: Stage) -> None:
    one = message(1, key="a", sequence=1)
    other_source = dataclasses.replace(one, source="/elsewhere")
    other_id = message(1, key="a", sequence=1)
    assert stage.settle(one, other_source, other_id) == [Outcome.APPLIED] * 3


def test_services_that_share_a_database_do_not_share_an_inbox(engine: Engine) -> None:
    one, two = Stage(engine, name="exports"), Stage(engine, name="mail")
    sent = message(1, key="a", sequence=1)
    assert one.settle(sent) == two.settle(sent) == [Outcome.APPLIED]
    assert one.settle(sent) == [Outcome.DUPLICATE]
    assert (one.status.applied_total, two.status.duplicates_total) == (1, 0)


def test_a_batch_in_which_a_handler_fails_leaves_nothing_of_any_message(stage: Stage) -> None:
    def fail(received: Any, _session: Any) -> None:
        if received.data["number"] == 2:
            raise ValueError("no")

    stage.recorder.before = fail
    sent = [message(number, key="a", sequence=number) for number in (1, 2, 3)]
    with pytest.raises(ValueError, match="no"):
        stage.settle(*sent)
    assert stage.seen == []
    assert rows(stage.engine, tables.inbox) == rows(stage.engine, tables.key) == []
    assert stage.status.applied_total == 0
    stage.recorder.before = None
    assert stage.settle(*sent) == [Outcome.APPLIED] * 3


def test_the_same_message_given_to_two_transactions_at_once_has_one_effect(stage: Stage) -> None:
    inside, outcomes = threading.Event(), []

    def slowly(_received: Any, _session: Any) -> None:
        inside.set()

    sent = [message(number, key=f"key:{number}", sequence=1) for number in range(20)]
    stage.recorder.before = slowly
    one = threading.Thread(target=lambda: outcomes.extend(stage.settle(*sent)), daemon=True)
    two = threading.Thread(target=lambda: outcomes.extend(stage.settle(*reversed(sent))), daemon=True)
    one.start()
    two.start()
    one.join(20)
    two.join(20)
    assert sorted(outcomes) == [Outcome.APPLIED] * 20 + [Outcome.DUPLICATE] * 20
    assert sorted(effect.number for effect in stage.seen) == list(range(20))


def test_what_a_message_loaded_is_not_found_by_the_next_one_of_the_batch(stage: Stage) -> None:
    class Base(DeclarativeBase):
        pass

    class Room(Base):
        __tablename__ = "room"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    Base.metadata.create_all(stage.engine)
    found: list[str | None] = []
    kept: list[Room] = []  # an identity map is weak: only what somebody keeps can be stale

    def rename(received: Any, session: Any) -> None:
        room = session.get(Room, 1)
        found.append(room.name if room else None)
        if room is None:
            session.add(Room(id=1, name="made"))
        else:
            kept.append(room)
            session.execute(sa.text("UPDATE room SET name = :name"), {"name": f"renamed by {received.data['number']}"})

    stage.recorder.before = rename
    stage.settle(message(1), message(2), message(3))
    assert found == [None, "made", "renamed by 2"]  # as each would have seen it alone in its transaction


# --- order -------------------------------------------------------------------------------------------------------------


def test_a_message_after_a_later_one_of_its_key_is_applied_and_marked_late(stage: Stage) -> None:
    stage.settle(message(5, key="a", sequence=5))
    assert stage.settle(message(3, key="a", sequence=3), message(6, key="a", sequence=6)) == [Outcome.APPLIED] * 2
    assert [(effect.number, effect.late) for effect in stage.seen] == [(5, False), (3, True), (6, False)]
    assert (stage.status.late_total, stage.status.applied_total) == (1, 3)


def test_after_a_restored_publisher_new_messages_of_known_keys_are_late_and_none_is_dropped(stage: Stage) -> None:
    stage.settle(*series("a", 5))
    stage.settle(*series("a", 4, first=3))  # numbers 3 to 6 once more, but other messages
    assert [(effect.number, effect.late) for effect in stage.seen][5:] == [(3, True), (4, True), (5, True), (6, False)]
    assert stage.status.late_total == 3


def test_a_late_message_is_parked_and_holds_its_key_where_the_service_is_strict(engine: Engine) -> None:
    stage = Stage(engine, order="strict")
    stage.settle(message(5, key="a", sequence=5))
    outcomes = stage.settle(message(3, key="a", sequence=3), message(6, key="a", sequence=6), message(1, key="b", sequence=1))
    assert outcomes == [Outcome.PARKED, Outcome.PARKED, Outcome.APPLIED]
    assert [(row.reason, row.state, row.late) for row in stage.parked] == [
        (Reason.LATE, State.PARKED, True),
        (Reason.BEHIND, State.BEHIND, False),
    ]
    assert (stage.status.held_keys, stage.status.parked, stage.status.late_total) == (1, 2, 0)


def test_a_jump_is_counted_and_never_waited_for(stage: Stage) -> None:
    assert stage.settle(message(1, key="a", sequence=7)) == [Outcome.APPLIED]
    assert stage.status.gaps_total == 0  # the first message a service sees of a key may have any number
    assert stage.settle(message(2, key="a", sequence=10), message(3, key="a", sequence=11)) == [Outcome.APPLIED] * 2
    assert stage.status.gaps_total == 1
    assert stage.settle(message(4, key="a", sequence=9)) == [Outcome.APPLIED]
    assert (stage.status.gaps_total, stage.status.late_total) == (1, 1)


def test_keys_of_different_sources_are_different_keys(stage: Stage) -> None:
    stage.settle(message(5, key="a", sequence=5))
    assert [each.late for each in stage.settled(message(1, key="a", sequence=1, source="/elsewhere"))] == [False]


def test_a_key_without_a_sequence_is_never_late(stage: Stage) -> None:
    assert [each.late for each in stage.settled(message(1, key="a"), message(2, key="a"))] == [False, False]


def test_keys_and_topics_compare_byte_by_byte(stage: Stage) -> None:
    stage.settle(message(1, key="ä", sequence=5), message(2, key="a", sequence=4), message(3, key="A", sequence=3))
    assert [row.sequence for row in sorted(rows(stage.engine, tables.key), key=lambda row: row.sequence)] == [3, 4, 5]
    assert stage.status.late_total == 0


# --- parked ------------------------------------------------------------------------------------------------------------


def test_a_topic_without_handler_is_parked_and_holds_nothing(stage: Stage) -> None:
    stray = message(1, key="a", sequence=1, topic="room.modified")
    assert stage.settle(stray, message(2, key="a", sequence=2)) == [Outcome.PARKED, Outcome.APPLIED]
    (row,) = stage.parked
    assert (row.reason, row.state, row.holds) == (Reason.NO_HANDLER, State.PARKED, False)
    assert row.body == cloud_event(stray)
    assert "room.modified" in row.error
    assert stage.status.held_keys == 0


@pytest.mark.parametrize("body", [b"", b"\xff\x00garbage\0", b"{" * 5000, b'{"specversion":"1.0"}'])
def test_an_unreadable_body_is_parked_as_it_came_and_a_redelivery_of_it_once(stage: Stage, body: bytes) -> None:
    assert stage.settle(body, message(1)) == [Outcome.PARKED, Outcome.APPLIED]
    assert stage.settle(body) == [Outcome.DUPLICATE]
    (row,) = stage.parked
    assert (row.reason, row.body, row.source, row.topic) == (Reason.UNDECODABLE, body, "", "session.modified")
    assert row.error


def test_a_parked_message_keeps_the_properties_it_came_with(stage: Stage) -> None:
    odd = {"headers": {"binary": b"\xff\0", "n": 2**70, "nested": {"a": [None, "nul \0"]}}, "content_type": "x"}
    stage.settle(read(b"garbage", routing_key="a\0b" + "x" * 300, properties=odd))
    (entry,) = operating.parked_list(stage.engine, stage.recorder.service)
    (detail,) = operating.parked_show(stage.engine, stage.recorder.service, entry.id)
    assert detail.properties["content_type"] == "x"
    assert entry.topic.startswith("a\\0b")


@pytest.mark.parametrize("time", [b"0001-01-01T00:00:00+14:00", b"9999-12-31T23:59:59-12:00"])
def test_a_message_with_a_time_that_no_database_holds_is_parked_and_listed(stage: Stage, time: bytes) -> None:
    event = b'{"specversion":"1.0","id":"1","source":"/tests","type":"room.modified","time":"%s"}' % time
    assert stage.settle(event) == [Outcome.PARKED]
    (entry,) = operating.parked_list(stage.engine, stage.recorder.service)
    assert (entry.id, entry.created_at) == ("1", None)


def test_a_large_body_is_parked_whole(stage: Stage) -> None:
    body = b"\xfe" * 5_000_000
    stage.settle(body)
    assert stage.parked[0].body == body


def test_a_dead_lettered_message_is_parked_unless_it_is_known(stage: Stage) -> None:
    known, unknown = message(1, key="a", sequence=1), message(2, key="a", sequence=2)
    stage.settle(known)
    gone = [read(cloud_event(each), dead_lettered=True) for each in (known, unknown)]
    assert stage.settle(*gone) == [Outcome.DUPLICATE, Outcome.PARKED]
    assert stage.parked[0].reason == Reason.DEAD_LETTERED
    assert stage.status.held_keys == 1


def test_a_database_error_that_a_handler_swallowed_is_explained(postgres_engine: Engine) -> None:
    def swallow(_message: Any, session: Any) -> None:
        try:
            session.execute(sa.text("SELECT * FROM no_such_table"))
        except sa.exc.ProgrammingError:
            return

    stage = Stage(postgres_engine, name="swallower", before=swallow)
    with pytest.raises(HandlerMistake, match=r"begin_nested\(\)"):
        stage.settle(message(1))


@pytest.mark.parametrize("part", ["connection", "get_transaction"])
def test_a_handler_that_commits_past_its_session_leaves_nothing_of_the_batch(stage: Stage, part: str) -> None:
    def end(received: Any, session: Any) -> None:
        if received.data["number"] == 2:
            getattr(session, part)().commit()

    stage.recorder.before = end
    batch = [message(number) for number in (1, 2, 3)]
    with pytest.raises(HandlerMistake, match=r"commit\(\) on the connection or the transaction of db_session"):
        stage.settle(*batch)
    assert stage.seen == []
    stage.recorder.before = None
    assert stage.settle(*batch) == [Outcome.APPLIED] * 3  # no inbox row was left to call them duplicates


def test_a_handler_may_undo_a_part_by_a_savepoint(stage: Stage) -> None:
    def undo(_received: Any, session: Any) -> None:
        session.execute(sa.text("SAVEPOINT own"))
        session.execute(sa.text("ROLLBACK TO SAVEPOINT own"))
        session.begin_nested().rollback()

    stage.recorder.before = undo
    assert stage.settle(message(1)) == [Outcome.APPLIED]


# --- forgetting --------------------------------------------------------------------------------------------------------


def test_old_ids_are_forgotten_a_few_at_a_time_and_those_of_parked_messages_never(stage: Stage) -> None:
    stage.settle(*[message(number) for number in range(10)], message(1, topic="room.modified"))
    later = datetime.now(UTC) + timedelta(seconds=1)
    with stage.engine.begin() as connection:
        assert prune(connection, "exports", datetime.now(UTC) - timedelta(days=1), 100) == 0
        assert prune(connection, "another", later, 100) == 0
        assert prune(connection, "exports", later, 4) == 4
        assert prune(connection, "exports", later, 100) == 6
    assert [row.message_id for row in rows(stage.engine, tables.inbox)] == [stage.parked[0].message_id]
