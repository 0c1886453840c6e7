"""What an exception means: wait, try again, or give the message up."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import ProgrammingError

from outbox.backoff import Backoff
from outbox.consumer import Reject, Retry, attempts
from outbox.consumer.arrival import Arrival, read
from outbox.consumer.attempts import Attempts, Pause, Policy, Stopping, Turnstile
from outbox.consumer.delivery import Settled
from outbox.consumer.outcomes import Incomplete, Outcome
from outbox.consumer.tables import Reason
from outbox.consumer.transaction import Transient
from outbox.message import cloud_event
from tests.consuming import message
from tests.kit.waiting import eventually

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
    worker: int = 0

    def clock(self) -> datetime:
        return NOW

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


def arrivals(*numbers: int, returns: int = 0) -> list[Arrival]:
    headers = {"x-delivery-count": returns}
    return [read(cloud_event(message(each)), headers=headers, redelivered=returns > 0) for each in numbers]


class Bench:
    def __init__(self, script: Script, policy: Policy = POLICY) -> None:
        self.script = script
        self.stopping = threading.Event()
        self.pause = Pause("exports", policy, self.stopping, random.Random(1))
        self.attempts = Attempts(script, policy, self.pause, random.Random(1))  # type: ignore[arg-type]
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


def test_a_handler_that_asks_to_wait_again_and_again_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", attempts.__name__)
    bench = Bench(Script(failures={1: [Retry(reason="secret")] * 4, 2: [Retry(reason="secret")] * 12}))
    bench.settle(arrivals(1))
    assert caplog.messages == []
    bench.settle(arrivals(2))
    assert [record.outbox_event for record in caplog.records] == ["consumer.waiting"]  # type: ignore[attr-defined]
    assert "secret" not in caplog.text


def test_a_database_that_is_away_is_waited_for_with_the_whole_batch() -> None:
    bench = Bench(Script(failures={1: [Transient("gone"), Transient("gone")]}))
    bench.settle(arrivals(1, 2))
    assert bench.script.batches == [[1, 2], [1, 2], [1, 2]]


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
    script = Script(failures={1: [Reject("x")]}, parking=[Transient("gone"), PermissionError("no INSERT"), Transient("gone")])
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
    [Transient("gone"), Retry(), Retry(after=60), ValueError("between attempts")],
    ids=lambda error: type(error).__name__,
)
def test_a_stop_ends_any_wait_and_leaves_the_message_to_the_broker(failure: Exception) -> None:
    policy = Policy(max_attempts=3, between_attempts=FOR_EVER, without_database=FOR_EVER, when_asked=FOR_EVER)
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
    pause.asked_for(3600)
    pause.asked_for(0)
    passed = threading.Event()

    def wait() -> None:
        try:
            pause.wait()
        except Stopping:
            return
        passed.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert not passed.wait(0.05)
    stopping.set()
    thread.join(5)
    assert not passed.is_set()


def test_the_second_failure_in_a_row_is_said_once_and_so_is_the_recovery(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", attempts.__name__)
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
        assert not inside.wait(0.05)
    assert inside.wait(5)
    second = threading.Thread(target=beside, daemon=True)
    second.start()
    second.join(0.05)
    assert second.is_alive()
    leave.set()
    second.join(5)
    first.join(5)
    assert log == ["alone", "left", "shared"]


def test_the_turnstile_turns_again_after_an_error_inside() -> None:
    turnstile = Turnstile()
    for guard in (turnstile.shared, turnstile.alone, turnstile.shared):
        with pytest.raises(ValueError, match="x"), guard():
            raise ValueError("x")
