"""What a person orders for parked messages, one or very many: on both databases, and beside a service that works."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from outbox.consumer import operating, orders, parking, tables
from outbox.consumer.orders import Filter
from outbox.consumer.parking import Aside
from outbox.consumer.tables import Reason, State
from outbox.database import create_engine
from outbox.errors import OutboxError, Unavailable
from tests.kit.commands import Commands
from tests.kit.consuming import TOPIC, Stage, arrival, message, rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy.engine import Engine

    from outbox.message import Message

PARKED = tables.parked
WAITING = Filter(state=State.PARKED)


class Place(Stage):
    """A stage on which messages are parked without a handler."""

    @property
    def service(self) -> Any:
        return self.recorder.service

    def park(self, messages: Sequence[Message], reason: Reason = Reason.FAILED) -> None:
        """Set *messages* aside, in few transactions."""
        for start in range(0, len(messages), 1_000):
            batch = [arrival(each) for each in messages[start : start + 1_000]]
            self.deliveries.settle(batch, {each: Aside(reason, "no") for each in batch})

    def heap_up(self, count: int) -> None:
        """Let *count* messages without a key be parked, at once."""
        now = datetime.now(UTC)
        row = parking.row("exports", arrival(message(1)), Aside(Reason.FAILED, "no"), now)
        with self.engine.begin() as connection:
            connection.execute(PARKED.insert(), [{**row, "message_id": str(number)} for number in range(count)])

    def states(self) -> list[str]:
        """The states of all parked messages, in the order they came."""
        query = sa.select(PARKED.c.state).order_by(PARKED.c.id)
        with self.engine.connect() as connection:
            return list(connection.scalars(query))

    def requeue_all(self, which: Filter = WAITING) -> list[int]:
        """Requeue as the command does; return how many messages each commit was for."""
        _, last = operating.parked_count(self.engine, self.service, which)
        return list(operating.requeue_all(self.engine, self.service, which, last=last, actor="me@here").run())


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    engine = create_engine(request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url"))
    yield Place(engine)
    engine.dispose()


def many(count: int, *, keys: int = 10) -> list[Message]:
    """Messages of *keys* keys, in turn."""
    return [message(number, key=f"k{number % keys}", sequence=number // keys + 1) for number in range(count)]


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """What is sent to the database."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


# --- whose message -----------------------------------------------------------------------------------------------------


def test_of_two_sources_with_the_same_id_an_order_reaches_the_one_that_is_meant(place: Place) -> None:
    shop, billing = (message(number, source=source, id="1") for number, source in enumerate(("/shop", "/billing")))
    place.park([shop, billing])
    with pytest.raises(operating.AmbiguousId, match="id 1 is that of messages of '/shop' and of '/billing'"):
        operating.discard(place.engine, place.service, ["1"], actor="me@here", reason="x")
    assert place.states() == [State.PARKED, State.PARKED]
    operating.discard(place.engine, place.service, ["1"], source="/shop", actor="me@here", reason="x")
    assert place.states() == [State.DISCARDED, State.PARKED]
    operating.requeue(place.engine, place.service, ["1"], source="/billing", actor="me@here")
    assert place.states() == [State.DISCARDED, State.DUE]
    with pytest.raises(OutboxError, match="no parked message 1 from '/nobody'"):
        operating.requeue(place.engine, place.service, ["1"], source="/nobody", actor="me@here")


def test_an_order_for_all_of_a_topic_reaches_no_other_message_of_the_same_id(place: Place) -> None:
    place.park([message(1, source="/shop", id="1", topic="t.a"), message(2, source="/billing", id="1", topic="t.b")])
    which = Filter(state=State.PARKED, topic="t.a")
    expected, last = operating.parked_count(place.engine, place.service, which)
    sweep = operating.discard_all(place.engine, place.service, which, last=last, actor="me@here", reason="x")
    assert (expected, sum(sweep.run())) == (1, 1)
    assert place.states() == [State.DISCARDED, State.PARKED]


def test_of_a_message_that_came_again_after_it_was_discarded_the_one_that_waits_is_meant(place: Place) -> None:
    again = message(1)
    place.park([again])
    operating.discard(place.engine, place.service, [str(again.id)], actor="me@here", reason="x")
    with place.engine.begin() as connection:
        connection.execute(sa.delete(tables.inbox))  # the retention is over
    place.park([again])
    operating.requeue(place.engine, place.service, [str(again.id)], actor="me@here")
    assert place.states() == [State.DISCARDED, State.DUE]


# --- very many ---------------------------------------------------------------------------------------------------------


def test_an_order_for_all_goes_in_chunks_and_says_how_far_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "CHUNK", 100)
    place.park(many(250))
    assert place.requeue_all() == [100, 100, 50]
    assert (place.states().count(State.DUE), place.states().count(State.BEHIND)) == (10, 240)


