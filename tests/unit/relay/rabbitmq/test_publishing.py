"""RabbitBroker against a server that answers what the test wants: nothing is settled that was not confirmed."""

from __future__ import annotations

import itertools
import logging
import re
import socket
import ssl
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pika import spec
from pika.adapters.select_connection import IOLoop

from outbox import amqp_url
from outbox.errors import ConfigurationError
from outbox.message import cloud_event
from outbox.process.backoff import Backoff
from outbox.relay import open_broker
from outbox.relay.broker import Cause, Outcome, Outgoing
from outbox.relay.rabbitmq import RabbitBroker
from outbox.relay.rabbitmq.pika_connection import parameters
from outbox.relay.rabbitmq.publishing import Link
from outbox.settings import Settings
from tests.kit.builders import message
from tests.kit.outgoing import answered, batch, connected
from tests.kit.ports import free_port
from tests.kit.proxy import TO_CLIENT, TO_SERVER, Proxy
from tests.kit.scripted_amqp import Publish, ScriptedAmqp, Session, SilentQueue, acknowledge
from tests.kit.waiting import eventually, stands_still

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from outbox.relay.broker import Answer

AT_ONCE = Backoff(0.001, 0.01)


@pytest.fixture(autouse=True)
def _no_word_from_pika(caplog: pytest.LogCaptureFixture) -> None:
    """As in a relay: what pika says of a lost connection would hide what we say."""
    caplog.set_level(logging.CRITICAL, logger="pika")
    caplog.set_level(logging.DEBUG, logger="outbox")


@contextmanager
def relay_on(server: ScriptedAmqp, *, wait: bool = True, **options: Any) -> Iterator[RabbitBroker]:
    settings: dict[str, Any] = {"exchange": "openevent", "reconnect": AT_ONCE, "refused": AT_ONCE, **options}
    broker = RabbitBroker(server.url, **settings)
    broker.start()
    try:
        if wait:
            connected(broker)
        yield broker
    finally:
        broker.stop(5)


def outcomes(answers: dict[int, Answer]) -> dict[int, Outcome]:
    return {token: answer.outcome for token, answer in answers.items()}


def proven(broker: RabbitBroker, session: Session) -> None:
    """Let one message through, so that the next ones need not wait for the first one's confirm."""
    broker.send(batch(1, first=0))
    session.ack(len(session.wait_for(1)))
    answered(broker, 1)


def heard(broker: RabbitBroker, session: Session, *, unblock: bool = True) -> None:
    """Return when *broker* has dealt with all that it was handed and told so far, and *session* with all that it wrote.

    The witness is two words of the server, one after the other: what lay in the broker's loop before the first is done when
    the second arrives.
    """
    for word in ("a first word", "a second word"):
        session.block(word)
        eventually(lambda word=word: word in broker.state().detail, what=word, interval=0.001)  # type: ignore[misc]
    if unblock:
        session.unblock()
        eventually(lambda: not broker.state().blocked, what="the end of the words", interval=0.001)
    session.read_everything()


def thread_of(broker: RabbitBroker) -> threading.Thread:
    return broker._thread


