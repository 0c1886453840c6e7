"""Frames read in large pieces, and properties that no client can decode."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
from amqp.basic_message import Message as AmqpMessage
from amqp.exceptions import UnexpectedFrame
from amqp.method_framing import frame_handler
from amqp.serialization import dumps
from hypothesis import given
from hypothesis import strategies as st

from outbox import amqp_url
from outbox.consumer.delivery import UNREADABLE_PROPERTIES
from outbox.consumer.rabbit import FrameBuffer, _Buffered, tolerant_frames, transport
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

Frame = tuple[int, int, bytes]


def encoded(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 65535), st.binary(max_size=40)), max_size=8),
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
)
def test_frames_are_the_same_however_the_bytes_are_cut(frames: list[Frame], sizes: list[int]) -> None:
    wire, buffer, found = b"".join(encoded(*frame) for frame in frames), FrameBuffer(), []
    position = 0
    for size in [*sizes, len(wire) + 1]:
        buffer.feed(wire[position : position + size])
        position += size
        while buffer.ready:
            found.append(buffer.next())
        assert buffer.next() is None
    assert found == frames


def test_a_frame_with_a_wrong_end_is_an_error() -> None:
    buffer = FrameBuffer()
    buffer.feed(encoded(1, 0, b"abc")[:-1] + b"\x00")
    with pytest.raises(UnexpectedFrame, match="0x00"):
        buffer.next()


class Piecewise(_Buffered):
    """A stream whose socket answers as told."""

    def __init__(self, *answers: bytes | Exception) -> None:
        super().__init__()
        self.connected = True
        self._answers = list(answers)

    def _quick_recv(self, _count: int) -> bytes:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_frame_that_is_late_is_read_whole_at_the_next_try() -> None:
    wire = encoded(1, 3, b"payload")
    stream = Piecewise(wire[:5], TimeoutError(), wire[5:])
    with pytest.raises(TimeoutError):
        stream.read_frame()
    assert stream.connected
    assert stream.read_frame() == (1, 3, b"payload")


@pytest.mark.parametrize("end", [b"", ConnectionResetError()])
def test_a_connection_that_ends_in_the_middle_of_a_frame_is_lost(end: bytes | Exception) -> None:
    stream = Piecewise(encoded(1, 3, b"payload")[:5], end)
    with pytest.raises(OSError):
        stream.read_frame()
    assert not stream.connected


# --- properties --------------------------------------------------------------------------------------------------------

DELIVER = (60, 60)
_HEADERS = 0x2000


def table(*fields: bytes) -> bytes:
    inside = b"".join(fields)
    return struct.pack(">H", _HEADERS) + struct.pack(">I", len(inside)) + inside


def field(name: bytes, kind: bytes, value: bytes) -> bytes:
    return struct.pack(">B", len(name)) + name + kind + value


def received(properties: bytes, body: bytes) -> AmqpMessage:
    """What py-amqp makes of a delivery with these property bytes, through our frame handler."""
    messages: list[AmqpMessage] = []

    class Counting:
        bytes_recv = 0

    read = tolerant_frames(Counting(), lambda _channel, _method, _arguments, message: messages.append(message))
    arguments = dumps("sLbss", ["tag", 1, False, "openevent", "t"])
    read((1, 1, struct.pack(">HH", *DELIVER) + arguments))
    read((2, 1, struct.pack(">HHQ", 60, 0, len(body)) + properties))
    if body:
        read((3, 1, body))
    (message,) = messages
    return message


@pytest.mark.parametrize(
    "properties",
    [
        table(field(b"when", b"T", struct.pack(">Q", 2**63))),
        table(field(b"odd", b"Z", b"\x00")),
        table(field(b"cut", b"d", b"\x00\x00")),
        struct.pack(">H", 0x8000) + b"\x03\xff\xfe\xfd",  # a content type that is not UTF-8
        struct.pack(">H", 0x0040),  # a timestamp that is not there
    ],
    ids=["timestamp 2**63", "unknown type", "value cut off", "not UTF-8", "missing"],
)
@pytest.mark.parametrize("body", [b"the body", b""])
def test_properties_that_can_not_be_decoded_reach_us_as_bytes_with_the_body_untouched(properties: bytes, body: bytes) -> None:
    message = received(properties, body)
    assert (message.body or b"") == body
    assert message.headers == {UNREADABLE_PROPERTIES: properties}


def test_properties_that_can_be_decoded_are() -> None:
    message = received(table(field(b"x-delivery-count", b"l", struct.pack(">q", 4))), b"x")
    assert message.headers == {"x-delivery-count": 4}


def test_an_error_of_the_receiver_is_not_taken_for_one_of_the_properties() -> None:
    class Counting:
        bytes_recv = 0

    def fail(*_: Any) -> None:
        raise LookupError("of the receiver")

    read = tolerant_frames(Counting(), fail)
    read((1, 1, struct.pack(">HH", *DELIVER) + dumps("sLbss", ["tag", 1, False, "", ""])))
    with pytest.raises(LookupError, match="of the receiver"):
        read((2, 1, struct.pack(">HHQ", 60, 0, 0) + struct.pack(">H", 0)))


def test_py_amqp_alone_ends_the_connection_over_such_properties() -> None:
    """Why `tolerant_frames` exists; when this fails, it may go."""

    class Counting:
        bytes_recv = 0

    read = frame_handler(Counting(), lambda *_: None)
    read((1, 1, struct.pack(">HH", *DELIVER) + dumps("sLbss", ["tag", 1, False, "", ""])))
    with pytest.raises(Exception, match=r"year|range"):
        read((2, 1, struct.pack(">HHQ", 60, 0, 0) + table(field(b"when", b"T", struct.pack(">Q", 2**63)))))


# --- the connection ----------------------------------------------------------------------------------------------------


def test_a_tls_connection_verifies_the_name_in_the_url() -> None:
    made = transport(amqp_url.parse("amqps://u:p@broker.example/v"), "exports")
    assert made.client.ssl["server_hostname"] == "broker.example"
    assert made.client.ssl["cert_reqs"].name == "CERT_REQUIRED"
    assert made.client.port == 5671


def test_a_plain_connection_has_user_host_and_virtual_host_of_the_url() -> None:
    client = transport(amqp_url.parse("amqp://us%40er:p%2Fw@[::1]:5673/ten%2Fant?heartbeat=7"), "exports").client
    assert (client.userid, client.password, client.virtual_host) == ("us@er", "p/w", "ten/ant")
    assert client.host == "[::1]:5673"
    assert client.heartbeat == 7
    assert not client.ssl


def test_certificates_that_can_not_be_read_are_named_before_anything_connects(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing\.pem"):
        transport(amqp_url.parse(f"amqps://u:p@h/v?cacertfile={tmp_path}/missing.pem"), "exports")
