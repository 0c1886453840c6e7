"""RabbitBroker on a real RabbitMQ: what it confirms is in the queue, whatever happens to the broker."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pika
import pytest

from outbox.process.backoff import Backoff
from outbox.relay.broker import Outcome, Outgoing
from outbox.relay.rabbitmq import RabbitBroker
from tests.kit.builders import message
from tests.kit.outgoing import answered, batch, connected
from tests.kit.proxy import TO_SERVER, Proxy
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pika.adapters.blocking_connection import BlockingChannel

    from tests.kit.servers import ExternalRabbit, RabbitServer

_EXCHANGE = "openevent"
_QUEUE = "openevent.tap"
_WINDOW = 2000
AT_ONCE = Backoff(0.05, 0.2)


@pytest.fixture(autouse=True)
def _no_word_from_pika(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="pika")
    caplog.set_level(logging.INFO, logger="outbox")


@contextmanager
def channel_on(url: str) -> Iterator[BlockingChannel]:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        yield connection.channel()


def set_up(channel: BlockingChannel, **arguments: Any) -> None:
    """The exchange, and a quorum queue with all topics."""
    channel.exchange_declare(_EXCHANGE, "topic", durable=True)
    channel.queue_declare(_QUEUE, durable=True, arguments={"x-queue-type": "quorum", **arguments})
    channel.queue_bind(_QUEUE, _EXCHANGE, "#")


def everything_in_the_queue(url: str, at_least: int) -> list[str]:
    """Remove all messages and return their ids in order; waits until *at_least* are there."""
    ids: list[str] = []
    deadline = time.monotonic() + 30
    with channel_on(url) as channel:
        for _, properties, _ in channel.consume(_QUEUE, auto_ack=True, inactivity_timeout=0.2):
            if properties is not None:
                ids.append(properties.message_id)
            elif len(ids) >= at_least or time.monotonic() > deadline:
                break
    return ids


@contextmanager
def relay_on(url: str, *, wait: bool = True, **options: Any) -> Iterator[RabbitBroker]:
    settings: dict[str, Any] = {"exchange": _EXCHANGE, "reconnect": AT_ONCE, "refused": AT_ONCE, **options}
    broker = RabbitBroker(url, **settings)
    broker.start()
    try:
        if wait:
            connected(broker, timeout=30)
        yield broker
    finally:
        broker.stop(5)


class Sender:
    """Sends until everything is confirmed, as a relay does: what was lost or returned is sent again."""

    def __init__(self, broker: RabbitBroker, messages: Iterable[Outgoing]) -> None:
        self.broker = broker
        self.waiting = list(messages)
        self.flying: dict[int, Outgoing] = {}
        self.confirmed: list[Outgoing] = []
        self.outcomes: set[Outcome] = set()

    def turn(self) -> None:
        """Hand over what fits into the window, and take the answers that are there."""
        if self.broker.state().connected and len(self.flying) <= _WINDOW - 500:
            portion, self.waiting = self.waiting[:500], self.waiting[500:]
            self.flying |= {outgoing.token: outgoing for outgoing in portion}
            self.broker.send(portion)
        for answer in self.broker.answers(0.1):
            outgoing = self.flying.pop(answer.token)
            self.outcomes.add(answer.outcome)
            (self.confirmed if answer.outcome is Outcome.CONFIRMED else self.waiting).append(outgoing)

    def hand_over(self, messages: Sequence[Outgoing]) -> None:
        """Send *messages* too; return when they are on their way."""
        self.waiting += messages
        self.until(lambda: not self.waiting)

    def until(self, done: Callable[[], bool], timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < deadline, (
                f"{len(self.confirmed)} confirmed, {len(self.flying)} in flight, {len(self.waiting)} waiting "
                f"after {timeout} s, with {self.outcomes}; {self.broker.state()}"
            )
            self.turn()

    def finish(self) -> None:
        self.until(lambda: not self.waiting and not self.flying)


def ids_of(sent: Iterable[Outgoing]) -> list[str]:
    return [str(outgoing.message.id) for outgoing in sent]


def test_twenty_thousand_messages_are_confirmed_and_in_the_queue_in_order(broker_url: str) -> None:
    with channel_on(broker_url) as channel:
        set_up(channel)
    messages = batch(20_000, body=b'"' + b"x" * 1000 + b'"')
    with relay_on(broker_url) as broker:
        sender = Sender(broker, messages)
        sender.finish()
    assert sender.outcomes == {Outcome.CONFIRMED}
    assert everything_in_the_queue(broker_url, 20_000) == ids_of(messages)


def test_a_queue_that_is_full_refuses_and_the_message_is_not_in_it(broker_url: str) -> None:
    with channel_on(broker_url) as channel:
        set_up(channel, **{"x-max-length": 10, "x-overflow": "reject-publish"})
    confirmed: list[Outgoing] = []
    with relay_on(broker_url) as broker:
        for outgoing in batch(200):  # a quorum queue says a little later that it is full
            broker.send([outgoing])
            outcome = answered(broker, 1)[outgoing.token].outcome
            if outcome is Outcome.NACKED:
                break
            confirmed.append(outgoing)
    assert outcome is Outcome.NACKED
    assert everything_in_the_queue(broker_url, len(confirmed)) == ids_of(confirmed)


def test_a_binding_deleted_while_publishing_returns_what_it_would_have_carried(broker_url: str) -> None:
    messages = batch(4000)
    with channel_on(broker_url) as channel, relay_on_empty(channel, broker_url) as broker:
        sender = Sender(broker, messages)
        sender.until(lambda: len(sender.confirmed) > 500)
        channel.queue_unbind(_QUEUE, _EXCHANGE, "#")
        sender.until(lambda: Outcome.RETURNED in sender.outcomes)
        channel.queue_bind(_QUEUE, _EXCHANGE, "#")
        sender.finish()
    assert sender.outcomes == {Outcome.CONFIRMED, Outcome.RETURNED}
    found = everything_in_the_queue(broker_url, 4000)
    assert sorted(found) == sorted(ids_of(messages))  # and none twice: returned means that nobody has it


def test_an_exchange_deleted_while_publishing_loses_nothing_and_is_named(broker_url: str) -> None:
    messages = batch(3000)
    with channel_on(broker_url) as channel, relay_on_empty(channel, broker_url) as broker:
        sender = Sender(broker, messages)
        sender.until(lambda: len(sender.confirmed) > 500)
        channel.exchange_delete(_EXCHANGE)
        sender.until(lambda: broker.state().refused)
        assert "404 NOT_FOUND - no exchange 'openevent'" in broker.state().detail
        assert "outbox topology apply" in broker.state().detail
        set_up(channel)
        sender.finish()
    # Since 4.3 the bindings may be gone a moment before the exchange is: what is published then comes back as unroutable.
    assert sender.outcomes - {Outcome.RETURNED, Outcome.NOT_SENT} == {Outcome.CONFIRMED, Outcome.LOST}
    assert set(ids_of(messages)) <= set(everything_in_the_queue(broker_url, 3000))


@contextmanager
def relay_on_empty(channel: BlockingChannel, url: str) -> Iterator[RabbitBroker]:
    set_up(channel)
    with relay_on(url) as broker:
        yield broker


def test_a_broker_killed_with_an_open_window_loses_nothing_and_is_found_again(
    private_rabbit: Callable[[], RabbitServer],
) -> None:
    server = private_rabbit()
    messages = batch(4000)
    with channel_on(server.url) as channel:
        set_up(channel)
    with relay_on(server.url) as broker:
        sender = Sender(broker, messages)
        sender.until(lambda: len(sender.confirmed) > 500 and len(sender.flying) > 500)
        server.kill()
        sender.until(lambda: Outcome.LOST in sender.outcomes)
        assert not broker.state().connected
        server.start()
        sender.finish()
    assert set(ids_of(messages)) <= set(everything_in_the_queue(server.url, 4000))


def _through(proxy: Proxy, url: str) -> str:
    return urlsplit(url)._replace(netloc=f"guest:guest@127.0.0.1:{proxy.port}").geturl()


def test_connections_closed_by_the_broker_while_publishing_lose_nothing(private_rabbit: Callable[[], RabbitServer]) -> None:
    server = private_rabbit()
    with channel_on(server.url) as channel:
        set_up(channel)
    messages = batch(1500)
    with Proxy(server.port) as proxy, relay_on(_through(proxy, server.url)) as broker:
        sender = Sender(broker, messages[:500])
        sender.finish()
        proxy.stall(TO_SERVER)  # what is on its way is without an answer when the broker closes, however fast it is
        sender.hand_over(messages[500:])
        server.close_all_connections()
        sender.until(lambda: Outcome.LOST in sender.outcomes)
        proxy.restore()
        sender.finish()
    assert set(ids_of(messages)) <= set(everything_in_the_queue(server.url, len(messages)))


def test_a_memory_alarm_loses_the_window_after_the_deadline_and_publishing_resumes_when_it_is_over(
    private_rabbit: Callable[[], RabbitServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = private_rabbit()
    with channel_on(server.url) as channel:
        set_up(channel)
    with relay_on(server.url, confirm_timeout_seconds=0.5) as broker:
        broker.send(batch(1))
        assert answered(broker, 1)[1].outcome is Outcome.CONFIRMED
        server.set_memory_alarm()
        broker.send(batch(50))
        lost = answered(broker, 50)
        assert {answer.outcome for answer in lost.values()} == {Outcome.LOST, Outcome.NOT_SENT}
        assert any("takes no messages for 0.5 s" in answer.detail for answer in lost.values())
        connected(broker)
        broker.send(batch(50))
        eventually(lambda: broker.state().blocked, what="the state blocked")
        assert "memory" in broker.state().detail
        answered(broker, 50)

        with relay_on(server.url) as another:
            another.send(batch(1))
            eventually(lambda: another.state().blocked, what="the state blocked")
            before = time.monotonic()
            another.stop(10)
            assert time.monotonic() - before < 5

        server.clear_memory_alarm()
        messages = batch(2000)
        sender = Sender(broker, messages)
        sender.finish()
    assert set(ids_of(messages)) <= set(everything_in_the_queue(server.url, 2001))
    # Blocked, dropped, connected, blocked again: each is told once, until a confirm shows that it is over.
    told = [getattr(record, "outbox_event", "") for record in caplog.records if "outbox" in record.name]
    of_the_other = ["broker.connected", "broker.blocked", "broker.stopped"]
    first = ["broker.connected", "broker.blocked", "broker.lost"]
    assert told == [*first, *of_the_other, "broker.connected", "broker.stopped"]


def test_a_wrong_password_and_an_unknown_virtual_host_are_refused_in_the_brokers_words(broker_url: str) -> None:
    parts = urlsplit(broker_url)
    wrong = f"amqp://{parts.username}:wrong-secret@{parts.hostname}:{parts.port}{parts.path}"
    nowhere = f"{broker_url}-nowhere"
    for url, words in ((wrong, "403 ACCESS_REFUSED"), (nowhere, "530 NOT_ALLOWED - vhost")):
        with relay_on(url, wait=False) as broker:
            expect_refusal(broker, words)


def expect_refusal(broker: RabbitBroker, words: str) -> None:
    eventually(lambda: broker.state().refused, what=words)
    assert words in broker.state().detail
    assert "secret" not in broker.state().detail
    broker.send(batch(1))
    assert answered(broker, 1)[1].outcome is Outcome.NOT_SENT


def test_a_user_who_may_not_write_is_told_so_and_goes_on_when_allowed(
    rabbit_server: RabbitServer | ExternalRabbit, broker_url: str
) -> None:
    parts = urlsplit(broker_url)
    vhost, user = parts.path[1:], f"reader{parts.path[-6:]}"
    management = rabbit_server.management
    with channel_on(broker_url) as channel:
        set_up(channel)
    management.request("PUT", f"users/{user}", {"password": "reading", "tags": ""})
    permissions = {"configure": "", "write": "", "read": ".*"}
    management.request("PUT", f"permissions/{vhost}/{user}", permissions)
    try:
        with relay_on(f"amqp://{user}:reading@{parts.hostname}:{parts.port}/{vhost}") as broker:
            broker.send(batch(3))
            lost = answered(broker, 3)
            assert {answer.outcome for answer in lost.values()} == {Outcome.LOST, Outcome.NOT_SENT}
            assert lost[1].detail.startswith("403 ACCESS_REFUSED")
            assert "rabbitmqctl set_permissions" in lost[1].detail
            management.request("PUT", f"permissions/{vhost}/{user}", {**permissions, "write": ".*"})
            sender = Sender(broker, batch(3))
            sender.finish()
    finally:
        management.request("DELETE", f"users/{user}")


def test_a_message_without_key_or_headers_and_one_with_all_of_them_reach_another_client_as_they_were(broker_url: str) -> None:
    plain = message("session.modified")
    full = message("session.modified", key="event:1", sequence=3, headers={"traceparent": "00-1-2-01", "correlationid": "c-1"})
    with channel_on(broker_url) as channel, relay_on_empty(channel, broker_url) as broker:
        broker.send([Outgoing(1, plain), Outgoing(2, full)])
        answered(broker, 2)
        first = channel.basic_get(_QUEUE, auto_ack=True)[1]
        second = channel.basic_get(_QUEUE, auto_ack=True)[1]
    # RabbitMQ 3.10 adds x-delivery-count to a first delivery; since 4.0 a message without headers comes without a table.
    headers = [each.headers or {} for each in (first, second)]
    own = [{name: value for name, value in each.items() if not name.startswith("x-")} for each in headers]
    assert own == [{}, {"partitionkey": "event:1", "traceparent": "00-1-2-01", "correlationid": "c-1"}]
    assert (first.message_id, first.correlation_id, first.delivery_mode) == (str(plain.id), None, 2)
    assert (second.correlation_id, second.type, second.app_id) == ("c-1", "session.modified", "outbox")
    assert second.content_type == "application/cloudevents+json; charset=utf-8"