class Clock:
    """What the link takes for the time: it passes when a test says so."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._asked = 0

    def monotonic(self) -> float:
        self._asked += 1
        return self._now

    def goes_on(self, seconds: float) -> None:
        """Let *seconds* pass; return when the link, idle otherwise, has looked at the clock since."""
        self._now += seconds
        before = self._asked
        eventually(lambda: self._asked >= before + 2, what="a look at the clock", interval=0.001)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("outbox.relay.rabbitmq.publishing.time", made)
    return made


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [getattr(record, "outbox_event", "") for record in caplog.records if record.name.startswith("outbox")]


# --- answers --------------------------------------------------------------------------------------------------------------


def test_what_is_acknowledged_is_confirmed_and_arrived_as_it_was_sent() -> None:
    with ScriptedAmqp(acknowledge) as server, relay_on(server, app_id="tests") as broker:
        long_body = b'"' + b"x" * 20_000 + b'"'  # several frames
        sent = [Outgoing(1, message()), Outgoing(2, message(key="event:1", sequence=1, body=long_body))]
        broker.send(sent)
        answers = answered(broker, 2)
        assert outcomes(answers) == {1: Outcome.CONFIRMED, 2: Outcome.CONFIRMED}
        assert all(0 < answer.seconds < 5 for answer in answers.values())
        publishes = server.session(1).publishes
    assert [publish.body for publish in publishes] == [cloud_event(outgoing.message) for outgoing in sent]
    assert all(publish.method.mandatory and publish.properties.delivery_mode == 2 for publish in publishes)
    assert publishes[1].properties.headers == {"partitionkey": "event:1"}


def test_answers_in_any_order_and_in_groups_reach_their_messages() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        proven(broker, session)
        broker.send(batch(6))
        session.wait_for(7)
        session.nack(4)  # tags are one ahead of tokens
        session.give_back(session.publishes[5])
        session.ack(7)
        session.ack(6, multiple=True)
        assert outcomes(answered(broker, 6)) == {
            1: Outcome.CONFIRMED,
            2: Outcome.CONFIRMED,
            3: Outcome.NACKED,
            4: Outcome.CONFIRMED,
            5: Outcome.RETURNED,
            6: Outcome.CONFIRMED,
        }


def test_a_returned_message_says_why_and_nothing_of_its_body(caplog: pytest.LogCaptureFixture) -> None:
    def give_back(session: Session, publish: Publish) -> None:
        session.give_back(publish)
        session.ack(publish.tag)

    with ScriptedAmqp(give_back) as server, relay_on(server) as broker:
        broker.send([Outgoing(1, message(body=b'"the secret of the conference"'))])
        answer = answered(broker, 1)[1]
    assert (answer.outcome, answer.detail) == (Outcome.RETURNED, "312 NO_ROUTE")
    assert "the secret" not in caplog.text


def test_a_return_alone_answers_nothing_until_its_ack() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        broker.send(batch(1))
        session.give_back(session.wait_for(1)[0])
        heard(broker, session)
        assert broker.answers(0) == []
        session.ack(1)
        assert outcomes(answered(broker, 1)) == {1: Outcome.RETURNED}


def test_a_message_that_cannot_be_encoded_is_refused_and_the_others_go_on() -> None:
    with ScriptedAmqp(acknowledge) as server, relay_on(server) as broker:
        before_1970 = message(created_at=datetime(1969, 1, 1, tzinfo=UTC))
        broker.send([Outgoing(1, message()), Outgoing(2, before_1970), Outgoing(3, message())])
        answers = answered(broker, 3)
        assert outcomes(answers) == {1: Outcome.CONFIRMED, 2: Outcome.REFUSED, 3: Outcome.CONFIRMED}
        assert answers[2].detail.startswith("AMQP can't carry it")
        assert len(server.session(1).publishes) == 2


def test_headers_that_no_frame_holds_are_refused_before_the_first_byte_and_the_connection_stays() -> None:
    with ScriptedAmqp(acknowledge) as server, relay_on(server) as broker:  # frame_max is 4096
        wide = message(headers={f"x{n:03}": "v" * 200 for n in range(30)})
        broker.send([Outgoing(1, message()), Outgoing(2, wide), Outgoing(3, message())])
        answers = answered(broker, 3)
        assert outcomes(answers) == {1: Outcome.CONFIRMED, 2: Outcome.REFUSED, 3: Outcome.CONFIRMED}
        assert re.search(r"its headers take 6\d\d\d bytes, the broker's frame_max allows 4088", answers[2].detail)
        assert len(server.session(1).publishes) == 2
        assert not server.session(1).ended.is_set()


def test_the_first_message_of_a_connection_goes_alone() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        broker.send(batch(3))
        session.wait_for(1)
        broker.send(batch(1, first=4))
        heard(broker, session)
        assert broker.answers(0) == []
        assert len(session.publishes) == 1
        session.ack(1)
        session.wait_for(4)
        session.ack(4, multiple=True)
        answered(broker, 4)


def test_what_waited_until_another_relay_may_have_it_is_not_written_any_more() -> None:
    """As in a process that was paused between hand-over and writing: the others wait for the first one's confirm."""
    lease = Event()
    lease.set()
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        broker.send([replace(outgoing, may_go=lease.is_set) for outgoing in batch(4)])
        session.wait_for(1)
        broker.send(batch(1, first=5))  # of the next time it has the shards
        lease.clear()
        session.ack(1)
        assert outcomes(answered(broker, 4)) == {
            1: Outcome.CONFIRMED,
            2: Outcome.NOT_SENT,
            3: Outcome.NOT_SENT,
            4: Outcome.NOT_SENT,
        }
        session.ack(len(session.wait_for(2)))
        assert outcomes(answered(broker, 1)) == {5: Outcome.CONFIRMED}


def test_a_connection_whose_messages_are_unanswered_when_the_lease_ends_is_reset() -> None:
    lease = Event()
    lease.set()
    with ScriptedAmqp() as server, relay_on(server, confirm_timeout_seconds=4.0) as broker:
        session = server.session(1)
        broker.send([replace(outgoing, may_go=lease.is_set) for outgoing in batch(1)])
        session.wait_for(1)
        lease.clear()
        answer = answered(broker, 1, timeout=3.0)[1]
        assert (answer.outcome, answer.cause) == (Outcome.LOST, Cause.OURS)
        assert "the lease ended" in answer.detail
        connected(broker)


def test_a_second_message_of_one_id_waits_for_the_first_ones_answer() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        proven(broker, session)
        same = message()
        broker.send([Outgoing(1, same), Outgoing(2, same)])
        session.wait_for(2)
        heard(broker, session)
        assert broker.answers(0) == []
        assert len(session.publishes) == 2
        session.ack(2)
        session.give_back(session.wait_for(3)[2])
        session.ack(3)
        assert outcomes(answered(broker, 2)) == {1: Outcome.CONFIRMED, 2: Outcome.RETURNED}


def test_no_more_is_written_than_the_bytes_in_flight_allow() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        proven(broker, session)
        large = b'"' + b"x" * 1_000_000 + b'"'
        broker.send(batch(30, body=large))
        session.wait_for(9)
        for _ in range(30):  # with every word it writes another one, if it may
            heard(broker, session)
        assert broker.answers(0) == []
        assert len(session.publishes) < 12  # 8 MiB
        server.script = acknowledge
        session.ack(len(session.publishes), multiple=True)
        answered(broker, 30, timeout=30)


# --- what must never be attributed ----------------------------------------------------------------------------------------


