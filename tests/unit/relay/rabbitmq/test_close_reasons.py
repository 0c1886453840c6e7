"""What ended a connection is said in the broker's words, with the next step."""

from __future__ import annotations

import pytest
from pika import exceptions
from pika.adapters.utils import connection_workflow as pikas

from outbox import amqp_url
from outbox.relay.broker import Cause
from outbox.relay.rabbitmq import close_reasons

URL = amqp_url.parse("amqp://user:secret@broker.test/events")


def test_a_code_that_refuses_a_login_means_something_else_on_a_connection_that_was_open() -> None:
    connecting = close_reasons.closed_by_broker(URL, 403, "ACCESS_REFUSED", was_open=False)
    assert connecting.refused
    assert connecting.detail.startswith("amqp://user:***@broker.test:5672/events refused the login: 403 ACCESS_REFUSED")
    later = close_reasons.closed_by_broker(URL, 403, "ACCESS_REFUSED", was_open=True)
    assert not later.refused
    assert later.detail == "amqp://user:***@broker.test:5672/events closed the connection: 403 ACCESS_REFUSED"


@pytest.mark.parametrize(
    "words",
    [
        "NOT_ALLOWED - access to vhost 'events' refused for user 'user': connection limit (5) is reached",
        "NOT_ALLOWED - connection refused for user 'user': user connection limit (5) is reached",
    ],
)
def test_a_broker_without_a_connection_left_does_not_refuse_us_for_good(words: str) -> None:
    ending = close_reasons.closed_by_broker(URL, 530, words, was_open=False)
    assert not ending.refused
    assert f"takes no more connections: 530 {words}; close some, or allow more: rabbitmqctl set_vhost_limits" in ending.detail
    assert close_reasons.closed_by_broker(URL, 530, "NOT_ALLOWED - vhost events not found", was_open=False).refused


def test_a_broker_that_shuts_down_does_not_refuse_us() -> None:
    ending = close_reasons.closed_by_broker(URL, 320, "CONNECTION_FORCED - broker forced connection closure", was_open=True)
    assert not ending.refused
    assert "320 CONNECTION_FORCED" in ending.detail


@pytest.mark.parametrize(
    ("code", "refused", "cause"), [(404, True, Cause.CLOSED), (403, True, Cause.CLOSED), (406, False, Cause.MESSAGE)]
)
def test_a_closed_channel_is_the_destinations_fault_or_the_messages(code: int, refused: bool, cause: Cause) -> None:
    ending = close_reasons.channel_closed(URL, code, "WORDS - of the broker")
    assert (ending.refused, ending.cause) == (refused, cause)
    assert ending.detail.startswith(f"{code} WORDS - of the broker")


def test_what_pika_wraps_is_unwrapped() -> None:
    refused = ConnectionRefusedError(111, "Connection refused")
    error = exceptions.AMQPConnectionError(
        pikas.AMQPConnectionWorkflowFailed([OSError("another address"), pikas.AMQPConnectorSocketConnectError(refused)])
    )
    ending = close_reasons.failed(URL, error, was_open=False)
    assert ending.detail == "no connection to amqp://user:***@broker.test:5672/events: [Errno 111] Connection refused"


def test_an_error_without_a_text_is_named() -> None:
    assert close_reasons.failed(URL, TimeoutError(), was_open=True).detail.endswith("was lost: TimeoutError()")
