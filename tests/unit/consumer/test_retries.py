"""What an exception means: wait, try again, or give the message up."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from psycopg import errors
from sqlalchemy.exc import ProgrammingError

from outbox.consumer import Reject, Retry, Service, retries
from outbox.consumer.batch import Settled
from outbox.consumer.delivery import Arrival, read
from outbox.consumer.exclusive import Turnstile
from outbox.consumer.hand import Hand
from outbox.consumer.outcomes import Incomplete, Outcome
from outbox.consumer.retries import Attempts, Pause, Policy, Stopping
from outbox.consumer.tables import Reason
from outbox.consumer.transaction import Conflict, Transient
from outbox.message import cloud_event
from outbox.process.backoff import Backoff
from tests.kit.consuming import TOPIC, message
from tests.kit.waiting import eventually, stands_still

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from outbox.consumer.parking import Aside

NOW = datetime(2026, 1, 1, tzinfo=UTC)
AT_ONCE = Backoff(0.0, 0.0)
POLICY = Policy(max_attempts=3, between_attempts=AT_ONCE, without_database=AT_ONCE, when_asked=AT_ONCE)


@dataclass
class Script:
    """Stands for `Deliveries`: fails as told, remembers what it was asked."""

    #: What to raise, for each number in a batch, in this order.
    failures: dict[int, list[Exception]] = field(default_factory=dict)
    #: What to raise from parking.
    parking: list[Exception] = field(default_factory=list)
    crashes: int = 0
    batches: list[list[int]] = field(default_factory=list)
    asides: dict[int, Aside] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    #: Whether a new connection can be made.
    works: bool = True
    service: Service = field(default_factory=lambda: Service("exports"))
    worker: int = 0
    hand: Hand = field(default_factory=Hand)

    def clock(self) -> datetime:
        return NOW

    def database_works(self) -> bool:
        return self.works

    def settle(self, batch: Sequence[Arrival], aside: Mapping[Arrival, Aside] | None = None) -> list[Settled]:
        numbers = [number(each) for each in batch]
        if aside:
            if self.parking:
                raise self.parking.pop(0)
            self.asides.update({number(each): aside[each] for each in batch})
            return [Settled(each, Outcome.PARKED, aside=aside[each]) for each in batch]
        self.batches.append(numbers)
        for each in numbers:
            if self.failures.get(each):
                raise self.failures[each].pop(0)
        return [Settled(each, Outcome.APPLIED) for each in batch]

    def begin_attempt(self, _arrival: Arrival) -> int:
        self.crashes += 1
        self.begun.append("begun")
        return self.crashes

    def end_attempt(self, _arrival: Arrival) -> None:
        self.crashes = 0
        self.begun.append("ended")


def number(arrival: Arrival) -> int:
    assert arrival.message is not None
    return int(arrival.message.data["number"])


def arrivals(*numbers: int, returns: int = 0, key: str | None = None) -> list[Arrival]:
    headers = {"x-delivery-count": returns}
    return [read(cloud_event(message(each, key=key)), headers=headers, redelivered=returns > 0) for each in numbers]


class Bench:
    def __init__(self, script: Script, policy: Policy = POLICY) -> None:
        self.script = script
        self.stopping = threading.Event()
        self.pause = Pause("exports", policy, self.stopping, random.Random(1))
        self.turnstile = Turnstile()
        self.attempts = Attempts(script, policy, self.pause, random.Random(1), self.turnstile)  # type: ignore[arg-type]
        self.done: list[tuple[int, Outcome]] = []

    def settle(self, batch: Sequence[Arrival]) -> None:
        self.attempts.settle(batch, lambda results: self.done.extend((number(r.arrival), r.outcome) for r in results))


def test_a_batch_that_works_is_settled_together() -> None:
    bench = Bench(Script())
    bench.settle(arrivals(1, 2, 3))
    assert bench.script.batches == [[1, 2, 3]]
    assert bench.done == [(1, Outcome.APPLIED), (2, Outcome.APPLIED), (3, Outcome.APPLIED)]


def test_a_batch_in_which_one_fails_is_taken_one_by_one_in_order_and_only_the_culprit_is_parked() -> None:
    bench = Bench(Script(failures={2: [ValueError("no")] * 9}))
    bench.settle(arrivals(1, 2, 3))
    assert bench.script.batches == [[1, 2, 3], [1], [2], [2], [2], [3]]
    assert bench.done == [(1, Outcome.APPLIED), (2, Outcome.PARKED), (3, Outcome.APPLIED)]
    aside = bench.script.asides[2]
    assert (aside.reason, aside.attempts, aside.error) == (Reason.FAILED, 3, "ValueError: no")
    assert "Traceback" in aside.detail


def test_a_failure_that_passes_parks_nothing() -> None:
    bench = Bench(Script(failures={1: [ValueError(), ValueError()]}))
    bench.settle(arrivals(1))
    assert bench.done == [(1, Outcome.APPLIED)]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("error", [Transient("deadlock"), ValueError()])
def test_every_attempt_finds_the_data_as_it_came(error: Exception, together: bool) -> None:
    @dataclass
    class Spoiler(Script):
        found: list[Any] = field(default_factory=list)

        def settle(self, batch: Sequence[Arrival], aside: Mapping[Arrival, Aside] | None = None) -> list[Settled]:
            for each in batch:
                assert each.message is not None
                self.found.append(dict(each.message.data))
                each.message.data["spoiled"] = True
            return super().settle(batch, aside)

    script = Spoiler(failures={1: [error] * 2})
    Bench(script).settle(arrivals(1, 2) if together else arrivals(1))
    assert script.found == [{"number": each} for batch in script.batches for each in batch]
    assert len(script.found) >= 3


@pytest.mark.parametrize("error", [Transient("deadlock"), Retry(), Retry(after=0.001), Retry(after=timedelta(0))])
def test_what_is_not_the_messages_fault_costs_no_attempt(error: Exception) -> None:
    bench = Bench(Script(failures={1: [error] * 20}))
    bench.settle(arrivals(1))
    assert bench.done == [(1, Outcome.APPLIED)]
    assert len(bench.script.batches) == 21


def test_a_message_that_has_to_wait_again_and_again_is_said_once_and_for_what(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", retries.__name__)
    bench = Bench(Script(failures={1: [Retry(reason="mail server")] * 4, 2: [Retry(reason="mail server says 452")] * 12}))
    bench.settle(arrivals(1))
    assert caplog.messages == []
    (two,) = arrivals(2)
    bench.settle([two])
    (record,) = caplog.records
    assert record.outbox_event == "consumer.waiting"  # type: ignore[attr-defined]
    assert record.outbox_fields == {"service": "exports", "topic": TOPIC, "key": None}  # type: ignore[attr-defined]
    assert two.identity[1] in record.getMessage()
    assert "mail server says 452" in record.getMessage()


def test_a_database_that_is_away_is_waited_for_with_the_whole_batch() -> None:
    bench = Bench(Script(failures={1: [Transient("gone"), Transient("gone")]}))
    bench.settle(arrivals(1, 2))
    assert bench.script.batches == [[1, 2], [1, 2], [1, 2]]


def test_while_a_message_waits_only_the_later_ones_of_its_key_wait_with_it() -> None:
    bench = Bench(Script(failures={1: [ValueError(), Retry(after=0.5)]}))
    bench.settle([*arrivals(1, 2, key="a"), *arrivals(3, key="b"), *arrivals(4)])
    assert bench.script.batches == [[1, 2, 3, 4], [1], [3], [4], [1], [2]]
    assert [each for each, _ in bench.done] == [3, 4, 1, 2]


def test_a_retry_that_takes_no_time_is_not_asked_as_fast_as_the_processor_allows() -> None:
    policy = replace(POLICY, between_attempts=Backoff(0.01, 5.0), in_hand_seconds=0.05)
    bench = Bench(Script(failures={1: [Retry(after=0)] * 1000}), policy)
    bench.settle(arrivals(1))
    assert len(bench.script.batches) < 8
    assert bench.script.asides[1].reason is Reason.LATER


def test_a_retry_that_does_not_pass_is_set_aside_so_that_a_worker_is_free() -> None:
    bench = Bench(Script(failures={1: [Retry(reason="mail server")] * 9}), replace(POLICY, in_hand_seconds=-1.0))
    bench.settle(arrivals(1))
    aside = bench.script.asides[1]
    assert (aside.reason, aside.due_at, aside.attempts) == (Reason.LATER, NOW, 0)
    assert "mail server" in aside.error


@pytest.mark.parametrize("everybody", [True, False])
def test_who_asks_to_wait_for_longer_than_the_policy_allows_is_parked_for_a_person(everybody: bool) -> None:
    error = Retry(reason="mail server", everybody=everybody)
    bench = Bench(Script(failures={1: [error] * 99}), replace(POLICY, patience_seconds=0.0))
    bench.settle(arrivals(1))
    aside = bench.script.asides[1]
    assert (aside.reason, aside.due_at) == (Reason.FAILED, None)
    assert "mail server" in aside.error


def test_a_handler_may_say_that_everybody_waits() -> None:
    bench = Bench(Script(failures={1: [Retry(after=0.2, everybody=True)]}))
    thread = threading.Thread(target=lambda: bench.settle(arrivals(1)), daemon=True)
    thread.start()
    eventually(lambda: bench.pause._until > time.monotonic())
    bench.pause.wait()
    thread.join(5)
    assert bench.done == [(1, Outcome.APPLIED)]


# --- whose trouble it is -----------------------------------------------------------------------------------------------

DEADLOCK = Conflict("deadlock", handled=True)
DIED = Transient("its connection died", handled=True, lost=True)
FULL = Transient("no room", handled=True)


@pytest.mark.parametrize("error", [DEADLOCK, DIED], ids=["conflict", "lost"])
def test_a_message_that_brings_about_its_own_trouble_is_parked_and_everybody_else_applied(error: Exception) -> None:
    bench = Bench(Script(failures={2: [error] * 99}))
    bench.settle(arrivals(1, 2, 3))
    assert sorted(bench.done) == [(1, Outcome.APPLIED), (2, Outcome.PARKED), (3, Outcome.APPLIED)]
    assert bench.script.asides[2].reason is Reason.FAILED
    assert bench.pause.problem == ""


def test_a_connection_that_dies_while_no_other_can_be_made_is_nobodys_fault() -> None:
    bench = Bench(Script(failures={1: [DIED] * 20}, works=False))
    bench.settle(arrivals(1, 2))
    assert bench.script.batches == [[1, 2]] * 21


def test_a_lack_of_room_is_the_messages_only_while_others_get_something_done() -> None:
    alone = Bench(Script(failures={1: [FULL] * 20}))
    alone.settle(arrivals(1))
    assert alone.done == [(1, Outcome.APPLIED)]
    impatient = Bench(Script(failures={1: [FULL] * 20}), replace(POLICY, in_hand_seconds=-1.0))
    impatient.settle(arrivals(1))
    assert impatient.script.asides[1].reason is Reason.LATER  # no worker is kept from others' messages

    class Busy(Script):
        def database_works(self) -> bool:
            bench.pause.over()  # a neighbour commits
            return True

    bench = Bench(Busy(failures={1: [FULL] * 20}))
    bench.settle(arrivals(1))
    assert bench.done == [(1, Outcome.PARKED)]


def test_a_lock_that_another_process_holds_makes_only_those_wait_who_need_it() -> None:
    policy = replace(POLICY, without_database=Backoff(0.5, 0.5))
    bench = Bench(Script(failures={1: [Conflict("lock timeout")] * 2}), policy)
    bench.settle(arrivals(1, 2))
    assert bench.script.batches[:3] == [[1, 2], [1], [2]]
    assert bench.done == [(2, Outcome.APPLIED), (1, Outcome.APPLIED)]


def test_what_met_a_conflict_is_repeated_when_nobody_else_is_at_work() -> None:
    bench = Bench(Script(failures={1: [DEADLOCK]}))
    thread = threading.Thread(target=lambda: bench.settle(arrivals(1, 2)), daemon=True)
    with bench.turnstile.shared():
        thread.start()
        stands_still(thread, "alone")
        assert bench.script.batches == [[1, 2]]
    thread.join(5)
    assert bench.script.batches == [[1, 2]] * 2


def test_when_conflicts_recur_work_is_done_one_after_the_other_for_a_while() -> None:
    turnstile, second_in = Turnstile(), threading.Event()

    def second() -> None:
        with turnstile.side_by_side():
            second_in.set()

    turnstile.conflict()
    with turnstile.side_by_side(), turnstile.side_by_side():
        """One conflict is everyday life: they are still beside each other."""
    turnstile.conflict()
    with turnstile.side_by_side():
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        stands_still(thread, "second")
        assert not second_in.is_set()
    assert second_in.wait(5)


def test_who_stays_inside_for_long_does_not_keep_out_those_behind_one_who_wants_to_be_alone() -> None:
    turnstile = Turnstile()
    with turnstile.shared(), turnstile.alone(0.01), turnstile.shared():
        pass
    with turnstile.alone(0.01):  # and they are all out again
        pass


def test_a_long_retry_is_set_aside_until_then_without_an_attempt() -> None:
    bench = Bench(Script(failures={1: [Retry(after=61, reason="mail server in maintenance")]}))
    bench.settle(arrivals(1))
    aside = bench.script.asides[1]
    assert (aside.reason, aside.due_at, aside.attempts) == (Reason.LATER, NOW + timedelta(seconds=61), 0)
    assert "mail server in maintenance" in aside.error


@pytest.mark.parametrize(
    ("error", "reason"), [(Reject("no such room"), Reason.REJECTED), (Incomplete("needs event_id"), Reason.INCOMPLETE)]
)
def test_what_no_attempt_would_help_is_parked_at_once(error: Exception, reason: Reason) -> None:
    bench = Bench(Script(failures={1: [error]}))
    bench.settle(arrivals(1))
    assert bench.script.batches == [[1]]
    assert bench.script.asides[1].reason is reason
    assert str(error) in bench.script.asides[1].error


def test_a_rejected_message_holds_its_key_unless_the_handler_says_otherwise() -> None:
    bench = Bench(Script(failures={1: [Reject("x")], 2: [Reject("x", hold=False)]}))
    bench.settle(arrivals(1))
    bench.settle(arrivals(2))
    key = ("/tests", "event:1")
    assert bench.script.asides[1].holds(key)
    assert not bench.script.asides[2].holds(key)


def test_parking_is_tried_until_the_database_takes_it() -> None:
    no_right = ProgrammingError("INSERT", {}, errors.InsufficientPrivilege("permission denied for table consumer_parked"))
    script = Script(failures={1: [Reject("x")]}, parking=[Transient("gone"), no_right, Transient("gone")])
    bench = Bench(script)
    bench.settle(arrivals(1))
    assert bench.done == [(1, Outcome.PARKED)]
    assert len(script.batches) == 1  # the handler was not called again


def test_a_suspects_attempt_is_on_record_before_its_handler_runs() -> None:
    bench = Bench(Script())
    bench.settle(arrivals(1, returns=3))
    assert bench.script.begun == ["begun"]
    assert bench.done == [(1, Outcome.APPLIED)]


def test_a_suspect_that_killed_the_process_too_often_is_parked_unhandled() -> None:
    bench = Bench(Script(crashes=3))
    bench.settle(arrivals(1, returns=9))
    assert bench.script.batches == []
    aside = bench.script.asides[1]
    assert (aside.reason, aside.attempts) == (Reason.CRASHED, 3)
    assert aside.error == "the process died 3 times while handling it"


def test_a_suspect_that_only_fails_or_waits_is_not_taken_for_a_killer() -> None:
    bench = Bench(Script(failures={1: [Retry()] * 10 + [Transient("gone")] * 10}))
    bench.settle(arrivals(1, returns=3))
    assert bench.done == [(1, Outcome.APPLIED)]
    assert bench.script.begun == ["begun", "ended"] * 20 + ["begun"]


def test_a_message_without_suspicion_costs_no_record() -> None:
    bench = Bench(Script())
    bench.settle(arrivals(1, returns=2))
    assert bench.script.begun == []


# --- waiting -----------------------------------------------------------------------------------------------------------

FOR_EVER = Backoff(3600.0, 3600.0)


@pytest.mark.parametrize(
    "failure",
    [
        Transient("gone"),
        Transient("its connection died", handled=True, lost=True),
        Retry(),
        Retry(after=60),
        Retry(everybody=True),
        ValueError("between attempts"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_stop_ends_any_wait_and_leaves_the_message_to_the_broker(failure: Exception) -> None:
    policy = Policy(
        max_attempts=3,
        between_attempts=FOR_EVER,
        without_database=FOR_EVER,
        when_asked=FOR_EVER,
        in_hand_seconds=float("inf"),
    )
    bench = Bench(Script(failures={1: [failure]}), policy)
    ended: list[Any] = []

    def work() -> None:
        try:
            bench.settle(arrivals(1))
        except Stopping as stopping:
            ended.append(stopping)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    eventually(lambda: bench.script.batches == [[1]])
    bench.stopping.set()
    thread.join(5)
    assert len(ended) == 1
    assert bench.done == []


def test_a_pause_holds_everybody_and_a_later_one_does_not_shorten_it() -> None:
    stopping = threading.Event()
    pause = Pause("exports", POLICY, stopping, random.Random(1))
    pause.everybody(3600)
    pause.everybody(0)
    passed = threading.Event()

    def wait() -> None:
        try:
            pause.wait()
        except Stopping:
            return
        passed.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    stands_still(thread, "wait")
    stopping.set()
    thread.join(5)
    assert not passed.is_set()


def test_the_second_failure_in_a_row_is_said_once_and_so_is_the_recovery(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", retries.__name__)
    pause = Pause("exports", POLICY, threading.Event(), random.Random(1))
    pause.database_failed(Transient("x"))
    pause.over()
    assert caplog.messages == []  # one deadlock is everyday life
    for _ in range(5):
        pause.database_failed(Transient("x"))
    assert pause.problem
    pause.over()
    pause.over()
    assert pause.problem == ""
    assert [record.outbox_event for record in caplog.records] == ["consumer.database_lost", "consumer.database_back"]  # type: ignore[attr-defined]


def test_a_refusal_by_the_database_is_said_in_its_words_without_the_line_that_may_show_a_row() -> None:
    pause = Pause("exports", POLICY, threading.Event(), random.Random(1))
    refusal = ProgrammingError("INSERT", {}, Exception("permission denied for table consumer_parked\nDETAIL: (secret)"))
    for _ in range(2):
        pause.database_failed(refusal)
    assert pause.problem == "permission denied for table consumer_parked"


# --- alone or beside others --------------------------------------------------------------------------------------------


def test_who_asks_to_be_alone_waits_for_those_inside_and_keeps_others_out() -> None:
    turnstile, inside, log = Turnstile(), threading.Event(), []
    leave = threading.Event()

    def alone() -> None:
        with turnstile.alone():
            log.append("alone")
            inside.set()
            leave.wait(10)
            log.append("left")

    def beside() -> None:
        with turnstile.shared():
            log.append("shared")

    with turnstile.shared(), turnstile.shared():
        first = threading.Thread(target=alone, daemon=True)
        first.start()
        stands_still(first, "alone")
        assert not inside.is_set()
    assert inside.wait(5)
    second = threading.Thread(target=beside, daemon=True)
    second.start()
    stands_still(second, "shared")
    leave.set()
    second.join(5)
    first.join(5)
    assert log == ["alone", "left", "shared"]


def test_the_turnstile_turns_again_after_an_error_inside() -> None:
    turnstile = Turnstile()
    for guard in (turnstile.shared, turnstile.alone, turnstile.shared):
        with pytest.raises(ValueError, match="x"), guard():
            raise ValueError("x")


def entered(guard: Any) -> threading.Event:
    """Enter *guard* in a thread of its own, for ever; return the event of being inside."""
    return entering(guard)[1]


def entering(guard: Any) -> tuple[threading.Thread, threading.Event]:
    """Enter *guard* in a thread of its own, for ever; return that, and the event of being inside."""
    inside = threading.Event()

    def stay() -> None:
        with guard:
            inside.set()
            threading.Event().wait(20)

    thread = threading.Thread(target=stay, daemon=True)
    thread.start()
    return thread, inside


def test_nobody_waits_for_long_for_work_that_hangs_whoever_it_is() -> None:
    turnstile = Turnstile(patience_seconds=0.05)
    assert entered(turnstile.shared()).wait(10)
    assert entered(turnstile.alone()).wait(10), "a suspect waits for a handler that hangs"
    assert entered(turnstile.shared()).wait(10), "others wait for a suspect that hangs"
    assert entered(turnstile.alone()).wait(10), "a suspect waits for another that hangs"


def test_who_has_hung_for_long_is_not_waited_for_again() -> None:
    now = [0.0]
    turnstile = Turnstile(patience_seconds=3600.0, clock=lambda: now[0])
    assert entered(turnstile.shared()).wait(10)
    now[0] += 3601.0
    with turnstile.alone():
        thread, inside = entering(turnstile.shared())
        stands_still(thread, "shared")
        assert not inside.is_set()
