"""One connection to the broker, through kombu: receives raw bytes, acknowledges, and ends without a word.

RabbitMQ and the embedded broker look the same from here. Messages are taken below kombu's `Message` on RabbitMQ: its
constructor expands what a `compression` header asks for. A link is used by one thread; only `wake` may be called from
others. After any error it is of no more use: `drop` it and make another.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from outbox import amqp_url, embedded
from outbox.consumer import delivery as arrivals
from outbox.consumer import rabbit, spool
from outbox.consumer import topology as topologies
from outbox.consumer.acks import Acks, Receipt
from outbox.consumer.amqp_errors import AccessRefused, ConsumerCancelled, NotAllowed
from outbox.errors import BrokerError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox.consumer.delivery import Arrival
    from outbox.consumer.topology import Queue, Topology

#: Frames read before acknowledgements and heartbeats get their turn.
_FRAMES_AT_ONCE = 1_000
#: What RabbitMQ means when it ends a consumer; it says no more than which.
_CANCELLED = "it was deleted, or a message stayed unacknowledged beyond the broker's consumer_timeout"
#: The embedded broker has nothing to wait on but the clock.
_LONGEST_POLL_SECONDS = 0.05


def shown(url: str) -> str:
    """Return *url* without its password."""
    return url if urlsplit(url).scheme == "embedded" else str(amqp_url.parse(url))


def _transport(url: str, name: str) -> Any:
    """Return kombu's transport to *url*, not yet connected. Raises ConfigurationError."""
    if urlsplit(url).scheme == "embedded":
        return embedded.connection(url).transport
    return rabbit.transport(amqp_url.parse(url), name)


