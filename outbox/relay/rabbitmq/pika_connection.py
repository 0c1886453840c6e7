"""pika's connection, with what its public interface lacks."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import pika

if TYPE_CHECKING:
    from outbox.amqp_url import AmqpUrl

#: The one channel of a connection.
CHANNEL = 1
#: Unless the URL says otherwise. pika looks every so many seconds plus five: a half-open connection on which nothing waits
#: for an answer is noticed within 30 s.
_HEARTBEAT_SECONDS = 10
#: For each step of connecting: TCP, then TLS and the handshake.
_CONNECT_SECONDS = 10.0


def parameters(url: AmqpUrl, app_id: str) -> pika.ConnectionParameters:
    """Return how to connect to *url*. Raises ConfigurationError for certificates that can't be read."""
    context = url.tls_context()
    return pika.ConnectionParameters(
        host=url.host,
        port=url.port,
        virtual_host=url.vhost,
        credentials=pika.PlainCredentials(url.user, url.password),
        heartbeat=_HEARTBEAT_SECONDS if url.heartbeat is None else url.heartbeat,
        # No blocked_connection_timeout: silence while messages wait ends a blocked connection as well, and without any it
        # is good to know that the broker is blocked.
        ssl_options=pika.SSLOptions(context, url.server_name) if context is not None else None,
        socket_timeout=_CONNECT_SECONDS,
        stack_timeout=_CONNECT_SECONDS * 2,
        client_properties={"connection_name": f"{app_id} relay on {socket.gethostname()}, pid {os.getpid()}"},
    )


class Connection(pika.SelectConnection):  # type: ignore[misc]
    """One connection. A frame that belongs to nothing ends it, and nothing counts that comes after its end was decided."""

    #: Code and words of the `connection.close` the broker sent; pika wraps them away while it is connecting.
    last_words: tuple[int, str] | None = None
    _doomed = False

    def write(self, frames: bytes) -> None:
        """Send *frames* as they are."""
        self._output_marshaled_frames([frames])

    def drop(self, reason: str = "dropped") -> None:
        """End the TCP connection without the closing handshake."""
        if not self.is_closed:
            self._terminate_stream(pika.exceptions.StreamLostError(reason))

    def forget_unsent(self) -> None:
        """Let the end of the connection be a reset: what the kernel has not sent until then is never sent."""
        if self._transport is not None:
            self._transport._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _terminate_stream(self, error: Exception | None) -> None:
        self._doomed = True
        super()._terminate_stream(error)

    def _process_frame(self, frame_value: Any) -> None:
        # pika ends a connection only after the frames it has read already; none of them counts any more.
        if not self._doomed:
            super()._process_frame(frame_value)

    def _on_connection_close_from_broker(self, method_frame: Any) -> None:
        self.last_words = (method_frame.method.reply_code, method_frame.method.reply_text)
        super()._on_connection_close_from_broker(method_frame)

    def _deliver_frame_to_channel(self, value: Any) -> None:
        """Pass on what belongs to a returned message; pika would log the rest and go on."""
        method = getattr(value, "method", None)
        if value.channel_number != CHANNEL or not (method is None or isinstance(method, pika.spec.Basic.Return)):
            self.drop(f"an unexpected frame came: {value.NAME if method is None else method.NAME}")
        else:
            super()._deliver_frame_to_channel(value)