def test_an_order_that_is_interrupted_has_done_what_it_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "CHUNK", 100)
    place.park(many(250, keys=250))
    _, last = operating.parked_count(place.engine, place.service, WAITING)
    said = next(operating.requeue_all(place.engine, place.service, WAITING, last=last, actor="me@here").run())
    assert said == 100
    assert place.states() == [State.DUE] * 100 + [State.PARKED] * 150


def test_what_is_parked_after_the_question_is_not_meant(place: Place) -> None:
    place.park(many(3, keys=3))
    expected, last = operating.parked_count(place.engine, place.service, WAITING)
    place.park([message(9)])
    sweep = operating.discard_all(place.engine, place.service, WAITING, last=last, actor="me@here", reason="x")
    assert (expected, sum(sweep.run())) == (3, 3)
    assert place.states() == [State.DISCARDED] * 3 + [State.PARKED]


def test_twice_as_many_take_twice_as_many_statements_and_no_body_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "CHUNK", 25)
    place.park(many(300, keys=300))
    counts = []
    for topic_keys in ([f"k{number}" for number in range(100)], [f"k{number}" for number in range(100, 300)]):
        with place.engine.begin() as connection:
            wanted = PARKED.c.key.in_(topic_keys)
            connection.execute(sa.update(PARKED).where(wanted).values(topic="meant"))
        with statements(place.engine) as seen:
            assert sum(place.requeue_all(Filter(state=State.PARKED, topic="meant"))) == len(topic_keys)
        assert not [each for each in seen if "body" in each]
        counts.append(len(seen))
        with place.engine.begin() as connection:
            connection.execute(sa.update(PARKED).values(topic=TOPIC))
    assert counts[1] < 2.2 * counts[0]
    assert counts[0] <= 4 * 15 + 10


def test_the_head_of_a_key_is_found_without_reading_what_was_discarded(place: Place) -> None:
    place.park(many(3, keys=1))
    query = sa.select(sa.func.min(PARKED.c.id)).where(
        PARKED.c.service == "exports", PARKED.c.source == "/tests", PARKED.c.key == "k0", PARKED.c.holds
    )
    explain = "EXPLAIN QUERY PLAN" if place.engine.dialect.name == "sqlite" else "EXPLAIN"
    with place.engine.begin() as connection:
        if place.engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # three rows are read as quickly without an index
        text = str(query.compile(place.engine, compile_kwargs={"literal_binds": True}))
        plan = " ".join(str(row) for row in connection.exec_driver_sql(f"{explain} {text}"))
    assert "consumer_parked_holding" in plan


def test_discarding_all_of_a_key_frees_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "CHUNK", 2)
    place.park(many(5, keys=1))
    _, last = operating.parked_count(place.engine, place.service, WAITING)
    sweep = operating.discard_all(place.engine, place.service, WAITING, last=last, actor="me@here", reason="x")
    assert list(sweep.run()) == [2, 2, 1]
    assert place.status.held_keys == 0


