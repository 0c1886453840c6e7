"""Registration, and where a capture stands among the receivers of a signal. No database is touched."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from blinker import Namespace, Signal

from outbox import Outbox
from outbox.capture.signals import Capture, KeyTemplate, connect
from outbox.errors import ConfigurationError, InvalidMessage


def captured(signal: Signal, into: list[Any]) -> Capture:
    """Return a capture of *signal* that only notes what it gets."""
    capture = Capture(
        signal, "a.b", None, "hold", outbox=object(), hold=lambda _c, sender, _u, data: into.append((sender, data))
    )
    connect(signal, capture)
    return capture


def test_a_capture_is_listed_held_strongly_and_leaves_the_signal_itself() -> None:
    signal, seen = Namespace().signal("s"), []  # type: ignore[var-annotated]
    same = signal
    captured(signal, seen)
    gc.collect()
    signal.send("me", a=1)
    assert seen == [("me", {"a": 1})]
    assert same is signal
    assert isinstance(signal, Signal)
    assert any(isinstance(receiver, Capture) for receiver in signal.receivers.values())


def test_it_runs_before_every_other_receiver_whatever_the_order_of_connecting() -> None:
    for _ in range(20):  # Blinker's order is that of a set of addresses: one try proves nothing
        signal, seen = Signal(), []  # type: ignore[var-annotated]
        others = [lambda sender, n=n, seen=seen, **_: seen.append(n) for n in range(5)]
        for other in others[:3]:
            signal.connect(other)
        captured(signal, seen)
        for other in others[3:]:
            signal.connect(other)
        signal.send(None)
        assert seen[0] == (None, {})
        assert sorted(seen[1:]) == [0, 1, 2, 3, 4]


def test_a_receiver_that_raises_comes_too_late_to_prevent_it() -> None:
    signal, seen = Signal(), []  # type: ignore[var-annotated]

    def fail(_sender: object, **_data: object) -> None:
        raise RuntimeError("other receiver")

    signal.connect(fail)
    captured(signal, seen)
    with pytest.raises(RuntimeError, match="other receiver"):
        signal.send(None)
    assert len(seen) == 1


def test_it_runs_while_the_signal_is_muted_and_the_others_do_not() -> None:
    signal, seen, other = Signal(), [], []  # type: ignore[var-annotated]
    captured(signal, seen)
    signal.connect(other.append, weak=False)
    with signal.muted():
        signal.send(None)
    assert (len(seen), other) == (1, [])


def test_it_runs_once_per_send_and_gives_its_result_among_the_others() -> None:
    signal, seen = Signal(), []  # type: ignore[var-annotated]
    capture = captured(signal, seen)

    def local(_sender: object, **_data: object) -> int:
        return 42

    signal.connect(local)
    assert signal.send(None) == [(capture, None), (local, 42)]
    assert len(seen) == 1


def test_it_runs_for_send_async_too() -> None:
    signal, seen, other = Signal(), [], []  # type: ignore[var-annotated]
    captured(signal, seen)

    async def receive(_sender: object, **_data: object) -> None:
        other.append(1)

    signal.connect(receive)
    asyncio.run(signal.send_async("me", a=1))
    assert (seen, other) == ([("me", {"a": 1})], [1])


def test_a_disconnected_capture_captures_no_more() -> None:
    signal, seen = Signal(), []  # type: ignore[var-annotated]
    signal.disconnect(captured(signal, seen))
    signal.send(None)
    assert seen == []


def test_capturing_again_changes_nothing_and_differently_is_refused() -> None:
    signal, outbox = Namespace().signal("sessions_modified"), Outbox()
    outbox.capture(signal, topic="session.modified", key="event:{event_id}")
    outbox.capture(signal, topic="session.modified", key="event:{event_id}")
    assert len(signal.receivers) == 1
    with pytest.raises(ConfigurationError, match=r"'sessions_modified' is captured as 'session\.modified' already"):
        outbox.capture(signal, topic="session.modified")
    outbox.capture(signal, topic="audit.session")
    assert outbox.topics == ("audit.session", "session.modified")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"topic": ""}, "topic '' has 0 bytes"),
        ({"topic": "a b"}, "holds ' '"),
        ({"topic": "session.*"}, "holds '\\*'"),
        ({"topic": "x" * 256}, "256 bytes"),
        ({"topic": "a.b", "key": "event"}, "names no field"),
        ({"topic": "a.b", "key": "event:{event_id"}, "write it like"),
        ({"topic": "a.b", "key": "event:{event.id}"}, "plain name of a field"),
        ({"topic": "a.b", "key": "event:{event[id]}"}, "plain name of a field"),
        ({"topic": "a.b", "key": "event:{event_id!r}"}, "plain name of a field"),
        ({"topic": "a.b", "key": "event:{}"}, "plain name of a field"),
        ({"topic": "a.b", "unheard": "ignore"}, "neither 'hold'"),
    ],
)
def test_a_registration_that_cannot_work_is_refused_at_once(arguments: dict[str, str], words: str) -> None:
    signal = Namespace().signal("s")
    with pytest.raises(ConfigurationError, match=words):
        Outbox().capture(signal, **arguments)
    assert not signal.receivers


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "without event_id"),
        ({"event_id": None}, "flush before you send"),
        ({"event_id": ""}, "is empty"),
        ({"event_id": 1.5}, "is a float"),
        ({"event_id": True}, "is a bool"),
        ({"event_id": object()}, "is a object"),
    ],
)
def test_a_field_that_cannot_name_a_key_is_refused(data: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidMessage, match=words):
        KeyTemplate.parse("event:{event_id}").fill(data)


def test_a_key_may_have_several_fields_and_braces() -> None:
    assert KeyTemplate.parse("{{{a}}}/{b}").fill({"a": 1, "b": "x"}) == "{1}/x"


def test_an_unknown_argument_names_the_right_one() -> None:
    with pytest.raises(ConfigurationError, match="did you mean OUTBOX_MAX_BODY"):
        Outbox(max_bodi="1KiB", source="/x", session=lambda: None).send("a.b", 1)
