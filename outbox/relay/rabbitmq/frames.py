"""The bytes of `basic.publish`: method, header and body frames, without an object per frame.

pika marshals every field of every frame through its own classes, which costs more than everything else the relay does with
a message. What is written here is the same, byte for byte: `tests/contract/test_frames.py` holds it to pika's codec.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from outbox.message import cloud_event

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outbox.message import Message

#: What the body is: a CloudEvents event in structured mode. JSON is UTF-8 anyway; the charset is what the AMQP binding of
#: CloudEvents writes, and what makes generic tools show text.
CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"

_METHOD, _HEADER, _BODY, _END = 1, 2, 3, b"\xce"
#: Type, channel and size before a frame's payload; the end mark after it.
FRAME_OVERHEAD = 8
_BASIC, _PUBLISH = 60, 40
_MANDATORY = b"\x01"
_PERSISTENT = b"\x02"

_CONTENT_TYPE_FLAG = 1 << 15
_HEADERS_FLAG = 1 << 13
_DELIVERY_MODE_FLAG = 1 << 12
_CORRELATION_ID_FLAG = 1 << 10
_MESSAGE_ID_FLAG = 1 << 7
_TIMESTAMP_FLAG = 1 << 6
_TYPE_FLAG = 1 << 5
_APP_ID_FLAG = 1 << 3
_ALWAYS = _CONTENT_TYPE_FLAG | _DELIVERY_MODE_FLAG | _MESSAGE_ID_FLAG | _TIMESTAMP_FLAG | _TYPE_FLAG | _APP_ID_FLAG

#: Topics whose method frame is remembered; a publisher has a handful.
_REMEMBERED_TOPICS = 1024

_frame_head = struct.Struct(">BHI").pack
_header_head = struct.Struct(">HHQH").pack
_long = struct.Struct(">I").pack
_long_long = struct.Struct(">Q").pack


class FrameTooLarge(ValueError):
    """A frame can't be sent on this connection; the text quotes nothing of the message."""


class PublishEncoder:
    """Encodes messages for one channel of one connection: mandatory, persistent, all to one exchange."""

    def __init__(self, *, channel: int, exchange: str, app_id: str, frame_max: int) -> None:
        """*frame_max* is what the connection was tuned to, in bytes; 0: no limit."""
        self._channel = channel
        self._exchange = _short(exchange)
        self._app_id = _short(app_id)
        self._content_type = _short(CONTENT_TYPE)
        self._payload_max = frame_max - FRAME_OVERHEAD if frame_max else 0
        self._topics: dict[str, tuple[bytes, bytes]] = {}

    def encode(self, message: Message, message_id: str) -> bytes:
        """Return all frames of *message*, whose id is *message_id* as text.

        Raises FrameTooLarge for headers that no frame of this connection holds, and whatever a value that AMQP can't carry
        makes struct and str raise; no part of the message is out then.
        """
        method, topic = self._topics.get(message.topic) or self._remember(message.topic)
        body = cloud_event(message)
        flags = _ALWAYS
        headers = correlation_id = b""
        if message.key is not None or message.headers:
            flags |= _HEADERS_FLAG
            headers = _table(message.key, message.headers)
            if (correlation := message.headers.get("correlationid")) is not None:
                flags |= _CORRELATION_ID_FLAG
                correlation_id = _short(correlation)
        header = b"".join(
            (
                _header_head(_BASIC, 0, len(body), flags),
                self._content_type,
                headers,
                _PERSISTENT,
                correlation_id,
                _short(message_id),
                _long_long(int(message.created_at.timestamp())),
                topic,
                self._app_id,
            )
        )
        if self._payload_max and len(header) > self._payload_max:  # a header frame can't be split; the broker would hang up
            raise FrameTooLarge(f"its headers take {len(header)} bytes, the broker's frame_max allows {self._payload_max}")
        pieces = [method, _frame_head(_HEADER, self._channel, len(header)), header, _END]
        if self._payload_max == 0 or len(body) <= self._payload_max:
            pieces += (_frame_head(_BODY, self._channel, len(body)), body, _END)
        else:
            for start in range(0, len(body), self._payload_max):
                part = body[start : start + self._payload_max]
                pieces += (_frame_head(_BODY, self._channel, len(part)), part, _END)
        return b"".join(pieces)

    def _remember(self, topic: str) -> tuple[bytes, bytes]:
        if len(self._topics) >= _REMEMBERED_TOPICS:
            self._topics.clear()
        name = _short(topic)
        payload = b"".join((struct.pack(">HHH", _BASIC, _PUBLISH, 0), self._exchange, name, _MANDATORY))
        made = (_frame_head(_METHOD, self._channel, len(payload)) + payload + _END, name)
        self._topics[topic] = made
        return made


def _short(text: str) -> bytes:
    """A short string; ValueError above 255 bytes."""
    encoded = text.encode()
    return bytes((len(encoded),)) + encoded


def _table(key: str | None, headers: Mapping[str, str]) -> bytes:
    """A field table of long strings: `partitionkey`, then the message's own headers."""
    fields = [] if key is None else [_field("partitionkey", key)]
    fields += [_field(name, value) for name, value in headers.items()]
    encoded = b"".join(fields)
    return _long(len(encoded)) + encoded


def _field(name: str, value: str) -> bytes:
    encoded = value.encode()
    return b"".join((_short(name), b"S", _long(len(encoded)), encoded))