@pytest.mark.postgres
def test_keys_that_the_service_has_in_hand_keep_no_others_waiting_and_are_ordered_at_the_end(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(create_engine(postgres_url))
    place.park(many(30, keys=10))
    monkeypatch.setattr(orders, "CHUNK", 10)
    key = tables.key
    with place.engine.connect() as handler:
        handler.execute(sa.select(key).where(key.c.key == "k3").with_for_update())
        _, last = operating.parked_count(place.engine, place.service, WAITING)
        sweep = operating.requeue_all(place.engine, place.service, WAITING, last=last, actor="me@here")
        steps = sweep.run()
        assert [next(steps) for _ in range(3)] == [9, 9, 9]
        assert len(sweep.left) == 3
        handler.rollback()
        assert list(steps) == [3]
    assert sweep.left == set()
    place.engine.dispose()


@pytest.mark.postgres
def test_a_key_whose_messages_keep_coming_is_ordered_in_its_turn(postgres_url: str) -> None:
    place = Place(create_engine(postgres_url))
    place.park(many(4, keys=2))
    key, over = tables.key, threading.Event()

    def keeps_it_busy() -> None:
        while not over.is_set():
            with place.engine.begin() as handler:
                handler.execute(sa.select(key).where(key.c.key == "k1").with_for_update())
                over.wait(0.02)

    busy = [threading.Thread(target=keeps_it_busy) for _ in range(3)]
    for each in busy:
        each.start()
    try:
        assert sum(place.requeue_all()) == 4
        (entry, _) = operating.parked_list(place.engine, place.service, Filter(key="k1"))
        operating.discard(place.engine, place.service, [entry.id], actor="me@here", reason="x")
    finally:
        over.set()
        for each in busy:
            each.join()
    place.engine.dispose()


@pytest.mark.postgres
def test_keys_that_stay_in_hand_are_left_and_said(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(create_engine(postgres_url))
    monkeypatch.setattr(orders, "PATIENCE_SECONDS", 0.3)
    place.park(many(4, keys=2))
    key = tables.key
    with place.engine.connect() as handler:
        handler.execute(sa.select(key).where(key.c.key == "k1").with_for_update())
        (entry,) = operating.parked_list(place.engine, place.service, Filter(key="k1"), limit=1)
        with pytest.raises(Unavailable, match="is handling messages of these keys; nothing was changed"):
            operating.discard(place.engine, place.service, [entry.id], actor="me@here", reason="x")
        assert sum(place.requeue_all()) == 2
    assert sorted(place.states()) == [State.BEHIND, State.DUE, State.PARKED, State.PARKED]
    place.engine.dispose()


# --- without a handler -------------------------------------------------------------------------------------------------


def test_a_replay_under_a_version_without_the_handler_leaves_the_key_held(place: Place) -> None:
    from tests.integration.consumer.test_redrive import Place as Replaying

    older = Replaying(place.engine)
    older.recorder.service.on("room.modified")(lambda message, db_session, /, **extra: None)
    place.park([message(1, key="a", sequence=1, topic="room.modified")])
    older.attempts.settle([arrival(message(2, key="a", sequence=2))], lambda _: None)
    newer = Replaying(place.engine)
    newer.requeue()
    newer.replay()
    first, second = sorted(rows(place.engine, PARKED), key=lambda row: row.id)
    assert (first.state, first.reason, first.holds) == (State.PARKED, Reason.FAILED, True)
    assert "has no handler for 'room.modified'" in first.error
    assert second.state == State.BEHIND
    older.requeue()
    older.replay()
    assert rows(place.engine, PARKED) == []
    assert [effect.late for effect in place.seen] == [False]


# --- by command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Place, Commands]:
    from outbox.cli import services

    place = Place(create_engine(sqlite_url))
    monkeypatch.setattr(services, "find", lambda _: place.service)
    return place, Commands({"CONSUMER_DATABASE_URL": sqlite_url})


def test_an_id_of_two_sources_is_wrong_usage_until_the_source_is_given(command: tuple[Place, Commands]) -> None:
    place, outbox = command
    place.park([message(number, source=source, id="1") for number, source in enumerate(("/shop", "/billing"))])
    said = outbox.refused("consumer", "parked", "discard", "exports", "1", "--reason", "x", "--yes", code=2)
    assert "id 1 is that of messages of '/shop' and of '/billing'; say which with --source" in said
    outbox.fine("consumer", "parked", "discard", "exports", "1", "--source", "/billing", "--reason", "x", "--yes")
    assert place.states() == [State.PARKED, State.DISCARDED]
    assert outbox.json("consumer", "parked", "show", "exports", "1", "--source", "/shop")["state"] == "parked"


def test_all_is_all_however_many_and_the_number_is_said_before_and_after(command: tuple[Place, Commands]) -> None:
    place, outbox = command
    place.heap_up(10_100)
    result = outbox("consumer", "parked", "requeue", "exports", "--all", "--yes")
    assert result.exit_code == 0
    assert "This would requeue 10,100 messages of 'exports'." in result.stderr
    assert "5,000 of 10,100" in result.stderr
    assert result.stdout == "Requeued 10,100 messages.\n"
    assert State.PARKED not in place.states()


def test_messages_without_a_handler_here_are_not_requeued(command: tuple[Place, Commands]) -> None:
    place, outbox = command
    stray, ours = message(1, topic="room.modified", key="a", sequence=1), message(2)
    place.park([stray, ours])
    said = outbox.refused("consumer", "parked", "requeue", "exports", str(stray.id), str(ours.id), "--yes")
    assert f"message {stray.id}: service 'exports' has no handler for 'room.modified' here" in said
    assert place.states() == [State.PARKED, State.PARKED]
    result = outbox("consumer", "parked", "requeue", "exports", "--all", "--yes")
    assert "1 message of topics that have no handler here: left as they are." in result.stderr
    assert place.states() == [State.PARKED, State.DUE]


def test_an_order_that_fails_in_the_middle_says_what_was_done(
    command: tuple[Place, Commands], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, outbox = command
    place.park(many(30, keys=30))
    monkeypatch.setattr(orders, "CHUNK", 10)
    real, calls = orders.look, iter(range(100))

    def fails(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise OutboxError("the database went")
        return real(*arguments, **options)

    monkeypatch.setattr(orders, "look", fails)
    result = outbox("consumer", "parked", "discard", "exports", "--all", "--reason", "x", "--yes")
    assert result.exit_code == 1
    assert "Discarded 10 of 30 messages; the others are as they were." in result.stderr
    assert place.states() == [State.DISCARDED] * 10 + [State.PARKED] * 20