class Link:
    """A connection that consumes a service's two queues, a channel each."""

    def __init__(self, url: str, *, name: str = "outbox") -> None:
        """Connect; the broker lists it as *name*.

        Raises ConfigurationError and BrokerError for what waiting won't mend, Unavailable where the broker has no room,
        otherwise whatever kombu raises.
        """
        self._transport = _transport(url, name)
        self._polled = self._transport.driver_type != "amqp"
        self._channels: list[tuple[Any, Acks]] = []
        self._spool = spool.Spool()
        self._received = False
        try:
            self._raw = self._transport.establish_connection()
        except (AccessRefused, NotAllowed) as error:
            said = getattr(error, "reply_text", None) or error
            if "connection limit" in str(
                said
            ):  # the same code as for an unknown virtual host, but closing one elsewhere mends it
                raise Unavailable(f"{shown(url)} takes no more connections: {said}") from error
            raise BrokerError(f"{shown(url)}: the broker refuses us: {said}; check user, password and virtual host") from error
        except ssl.SSLCertVerificationError as error:
            words = f"its certificate is not accepted: {error.verify_message}; check host name and cacertfile of BROKER_URL"
            raise BrokerError(f"{shown(url)}: {words}") from error
        # Kept: asked for its transport after it was lost, py-amqp would silently connect again, without consumers.
        self._stream: Any = None if self._polled else self._raw.transport
        self._wake_lock = threading.Lock()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        if self._stream is not None:
            self._selector.register(self._stream.sock, selectors.EVENT_READ)

    def new_channel(self) -> Any:
        """Open a channel, for declarations."""
        channel = self._transport.create_channel(self._raw)
        # By default py-amqp makes a text of a body whose `content_encoding` is one, as kombu and Celery set it: another text
        # than was sent where the bytes are not that encoding's, and nothing that the database takes for a body.
        channel.auto_decode = False
        return channel

    def consume(self, topology: Topology, prefetch: int, on_arrival: Callable[[Arrival], None]) -> None:
        """Declare *topology* and begin to receive; *on_arrival* is called from `receive`. Raises as `topology.declare`."""
        topologies.declare(self.new_channel, topology)
        with topologies.advised(topology):
            self._consume(topology.main, prefetch, on_arrival, dead=False)
            self._consume(topology.dead, prefetch, on_arrival, dead=True)

    def bind(self, topology: Topology) -> None:
        """Make the bindings again; what is there stays as it is. Raises NotFound when a queue or the exchange is gone."""
        topologies.bind_again(self.new_channel, topology)

    def _consume(self, queue: Queue, prefetch: int, on_arrival: Callable[[Arrival], None], *, dead: bool) -> None:
        channel = self.new_channel()
        acks = Acks()
        self._channels.append((channel, acks))

        def received(message: Any) -> None:
            info = message.delivery_info
            headers = message.headers or {}
            arrival = arrivals.slim(
                arrivals.read(
                    message.body or b"",  # py-amqp's empty body is a text
                    routing_key=info["routing_key"],
                    properties={**message.properties, "headers": headers} if headers else message.properties,
                    headers=headers,
                    redelivered=bool(info["redelivered"]),
                    dead_lettered=dead,
                    receipt=Receipt(acks, info["delivery_tag"]),
                )
            )
            if self._has_enough(arrival):
                arrival = arrivals.spooled(arrival, self._spool)
            acks.delivered(info["delivery_tag"], arrival)
            self._received = self._received or not dead
            on_arrival(arrival)

        channel.basic_qos(0, prefetch, False)  # per consumer: RabbitMQ 4.3 refuses a global one
        topologies.consume(channel, queue, received)

    def _has_enough(self, arrival: Arrival) -> bool:
        return sum(acks.bytes for _, acks in self._channels) + arrival.size > spool.MEMORY_BYTES

    # --- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, timeout: float) -> None:
        """Hand over what arrives; return after *timeout* seconds, earlier when something came or `wake` was called."""
        try:
            if self._polled:
                self._drain_polled(timeout)
            elif self._readable(timeout):
                self._drain_socket()
        except ConsumerCancelled as error:
            if self._polled:  # it says why
                raise
            raise ConsumerCancelled(f"queue {error.reply_text!r}: {_CANCELLED}") from error  # its consumer tag is its name
        self._transport.heartbeat_check(self._raw, rate=2)

    def _drain_polled(self, timeout: float) -> None:
        wait = 0.0 if self._swallow_wakes() else min(timeout, _LONGEST_POLL_SECONDS)
        with contextlib.suppress(TimeoutError):
            for _ in range(_FRAMES_AT_ONCE):
                self._transport.drain_events(self._raw, timeout=wait)
                wait = 0.0

    def _drain_socket(self) -> None:
        for _ in range(_FRAMES_AT_ONCE):
            self._raw.on_inbound_frame(self._stream.read_frame())
            if not self._stream.frames.ready:
                return

    def _readable(self, timeout: float) -> bool:
        sock = self._stream.sock
        if self._stream.frames.ready or (isinstance(sock, ssl.SSLSocket) and sock.pending()):
            return True
        ready = [key.fileobj for key, _ in self._selector.select(timeout)]
        if self._woken in ready:
            self._swallow_wakes()
        return sock in ready

    def _swallow_wakes(self) -> bool:
        """Say whether `wake` was called."""
        woken = False
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                woken = True
        return woken

    def wake(self) -> None:
        """Make a waiting `receive` return; from any thread, also after `drop`."""
        with self._wake_lock, contextlib.suppress(OSError):  # full: it is awake anyway; closed: nobody waits
            self._waker.send(b"!")

    # --- acknowledging ------------------------------------------------------------------------------------------------

    def acknowledge(self, *, all_of_them: bool = False) -> int:
        """Acknowledge what is settled, as `Acks.ready` tells; return how many deliveries that were."""
        count = 0
        for channel, acks in self._channels:
            together, singly = acks.ready(all_of_them=all_of_them)
            if together:
                channel.basic_ack(together[-1], multiple=True)
            if singly:
                self._acknowledge_singly(channel, singly)
            count += len(together) + len(singly)
        if count:
            self._spool.tidy()
        return count

    def _acknowledge_singly(self, channel: Any, tags: list[Any]) -> None:
        if self._polled:
            channel.ack_each(tags)  # in one transaction of the file
            return
        for tag in tags:
            channel.basic_ack(tag)

    def in_hand(self) -> list[Arrival]:
        """Return what was delivered and is not settled."""
        return [arrival for _, acks in self._channels for arrival in acks.unsettled()]

    def has_emptied(self, topology: Topology) -> bool:
        """Say whether the queues are empty, and we are who emptied them: one that waits for its turn can't tell."""
        return self._received and not self.in_hand() and self.backlog(topology) == 0 and not self.in_hand()

    def backlog(self, topology: Topology) -> int:
        """Return how many messages of the service's queues were not delivered to anybody."""
        channel, _ = self._channels[0]
        return sum(topologies.backlog(channel, queue.name) for queue in (topology.main, topology.dead))

    # --- ending -------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Acknowledge all that is settled; return when the broker has seen it: an answer to what is asked after it says so."""
        self.acknowledge(all_of_them=True)
        for channel, _ in self._channels:
            channel.basic_qos(0, 1, False)

    def drop(self) -> None:
        """End the connection without cancel or close; never raises.

        A quorum queue that is told by `basic.cancel`, which is part of many a polite close, lets the next consumer start
        with the messages after those we hold. One that sees the connection go returns ours first.
        """
        self._selector.close()
        with contextlib.suppress(Exception):
            if self._polled:
                self._raw.close()
            else:
                self._stream.sock.settimeout(1.0)  # TLS says good-bye and waits for an answer
                self._raw.collect()
        with self._wake_lock:
            self._waker.close()
        self._woken.close()
