"""RabbitMQ as the relay's broker: pika's connection in a thread of its own, publishing pipelined, confirmed and mandatory.

A `RabbitBroker` makes one `_Link` after another. A link is one connection, one channel, one tracker and one I/O loop; they
live and end together, so an answer, a timer or a callback of an old connection has nobody left to reach. Whatever goes
wrong on a link ends it, and everything it had in flight is LOST: after a failed write, a silent broker or an answer nobody
asked for, no later answer could be trusted to belong to the message it seems to.

What a link writes:

* the first message of a connection alone, so that one that makes the broker close connections takes no others with it;
* then whatever it is given, up to `_MAX_BYTES_IN_FLIGHT`: pika buffers without limit what the socket does not take;
* nothing while the broker says `connection.blocked`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import threading
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import pika
from pika.adapters.select_connection import IOLoop

from outbox import amqp_url, failpoints
from outbox.backoff import Backoff
from outbox.relay import endings
from outbox.relay.broker import NOT_SENT, Answer, BrokerState, Outcome
from outbox.relay.confirms import Confirms, Flight, Unexpected
from outbox.relay.endings import Ending
from outbox.relay.frames import PublishEncoder
from outbox.relay.news import News

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from outbox.amqp_url import AmqpUrl
    from outbox.relay.broker import Outgoing

log = logging.getLogger(__name__)

#: Unanswered bytes above which a link writes no more; one larger message still goes, alone.
_MAX_BYTES_IN_FLIGHT = 8 * 1024 * 1024
#: Bytes encoded at once, before the loop gets a chance to send them and to read answers.
_BYTES_PER_WRITE = 128 * 1024
_CHANNEL = 1
#: For each step of connecting: TCP, TLS with the handshake, our channel.
_CONNECT_SECONDS = 10.0
#: How long a connection that we end may take for its last words.
_GOODBYE_SECONDS = 1.0
_RECONNECT = Backoff(0.2, 5.0)
_REFUSED = Backoff(1.0, 30.0)  # the broker logs every refused login


class RabbitBroker:
    """The relay's `Broker` on RabbitMQ. Raises ConfigurationError for a URL or certificates that can't be used."""

    def __init__(
        self,
        url: str,
        *,
        exchange: str,
        confirm_timeout_seconds: float = 10.0,
        app_id: str = "outbox",
        reconnect: Backoff = _RECONNECT,
        refused: Backoff = _REFUSED,
    ) -> None:
        """*refused* is the pace of new attempts when the broker does not let us in, *reconnect* of all others."""
        self.url = amqp_url.parse(url)
        self.exchange = exchange
        self.app_id = app_id
        self.confirm_timeout_seconds = confirm_timeout_seconds
        self.parameters = _parameters(self.url, app_id)
        self._reconnect, self._refused = reconnect, refused
        self._random = random.Random()  # noqa: S311
        #: Lists of answers; an empty one only wakes.
        self._answers: SimpleQueue[list[Answer]] = SimpleQueue()
        self._state = BrokerState(connected=False, detail=f"not connected to {self.url} yet")
        #: The present link; the lock keeps a batch from slipping into one that has just ended.
        self._link: _Link | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rabbitmq", daemon=True)
        self._news = News()

    # --- the Broker protocol, called from the relay's thread --------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def send(self, batch: Sequence[Outgoing]) -> None:
        with self._lock:
            state = self._state
            if self._link is not None and state.connected:
                self._link.hand_over(batch)
                return
        self._lost((outgoing.token for outgoing in batch), NOT_SENT + state.detail)

    def answers(self, timeout: float) -> list[Answer]:
        found: list[Answer] = []
        with contextlib.suppress(Empty):
            found += self._answers.get(timeout=max(timeout, 0.0))
            while True:
                found += self._answers.get_nowait()
        return found

    def wake(self) -> None:
        self._answers.put([])

    def state(self) -> BrokerState:
        return self._state

    def stop(self, timeout: float) -> None:
        self._stopping.set()
        with self._lock:
            if self._link is not None:
                self._link.request_close(min(timeout / 2, _GOODBYE_SECONDS))
        if self._thread.is_alive():
            self._thread.join(timeout)

    # --- the I/O thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        attempt = 0
        while True:
            with self._lock:
                if self._stopping.is_set():
                    break
                link = self._link = _Link(self)
            try:
                end = link.run()
            except Exception as mistake:
                log.exception("the connection to %s ended by a mistake of this program", self.url)
                end = Ending(f"a mistake of this program: {mistake!r}")
            self._ended(link, end)
            attempt = 1 if link.proven else attempt + 1
            if not end.expected:
                # Only a login is asked for slowly: an exchange may be declared any moment, by a service that starts.
                backoff = self._refused if end.refused and not link.was_open else self._reconnect
                self._stopping.wait(backoff.wait(attempt, self._random))

    def _ended(self, link: _Link, end: Ending) -> None:
        """Give every message that *link* still had its answer, and say what happened."""
        with self._lock:
            self._link = None
            self._state = BrokerState(connected=False, detail=end.detail, refused=end.refused)
        in_flight, unwritten = link.abandon()
        if end.message_refused and len(in_flight) == 1:
            self._answers.put([Answer(in_flight.pop(), Outcome.REFUSED, end.detail)])
        self._lost(in_flight, end.detail)
        self._lost(unwritten, NOT_SENT + end.detail)
        self._news.doubt(link.ready and bool(link.blocked or (not link.proven and (in_flight or unwritten))))
        if end.expected:
            self._news.trouble("stopped", end.detail, logging.INFO)
        elif end.refused:
            self._news.trouble("refused", f"{end.detail}; trying again until it is allowed", logging.ERROR)
        else:
            self._news.trouble("lost" if link.ready else "unreachable", f"{end.detail}; trying again until it is back")

    def _lost(self, tokens: Iterable[int], detail: str) -> None:
        self._answers.put([Answer(token, Outcome.LOST, detail) for token in tokens])

    # --- what a link reports, in the I/O thread ---------------------------------------------------------------------------

    def ready(self) -> None:
        """The link takes messages."""
        self._state = BrokerState(connected=True)
        self._news.connected(f"connected to {self.url}, exchange {self.exchange}")
        self.wake()

    def answered(self, answers: list[Answer]) -> None:
        """The broker answered messages, or our encoder refused them."""
        self._answers.put(answers)

    def proven(self) -> None:
        """The link got its first confirm."""
        self._news.confirmed(f"{self.url} takes messages again")

    def blocked(self, reason: str) -> None:
        """The broker reads nothing from us."""
        detail = f"{self.url} takes no messages: {reason}; free memory or disk on the broker"
        self._state = BrokerState(connected=True, blocked=True, detail=detail)
        self._news.trouble("blocked", detail)
        self.wake()

    def unblocked(self) -> None:
        """The broker reads again."""
        self._state = BrokerState(connected=True)
        self._news.well(f"{self.url} takes messages again")
        self.wake()


class _Link:
    """One connection from its first byte to its last. Everything but `hand_over` and `request_close` runs in the I/O thread."""

    def __init__(self, broker: RabbitBroker) -> None:
        self._broker = broker
        self._timeout_seconds = broker.confirm_timeout_seconds
        self._loop = IOLoop()
        self._connection: Any = None
        self._encoder: PublishEncoder
        self._confirms = Confirms()
        #: Handed over by the other thread; taken into `_queue` by this one.
        self._inbox: deque[Sequence[Outgoing]] = deque()
        #: Not written yet.
        self._queue: deque[Outgoing] = deque()
        self._end: Ending | None = None
        self._write_scheduled = False
        #: When the last confirm came, or the first of the messages now unanswered: what silence is counted from.
        self._heard_at = 0.0
        #: The broker let us in.
        self.was_open = False
        #: The channel stands and confirms are on.
        self.ready = False
        #: Why the broker reads nothing; empty: it reads.
        self.blocked = ""
        #: A confirm came: connection, exchange and permissions are as they should be.
        self.proven = False

    # --- from the relay's thread ------------------------------------------------------------------------------------------

    def hand_over(self, batch: Sequence[Outgoing]) -> None:
        """Write *batch* as soon as may be."""
        self._inbox.append(batch)
        self._loop.add_callback_threadsafe(self._take)

    def request_close(self, seconds: float) -> None:
        """Say goodbye to the broker if all is answered; end in any case within about *seconds*."""
        self._loop.add_callback_threadsafe(lambda: self._close(seconds))

    # --- from beginning to end --------------------------------------------------------------------------------------------

    def run(self) -> Ending:
        """Connect, publish what is handed over, and return when the connection has ended."""
        try:
            self._connection = _Connection(
                self._broker.parameters,
                on_open_callback=self._on_connected,
                on_open_error_callback=self._on_closed,
                on_close_callback=self._on_closed,
                custom_ioloop=self._loop,
            )
            self._loop.start()
        finally:
            self._loop.close()
        return self._end or Ending(f"the connection to {self._broker.url} ended without a reason")

    def abandon(self) -> tuple[list[int], list[int]]:
        """Return the tokens of all messages without an answer: those written, those not."""
        unwritten = [outgoing.token for batch in (self._queue, *self._inbox) for outgoing in batch]
        self._queue.clear()
        self._inbox.clear()
        return self._confirms.abandon(), unwritten

    def _finish(self, end: Ending) -> None:
        """End the link without another word to the broker; the first reason given is the one that counts."""
        if self._end is None:
            self._end = end
            self._loop.call_later(_GOODBYE_SECONDS, self._loop.stop)  # in case pika finds no way out
            self._connection.drop()

    def _close(self, seconds: float) -> None:
        goodbye = Ending(f"disconnected from {self._broker.url}", expected=True)
        if self.ready and self._end is None and not self.blocked and not self._unanswered:
            self._end = goodbye
            self._loop.call_later(seconds, self._loop.stop)
            self._connection.close()
        else:  # who reads nothing answers no farewell
            self._finish(goodbye)

    def _on_connected(self, connection: Any) -> None:
        self.was_open = True
        self._loop.call_later(_CONNECT_SECONDS, self._give_up_waiting)
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        connection.channel(_CHANNEL, on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_close_callback(self._on_channel_closed)
        channel.add_on_return_callback(self._on_return)
        # Passive: only asks. A missing exchange shall be known before the first message, not by it.
        channel.exchange_declare(
            self._broker.exchange,
            passive=True,
            callback=lambda _: channel.confirm_delivery(self._on_confirm, callback=self._on_confirms_on),
        )

    def _on_confirms_on(self, _: Any) -> None:
        self._encoder = PublishEncoder(
            channel=_CHANNEL,
            exchange=self._broker.exchange,
            app_id=self._broker.app_id,
            frame_max=self._connection.params.frame_max,
        )
        self.ready = True
        self._watch()
        self._broker.ready()
        if self.blocked:
            self._broker.blocked(self.blocked)

    def _give_up_waiting(self) -> None:
        if not self.ready:
            self._finish(Ending(f"{self._broker.url} opened no channel within {_CONNECT_SECONDS:g} s"))

    def _on_closed(self, connection: Any, error: Exception) -> None:
        if self._end is None:
            url = self._broker.url
            if connection.last_words is not None:
                self._end = endings.closed_by_broker(url, *connection.last_words, was_open=self.was_open)
            else:
                self._end = endings.failed(url, error, was_open=self.was_open)
        self._loop.stop()

    def _on_channel_closed(self, _: Any, error: Exception) -> None:
        if isinstance(error, pika.exceptions.ChannelClosedByBroker):
            self._finish(endings.channel_closed(self._broker.url, error.reply_code, error.reply_text))

    # --- publishing -------------------------------------------------------------------------------------------------------

    @property
    def _unanswered(self) -> bool:
        return bool(self._confirms or self._queue)

    def _take(self) -> None:
        if not self._unanswered:
            self._heard_at = time.monotonic()
        while self._inbox:
            self._queue += self._inbox.popleft()
        self._write()

    def _write(self) -> None:
        """Write one portion of the queue, as far as may be, and come back for the rest."""
        self._write_scheduled = False
        if self._end is not None or self.blocked:
            return
        portion: list[bytes] = []
        size = 0
        now = time.monotonic()
        while self._queue and size < _BYTES_PER_WRITE:
            message_id = str(self._queue[0].message.id)
            if not self._may_write(message_id):
                break
            outgoing = self._queue.popleft()
            frames = self._encoded(outgoing, message_id)
            if frames is not None:
                self._confirms.sent(Flight(outgoing.token, message_id, len(frames), now))
                portion.append(frames)
                size += len(frames)
        if portion:
            self._connection.write(b"".join(portion))
            if failpoints.armed("R2"):  # pika writes in the next turn of the loop, before the timers
                self._loop.call_later(0, lambda: failpoints.reached("R2"))
        if size >= _BYTES_PER_WRITE and self._queue and not self._write_scheduled:
            self._write_scheduled = True
            self._loop.add_callback_threadsafe(self._write)

    def _may_write(self, message_id: str) -> bool:
        in_flight = self._confirms
        if not in_flight:
            return True
        # A second message of an id waits for the first one's answer: a return names nothing but the id.
        return self.proven and in_flight.bytes_in_flight < _MAX_BYTES_IN_FLIGHT and not in_flight.holds(message_id)

    def _encoded(self, outgoing: Outgoing, message_id: str) -> bytes | None:
        try:
            return self._encoder.encode(outgoing.message, message_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this message's fault alone, and no byte is out
            # Not the error's text: that may quote what it choked on.
            self._broker.answered([Answer(outgoing.token, Outcome.REFUSED, f"AMQP can't carry it: {type(error).__name__}")])
            return None

    def _on_confirm(self, frame: Any) -> None:
        if self._end is not None:
            return
        method, now = frame.method, time.monotonic()
        take = self._confirms.acked if isinstance(method, pika.spec.Basic.Ack) else self._confirms.nacked
        try:
            answers = take(method.delivery_tag, multiple=method.multiple, now=now)
        except Unexpected as breach:
            self._finish(self._distrust(breach))
            return
        self._heard_at = now
        self._broker.answered(answers)
        if not self.proven:
            self.proven = True
            self._broker.proven()
        if self._queue and not self._write_scheduled:
            self._write()

    def _on_return(self, _channel: Any, method: Any, properties: Any, _body: bytes) -> None:
        if self._end is not None:
            return
        try:
            self._confirms.returned(properties.message_id, f"{method.reply_code} {method.reply_text}")
        except Unexpected as breach:
            self._finish(self._distrust(breach))

    def _distrust(self, breach: Unexpected) -> Ending:
        return Ending(f"dropped the connection to {self._broker.url}: it sent {breach}")

    # --- silence ----------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Drop the connection when messages wait and no confirm came for the deadline; look again when it may be over."""
        remaining = self._timeout_seconds
        if self._unanswered:
            remaining += self._heard_at - time.monotonic()
        if remaining > 0:
            self._loop.call_later(remaining, self._watch)
        else:
            silence = "it takes no messages" if self.blocked else "no confirm came"
            self._finish(Ending(f"dropped the connection to {self._broker.url}: {silence} for {self._timeout_seconds:g} s"))

    def _on_blocked(self, _: Any, frame: Any) -> None:
        self.blocked = frame.method.reason or "it is out of some resource"
        if self.ready:
            self._broker.blocked(self.blocked)

    def _on_unblocked(self, _connection: Any, _frame: Any) -> None:
        self.blocked = ""
        if self.ready:
            self._broker.unblocked()
            self._write()


class _Connection(pika.SelectConnection):  # type: ignore[misc]
    """pika's connection with what its public interface lacks."""

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
        if value.channel_number != _CHANNEL or not (method is None or isinstance(method, pika.spec.Basic.Return)):
            self.drop(f"an unexpected frame came: {value.NAME if method is None else method.NAME}")
        else:
            super()._deliver_frame_to_channel(value)


def _parameters(url: AmqpUrl, app_id: str) -> pika.ConnectionParameters:
    context = url.tls_context()
    return pika.ConnectionParameters(
        host=url.host,
        port=url.port,
        virtual_host=url.vhost,
        credentials=pika.PlainCredentials(url.user, url.password),
        heartbeat=url.heartbeat,
        # No blocked_connection_timeout: silence while messages wait ends a blocked connection as well, and without any it
        # is good to know that the broker is blocked.
        ssl_options=pika.SSLOptions(context, url.server_name) if context is not None else None,
        socket_timeout=_CONNECT_SECONDS,
        stack_timeout=_CONNECT_SECONDS * 2,
        client_properties={"connection_name": f"{app_id} relay on {socket.gethostname()}, pid {os.getpid()}"},
    )
