"""The queues a service asks for."""

from __future__ import annotations

from typing import Any

import pytest
from amqp.exceptions import AccessRefused, NotFound, PreconditionFailed

from outbox.consumer import topology
from outbox.errors import BrokerError, ConfigurationError
from tests.kit.consuming import Recorder

WANTED = topology.of(Recorder().service, "openevent")


class Channel:
    """Remembers what is declared; refuses as told."""

    def __init__(self, refusal: Exception | None = None, at: str = "") -> None:
        self.calls: list[tuple[str, str]] = []
        self._refusal, self._at = refusal, at

    def _call(self, kind: str, name: str) -> tuple[str, int, int]:
        if self._refusal is not None and kind == self._at:
            raise self._refusal
        self.calls.append((kind, name))
        return name, 3, 1

    def exchange_declare(self, name: str, kind: str, **options: Any) -> None:
        assert options == {"durable": True, "auto_delete": False}
        self._call("exchange", name)

    def queue_declare(self, name: str, **options: Any) -> Any:
        assert options["auto_delete"] is False
        return self._call("queue", name)

    def queue_bind(self, queue: str, exchange: str, routing_key: str) -> None:
        self._call("binding", f"{exchange} -> {queue} [{routing_key}]")


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
    channel = Channel()
    topology.declare(channel, WANTED)
    assert channel.calls == [
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
        topology.declare(Channel(refusal, at), WANTED)
    assert named in str(error.value)
    assert "inequivalent arg 'x-queue-type'" in str(error.value)
    assert "delete it" in str(error.value)


def test_a_permission_that_is_missing_is_named() -> None:
    with pytest.raises(BrokerError, match="configure, write and read"):
        topology.declare(Channel(AccessRefused("access to queue refused"), "queue"), WANTED)


def test_backlog_and_consumers_are_asked_without_declaring() -> None:
    assert topology.backlog(Channel(), "openevent.exports") == 3
    assert topology.consumers(Channel(), "openevent.exports") == 1
    assert topology.exists(Channel(), "openevent.exports")
    assert not topology.exists(Channel(NotFound("no queue"), "queue"), "openevent.exports")
