"""Replaying what was parked, beside what arrives: on both databases, from two processes at once."""

from __future__ import annotations

import random
import threading
import uuid
from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from outbox.consumer import Outcome, Reject, operating, redrive, tables
from outbox.consumer.batch import Deliveries, now_utc
from outbox.consumer.exclusive import Turnstile
from outbox.consumer.orders import Filter
from outbox.consumer.redrive import Redriver, Replays
from outbox.consumer.retries import Attempts, Pause, Policy
from outbox.consumer.tables import Reason, State
from outbox.database import create_engine
from outbox.errors import OutboxError
from tests.kit.consuming import QUICK, Stage, arrival, message, series
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import Connection, Engine


class Place(Stage):
    """A stage with a worker's attempts and a redriver."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        super().__init__(engine, **options)
        self.stopping = threading.Event()
        self.attempts, self.redriver = self.process()

    def process(
        self, clock: Callable[[], datetime] = now_utc, *, name: str = "", policy: Policy = QUICK, replayers: int = 1
    ) -> tuple[Attempts, Redriver]:
        """Return what another process of the service would have."""
        all_attempts = []
        for number in range(replayers):
            deliveries = Deliveries(self.recorder.service, self.engine, worker=number, clock=clock)
            pause = Pause("exports", policy, self.stopping, random.Random(1))
            all_attempts.append(Attempts(deliveries, policy, pause, random.Random(1)))
        name = name or str(uuid.uuid4())
        return all_attempts[0], Redriver(all_attempts, Turnstile(patience_seconds=0.2), self.stopping, batch=10, process=name)

    def is_seen(self, name: str, *, at: datetime | None = None) -> None:
        """Let the row of the process *name*, on another host, say that it was alive at *at*."""
        now = at or now_utc()
        row = {"service": "exports", "id": name, "host": "elsewhere", "pid": 1, "version": "1", "state": "running"}
        with self.engine.begin() as connection:
            connection.execute(sa.delete(tables.process).where(tables.process.c.id == name))
            connection.execute(tables.process.insert(), {**row, "connected": True, "started_at": now, "seen_at": now})

    def was_begun(self, starts: int, by: str | None) -> None:
        """Let the replay of every parked message have begun in *starts* processes, *by* being the last."""
        with self.engine.begin() as connection:
            connection.execute(sa.update(tables.parked).values(starts=starts, starter=by))

    def arrive(self, *messages: Any) -> None:
        self.attempts.settle([arrival(each) for each in messages], lambda _settled: None)

    def requeue(self, *, at: datetime | None = None) -> None:
        waiting = [each.id for each in self.entries if each.state == State.PARKED]
        operating.requeue(self.engine, self.recorder.service, waiting, actor="me@here", now=at)

    def replay(self) -> None:
        while self.redriver.look():
            pass

    @property
    def entries(self) -> list[operating.Entry]:
        return operating.parked_list(self.engine, self.recorder.service, limit=1000)

    @property
    def numbers(self) -> list[int]:
        return self.recorder.numbers(self.engine)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    yield engine
    engine.dispose()


def failing_on(number: int, error: type[Exception] = ValueError) -> Any:
    def fail(received: Any, _session: Any) -> None:
        if received.data["number"] == number:
            raise error("no")

    return fail


def test_a_long_line_behind_a_repaired_message_is_replayed_in_order_in_few_transactions(engine: Engine) -> None:
    place = Place(engine, before=failing_on(1))
    place.arrive(*series("a", 35))
    assert len(place.entries) == 35
    place.recorder.before = None
    place.requeue()
    looks = 0
    while place.redriver.look():
        looks += 1
    assert looks == 4  # ten at a time
    assert place.numbers == list(range(1, 36))
    assert place.status.held_keys == 0


def test_a_replay_ended_by_what_is_no_exception_does_not_end_all_replaying(engine: Engine) -> None:
    place = Place(engine, before=failing_on(1))
    place.arrive(*series("event:1", 2))
    failures: list[BaseException] = [KeyboardInterrupt()]

    def interrupted(_message: Any, _session: Any) -> None:
        if failures:
            raise failures.pop()

    place.recorder.before = interrupted
    place.requeue()
    place.redriver.start()
    try:
        eventually(lambda: place.numbers == [1, 2], what="the replay to be tried again")
    finally:
        place.stopping.set()
        place.redriver.join(10)
    assert place.entries == []


def test_a_line_stops_at_the_next_message_that_fails_and_goes_on_from_there(engine: Engine) -> None:
    place = Place(engine, before=failing_on(1))
    place.arrive(*series("a", 9))
    place.recorder.before = failing_on(5)
    place.requeue()
    place.replay()
    assert place.numbers == [1, 2, 3, 4]
    assert [(entry.sequence, entry.state) for entry in place.entries] == [
        (5, State.PARKED),
        *[(number, State.BEHIND) for number in (6, 7, 8, 9)],
    ]
    assert place.entries[0].attempts == QUICK.max_attempts
    place.recorder.before = None
    place.requeue()
    place.replay()
    assert place.numbers == list(range(1, 10))


def test_a_message_that_a_strict_service_parked_as_late_is_late_when_it_is_replayed(engine: Engine) -> None:
    place = Place(engine, order="strict")
    place.arrive(message(5, key="a", sequence=5))
    place.arrive(message(3, key="a", sequence=3), message(6, key="a", sequence=6))
    assert place.entries[0].reason == Reason.LATE
    place.requeue()
    place.replay()
    assert [(effect.number, effect.late) for effect in place.seen] == [(5, False), (3, True), (6, False)]
    assert place.status.late_total == 1


def test_a_message_arriving_while_its_key_is_replayed_waits_and_comes_after(engine: Engine) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slowly(received: Any, _session: Any) -> None:
        if received.data["number"] == 2:
            inside.set()
            go_on.wait(20)

    place = Place(engine, before=failing_on(1))
    place.arrive(*series("a", 2))
    place.recorder.before = slowly
    place.requeue()
    other, _ = place.process()
    replaying = threading.Thread(target=place.replay, daemon=True)
    replaying.start()
    assert inside.wait(10)
    done: list[Outcome] = []
    arriving = threading.Thread(
        target=lambda: done.extend(each.outcome for each in other.deliveries.settle([_arrival(3)])), daemon=True
    )
    arriving.start()
    arriving.join(0.2)
    assert done == []
    go_on.set()
    arriving.join(20)
    replaying.join(20)
    assert done == [Outcome.APPLIED]
    assert place.numbers == [1, 2, 3]


def _arrival(number: int) -> Any:
    return arrival(message(number, key="a", sequence=number))


def test_two_processes_that_replay_at_once_apply_each_message_once_and_in_order(engine: Engine) -> None:
    place = Place(engine, before=lambda received, _session: _no() if received.sequence in (1, None) else None)
    for number in range(6):
        place.arrive(*series(f"key:{number}", 8))
    place.arrive(*[message(100 + number) for number in range(10)])
    assert len(place.entries) == 58
    place.recorder.before = None
    place.requeue()
    _, other = place.process()

    def replay(redriver: Redriver) -> None:
        while place.entries:
            redriver.look()

    threads = [threading.Thread(target=replay, args=(each,), daemon=True) for each in (place.redriver, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    effects = place.seen
    assert len(effects) == 58
    for number in range(6):
        assert [effect.number for effect in effects if effect.key == f"key:{number}"] == list(range(1, 9))
    assert sorted(effect.number for effect in effects if effect.key is None) == list(range(100, 110))
    assert (place.status.applied_total, place.status.held_keys, place.status.parked) == (58, 0, 0)


def _no() -> None:
    raise ValueError("no")


def test_a_rejected_message_that_let_its_key_go_takes_its_place_in_it_when_requeued(engine: Engine) -> None:
    def let_go(received: Any, _session: Any) -> None:
        if received.data["number"] == 1:
            raise Reject("no such room", hold=False)

    place = Place(engine, before=let_go)
    place.arrive(*series("a", 3))
    assert (place.numbers, place.status.held_keys) == ([2, 3], 0)
    place.requeue(at=datetime.now(UTC) + timedelta(hours=1))  # not yet due: its key waits for it from now on
    assert place.status.held_keys == 1
    place.arrive(message(4, key="a", sequence=4))
    assert place.numbers == [2, 3]
    place.recorder.before = None
    _, later = place.process(clock=lambda: datetime.now(UTC) + timedelta(hours=2))
    while later.look():
        pass
    assert [(effect.number, effect.late) for effect in place.seen] == [(2, False), (3, False), (1, True), (4, False)]
    assert place.status.held_keys == 0


def test_what_is_still_unreadable_or_without_handler_stays_parked_with_the_same_reason(engine: Engine) -> None:
    place = Place(engine)
    place.arrive(b"garbage", message(1, key="a", sequence=1, topic="room.modified"))
    place.requeue()
    place.replay()
    assert [(entry.reason, entry.state) for entry in place.entries] == [
        (Reason.UNDECODABLE, State.PARKED),
        (Reason.NO_HANDLER, State.PARKED),
    ]
    assert place.status.held_keys == 0
    place.arrive(message(2, key="a", sequence=2))
    assert place.numbers == [2]


def test_orders_for_messages_that_are_not_there_change_nothing_and_name_them(engine: Engine) -> None:
    place = Place(engine, before=failing_on(1))
    place.arrive(*series("a", 2))
    head, _ = place.entries
    with pytest.raises(OutboxError, match="no parked message nonsense"):
        operating.requeue(engine, place.recorder.service, [head.id, "nonsense"], actor="me@here")
    assert place.entries[0].state == State.PARKED
    operating.discard(engine, place.recorder.service, [head.id], actor="me@here", reason="x")
    with pytest.raises(OutboxError, match="was discarded"):
        operating.requeue(engine, place.recorder.service, [head.id], actor="me@here")
    eventually(lambda: place.redriver.look() or not place.entries, what="the one behind it to go")
    assert place.numbers == [2]


def test_a_discard_during_the_replay_of_a_message_does_not_claim_what_was_applied(engine: Engine) -> None:
    place = Place(engine, before=failing_on(1))
    place.arrive(message(1))
    begun, goes_on = threading.Event(), threading.Event()

    def slow(_message: Any, _session: Any) -> None:
        begun.set()
        goes_on.wait(10)

    place.recorder.before = slow
    (entry,) = place.entries
    place.requeue()
    replay = threading.Thread(target=place.replay)
    replay.start()
    assert begun.wait(10)
    refusals: list[str] = []

    def discard() -> None:
        try:
            operating.discard(engine, place.recorder.service, [entry.id], actor="me@here", reason="no")
        except OutboxError as error:
            refusals.append(str(error))

    order = threading.Thread(target=discard)
    order.start()
    order.join(0.2)  # it waits for the replay
    goes_on.set()
    replay.join(10)
    order.join(10)
    assert place.numbers == [1]
    assert "has no parked message" in refusals[0]


def test_parked_messages_are_listed_by_state_reason_topic_and_key(engine: Engine) -> None:
    place = Place(engine, before=failing_on(1))
    place.arrive(*series("a", 3))
    place.arrive(b"garbage", message(1, key="b", sequence=1, topic="room.modified"))
    service = place.recorder.service

    def listed(**which: Any) -> list[int | None]:
        return [each.sequence for each in operating.parked_list(engine, service, Filter(**which))]

    assert listed() == [1, 2, 3, None, 1]
    assert listed(state=State.BEHIND) == [2, 3]
    assert listed(reason=Reason.FAILED) == [1]
    assert listed(topic="room.modified") == listed(key="b") == [1]
    assert [each.sequence for each in operating.parked_list(engine, service, limit=2)] == [1, 2]


# --- several processes ---------------------------------------------------------------------------------------------------


def test_a_replay_that_a_living_process_began_is_left_to_it_and_a_dead_one_counts_as_a_death(engine: Engine) -> None:
    place = Place(engine, before=failing_on(1))
    place.arrive(*series("a", 1))
    place.arrive(message(1))
    place.recorder.before = None
    place.requeue()
    place.is_seen("another")
    place.was_begun(1, "another")
    assert not place.redriver.look()
    assert place.numbers == []
    place.is_seen("another", at=now_utc() - timedelta(minutes=1))
    place.replay()
    assert place.numbers == [1, 1]


@pytest.mark.parametrize("by", ["another", None])
def test_a_message_whose_replay_killed_as_many_processes_as_allowed_is_parked_as_that(engine: Engine, by: str | None) -> None:
    place = Place(engine, before=failing_on(1))
    place.arrive(*series("a", 1))
    place.requeue()
    place.was_begun(QUICK.max_attempts, by)
    place.replay()
    (entry,) = place.entries
    assert (entry.reason, entry.state) == (Reason.CRASHED, State.PARKED)
    assert entry.error == f"the process died {QUICK.max_attempts} times while replaying it"


def test_a_process_that_begins_a_replay_again_counts_once(engine: Engine) -> None:
    place = Place(engine, before=failing_on(1))
    place.arrive(*series("a", 1))
    place.requeue()
    (row,) = place.parked
    mine, others = (Replays(place.deliveries, name) for name in ("mine", "another"))
    key = (row.source, row.key)
    assert [mine.begin(row.id, key) for _ in range(3)] == [1, 1, 1]
    assert others.begin(row.id, key) == 2  # nobody has seen the first one
    others.end(row.id)
    assert mine.begin(row.id, key) == 1


@pytest.mark.postgres
def test_processes_that_all_replay_failing_messages_never_say_that_one_died(postgres_url: str) -> None:
    def fail(_received: Any, _session: Any) -> None:
        raise ValueError("no")

    place = Place(create_engine(postgres_url), before=fail)
    place.arrive(*(message(number, key=f"key:{number % 5}" if number % 2 else None, sequence=number) for number in range(20)))
    once = Policy(max_attempts=1)
    processes = [place.process(name=str(number), policy=once)[1] for number in range(3)]
    for number in range(3):
        place.is_seen(str(number))

    def replay(redriver: Redriver) -> None:
        while any(each.state == State.DUE for each in place.entries):
            redriver.look()

    for _ in range(3):
        place.requeue()
        threads = [threading.Thread(target=replay, args=(each,), daemon=True) for each in processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert {each.reason for each in place.entries} <= {Reason.FAILED, Reason.BEHIND}


@pytest.mark.postgres
@pytest.mark.parametrize("starts", [0, 1])
def test_a_replay_that_hangs_in_another_process_is_left_to_it_without_a_wait(postgres_url: str, starts: int) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hang(received: Any, _session: Any) -> None:
        if received.key == "hung":
            inside.set()
            go_on.wait(30)

    place = Place(create_engine(postgres_url), before=failing_on(1))
    place.arrive(message(1, key="hung", sequence=1), message(1, key="a", sequence=1))
    place.recorder.before = hang
    place.requeue()
    place.was_begun(starts, "a dead one" if starts else None)
    _, standby = place.process(replayers=2)
    standby.start()  # with a second thread, for the other key
    assert inside.wait(10)
    eventually(lambda: place.status.parked == 1, what="the other key to be replayed all the same")
    looks: list[bool] = []
    active = threading.Thread(target=lambda: looks.append(place.redriver.look()), daemon=True)
    active.start()
    active.join(10)
    assert looks == [False]
    with place.redriver._turnstile.shared():
        pass  # it keeps nobody out
    assert not standby.idle
    go_on.set()
    eventually(lambda: place.status.parked == 0, what="the hung one to be applied")
    place.stopping.set()
    eventually(lambda: not standby.working, what="its end")


@contextmanager
def key_locked(engine: Engine) -> Iterator[Connection]:
    """Have the key in hand as a batch of arriving messages has it."""
    with engine.begin() as connection:
        connection.execute(sa.select(tables.key).with_for_update())
        yield connection


def somebody_waits(engine: Engine) -> bool:
    with engine.connect() as connection:
        return bool(connection.scalar(sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")))


@pytest.mark.postgres
def test_a_replay_gets_its_turn_between_messages_of_its_key_that_arrive_without_a_break(postgres_url: str) -> None:
    limits: list[str] = []

    def note_limit(_received: Any, session: Any) -> None:
        limits.append(session.scalar(sa.text("SHOW lock_timeout")))

    place = Place(create_engine(postgres_url), before=failing_on(1))
    place.arrive(*series("a", 3))
    place.recorder.before = note_limit
    place.requeue()
    with futures.ThreadPoolExecutor() as pool:
        with key_locked(place.engine):
            look = pool.submit(place.redriver.look)
            eventually(lambda: somebody_waits(place.engine), what="the replay to stand in line for its key")
        assert look.result(10)
    assert place.numbers == [1, 2, 3]
    assert set(limits) == {"0"}, "the handlers' own locks are waited for as before"


@pytest.mark.postgres
def test_a_replay_does_not_wait_for_ever_for_its_key(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redrive, "_KEY_SECONDS", 0.05)
    place = Place(create_engine(postgres_url), before=failing_on(1))
    place.arrive(message(1, key="a", sequence=1))
    place.recorder.before = None
    place.requeue()
    with key_locked(place.engine):
        assert not place.redriver.look()
    place.replay()
    assert place.numbers == [1]


def test_a_message_discarded_just_before_its_replay_stays_discarded(engine: Engine) -> None:
    place = Place(engine, before=failing_on(1))
    place.arrive(*series("a", 2))
    place.requeue()
    replays = Replays(place.deliveries, "a process")
    (due,) = replays.due()
    operating.discard(engine, place.recorder.service, [place.entries[0].id], actor="me@here", reason="wrong")
    assert replays.begin(due.id, (due.source, due.key)) == 0
    place.replay()
    assert place.numbers == [2]
    assert [row.state for row in place.parked] == [State.DISCARDED]
