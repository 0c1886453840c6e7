"""A message that hangs, takes long or waits keeps its key waiting and nothing else; PostgreSQL."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox.consumer import hand, tables
from outbox.consumer.batch import Deliveries
from outbox.consumer.exclusive import Turnstile
from outbox.consumer.key_lanes import Waiting
from outbox.consumer.retries import Attempts, Pause
from outbox.consumer.workers import Pool
from tests.kit.consuming import QUICK, Stage, arrival, message, rows, series
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from logging import LogRecord

    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

    from outbox.consumer.delivery import Arrival
    from outbox.message import Message, Received

pytestmark = pytest.mark.postgres

WORKERS = 2


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a moment counts as stuck."""
    monkeypatch.setattr(hand, "STUCK_SECONDS", 0.3)


@pytest.fixture
def crew(postgres_engine: Engine) -> Iterator[Crew]:
    crew = Crew(postgres_engine)
    yield crew
    crew.end()


class Crew(Stage):
    """A recording service with workers, who find what waits when they begin: the first one takes all of it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.stopping = threading.Event()
        self.go_on = threading.Event()
        self.waiting = Waiting()
        self.pause = Pause("exports", QUICK, self.stopping, random.Random(1))
        self.turnstile = Turnstile()
        attempts = [self._attempts(number) for number in range(2 * WORKERS)]
        self.hands = [each.deliveries.hand for each in attempts]
        self.pool = Pool(attempts[:WORKERS], self.waiting, batch=50, wake=lambda: None, spares=attempts[WORKERS:])
        self.finished: list[Arrival] = []
        #: The numbers of each transaction's messages, in the order in which handlers were called.
        self.calls: list[tuple[int, int]] = []
        #: What is done with a message of that number.
        self.hangs: dict[int, Callable[[Session], object]] = {}
        self.recorder.before = self._before

    def _attempts(self, number: int) -> Attempts:
        deliveries = Deliveries(self.recorder.service, self.engine, number)
        return Attempts(deliveries, QUICK, self.pause, random.Random(number), self.turnstile)

    def _before(self, received: Received, session: Session) -> None:
        number = received.data["number"]
        self.calls.append((number, id(session)))
        if number in self.hangs:
            self.hangs[number](session)

    def begin(self, *messages: Message) -> None:
        for each in messages:
            self.waiting.add(arrival(each))
        self.pool.start()

    def numbers(self) -> list[int]:
        self.finished.extend(self.pool.finished())
        return [effect.number for effect in self.seen]

    def applies(self, *numbers: int) -> None:
        """Wait until exactly these are applied, whatever their order."""
        eventually(lambda: sorted(self.numbers()) == sorted(numbers), 20, f"{numbers} to be applied")

    def is_blameless(self, count: int) -> None:
        """Everything was applied once, none of it parked, and nobody took the database to be away."""
        assert sorted(self.numbers()) == list(range(1, count + 1))
        assert (self.status.applied_total, self.status.duplicates_total, self.parked) == (count, 0, [])
        eventually(lambda: len(self.numbers()) and len(self.finished) == count, what="all to be finished")
        assert len({id(each.receipt) if each.receipt else each.identity for each in self.finished}) == count
        assert self.pause.problem == ""
        assert self.pool.crash is None

    def end(self) -> None:
        self.go_on.set()
        self.stopping.set()
        self.waiting.close()
        eventually(lambda: not self.pool.working, 20, "the workers to end")


def forgetting(crew: Crew, number: int, then: Callable[[], object] = lambda: None) -> Callable[[Session], object]:
    """Wait as a handler does that hangs once."""

    def hang(_session: Session) -> None:
        del crew.hangs[number]
        crew.go_on.wait(30)
        then()

    return hang


def each_its_key(count: int) -> list[Message]:
    return [message(number, key=f"key:{number}", sequence=1) for number in range(1, count + 1)]


@pytest.mark.parametrize("hung", [1, 5, 9])
def test_a_message_that_hangs_gives_back_those_it_shares_a_transaction_with(crew: Crew, hung: int) -> None:
    crew.hangs[hung] = forgetting(crew, hung)
    crew.begin(*each_its_key(9))
    crew.applies(*({*range(1, 10)} - {hung}))
    crew.go_on.set()
    crew.applies(*range(1, 10))
    crew.is_blameless(9)
    (last,) = {session for number, session in crew.calls[-1:]}
    assert [number for number, session in crew.calls if session == last][-1:] == [hung]  # alone, when it came again


def test_a_message_that_hangs_without_a_key_keeps_nobody_waiting(crew: Crew) -> None:
    crew.hangs[3] = forgetting(crew, 3)
    crew.begin(*(message(number) for number in range(1, 6)))
    crew.applies(1, 2, 4, 5)
    crew.go_on.set()
    crew.applies(1, 2, 3, 4, 5)
    crew.is_blameless(5)


def test_the_key_of_what_hangs_waits_for_it_and_stays_in_order(crew: Crew) -> None:
    crew.hangs[2] = forgetting(crew, 2)
    crew.begin(*series("hung", 4), *(message(number, key=f"key:{number}", sequence=1) for number in (5, 6)))
    crew.applies(5, 6)
    crew.waiting.add(arrival(message(7, key="hung", sequence=5)))
    crew.waiting.add(arrival(message(8, key="key:5", sequence=2)))
    crew.applies(5, 6, 8)
    crew.go_on.set()
    crew.applies(*range(1, 9))
    assert crew.recorder.numbers(crew.engine, "hung") == [1, 2, 3, 4, 7]
    assert (crew.status.late_total, crew.status.gaps_total) == (0, 0)
    crew.is_blameless(8)


def sleeping(session: Session) -> None:
    session.execute(sa.text("SELECT pg_sleep(600)"))


def locked(session: Session) -> None:
    session.execute(sa.text("SELECT pg_advisory_xact_lock(4711)"))


def swallowing(session: Session) -> None:
    try:
        sleeping(session)
    except Exception:  # noqa: BLE001 - as handlers do
        return


@pytest.mark.parametrize("how", [sleeping, locked, swallowing])
def test_a_statement_that_takes_long_is_cancelled_for_the_sake_of_the_others_and_runs_alone(
    crew: Crew, how: Callable[[Session], object]
) -> None:
    def once(session: Session) -> None:
        if len([number for number, _ in crew.calls if number == 2]) == 1:
            how(session)

    crew.hangs[2] = once
    with crew.engine.connect() as other:
        other.execute(sa.text("SELECT pg_advisory_xact_lock(4711)"))
        crew.begin(*each_its_key(4))
        crew.applies(1, 2, 3, 4)
    crew.is_blameless(4)


def test_two_that_hang_in_one_transaction_keep_their_own_keys(crew: Crew) -> None:
    crew.hangs = {2: forgetting(crew, 2), 4: forgetting(crew, 4)}
    crew.begin(*each_its_key(6))
    crew.applies(1, 3, 5, 6)
    crew.go_on.set()
    crew.applies(*range(1, 7))
    crew.is_blameless(6)


def test_a_handler_that_is_cut_off_and_then_raises_has_not_failed(crew: Crew) -> None:
    def fail() -> None:
        raise ValueError("too late")

    crew.hangs[2] = forgetting(crew, 2, fail)
    crew.begin(*each_its_key(3))
    crew.applies(1, 3)
    crew.go_on.set()
    crew.applies(1, 2, 3)
    crew.is_blameless(3)


def test_what_is_alone_in_its_transaction_may_take_as_long_as_it_likes(crew: Crew) -> None:
    """A handler that is always slow is cut off once, among others; it finishes."""

    def be_slow(_session: Session) -> None:
        eventually(lambda: any(worker.is_stuck() for worker in crew.hands), 20, "it to have taken long")
        if len([number for number, _ in crew.calls if number == 1]) == 1:
            eventually(lambda: sorted(crew.numbers()) == [2, 3], 20, "the others to be applied")
        else:
            crew.pool.look()  # whatever it finds, this one goes on

    crew.hangs[1] = be_slow
    crew.begin(*each_its_key(3))
    crew.applies(1, 2, 3)
    crew.is_blameless(3)
    assert [number for number, _ in crew.calls].count(1) == 2


def test_when_one_hangs_while_its_batch_is_tried_one_by_one_the_rest_is_given_back(crew: Crew) -> None:
    def fail(_session: Session) -> None:
        if len(crew.calls) == 1:
            raise ValueError("once")

    crew.hangs = {1: fail, 2: forgetting(crew, 2)}
    crew.begin(*each_its_key(5))
    crew.applies(1, 3, 4, 5)
    crew.go_on.set()
    crew.applies(1, 2, 3, 4, 5)
    crew.is_blameless(5)


def test_as_many_that_hang_as_there_are_workers_do_not_stop_a_service(crew: Crew) -> None:
    crew.hangs = {number: forgetting(crew, number) for number in range(1, WORKERS + 1)}
    crew.begin(*each_its_key(6))
    crew.applies(3, 4, 5, 6)
    crew.go_on.set()
    crew.applies(*range(1, 7))
    crew.is_blameless(6)
    crew.waiting.add(arrival(message(7)))  # somebody is still there
    crew.applies(*range(1, 8))


def test_that_no_worker_is_left_is_said_once(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    crew.hangs = {number: forgetting(crew, number) for number in range(1, 2 * WORKERS + 1)}
    crew.begin(*each_its_key(6))

    def said() -> list[LogRecord]:
        return [each for each in caplog.records if getattr(each, "outbox_event", "") == "consumer.all_stuck"]

    eventually(said, 20, "it to be said")
    crew.pool.look()
    assert len(said()) == 1
    crew.go_on.set()
    crew.applies(*range(1, 7))
    crew.is_blameless(6)


def test_a_key_that_another_transaction_has_locked_keeps_no_other_waiting(crew: Crew) -> None:
    """As a replay that hangs does, in this process or another."""
    crew.settle(message(1, key="locked", sequence=1))
    with crew.engine.connect() as replay:
        replay.execute(sa.select(tables.key).with_for_update())
        crew.begin(*(message(number, key="locked" if number == 3 else None, sequence=number - 1) for number in range(2, 6)))
        crew.applies(1, 2, 4, 5)
    crew.applies(1, 2, 3, 4, 5)
    assert crew.parked == []


def test_what_hangs_when_the_workers_are_to_end_leaves_nothing_half_done(crew: Crew) -> None:
    crew.hangs[2] = forgetting(crew, 2)
    crew.begin(*each_its_key(3))
    crew.applies(1, 3)
    crew.stopping.set()
    crew.waiting.close()
    assert crew.pool.working
    crew.go_on.set()
    eventually(lambda: not crew.pool.working, 20, "the workers to end")
    assert crew.numbers() == [1, 3]
    assert {row.message_id for row in rows(crew.engine, tables.inbox)} == {each.identity[1] for each in crew.finished}
