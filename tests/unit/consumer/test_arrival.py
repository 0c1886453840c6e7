"""Whatever the broker brings becomes an arrival: nothing in a body or a header raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.consumer.arrival import UNREADABLE_PROPERTIES, properties_as_text, read
from outbox.message import cloud_event
from tests.consuming import message


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
