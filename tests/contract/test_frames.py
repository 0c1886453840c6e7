"""Our publish frames are, byte for byte, the ones pika's codec makes, and pika's codec reads them back."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any

import pika
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pika import frame, spec

from outbox.message import JSON, Message, cloud_event
from outbox.relay.rabbitmq.frames import CONTENT_TYPE, FRAME_OVERHEAD, PublishEncoder
from tests.kit.builders import message

_names = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="*#"), min_size=1, max_size=60)
_messages = st.builds(
    Message,
    id=st.uuids(),
    source=st.just("/tests"),
    topic=_names,
    key=st.none() | _names,
    sequence=st.none() | st.integers(1, 2**63 - 1),
    body=st.binary(max_size=9000).map(lambda raw: b'"' + raw.hex().encode() + b'"'),
    content_type=st.sampled_from([JSON, "text/plain"]),
    headers=st.dictionaries(
        st.from_regex(r"x[a-z0-9]{1,10}", fullmatch=True) | st.sampled_from(["traceparent", "correlationid"]),
        _names,
        max_size=4,
    ),
    created_at=st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)


def pikas_own(sent: Message, *, channel: int, exchange: str, app_id: str, frame_max: int) -> bytes:
    """The same message through pika's classes."""
    headers = ({} if sent.key is None else {"partitionkey": sent.key}) | dict(sent.headers)
    body = cloud_event(sent)
    properties = pika.BasicProperties(
        content_type=CONTENT_TYPE,
        headers=headers or None,
        delivery_mode=2,
        correlation_id=sent.headers.get("correlationid"),
        message_id=str(sent.id),
        timestamp=int(sent.created_at.timestamp()),
        type=sent.topic,
        app_id=app_id,
    )
    method = spec.Basic.Publish(exchange=exchange, routing_key=sent.topic, mandatory=True)
    part = frame_max - FRAME_OVERHEAD if frame_max else len(body)
    frames = [frame.Method(channel, method), frame.Header(channel, len(body), properties)]
    frames += [frame.Body(channel, body[start : start + part]) for start in range(0, len(body), part)]
    return b"".join(made.marshal() for made in frames)


def decoded(wire: bytes) -> list[Any]:
    frames = []
    while wire:
        used, value = frame.decode_frame(wire)
        assert value is not None
        frames.append(value)
        wire = wire[used:]
    return frames


@settings(max_examples=150, deadline=None)
@given(
    sent=_messages,
    channel=st.integers(1, 65535),
    exchange=_names,
    app_id=st.text(max_size=30),
    frame_max=st.sampled_from([0, 4096, 8192, 131072]),
)
@example(sent=message(body=b""), channel=1, exchange="outbox", app_id="", frame_max=4096)
@example(
    sent=message(topic="ü" * 127, key="k" * 255, headers={"traceparent": "t" * 255}),
    channel=1,
    exchange="x" * 255,
    app_id="a" * 255,
    frame_max=4096,
)
def test_frames_are_byte_for_byte_pikas(sent: Message, channel: int, exchange: str, app_id: str, frame_max: int) -> None:
    where: dict[str, Any] = {"channel": channel, "exchange": exchange, "app_id": app_id, "frame_max": frame_max}
    encoder = PublishEncoder(**where)
    assert encoder.encode(sent, str(sent.id)) == pikas_own(sent, **where)
    assert encoder.encode(sent, str(sent.id)) == pikas_own(sent, **where)  # the topic is remembered now


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_body_longer_than_a_frame_comes_in_parts_none_of_which_exceeds_it(spare: int) -> None:
    envelope = len(cloud_event(message(body=b'""')))
    sent = message(body=b'"' + b"a" * (4096 - FRAME_OVERHEAD - envelope + spare) + b'"')
    wire = PublishEncoder(channel=1, exchange="outbox", app_id="tests", frame_max=4096).encode(sent, str(sent.id))
    method, header, *parts = decoded(wire)
    assert isinstance(method.method, spec.Basic.Publish)
    assert len(parts) == (2 if spare > 0 else 1)
    assert all(len(part.marshal()) <= 4096 for part in parts)
    assert b"".join(part.fragment for part in parts) == cloud_event(sent)
    assert header.body_size == len(cloud_event(sent))


def test_a_message_is_mandatory_persistent_and_says_what_it_is() -> None:
    headers = {"traceparent": "00-1-2-01", "correlationid": "c-1", "tenant": "de"}
    sent = message(key="event:1", headers=headers, created_at=datetime(2017, 7, 1, 12, 0, 0, 250_000, UTC))
    wire = PublishEncoder(channel=7, exchange="openevent", app_id="tests", frame_max=0).encode(sent, str(sent.id))
    method, header, body = decoded(wire)
    assert (method.channel_number, method.method.exchange, method.method.routing_key) == (7, "openevent", "session.modified")
    assert (method.method.mandatory, method.method.immediate) == (True, False)
    properties = {name: value for name, value in vars(header.properties).items() if value is not None}
    assert properties == {
        "content_type": "application/cloudevents+json; charset=utf-8",
        "headers": {"partitionkey": "event:1", **headers},
        "delivery_mode": 2,
        "correlation_id": "c-1",
        "message_id": str(sent.id),
        "timestamp": 1498910400,
        "type": "session.modified",
        "app_id": "tests",
    }
    assert body.fragment == cloud_event(sent)


def test_more_topics_than_are_remembered_are_encoded_as_well() -> None:
    encoder = PublishEncoder(channel=1, exchange="outbox", app_id="tests", frame_max=0)
    for number in range(1500):
        sent = message(topic=f"topic.{number}")
        assert decoded(encoder.encode(sent, str(sent.id)))[0].method.routing_key == f"topic.{number}"


def test_what_amqp_cannot_carry_raises_before_a_byte_is_made() -> None:
    encoder = PublishEncoder(channel=1, exchange="outbox", app_id="tests", frame_max=0)
    too_old = message(created_at=datetime(1969, 12, 31, tzinfo=UTC))
    with pytest.raises((struct.error, OverflowError)):
        encoder.encode(too_old, str(too_old.id))
    with pytest.raises(ValueError, match="range"):
        PublishEncoder(channel=1, exchange="x" * 256, app_id="tests", frame_max=0)