def breaches() -> dict[str, Callable[[Session], None]]:
    return {
        "an ack of a tag never sent": lambda session: session.ack(9),
        "a multiple ack beyond the last": lambda session: session.ack(9, multiple=True),
        "an ack of tag 0": lambda session: session.ack(0, multiple=True),
        "a second ack": lambda session: session.ack(1),
        "a nack of what was confirmed": lambda session: session.nack(1),
        "a return of what was confirmed": lambda session: session.give_back(session.publishes[0]),
        "a delivery nobody asked for": lambda session: session.deliver(),
        "bytes that are no frame": lambda session: session.send(b"\x01\x00\x01\x00\x00\x00\x04ackno end"),
        "the channel closed": lambda session: session.close_channel(504, "CHANNEL_ERROR"),
        "the connection closed": lambda session: session.close_connection(320, "CONNECTION_FORCED"),
        "hung up": lambda session: session.hang_up(),
        "reset": lambda session: session.reset(),
    }


@pytest.mark.parametrize("breach", breaches())
def test_whatever_breaks_the_connection_loses_the_window_and_later_answers_count_for_nobody(breach: str) -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        proven(broker, session)
        broker.send(batch(3))
        session.wait_for(4)
        session.ack(2)
        assert outcomes(answered(broker, 1)) == {1: Outcome.CONFIRMED}
        breaches()[breach](session)
        session.ack(3)  # the old connection goes on talking
        session.ack(4)
        lost = answered(broker, 2)
        assert outcomes(lost) == {2: Outcome.LOST, 3: Outcome.LOST}
        assert all(answer.detail for answer in lost.values())
        assert {answer.cause for answer in lost.values()} <= {Cause.CLOSED, Cause.OURS}
        again = server.session(2)
        connected(broker)
        broker.send(batch(2, first=10))
        again.wait_for(1)
        session.ack(1, multiple=True)
        heard(broker, again)
        assert broker.answers(0) == []
        server.script = acknowledge
        again.ack(1)
        assert outcomes(answered(broker, 2)) == {10: Outcome.CONFIRMED, 11: Outcome.CONFIRMED}


def test_silence_loses_the_window_and_a_late_ack_confirms_nothing() -> None:
    with ScriptedAmqp() as server, relay_on(server, confirm_timeout_seconds=0.3) as broker:
        session = server.session(1)
        broker.send(batch(3))
        session.wait_for(1)
        lost = answered(broker, 3)
        assert outcomes(lost) == {1: Outcome.LOST, 2: Outcome.NOT_SENT, 3: Outcome.NOT_SENT}
        assert {answer.cause for answer in lost.values()} == {Cause.SILENCE}
        assert "no confirm came for 0.3 s" in lost[1].detail
        assert lost[2].detail == lost[3].detail == lost[1].detail
        session.ack(1)
        again = server.session(2)
        connected(broker)
        broker.send(batch(1, first=10))
        again.wait_for(1)
        session.ack(1)
        heard(broker, again)
        assert broker.answers(0) == []
        again.ack(1)
        assert outcomes(answered(broker, 1)) == {10: Outcome.CONFIRMED}


def test_the_settings_say_how_long_silence_is_borne() -> None:
    with ScriptedAmqp() as server:
        broker = open_broker(Settings(broker_url=server.url, confirm_timeout_seconds=0.3))
        broker.start()
        try:
            connected(broker)
            broker.send(batch(1))
            assert "no confirm came for 0.3 s" in answered(broker, 1)[1].detail
        finally:
            broker.stop(5)


def test_silence_is_counted_from_the_last_confirm(clock: Clock) -> None:
    with ScriptedAmqp() as server, relay_on(server, confirm_timeout_seconds=0.08) as broker:
        session = server.session(1)
        proven(broker, session)
        broker.send(batch(4))
        session.wait_for(5)
        for tag in range(2, 6):  # 0.12 seconds in all
            clock.goes_on(0.03)
            assert broker.answers(0) == []
            session.ack(tag)
            assert outcomes(answered(broker, 1)) == {tag - 1: Outcome.CONFIRMED}


def test_a_relay_that_goes_on_sending_does_not_put_off_the_end_of_silence() -> None:
    with ScriptedAmqp() as server, relay_on(server, confirm_timeout_seconds=0.4) as broker:
        for token in range(20):  # two seconds in all
            broker.send(batch(1, first=token))
            lost = broker.answers(0.1)
            if lost:
                break
        assert lost
        assert {answer.outcome for answer in lost} <= {Outcome.LOST, Outcome.NOT_SENT}


def test_an_idle_connection_may_be_silent_and_the_first_message_after_it_has_the_whole_deadline(clock: Clock) -> None:
    with ScriptedAmqp() as server, relay_on(server, confirm_timeout_seconds=0.06) as broker:
        session = server.session(1)
        clock.goes_on(60)
        broker.send(batch(1))
        session.wait_for(1)
        clock.goes_on(0.05)
        assert broker.answers(0) == []
        session.ack(1)
        assert outcomes(answered(broker, 1)) == {1: Outcome.CONFIRMED}
        clock.goes_on(60)
        assert broker.answers(0) == []
        heard(broker, session)
        assert not session.ended.is_set()


def test_acks_that_the_network_holds_back_beyond_the_deadline_confirm_nothing() -> None:
    with ScriptedAmqp(acknowledge) as server, Proxy(server.port) as proxy:
        server.url = f"amqp://user:secret@127.0.0.1:{proxy.port}/"
        with relay_on(server, confirm_timeout_seconds=0.3) as broker:
            broker.send(batch(1, first=0))
            answered(broker, 1)
            proxy.stall(TO_CLIENT)
            broker.send(batch(3))
            server.session(1).wait_for(4)
            assert set(outcomes(answered(broker, 3)).values()) == {Outcome.LOST}
            proxy.restore()
            connected(broker)
            broker.send(batch(1, first=10))
            assert outcomes(answered(broker, 1)) == {10: Outcome.CONFIRMED}
            heard(broker, server.session(2))
            assert broker.answers(0) == []


