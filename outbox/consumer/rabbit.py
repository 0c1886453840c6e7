"""RabbitMQ through kombu and py-amqp, read in large pieces, and not ended by properties that can't be decoded.

py-amqp asks the socket nine times for each message and sets its timeout six times; beside threads that work, each of these
calls may cost a whole turn of the interpreter's lock (seen: 4,200 messages a second, 2.5 times that in large pieces).
"""

from __future__ import annotations

import errno
import socket
import ssl
import struct
from typing import TYPE_CHECKING, Any

import amqp.method_framing
import amqp.serialization
from amqp.exceptions import UnexpectedFrame
from amqp.transport import SSLTransport, TCPTransport
from kombu.connection import Connection as KombuConnection
from kombu.transport import pyamqp

from outbox.consumer.delivery import UNREADABLE_PROPERTIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox.amqp_url import AmqpUrl

_CONNECT_SECONDS = 10.0
#: Longest silence in the middle of an answer or a write.
SOCKET_SECONDS = 15.0
_HEARTBEAT_SECONDS = 30
_PIECE_BYTES = 64 * 1024
_CONTENT_HEADER = 2
_FRAME_END = 0xCE

Frame = tuple[int, int, bytes]


def transport(url: AmqpUrl, name: str) -> Any:
    """Return kombu's transport to *url*, not yet connected; RabbitMQ will list it as *name*.

    Raises ConfigurationError for certificates that can't be read.
    """
    tls: dict[str, Any] | bool = False
    if url.tls:
        url.tls_context()  # says which file can't be read
        tls = {
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": url.server_name,  # without it py-amqp takes any host's certificate
            "ca_certs": url.cacertfile,
            "certfile": url.certfile,
            "keyfile": url.keyfile,
        }
    # kombu's Connection is only what holds the parameters: asked for anything, it would silently connect again, without
    # consumers.
    parameters = KombuConnection(  # type: ignore[no-untyped-call]
        transport=Transport,
        hostname=f"[{url.host}]" if ":" in url.host else url.host,
        port=url.port,
        userid=url.user,
        password=url.password,
        virtual_host=url.vhost,
        ssl=tls,
        connect_timeout=_CONNECT_SECONDS,
        heartbeat=_HEARTBEAT_SECONDS if url.heartbeat is None else url.heartbeat,
        transport_options={
            "client_properties": {"connection_name": name},
            "frame_handler": tolerant_frames,
            "read_timeout": SOCKET_SECONDS,
            "write_timeout": SOCKET_SECONDS,
            "socket_settings": _socket_settings(),
        },
    )
    return parameters.transport


def _socket_settings() -> dict[int, int]:
    """Return how long the kernel waits for the broker's machine; py-amqp gives up after one second of packet loss."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
    return {} if option is None else {option: int(SOCKET_SECONDS * 1000)}


# --- reading in large pieces -------------------------------------------------------------------------------------------


class FrameBuffer:
    """Bytes from the socket, and the frames in them."""

    def __init__(self) -> None:
        self._bytes = b""
        self._at = 0

    def feed(self, piece: bytes) -> None:
        """Add what was read."""
        self._bytes = self._bytes[self._at :] + piece
        self._at = 0

    def next(self) -> Frame | None:
        """Return the next frame; None when it is not all there."""
        end = self._end()
        if end is None:
            return None
        kind, channel, _ = struct.unpack_from(">BHI", self._bytes, self._at)
        if self._bytes[end - 1] != _FRAME_END:
            raise UnexpectedFrame(f"a frame ends with {self._bytes[end - 1]:#04x} instead of 0xce")
        payload = self._bytes[self._at + 7 : end - 1]
        self._at = end
        return kind, channel, payload

    @property
    def ready(self) -> bool:
        """Whether `next` has a frame."""
        return self._end() is not None

    def _end(self) -> int | None:
        if len(self._bytes) - self._at < 8:
            return None
        (size,) = struct.unpack_from(">I", self._bytes, self._at + 3)
        end = self._at + int(size) + 8
        return end if end <= len(self._bytes) else None


class _Buffered:
    """Instead of py-amqp's `read_frame`, which reads head, payload and end of a frame one by one."""

    _quick_recv: Callable[[int], bytes]
    connected: bool

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.frames = FrameBuffer()

    def read_frame(self) -> Frame:
        """Return the next frame. Raises TimeoutError when it does not come in time; nothing is lost then."""
        while True:
            frame = self.frames.next()
            if frame is not None:
                return frame
            try:
                piece = self._quick_recv(_PIECE_BYTES)
            except OSError as error:
                if isinstance(error, TimeoutError) or error.errno in (errno.EAGAIN, errno.EINTR):
                    raise TimeoutError("the broker says nothing") from error
                self.connected = False
                raise
            if not piece:
                self.connected = False
                raise ConnectionResetError("the broker closed the connection")
            self.frames.feed(piece)


class BufferedTCP(_Buffered, TCPTransport):  # type: ignore[misc]
    """Plain TCP."""


class BufferedTLS(_Buffered, SSLTransport):  # type: ignore[misc]
    """TLS."""


class Connection(pyamqp.Connection):
    """py-amqp's connection on a buffered transport."""

    def Transport(  # noqa: N802
        self,
        host: str,
        connect_timeout: float,
        ssl: Any = False,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
        **options: Any,
    ) -> _Buffered:
        """Make the transport; called by py-amqp, in this order."""
        timeouts = {"connect_timeout": connect_timeout, "read_timeout": read_timeout, "write_timeout": write_timeout}
        return (BufferedTLS if ssl else BufferedTCP)(host, ssl=ssl, **timeouts, **options)


class Transport(pyamqp.Transport):
    """What `kombu.Connection(transport=…)` takes."""

    Connection = Connection


# --- properties that can't be decoded ----------------------------------------------------------------------------------


def tolerant_frames(connection: Any, callback: Callable[..., None]) -> Callable[[Frame], bool]:
    """py-amqp's assembling of frames, but properties it can't decode reach us as bytes instead of ending the connection.

    A timestamp of 2**63 or an unknown field type would otherwise come back for ever: the message can't be acknowledged.
    """
    read = amqp.method_framing.frame_handler(connection, callback)

    def on_frame(frame: Frame) -> bool:
        kind, channel, payload = frame
        try:
            return bool(read(frame))
        except Exception:
            if kind != _CONTENT_HEADER or _decodes(payload):
                raise
        return bool(read((kind, channel, _with_readable_properties(payload))))

    return on_frame


def _decodes(payload: bytes) -> bool:
    try:
        amqp.serialization.decode_properties_basic(payload, 12)
    except Exception:  # noqa: BLE001 - struct.error, UnicodeDecodeError, OverflowError, FrameSyntaxError, …
        return False
    return True


def _with_readable_properties(payload: bytes) -> bytes:
    """Return the content header with all its properties replaced by one header that holds their bytes."""
    name = UNREADABLE_PROPERTIES.encode()
    raw = payload[12:]
    table = struct.pack(">B", len(name)) + name + b"x" + struct.pack(">I", len(raw)) + raw
    has_headers = 0x2000
    return payload[:12] + struct.pack(">H", has_headers) + struct.pack(">I", len(table)) + table
