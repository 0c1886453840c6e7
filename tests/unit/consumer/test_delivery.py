"""Whatever the broker brings becomes an arrival: nothing in a body or a header raises."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.consumer.delivery import LARGE_BYTES, UNREADABLE_PROPERTIES, again, properties_as_text, read, slim
from outbox.message import cloud_event
from tests.kit.consuming import message


def test_a_message_is_read_from_its_body_alone() -> None:
    sent = message(3, key="event:1", sequence=9)
    arrival = read(
        cloud_event(sent),
        routing_key="another",
        properties={"content_encoding": "gzip", "content_type": "application/x-python-serialize"},
        headers={"compression": "application/x-gzip", "partitionkey": "another"},
    )
    assert arrival.message is not None
    assert arrival.identity == ("/tests", str(sent.id))
    assert arrival.key == ("/tests", "event:1")
    assert arrival.topic == sent.topic


def envelope(**changes: Any) -> bytes:
    event = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t", **changes}
    return json.dumps({name: value for name, value in event.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe\x00",
        b"not json",
        b"[" * 100_000,
        b'"text"',
        b"{}",
        envelope(specversion="0.3"),
        envelope(id=...),
        envelope(id=""),
        envelope(id=7),
        envelope(id="x" * 256),
        envelope(id="nul\0"),
        envelope(id="\ud800"),
        envelope(source="a\nb"),
        envelope(type="x" * 300),
        envelope(partitionkey="k" * 256),
        envelope(partitionkey=["list"]),
        envelope(data_base64="no base64!"),
    ],
)
def test_a_body_that_can_not_be_a_message_is_kept_with_the_reason(body: bytes) -> None:
    arrival = read(body, routing_key="session.modified")
    assert arrival.message is None
    assert arrival.problem
    arrival.problem.encode()
    assert arrival.body == body
    assert arrival.key is None
    assert arrival.topic == "session.modified"
    source, digest = arrival.identity
    assert source == ""
    assert digest.startswith("sha256:")
    assert len(digest) <= 255


def test_odd_but_valid_attributes_are_read() -> None:
    arrival = read(envelope(sequence="9" * 5000, time="yesterday", extension={"a": 1}))
    assert arrival.message is not None
    assert arrival.message.sequence is None


@given(st.binary(max_size=200))
def test_no_bytes_raise(body: bytes) -> None:
    assert read(body).body == body


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from(["id", "source", "type", "partitionkey", "sequence", "time", "datacontenttype", "data_base64", "ext"]),
)
def test_no_attribute_raises(value: Any, name: str) -> None:
    read(envelope(**{name: value}))


@pytest.mark.parametrize(
    ("headers", "returns"),
    [
        ({}, 0),
        ({"x-delivery-count": 2}, 2),
        ({"x-delivery-count": 1, "x-acquired-count": 4}, 4),  # RabbitMQ 4.3: only the second counts every return
        ({"x-acquired-count": 3}, 3),
        ({"x-delivery-count": "3"}, 0),
        ({"x-delivery-count": True}, 0),
        ({"x-delivery-count": -1}, 0),
    ],
)
def test_earlier_deliveries_are_what_the_broker_counted(headers: dict[str, Any], returns: int) -> None:
    arrival = read(b"{}", headers=headers, redelivered=True)
    assert arrival.returns == returns
    assert arrival.suspect == (returns >= 3)


def test_a_count_on_a_first_delivery_is_its_publishers_and_means_nothing() -> None:
    headers = {"x-delivery-count": 5, "x-acquired-count": 7}
    assert not read(b"{}", headers=headers, redelivered=False).suspect
    assert read(b"{}", headers=headers, redelivered=True).suspect


def test_a_redelivery_whose_count_can_not_be_read_is_a_suspect() -> None:
    headers = {UNREADABLE_PROPERTIES: b"\x00"}
    assert not read(b"{}", headers=headers, redelivered=False).suspect
    assert read(b"{}", headers=headers, redelivered=True).suspect


def test_properties_become_text_whatever_they_hold() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    assert json.loads(properties_as_text({"headers": {"a": b"\xff", "n": 1}}))["headers"]["n"] == 1
    assert "unreadable" in json.loads(properties_as_text(loop))
    assert len(properties_as_text({"huge": "x" * 1_000_000})) < 70_000
    assert "\0" not in properties_as_text({"nul": "\0"})
    assert "nested too deep: headers" in properties_as_text({"headers": nested(100_000)})


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


# --- what can't be read is told apart by all that its publisher said ---------------------------------------------------


def unreadable(body: bytes = b'{"order":"paid"}', routing_key: str = "order", **properties: Any) -> str:
    arrival = read(body, routing_key=routing_key, properties=properties, headers=properties.get("headers", {}))
    assert arrival.message is None
    return arrival.identity[1]


def test_unreadable_messages_with_equal_bytes_are_as_many_as_their_publisher_sent() -> None:
    said: list[dict[str, Any]] = [
        {},
        {"message_id": "1"},
        {"message_id": "2"},
        {"type": "1"},
        {"app_id": "1"},
        {"correlation_id": "1"},
        {"timestamp": datetime(2026, 5, 1, tzinfo=UTC)},
        {"headers": {"id": "1"}},
        {"headers": {"id": "2"}},
        {"headers": {"id": 2}},
        {"headers": {"x-request-id": "1"}},
        {"headers": {"id": b"\xff"}},
        {"headers": {"tables": {"within": [{"tables": 1}]}}},
        {"headers": {"tables": {"within": [{"tables": 2}]}}},
    ]
    identities = [unreadable(**each) for each in said]
    assert len({*identities, unreadable(routing_key="another"), unreadable(b"{}")}) == len(said) + 2
    assert identities == [unreadable(**each) for each in said]


def test_what_brokers_add_between_two_deliveries_does_not_make_another_message() -> None:
    death = {"queue": "q", "reason": "delivery_limit", "routing-keys": ["order"], "exchange": "openevent", "count": 1}
    added = {
        "x-delivery-count": 3,
        "x-acquired-count": 4,
        "x-death": [death],
        "x-first-death-reason": "delivery_limit",
        "x-last-death-queue": "q",
        "x-opt-deaths": 1,
    }
    own = {"id": "1"}
    first = read(b"?", routing_key="order", properties={"message_id": "1", "headers": own}, headers=own)
    back = read(
        b"?",
        routing_key="openevent.exports",
        properties={"message_id": "1", "headers": own | added},
        headers=own | added,
        redelivered=True,
        dead_lettered=True,
    )
    assert back.identity == first.identity
    assert back.topic == "order"


@pytest.mark.parametrize("deaths", [None, [], "order", [None], [{}], [{"routing-keys": []}], [{"routing-keys": [7]}]], ids=repr)
def test_a_dead_letter_without_a_readable_history_keeps_the_routing_key_it_came_with(deaths: Any) -> None:
    assert read(b"?", routing_key="q", headers={"x-death": deaths}, dead_lettered=True).topic == "q"


def test_a_digest_from_before_is_kept() -> None:
    assert read(b"?", routing_key="order", digest="sha256:0").identity == ("", "sha256:0")


@given(st.dictionaries(st.text(max_size=5), st.none() | st.floats() | st.binary(max_size=3) | st.text(max_size=3)))
def test_no_properties_raise(values: dict[str, Any]) -> None:
    read(b"?", routing_key="\ud800", properties={**values, "headers": values}, headers=values)


def test_tables_nested_without_end_do_not_raise() -> None:
    assert read(b"?", properties={"headers": {"a": nested(100_000)}}, headers={"a": nested(100_000)}).digest


# --- events in binary mode ---------------------------------------------------------------------------------------------


def binary(body: bytes, prefix: str = "cloudEvents:", content_type: Any = "application/json", **more: Any) -> Any:
    attributes = {"specversion": "1.0", "id": "7", "source": "/shop", "type": "order.paid", "partitionkey": "order:1", **more}
    headers = {f"{prefix}{name}": value for name, value in attributes.items()} | {"unrelated": 1}
    return read(body, routing_key="order", properties={"content_type": content_type, "headers": headers}, headers=headers)


@pytest.mark.parametrize("prefix", ["cloudEvents:", "cloudEvents_", "ce-", "ce_"])
def test_an_event_in_binary_mode_is_read_and_is_in_structured_mode_from_then_on(prefix: str) -> None:
    sent = datetime(2026, 5, 1, 12, tzinfo=UTC)
    arrival = binary(b'{"order": 1}', prefix, time=sent, tenant=3)
    assert arrival.identity == ("/shop", "7")
    assert arrival.key == ("/shop", "order:1")
    assert arrival.topic == "order.paid"
    assert (arrival.message.data, arrival.message.created_at) == ({"order": 1}, sent)
    assert arrival.message.headers == {"tenant": "3"}
    assert read(arrival.body).message == again(arrival).message == arrival.message


@pytest.mark.parametrize(
    ("body", "content_type", "data"),
    [
        (b"\x00\xff", "image/png", b"\x00\xff"),
        (b"\x00\xff", None, b"\x00\xff"),
        (b'{"order": 1}', None, {"order": 1}),
        (b'{"order": 1}', "application/vnd.shop+json; charset=utf-8", {"order": 1}),
        (b"", "application/json", None),
    ],
)
def test_the_data_of_an_event_in_binary_mode_is_what_its_content_type_says(body: bytes, content_type: Any, data: Any) -> None:
    assert binary(body, content_type=content_type).message.data == data


@pytest.mark.parametrize(
    ("body", "more"),
    [
        (b'1,"id":"another"', {}),  # it would become part of the envelope
        (b"{", {}),
        (b"\xff", {}),
        (b"{}", {"id": ""}),
        (b"{}", {"source": b"\xff"}),
        (b"{}", {"source": "\ud800"}),
        (b"{}", {"specversion": "0.3"}),
        (b"{}", {"tenant": {"a": 1}}),
    ],
)
def test_an_event_in_binary_mode_that_is_none_is_kept_as_it_came(body: bytes, more: dict[str, Any]) -> None:
    arrival = binary(body, **more)
    assert arrival.message is None
    assert arrival.body == body
    assert arrival.problem
    assert arrival.identity != binary(body, subject="another", **more).identity


def test_a_body_that_is_an_event_is_that_whatever_the_headers_say() -> None:
    sent = cloud_event(message(3))
    assert binary(sent).body == sent


# --- memory ------------------------------------------------------------------------------------------------------------


def test_large_data_is_not_kept_while_a_message_waits() -> None:
    body = cloud_event(message(1, key="a", sequence=1, body=b'{"text":"%s"}' % (b"x" * LARGE_BYTES)))
    whole = read(body)
    light = slim(whole)
    assert light.message is not None
    assert (light.message.data, light.key, light.identity) == (None, whole.key, whole.identity)
    assert again(light).message == whole.message
    assert not again(light).slim
    small = read(cloud_event(message(1)))
    assert slim(small) is small
    garbage = read(b"x" * 2 * LARGE_BYTES)
    assert slim(garbage) is garbage