def test_a_message_cut_in_the_middle_is_lost_and_sent_whole_the_next_time() -> None:
    with ScriptedAmqp(acknowledge) as server, Proxy(server.port) as proxy:
        server.url = f"amqp://user:secret@127.0.0.1:{proxy.port}/"
        with relay_on(server) as broker:
            sent = [Outgoing(1, message(body=b'"' + b"x" * 10_000 + b'"'))]
            proxy.cut_after(7_000, TO_SERVER)
            broker.send(sent)
            assert outcomes(answered(broker, 1)) == {1: Outcome.LOST}
            connected(broker)
            broker.send(sent)
            assert outcomes(answered(broker, 1)) == {1: Outcome.CONFIRMED}
        assert server.session(1).publishes == []
        assert [publish.body for publish in server.session(2).publishes] == [cloud_event(sent[0].message)]


# --- one queue that says nothing ------------------------------------------------------------------------------------------


def read(
    broker: RabbitBroker, until: Callable[[list[Answer]], bool], timeout: float = 10.0, interval: float = 0.0
) -> list[Answer]:
    """Collect answers until *until* says that they are enough."""
    found: list[Answer] = []

    def enough() -> bool:
        found.extend(broker.answers(0.01))
        return until(found)

    eventually(enough, timeout, "the answers", interval)
    return found


def of(topic: str, count: int, first: int) -> list[Outgoing]:
    return batch(count, first, topic=topic)


def test_a_topic_that_is_silent_while_others_are_answered_is_named_and_stops_nobody() -> None:
    with ScriptedAmqp(SilentQueue("s")) as server, relay_on(server, confirm_timeout_seconds=0.8) as broker:
        broker.send([*of("h", 1, first=0), *of("s", 2, first=1)])
        token = 10

        def named(found: list[Answer]) -> bool:
            nonlocal token
            broker.send(of("h", 1, first=token))
            token += 1
            return sum(answer.outcome is Outcome.SILENT for answer in found) == 2

        found = read(broker, named)
        assert {answer.token for answer in found if answer.outcome is Outcome.SILENT} == {1, 2}
        assert {answer.outcome for answer in found} == {Outcome.CONFIRMED, Outcome.SILENT}
        assert all("later messages of other topics were answered" in a.detail for a in found if a.outcome is Outcome.SILENT)
        assert broker.state().connected
        assert server.connections == 1


def test_a_silent_topic_that_answers_after_all_confirms_what_was_given_up() -> None:
    silent = SilentQueue("s")
    with ScriptedAmqp(silent) as server, relay_on(server, confirm_timeout_seconds=0.4) as broker:
        broker.send([*of("h", 1, first=0), *of("s", 2, first=1)])
        numbers = itertools.count(10)

        def named(found: list[Answer]) -> bool:
            broker.send(of("h", 1, first=next(numbers)))
            return any(answer.outcome is Outcome.SILENT for answer in found)

        read(broker, named)
        silent.heal()
        late = read(broker, lambda found: {1, 2} <= {answer.token for answer in found})
        assert {answer.outcome for answer in late if answer.token in (1, 2)} == {Outcome.CONFIRMED}


def test_a_silent_topic_gets_only_as_much_as_does_not_stop_the_connection() -> None:
    with ScriptedAmqp(SilentQueue("s")) as server, relay_on(server, confirm_timeout_seconds=2.0) as broker:
        broker.send(of("h", 1, first=0))
        answered(broker, 1)
        broker.send(of("s", 200, first=1))
        for token in range(1000, 1100):
            broker.send(of("h", 1, first=token))
            answered(broker, 1, timeout=5)
        assert sum(publish.method.routing_key == "s" for publish in server.session(1).publishes) == 24


def test_a_topic_with_enough_in_flight_to_stop_the_whole_connection_is_left_with_it_before_it_does() -> None:
    silent = SilentQueue()

    def fall_silent_in_the_middle(session: Session, publish: Publish) -> None:
        if len(session.publishes) == 300:
            silent.topics.add("s")
        silent(session, publish)

    with ScriptedAmqp(fall_silent_in_the_middle) as server, relay_on(server, confirm_timeout_seconds=2.0) as broker:
        # It takes much, and is given much at once.
        broker.send([*of("h", 1, first=0), *of("s", 1000, first=1)])
        given_up, lost = left_with_its_connection(broker)
        server.session(2)
    assert len(given_up) > 32
    assert given_up <= set(range(1, 1001))
    assert given_up <= lost


def test_a_topic_that_stopped_the_whole_connection_is_left_with_it_long_before_the_deadline() -> None:
    silent = SilentQueue("s")

    def stop_all(session: Session, publish: Publish) -> None:
        if publish.id != stopper[0]:
            silent(session, publish)
        else:
            server.script = lambda *_: None

    last = of("h", 1, first=99)
    stopper = [str(last[0].message.id)]
    with ScriptedAmqp(stop_all) as server, relay_on(server, confirm_timeout_seconds=2.0) as broker:
        broker.send(of("h", 1, first=0))
        answered(broker, 1)
        broker.send(of("s", 10, first=1))
        server.session(1).wait_for(11)
        numbers = itertools.count(100)

        def enough(found: list[Answer]) -> bool:
            broker.send(of("h", 1, first=next(numbers)))
            return len(found) >= 15

        read(broker, enough, interval=0.02)
        broker.send(last)
        given_up, lost = left_with_its_connection(broker)
        server.session(2)
    assert given_up == set(range(1, 11))
    assert given_up | {99} <= lost


