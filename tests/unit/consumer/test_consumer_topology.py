"""The queues a service asks for."""

from __future__ import annotations

from typing import Any

import pytest
from amqp.exceptions import AccessRefused, NotFound, PreconditionFailed

from outbox.consumer import topology
from outbox.errors import BrokerError, ConfigurationError
from tests.kit.consuming import Recorder

REFUSED = " in vhost 'v' refused for user 'u'"
WANTED = topology.of(Recorder().service, "openevent")


class Channel:
    """A channel of a broker that has *there*; remembers what is made, refuses as told."""

    def __init__(self, refusal: Exception | None = None, at: str = "", there: tuple[str, ...] = ()) -> None:
        self.calls: list[tuple[str, str]] = []
        self._refusal, self._at = refusal, at
        self._there = there

    def _call(self, kind: str, name: str, *, passive: bool = False) -> tuple[str, int, int]:
        if passive:
            if name not in self._there:
                raise NotFound(f"no {kind} {name!r}")
            return name, 3, 1
        if self._refusal is not None and kind == self._at:
            raise self._refusal
        self.calls.append((kind, name))
        return name, 3, 1

    def exchange_declare(self, name: str, kind: str, *, passive: bool = False, **options: Any) -> None:
        assert options == {"durable": True, "auto_delete": False}
        self._call("exchange", name, passive=passive)

    def queue_declare(self, name: str, *, passive: bool = False, **options: Any) -> Any:
        assert options["auto_delete"] is False
        return self._call("queue", name, passive=passive)

    def queue_bind(self, queue: str, exchange: str, routing_key: str) -> None:
        self._call("binding", f"{exchange} -> {queue} [{routing_key}]")

    def close(self) -> None:
        """Nothing is left to do."""


def declared(channel: Channel) -> list[tuple[str, str]]:
    topology.declare(lambda: channel, WANTED)
    return channel.calls


def test_the_main_queue_is_a_quorum_queue_with_one_active_consumer_that_gives_up_late_and_loses_nothing_then() -> None:
    assert dict(WANTED.main.arguments) == {
        "x-queue-type": "quorum",
        "x-single-active-consumer": True,
        "x-delivery-limit": 1000,
        "x-dead-letter-exchange": "openevent.dead",
        "x-dead-letter-routing-key": "openevent.exports",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def test_names_are_what_others_hold_on_to() -> None:
    assert (WANTED.main.name, WANTED.main.exchange, WANTED.main.exchange_type) == ("openevent.exports", "openevent", "topic")
    assert (WANTED.dead.name, WANTED.dead.exchange, WANTED.dead.exchange_type) == (
        "openevent.exports.dead",
        "openevent.dead",
        "direct",
    )
    assert WANTED.main.routing_keys == ("session.modified",)
    assert WANTED.dead.routing_keys == ("openevent.exports",)


def test_the_place_for_what_is_given_up_is_declared_before_anything_can_be_given_up() -> None:
    assert declared(Channel()) == [
        ("exchange", "openevent.dead"),
        ("queue", "openevent.exports.dead"),
        ("binding", "openevent.dead -> openevent.exports.dead [openevent.exports]"),
        ("exchange", "openevent"),
        ("queue", "openevent.exports"),
        ("binding", "openevent -> openevent.exports [session.modified]"),
    ]


@pytest.mark.parametrize(
    ("at", "named"), [("exchange", "exchange 'openevent.dead'"), ("queue", "queue 'openevent.exports.dead'")]
)
def test_something_else_of_that_name_is_a_named_error_with_the_next_step(at: str, named: str) -> None:
    refusal = PreconditionFailed("inequivalent arg 'x-queue-type'")
    with pytest.raises(ConfigurationError) as error:
        declared(Channel(refusal, at))
    assert named in str(error.value)
    assert "inequivalent arg 'x-queue-type'" in str(error.value)
    assert "delete it" in str(error.value)


def test_an_exchange_that_is_there_is_left_as_it_is_and_a_queue_is_compared() -> None:
    made = declared(Channel(there=("openevent", "openevent.dead", "openevent.exports")))
    assert [kind for kind, _ in made] == ["queue", "binding", "queue", "binding"]


def test_a_queue_that_is_there_needs_no_right_to_declare_it() -> None:
    everything = ("openevent", "openevent.dead", "openevent.exports", "openevent.exports.dead")
    made = declared(Channel(AccessRefused("access to queue 'q' in vhost '/' refused for user 'u'"), "queue", everything))
    assert [kind for kind, _ in made] == ["binding", "binding"]


@pytest.mark.parametrize(
    ("at", "said", "right"),
    [
        ("exchange", f"access to exchange 'openevent.dead'{REFUSED}", "configure exchange 'openevent.dead'"),
        ("queue", f"configure access to queue 'q'{REFUSED}", "configure queue 'q'"),
        ("queue", f"access to exchange 'openevent.dead'{REFUSED}", "write exchange 'openevent.dead'"),
        ("binding", f"write access to queue 'q'{REFUSED}", "write queue 'q'"),
        ("binding", f"access to exchange 'openevent'{REFUSED}", "read exchange 'openevent'"),
    ],
)  # fmt: skip
def test_the_right_that_is_missing_is_named_with_the_command_that_gives_it(at: str, said: str, right: str) -> None:
    with pytest.raises(BrokerError) as error:
        declared(Channel(AccessRefused(f"ACCESS_REFUSED - {said}"), at))
    assert f"user 'u' lacks the right to {right} in virtual host 'v'" in str(error.value)
    own = r"openevent\.exports|openevent\.exports\.dead|openevent\.dead"
    rights = f"'^({own})$' '^({own})$' '^({own}|openevent)$'"
    assert str(error.value).endswith(f"rabbitmqctl set_permissions -p v u {rights}")


def test_a_refusal_in_other_words_is_passed_on() -> None:
    with pytest.raises(BrokerError, match=r"the broker refuses it: .*not today"):
        declared(Channel(AccessRefused("not today"), "queue"))


def test_backlog_and_consumers_are_asked_without_declaring() -> None:
    there = Channel(there=("openevent.exports",))
    assert topology.backlog(there, "openevent.exports") == 3
    assert topology.consumers(there, "openevent.exports") == 1
    assert topology.exists(lambda: there, "openevent.exports")
    assert not topology.exists(Channel, "openevent.exports")
