"""Marks, holds, parking and replaying, against a model: whatever happens in whatever order, a key stays in order.

The machine delivers messages in and out of sequence, twice, in batches; lets handlers fail, reject and ask for time; has
people requeue and discard; lets time pass and the worker replay. The tables are real (SQLite in memory).
"""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import UUID

import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outbox.consumer import Reject, Retry, operating, orders, tables
from outbox.consumer.batch import Deliveries
from outbox.consumer.delivery import Arrival, read
from outbox.consumer.exclusive import Turnstile
from outbox.consumer.orders import Filter, Requeue, Sweep
from outbox.consumer.redrive import Redriver
from outbox.consumer.retries import Attempts, Pause, Policy
from outbox.consumer.tables import State
from outbox.database import prepare
from outbox.message import cloud_event
from outbox.process.backoff import Backoff
from tests.kit.consuming import Recorder, message, rows

KEYS = ("a", "b")
AT_ONCE = Backoff(0.0, 0.0)
POLICY = Policy(max_attempts=2, between_attempts=AT_ONCE, without_database=AT_ONCE, when_asked=AT_ONCE)
BEHAVIOURS = ("works", "fails", "rejects", "lets go", "later")


@dataclass
class Sent:
    """A message and what the model knows of it."""

    number: int
    key: str
    sequence: int
    arrival: Arrival
    behaviour: str = "works"
    arrived: bool = False
    late: bool = False
    discarded: bool = False
    let_go: bool = False

    @property
    def id(self) -> str:
        return self.arrival.identity[1]


@dataclass
class KeyModel:
    highest: int = 0
    #: First arrivals, in order.
    arrivals: list[Sent] = field(default_factory=list)