def left_with_its_connection(broker: RabbitBroker) -> tuple[set[int], set[int]]:
    """Send a little of another topic until the connection is left; return who was given up and who was lost with it."""
    numbers = itertools.count(10_000)

    def left(found: list[Answer]) -> bool:
        broker.send(of("h", 1, first=next(numbers)))
        return Outcome.LOST in {answer.outcome for answer in found}

    found = read(broker, left, interval=0.02)
    undecided = [answer for answer in found if answer.outcome in (Outcome.SILENT, Outcome.LOST)]
    assert {answer.cause for answer in undecided} == {Cause.SILENCE}
    assert all(
        "no confirm came for s, which stops all others" in each.detail for each in undecided if each.outcome is Outcome.LOST
    )
    silent = {answer.token for answer in undecided if answer.outcome is Outcome.SILENT}
    return silent, {answer.token for answer in undecided if answer.outcome is Outcome.LOST}


def test_a_first_message_that_is_not_answered_keeps_other_topics_waiting_for_a_moment_only() -> None:
    with ScriptedAmqp(SilentQueue("s")) as server, relay_on(server, confirm_timeout_seconds=1.0) as broker:
        broker.send([*of("s", 5, first=1), *of("h", 5, first=10)])
        found = read(broker, lambda found: sum(answer.outcome is Outcome.CONFIRMED for answer in found) == 5)
        assert {answer.token for answer in found} == {10, 11, 12, 13, 14}
        assert server.session(1).publishes[1].method.routing_key == "h"
        assert broker.state().connected


def test_a_message_whose_id_is_in_flight_keeps_nobody_behind_it_waiting() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        proven(broker, session)
        same = message()
        broker.send([Outgoing(1, same), Outgoing(2, same), *batch(3, first=3)])
        session.wait_for(5)
        session.ack(5, multiple=True)
        assert outcomes(answered(broker, 4)) == dict.fromkeys((1, 3, 4, 5), Outcome.CONFIRMED)
        session.ack(len(session.wait_for(6)))
        assert outcomes(answered(broker, 1)) == {2: Outcome.CONFIRMED}


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_a_message_refused_while_alone_in_flight_is_to_blame() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        broker.send(batch(2))
        session.wait_for(1)
        session.close_channel(406, "PRECONDITION_FAILED - message size 17000000 is larger than 16777216")
        answers = answered(broker, 2)
        assert outcomes(answers) == {1: Outcome.REFUSED, 2: Outcome.NOT_SENT}
        assert answers[1].detail.startswith("406 PRECONDITION_FAILED")
        connected(broker)


def test_a_message_refused_among_others_loses_all_and_says_that_one_is_to_blame() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        proven(broker, session)
        broker.send(batch(3))
        session.wait_for(4)
        session.ack(2)
        session.close_channel(406, "PRECONDITION_FAILED - no")
        answers = answered(broker, 3)
        assert outcomes(answers) == {1: Outcome.CONFIRMED, 2: Outcome.LOST, 3: Outcome.LOST}
        assert answers[2].cause is Cause.MESSAGE


def test_the_only_one_left_in_flight_is_to_blame() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        proven(broker, session)
        broker.send(batch(2))
        session.wait_for(3)
        session.ack(2)
        session.close_channel(406, "PRECONDITION_FAILED - no")
        assert outcomes(answered(broker, 2)) == {1: Outcome.CONFIRMED, 2: Outcome.REFUSED}


