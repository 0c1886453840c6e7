"""What handlers have in hand, and for how long: said when it is long, with the place, and without payload."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import pytest

from outbox.consumer import Service, handlers
from outbox.consumer.calls import Call, Calls
from outbox.consumer.watch import SLOW_SECONDS, Watch
from outbox.message import Received
from tests.kit.waiting import eventually

MESSAGE = Received(
    id="7",
    source="/tests",
    topic="session.modified",
    key="event:1",
    sequence=1,
    data={"secret": "payload"},
    content_type="application/json",
    headers={},
    created_at=None,
)


class Clock:
    """A time that passes when it is told to."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Session:
    """As much of a session as a call needs."""

    def flush(self) -> None:
        pass

    def in_nested_transaction(self) -> bool:
        return False


def took(calls: Calls, clock: Clock, seconds: float) -> float:
    call = calls.begin(MESSAGE, "rebuild")
    clock.now += seconds
    calls.end(call)
    return calls.expected_seconds()


def test_before_the_first_call_nobody_knows_how_long_one_takes() -> None:
    assert Calls().expected_seconds() == inf


def test_a_slow_call_counts_at_once_and_quick_ones_make_up_for_it() -> None:
    clock = Clock()
    calls = Calls(clock)
    assert took(calls, clock, 0.01) == pytest.approx(0.01)
    assert took(calls, clock, 20.0) == pytest.approx(20.0)
    assert took(calls, clock, 0.01) == pytest.approx(18.0, rel=0.01)
    for _ in range(100):
        took(calls, clock, 0.01)
    assert calls.expected_seconds() == pytest.approx(0.01, rel=0.2)


def test_a_call_that_does_not_end_counts_while_it_lasts() -> None:
    clock = Clock()
    calls = Calls(clock)
    took(calls, clock, 0.01)
    hung = calls.begin(MESSAGE, "rebuild")
    clock.now += 5.0
    assert calls.expected_seconds() == 5.0
    assert took(calls, clock, 0.01) > 5.0
    assert calls.under_way() == [hung]


def test_a_call_within_a_call_ends_alone() -> None:
    calls = Calls()
    outer = calls.begin(MESSAGE, "rebuild")
    calls.end(calls.begin(MESSAGE, "rebuild"))
    assert calls.under_way() == [outer]


@contextmanager
def hanging(service: Service, function: Any) -> Iterator[Call]:
    """A handler of *service* in a thread of its own, in *function*."""
    service.on(MESSAGE.topic)(function)
    handler = service.handler(MESSAGE.topic)
    assert handler is not None
    thread = threading.Thread(target=handler, args=(MESSAGE, Session()), daemon=True)
    thread.start()
    eventually(handler.calls.under_way, what="the handler to be called")
    (call,) = handler.calls.under_way()
    yield call
    thread.join(20)


def test_a_message_that_takes_long_is_said_with_key_and_place_and_again_when_that_has_doubled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, inside, go_on, service = Clock(), threading.Event(), threading.Event(), Service("exports")

    def ask_a_slow_server() -> None:
        inside.set()
        go_on.wait(20)

    def rebuild(_message: Any, _session: Any, /, **_extra: Any) -> None:
        ask_a_slow_server()

    watch = Watch(service, clock)
    with hanging(service, rebuild) as call:
        assert inside.wait(10)
        call.since = clock.now
        said = []
        for seconds in (1.0, SLOW_SECONDS - 2.0, 1.0, 1.0, SLOW_SECONDS - 2.0, 1.0, 2 * SLOW_SECONDS):
            clock.now += seconds
            watch.look()
            said.append(len(caplog.records))
        assert said == [0, 0, 1, 1, 1, 2, 3]
        assert watch.oldest_seconds() == clock.now - call.since
        assert watch.named().startswith("message 7 (session.modified, key 'event:1') has been in")
        go_on.set()
    first = caplog.records[0]
    assert first.levelname == "WARNING"
    assert first.__dict__["outbox_event"] == "consumer.slow"
    assert {"message_id": "7", "key": "event:1"}.items() <= first.__dict__["outbox_fields"].items()
    for words in ("has been in", "rebuild for 30s, at ", "test_watch.py:", " rebuild(), in ", "threading.py:", "its key wait"):
        assert words in first.message
    assert "payload" not in caplog.text
    assert watch.oldest_seconds() == 0.0
    assert watch.named() == ""


def test_the_place_of_a_receiver_of_a_signal_is_the_receivers() -> None:
    from blinker import Namespace

    inside, go_on, service = threading.Event(), threading.Event(), Service("exports")
    signal = Namespace().signal("sessions_modified")

    def receiver(_sender: Any, **_fields: Any) -> None:
        inside.set()
        go_on.wait(20)

    signal.connect(receiver, weak=False)
    service.emit(signal, topic=MESSAGE.topic)
    handler = service.handler(MESSAGE.topic)
    assert handler is not None
    thread = threading.Thread(target=handler, args=(MESSAGE, Session()), daemon=True)
    thread.start()
    assert inside.wait(10)
    (call,) = handler.calls.under_way()
    assert " receiver(), in " in call.place(handlers.__file__)
    go_on.set()
    thread.join(10)
    assert call.place(handlers.__file__) == "unknown"


def test_a_call_that_raised_has_ended() -> None:
    service = Service("exports")

    @service.on(MESSAGE.topic)
    def fail(_message: Any, _session: Any, /, **_extra: Any) -> None:
        raise ValueError("no")

    handler = service.handler(MESSAGE.topic)
    assert handler is not None
    with pytest.raises(ValueError, match="no"):
        handler(MESSAGE, Session())  # type: ignore[arg-type]
    assert handler.calls.under_way() == []
    assert handler.calls.expected_seconds() < inf