class ParkingMachine(RuleBasedStateMachine):
    @initialize(order=st.sampled_from(["late-ok", "strict"]), limit=st.integers(1, 4))
    def begin(self, order: str, limit: int) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.engine = prepare(sa.create_engine("sqlite://", poolclass=sa.StaticPool))
        self.recorder = Recorder(order=order, before=self.behave)
        self.strict = order == "strict"
        operating.migrate(self.recorder.service, self.engine)
        deliveries = Deliveries(self.recorder.service, self.engine, 0, clock=lambda: self.now)
        stopping = threading.Event()
        pause = Pause("exports", POLICY, stopping, random.Random(1))
        self.attempts = Attempts(deliveries, POLICY, pause, random.Random(1))
        self.redriver = Redriver([self.attempts], Turnstile(), stopping, batch=limit, process="1")
        self.numbers = itertools.count(1)
        self.sequences = {key: itertools.count(1) for key in KEYS}
        self.sent: dict[int, Sent] = {}
        self.keys = {key: KeyModel() for key in KEYS}
        self.deliveries = 0
        self.late_applied_or_parked = 0

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.dispose()

    def behave(self, received: Any, _session: Any) -> None:
        behaviour = self.sent[received.data["number"]].behaviour
        if behaviour == "fails":
            raise ValueError("a bug")
        if behaviour in ("rejects", "lets go"):
            raise Reject("no", hold=behaviour == "rejects")
        if behaviour == "later":
            raise Retry(after=3600)

    # --- what happens ---------------------------------------------------------------------------------------------------

    @rule(
        wanted=st.lists(
            st.tuples(st.sampled_from(KEYS), st.sampled_from(BEHAVIOURS), st.integers(0, 2)), min_size=1, max_size=5
        ),
        twice=st.booleans(),
    )
    def new_messages_arrive(self, wanted: list[tuple[str, str, int]], twice: bool) -> None:
        batch = []
        for key, behaviour, skipped in wanted:
            for _ in range(skipped):  # said, but on its way: it comes late or never
                self.say(key, "works")
            batch.append(self.say(key, behaviour))
        self.deliver(batch + batch[:1] if twice else batch)

    @precondition(lambda self: any(not each.arrived for each in self.sent.values()))
    @rule(data=st.data())
    def a_late_message_arrives(self, data: Any) -> None:
        missing = [each for each in self.sent.values() if not each.arrived]
        self.deliver([data.draw(st.sampled_from(missing))])

    @precondition(lambda self: any(each.arrived for each in self.sent.values()))
    @rule(data=st.data())
    def a_message_arrives_again(self, data: Any) -> None:
        self.deliver([data.draw(st.sampled_from([each for each in self.sent.values() if each.arrived]))])

    @rule()
    def everything_is_repaired(self) -> None:
        for each in self.sent.values():
            each.behaviour = "works"

    @rule()
    def everything_is_repaired_and_requeued(self) -> None:
        self.everything_is_repaired()
        if chosen := self.waiting_for_a_person():
            self.requeue(chosen)
        self.the_worker_replays(hours=2)
        assert all(row.state == State.DISCARDED for row in rows(self.engine, tables.parked))
        assert not any(row.held for row in rows(self.engine, tables.key))

    @precondition(lambda self: self.waiting_for_a_person())
    @rule(data=st.data())
    def a_person_requeues(self, data: Any) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.waiting_for_a_person()), min_size=1, max_size=3, unique=True))
        self.requeue(chosen)

    def requeue(self, chosen: list[str]) -> None:
        self.note_requeue(chosen)
        operating.requeue(self.engine, self.recorder.service, chosen, actor="me@here", now=self.now)

    def note_requeue(self, chosen: list[str]) -> None:
        holding = {row.message_id for row in rows(self.engine, tables.parked) if row.holds}
        for each in self.sent.values():
            if each.id in chosen and each.id not in holding and each.sequence < self.keys[each.key].highest:
                each.late = True  # it let go, and was overtaken

    @precondition(lambda self: self.waiting_for_a_person())
    @rule(key=st.sampled_from([None, *KEYS]), chunk=st.integers(1, 3))
    def a_person_requeues_all(self, key: str | None, chunk: int) -> None:
        chosen = [row.message_id for row in self.parked() if row.state == State.PARKED and key in (None, row.key)]
        self.note_requeue(chosen)
        which = Filter(state=State.PARKED, key=key)
        act = Requeue(service="exports", actor="me@here", now=self.now)
        with patch.object(orders, "CHUNK", chunk):
            assert sum(Sweep(self.engine, "exports", which, last=1_000_000, act=act).run()) == len(chosen)

    @precondition(lambda self: self.waiting_for_a_person())
    @rule(data=st.data())
    def a_person_discards(self, data: Any) -> None:
        chosen = data.draw(st.sampled_from(self.waiting_for_a_person()))
        operating.discard(self.engine, self.recorder.service, [chosen], actor="me@here", reason="of no use", now=self.now)
        next(each for each in self.sent.values() if each.id == chosen).discarded = True

    @rule(hours=st.sampled_from([0, 0, 2]))
    def the_worker_replays(self, hours: int) -> None:
        self.now += timedelta(hours=hours)
        for _ in range(50):
            if not self.redriver.look():
                return
            self.now += timedelta(microseconds=1)
        raise AssertionError("replaying does not end")

    # --- what must hold -------------------------------------------------------------------------------------------------

    @invariant()
    def every_arrival_is_applied_once_or_parked(self) -> None:
        applied = self.recorder.numbers(self.engine)
        assert len(applied) == len(set(applied))
        parked = {row.message_id for row in rows(self.engine, tables.parked)}
        for each in self.sent.values():
            places = (each.number in applied) + (each.id in parked)
            assert places == (1 if each.arrived else 0), each

    @invariant()
    def effects_of_a_key_come_in_the_order_of_arrival(self) -> None:
        effects = self.recorder.seen(self.engine)
        for key, model in self.keys.items():
            applied = [effect.number for effect in effects if effect.key == key]
            # A message whose handler let go of its key may come after its successors: nobody waited for it.
            ordered = [number for number in applied if not self.sent[number].let_go]
            assert ordered == [each.number for each in model.arrivals if each.number in ordered]

    @invariant()
    def nothing_behind_a_message_that_holds_its_key_was_applied(self) -> None:
        applied = set(self.recorder.numbers(self.engine))
        for key, model in self.keys.items():
            holding = {row.message_id for row in rows(self.engine, tables.parked) if row.key == key and row.holds}
            first = next((index for index, each in enumerate(model.arrivals) if each.id in holding), None)
            if first is not None:
                behind = [each for each in model.arrivals[first + 1 :] if not each.let_go]
                overtaken = [each.number for each in behind if each.number in applied and not self.released(each, first, model)]
                assert overtaken == []

    def released(self, _each: Sent, first: int, model: KeyModel) -> bool:
        """A message that let go and was requeued holds its key only from then on."""
        return model.arrivals[first].let_go

    @invariant()
    def a_key_is_held_exactly_while_a_parked_message_holds_it(self) -> None:
        holding = {row.key for row in rows(self.engine, tables.parked) if row.holds and row.state != State.DISCARDED}
        held = {row.key for row in rows(self.engine, tables.key) if row.held}
        assert held == holding

    @invariant()
    def late_is_what_came_after_a_later_sequence(self) -> None:
        for effect in self.recorder.seen(self.engine):
            assert effect.late == self.sent[effect.number].late
        for row in rows(self.engine, tables.parked):
            assert row.late == next(each for each in self.sent.values() if each.id == row.message_id).late

    @invariant()
    def the_counters_agree_with_the_tables(self) -> None:
        status = operating.status(self.engine, self.recorder.service)
        parked = rows(self.engine, tables.parked)
        assert status.applied_total == len(self.recorder.seen(self.engine))
        assert status.parked == sum(row.state != State.DISCARDED for row in parked)
        assert status.applied_total + status.duplicates_total + len(parked) == self.deliveries
        assert status.late_total == sum(effect.late for effect in self.recorder.seen(self.engine))
        assert {row.key: row.sequence for row in rows(self.engine, tables.key)} == {
            key: model.highest for key, model in self.keys.items() if model.arrivals
        }

    # --- how ------------------------------------------------------------------------------------------------------------

    def say(self, key: str, behaviour: str) -> Sent:
        number, sequence = next(self.numbers), next(self.sequences[key])
        # The same ids in every run: Hypothesis replays what it found.
        arrival = read(cloud_event(message(number, key=key, sequence=sequence, id=UUID(int=number), created_at=self.now)))
        self.sent[number] = Sent(number, key, sequence, arrival, behaviour)
        return self.sent[number]

    def deliver(self, batch: list[Sent]) -> None:
        for each in batch:
            self.deliveries += 1
            model = self.keys[each.key]
            if not each.arrived:
                each.arrived = True
                each.late = each.sequence <= model.highest
                each.let_go = each.behaviour == "lets go"
                model.highest = max(model.highest, each.sequence)
                model.arrivals.append(each)
        self.attempts.settle([each.arrival for each in batch], lambda _settled: None)

    def parked(self) -> list[Any]:
        return list(rows(self.engine, tables.parked))

    def waiting_for_a_person(self) -> list[str]:
        return [row.message_id for row in rows(self.engine, tables.parked) if row.state == State.PARKED]


TestParking = ParkingMachine.TestCase
TestParking.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)