@pytest.mark.parametrize(
    ("code", "words", "step"),
    [
        (404, "NOT_FOUND - no exchange 'openevent' in vhost '/'", "outbox topology apply"),
        (403, "ACCESS_REFUSED - write access to exchange 'openevent' in vhost '/' refused", "rabbitmqctl set_permissions"),
    ],
)
def test_a_missing_exchange_and_a_missing_permission_are_said_loudly_once(
    code: int, words: str, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        proven(broker, session)
        broker.send(batch(2))
        session.wait_for(3)
        server.refusals[spec.Exchange.Declare] = (code, words)
        session.close_channel(code, words)
        answers = answered(broker, 2)
        assert outcomes(answers) == {1: Outcome.LOST, 2: Outcome.LOST}
        server.session(4)
        state = broker.state()
        assert (state.connected, state.refused) == (False, True)
        assert words in state.detail
        assert step in state.detail
        assert [outcome for outcome in told(caplog) if outcome == "broker.refused"] == ["broker.refused"]
        server.refusals.clear()
        connected(broker)
        assert told(caplog) == ["broker.connected", "broker.refused", "broker.connected"]


def test_an_exchange_that_is_missing_from_the_start_is_known_before_the_first_message() -> None:
    server = ScriptedAmqp(acknowledge)
    server.refusals[spec.Exchange.Declare] = (404, "NOT_FOUND - no exchange 'openevent' in vhost '/'")
    with server, relay_on(server, wait=False) as broker:
        eventually(lambda: broker.state().refused, what="the refusal")
        broker.send(batch(1))
        answer = answered(broker, 1)[1]
        assert answer.outcome is Outcome.NOT_SENT
        assert answer.detail.startswith("404 NOT_FOUND")
        server.refusals.clear()
        connected(broker)
        broker.send(batch(1))
        assert outcomes(answered(broker, 1)) == {1: Outcome.CONFIRMED}


@pytest.mark.parametrize(
    ("method", "code", "words", "step"),
    [
        (spec.Connection.StartOk, 403, "ACCESS_REFUSED - Login was refused", "rabbitmqctl change_password user"),
        (spec.Connection.Open, 530, "NOT_ALLOWED - vhost nowhere not found", "rabbitmqctl add_vhost"),
    ],
)
def test_a_refused_login_and_an_unknown_virtual_host_are_named_with_the_next_step(
    method: type, code: int, words: str, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = ScriptedAmqp(acknowledge)
    server.refusals[method] = (code, words)
    with server, relay_on(server, wait=False) as broker:
        server.session(3)
        state = eventually(lambda: broker.state() if broker.state().refused else None, what="the refusal")
        assert state is not None
        assert f"{code} {words}" in state.detail
        assert step in state.detail
        server.refusals.clear()
        connected(broker)
    assert "secret" not in caplog.text + state.detail
    assert told(caplog).count("broker.refused") == 1


def test_a_broker_that_refuses_is_asked_slowly() -> None:
    server = ScriptedAmqp()
    server.refusals[spec.Connection.StartOk] = (403, "ACCESS_REFUSED - Login was refused")
    with server, relay_on(server, wait=False, refused=Backoff(1000.0, 1000.0)) as broker:
        eventually(lambda: broker.state().refused, what="the refusal")
        stands_still(thread_of(broker), "_run")
        assert server.connections == 1


# --- blocked --------------------------------------------------------------------------------------------------------------


def test_a_blocked_broker_gets_nothing_and_is_resumed() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        session = server.session(1)
        proven(broker, session)
        session.block("low on memory")
        state = eventually(lambda: broker.state() if broker.state().blocked else None, what="the state blocked")
        assert state is not None
        assert state.connected
        assert "low on memory" in state.detail
        broker.send(batch(2))
        heard(broker, session, unblock=False)
        assert broker.answers(0) == []
        assert len(session.publishes) == 1
        session.unblock()
        session.wait_for(3)
        session.ack(3, multiple=True)
        assert outcomes(answered(broker, 2)) == {1: Outcome.CONFIRMED, 2: Outcome.CONFIRMED}
        assert broker.state().detail == ""


def test_a_broker_blocked_beyond_the_deadline_loses_its_connection_and_the_window() -> None:
    with ScriptedAmqp() as server, relay_on(server, confirm_timeout_seconds=0.3) as broker:
        session = server.session(1)
        proven(broker, session)
        broker.send(batch(1))
        session.wait_for(2)
        session.block("low on disk")
        eventually(lambda: broker.state().blocked, what="the state blocked")
        broker.send(batch(1, first=2))
        answers = answered(broker, 2)
        assert outcomes(answers) == {1: Outcome.LOST, 2: Outcome.NOT_SENT}
        assert "takes no messages" in answers[1].detail
        assert answers[1].cause is Cause.BLOCKED
        assert session.ended.wait(5)


def test_a_broker_that_is_blocked_while_nothing_waits_keeps_its_connection(clock: Clock) -> None:
    with ScriptedAmqp() as server, relay_on(server, confirm_timeout_seconds=0.1) as broker:
        session = server.session(1)
        session.block("low on memory")
        eventually(lambda: broker.state().blocked, what="the state blocked")
        clock.goes_on(60)
        assert broker.answers(0) == []
        heard(broker, session, unblock=False)
        assert not session.ended.is_set()


def test_a_broker_that_blocks_before_the_channel_stands_is_known_to_be_blocked() -> None:
    with ScriptedAmqp() as server:
        server.blocks_from_the_start = True
        with relay_on(server) as broker:
            assert broker.state().blocked
            broker.send(batch(1))
            server.session(1).unblock()
            server.session(1).wait_for(1)
            server.session(1).ack(1)
            assert outcomes(answered(broker, 1)) == {1: Outcome.CONFIRMED}
            assert not broker.state().blocked


def test_a_broker_that_blocks_again_on_every_connection_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:

    def block(session: Session, _: Publish) -> None:
        session.block("low on memory")

    with ScriptedAmqp(block) as server, relay_on(server, confirm_timeout_seconds=0.25) as broker:
        for token in range(1, 4):
            connected(broker)
            broker.send(batch(1, first=token))
            assert outcomes(answered(broker, 1)) == {token: Outcome.LOST}
        assert told(caplog) == ["broker.connected", "broker.blocked", "broker.lost"]
        server.script = acknowledge
        connected(broker)
        broker.send(batch(1))
        answered(broker, 1)
        eventually(lambda: told(caplog)[-1] == "broker.connected", what="the good news")


# --- the life of a connection ---------------------------------------------------------------------------------------------


def test_without_a_connection_everything_is_lost_at_once() -> None:
    broker = RabbitBroker(f"amqp://user:secret@127.0.0.1:{free_port()}/", exchange="openevent")
    broker.send(batch(2))
    answers = answered(broker, 2, timeout=1)
    assert set(outcomes(answers).values()) == {Outcome.NOT_SENT}
    assert answers[1].detail
    broker.stop(1)


def test_it_starts_before_the_broker_is_up_and_survives_its_restart(caplog: pytest.LogCaptureFixture) -> None:
    server = ScriptedAmqp(acknowledge)
    with relay_on(server, wait=False) as broker:
        state = eventually(lambda: broker.state() if "refused" in broker.state().detail else None, what="a failed attempt")
        assert state is not None
        assert (state.connected, state.refused) == (False, False)
        assert f"amqp://user:***@127.0.0.1:{server.port}/" in state.detail
        with server:
            connected(broker)
        eventually(lambda: not broker.state().connected, what="the loss")
        with server:
            connected(broker)
            broker.send(batch(1))
            assert outcomes(answered(broker, 1)) == {1: Outcome.CONFIRMED}
    news = told(caplog)
    assert news[0] == "broker.unreachable"
    assert news.count("broker.connected") == 2
    assert "secret" not in caplog.text


def test_a_mistake_of_ours_loses_the_connection_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedAmqp(acknowledge) as server, relay_on(server) as broker:
        with monkeypatch.context() as broken:
            broken.setattr(Link, "_next", lambda *_: 1 / 0)
            broker.send([Outgoing(1, message(body=b'"the secret of the conference"'))])
            answers = answered(broker, 1)
        assert outcomes(answers) == {1: Outcome.NOT_SENT}
        assert answers[1].detail == "a mistake of this program: ZeroDivisionError"
        connected(broker)
        broker.send(batch(1))
        assert outcomes(answered(broker, 1)) == {1: Outcome.CONFIRMED}
    assert "ended by a mistake of this program" in caplog.text
    assert "the secret" not in caplog.text


def test_without_a_file_descriptor_for_a_connection_it_waits_for_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_many(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with ScriptedAmqp(acknowledge) as server:
        with monkeypatch.context() as exhausted:
            exhausted.setattr(IOLoop, "__init__", too_many)
            broker = RabbitBroker(server.url, exchange="openevent", reconnect=AT_ONCE)
            broker.start()
            eventually(lambda: "Too many open files" in caplog.text, what="the complaint")
        connected(broker)
        broker.stop(5)


def test_wake_returns_from_a_long_wait() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        broker.wake()
        assert broker.answers(60) == []


def test_a_change_of_state_returns_from_a_long_wait() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        server.session(1).block("low on memory")
        assert broker.answers(60) == []
        assert broker.state().blocked


def test_what_is_handed_over_at_the_moment_a_connection_ends_is_lost_too(monkeypatch: pytest.MonkeyPatch) -> None:
    close = IOLoop.close

    def one_more_at_the_end(loop: IOLoop) -> None:
        if broker.state().connected:
            broker.send(batch(1, first=9))
        close(loop)

    monkeypatch.setattr(IOLoop, "close", one_more_at_the_end)
    with ScriptedAmqp() as server, relay_on(server) as broker:
        server.session(1).reset()
        answers = answered(broker, 1)
        assert outcomes(answers) == {9: Outcome.NOT_SENT}
        monkeypatch.undo()


def test_stop_says_goodbye_when_all_is_answered() -> None:
    with ScriptedAmqp(acknowledge) as server, relay_on(server) as broker:
        broker.send(batch(3))
        answered(broker, 3)
        broker.stop(5)
        assert spec.Connection.Close in server.session(1).methods
        assert not broker.state().connected


def test_stop_loses_what_has_no_answer_and_waits_for_nobody() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        broker.send(batch(2))
        server.session(1).wait_for(1)
        broker.stop(60)
        assert outcomes(answered(broker, 2, timeout=1)) == {1: Outcome.LOST, 2: Outcome.NOT_SENT}
        broker.send(batch(1))
        assert outcomes(answered(broker, 1, timeout=1)) == {1: Outcome.NOT_SENT}


def test_stop_ends_in_time_while_the_broker_is_blocked_and_while_it_does_not_answer() -> None:
    with ScriptedAmqp() as server, relay_on(server) as broker:
        server.session(1).block("low on memory")
        eventually(lambda: broker.state().blocked, what="the state blocked")
        broker.stop(60)
        assert not broker.state().connected
        assert spec.Connection.Close not in server.session(1).methods
    with ScriptedAmqp() as server, relay_on(server) as broker:
        server.session(1).deaf = True
        broker.stop(2)
        assert not broker.state().connected


@pytest.mark.parametrize("step", [spec.Connection.StartOk, spec.Channel.Open, spec.Confirm.Select])
def test_stop_ends_in_time_while_it_connects(step: type) -> None:
    with ScriptedAmqp() as server:
        server.unanswered.add(step)
        with relay_on(server, wait=False) as broker:
            server.session(1).wait_for_method(step)
            broker.stop(60)
            assert not broker.state().connected


def _knocking_at(port: int) -> int:
    """How many connections to *port* have got no answer to their first packet."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[2].endswith(f":{port:04X}") and line.split()[3] == "02" for line in lines)


def test_stop_ends_in_time_while_nobody_takes_the_connection() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with ExitStack() as others:
            for _ in range(3):  # the queue of the listener is full: Linux answers no further SYN
                other = others.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(full.getsockname())
            others_knock = _knocking_at(full.getsockname()[1])
            broker = RabbitBroker(f"amqp://user:secret@127.0.0.1:{full.getsockname()[1]}/", exchange="openevent")
            broker.start()
            eventually(lambda: _knocking_at(full.getsockname()[1]) > others_knock, what="it to connect")
            broker.stop(60)
            assert not broker.state().connected


@pytest.mark.parametrize(
    ("step", "words"), [(spec.Connection.Open, "Timeout"), (spec.Confirm.Select, "opened no channel within 0.1 s")]
)
def test_a_broker_that_stops_answering_while_it_connects_is_given_up(
    step: type, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.relay.rabbitmq.pika_connection._CONNECT_SECONDS", 0.1)
    monkeypatch.setattr("outbox.relay.rabbitmq.publishing._CHANNEL_SECONDS", 0.1)
    with ScriptedAmqp(acknowledge) as server:
        server.unanswered.add(step)
        with relay_on(server, wait=False) as broker:
            eventually(lambda: words in broker.state().detail, what=words)
            server.unanswered.clear()
            connected(broker)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("amqp://127.0.0.1/", "names no user and password"),
        ("http://user:secret@127.0.0.1/", "not amqp://"),
        ("amqps://user:secret@127.0.0.1/?cacertfile=/nowhere/ca.pem", "can't read the certificates"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_at_once(url: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as refused:
        RabbitBroker(url, exchange="openevent")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("query", "seconds"), [("", 10), ("?heartbeat=0", 0), ("?heartbeat=60", 60)])
def test_a_half_open_connection_is_noticed_soon_unless_the_url_says_otherwise(query: str, seconds: int) -> None:
    assert parameters(amqp_url.parse(f"amqp://user:secret@127.0.0.1/{query}"), "outbox").heartbeat == seconds


# --- TLS ------------------------------------------------------------------------------------------------------------------

TLS = Path(__file__).parents[3] / "kit" / "tls"


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        (f"?cacertfile={TLS / 'authority.pem'}&server_name_indication=broker.test", ""),
        (f"?cacertfile={TLS / 'authority.pem'}&server_name_indication=other.test", "Hostname mismatch"),
        (f"?cacertfile={TLS / 'authority.pem'}", "IP address mismatch"),
        ("?server_name_indication=broker.test", "unable to get local issuer certificate"),
    ],
    ids=["its name and its authority", "another name", "the address in the URL", "an unknown authority"],
)
def test_only_a_certificate_of_the_right_name_and_authority_is_accepted(query: str, problem: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "broker.pem")
    with ScriptedAmqp(acknowledge, tls=context) as server:
        server.url += query
        with relay_on(server, wait=False) as broker:
            state = eventually(lambda: broker.state() if broker.state().connected or broker.state().refused else None)
            assert state is not None
            assert problem in state.detail
            assert state.refused == bool(problem)
            broker.send(batch(1))
            assert outcomes(answered(broker, 1)) == {1: Outcome.NOT_SENT if problem else Outcome.CONFIRMED}


# --- anything may happen --------------------------------------------------------------------------------------------------

_steps = st.lists(
    st.sampled_from(["ack", "ack multiple", "nack", "return", "wait", "406", "404", "reset", "bogus ack", "block", "unblock"]),
    min_size=1,
    max_size=30,
)


class Chaos:
    """Does the next step of a program at each publish, and remembers what it truly said of which message."""

    def __init__(self, steps: list[str]) -> None:
        self._steps = iter(steps)
        self.said: dict[str, list[str]] = {}

    def __call__(self, session: Session, publish: Publish) -> None:
        step = next(self._steps, "ack multiple")
        waiting = [p for p in session.publishes if not self._answered(session, p)]
        if step == "ack":
            self._say(session, waiting[:1], "ack", waiting[0].tag, multiple=False)
        elif step == "ack multiple":
            self._say(session, waiting, "ack", publish.tag, multiple=True)
        elif step == "nack":
            self._say(session, waiting[-1:], "nack", waiting[-1].tag, multiple=False)
        elif step == "return":
            self._note(publish, "returned")
            session.give_back(publish)
            self._say(session, [publish], "ack", publish.tag, multiple=False)
        elif step in ("406", "404"):
            session.close_channel(int(step), "AS_THE_TEST_WANTS")
        elif step == "reset":
            session.reset()
        elif step == "bogus ack":
            session.ack(publish.tag + 1000)
        elif step == "block":
            session.block("low on memory")
        elif step == "unblock":
            session.unblock()

    def _say(self, session: Session, publishes: list[Publish], word: str, tag: int, *, multiple: bool) -> None:
        for publish in publishes:
            self._note(publish, f"{word} by {id(session)}")
        (session.ack if word == "ack" else session.nack)(tag, multiple=multiple)

    def _note(self, publish: Publish, word: str) -> None:
        self.said.setdefault(publish.id, []).append(word)

    def _answered(self, session: Session, publish: Publish) -> bool:
        return any(word.endswith(f"by {id(session)}") for word in self.said.get(publish.id, []))


@settings(max_examples=40, deadline=None)
@given(steps=_steps, sizes=st.lists(st.integers(1, 8), min_size=1, max_size=5))
def test_whatever_the_broker_does_each_message_gets_one_answer_and_only_its_own(steps: list[str], sizes: list[int]) -> None:
    chaos = Chaos(steps)
    with ScriptedAmqp(chaos) as server, relay_on(server, confirm_timeout_seconds=0.05) as broker:
        sent: list[Outgoing] = []
        for size in sizes:
            some = batch(size, first=len(sent))
            sent += some
            broker.send(some)
        answers = answered(broker, len(sent))
        assert broker.answers(0) == []
    for outgoing in sent:
        said = " ".join(chaos.said.get(str(outgoing.message.id), []))
        outcome = answers[outgoing.token].outcome
        if outcome is Outcome.CONFIRMED:
            assert "ack by" in said.replace("nack by", "")
            assert "returned" not in said
        elif outcome is Outcome.RETURNED:
            assert "returned" in said
            assert "ack by" in said
        elif outcome is Outcome.NACKED:
            assert "nack by" in said
        elif outcome is Outcome.REFUSED:
            assert said == ""
            assert "406" in steps
