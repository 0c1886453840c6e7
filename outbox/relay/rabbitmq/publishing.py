"""One connection to RabbitMQ: what is written, what the answers mean, and when to give it up.

What a link writes:

* the first message alone, so that one that makes the broker close connections takes no others with it; a message that is
  merely not answered keeps others waiting for a moment only;
* then whatever it is given, in order, up to `_MAX_BYTES_IN_FLIGHT`: pika buffers without limit what the socket
  does not take; and of one topic only what its answers make room for, because RabbitMQ stops reading from a connection that
  has a few hundred messages for a queue that confirms nothing;
* nothing while the broker says `connection.blocked`, and no message that another relay may have by now (`Outgoing.may_go`):
  it may have waited here, or the whole process. A connection on which such a one is unanswered is reset, because its bytes
  may still be in a buffer of this machine.

A topic that is silent while others are answered is given up (`Outcome.SILENT`), and the connection goes on without it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pika
from pika.adapters.select_connection import IOLoop

from outbox.process import failpoints
from outbox.relay.broker import Answer, Cause, Outcome
from outbox.relay.order.turns import Turns
from outbox.relay.rabbitmq import close_reasons
from outbox.relay.rabbitmq.close_reasons import Ending
from outbox.relay.rabbitmq.confirms import ROOM, Confirms, Flight, Unexpected
from outbox.relay.rabbitmq.frames import FrameTooLarge, PublishEncoder
from outbox.relay.rabbitmq.pika_connection import CHANNEL, Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from outbox.amqp_url import AmqpUrl
    from outbox.relay.broker import Outgoing

#: Unanswered bytes above which a link writes no more; one larger message still goes, alone.
_MAX_BYTES_IN_FLIGHT = 8 * 1024 * 1024
#: Bytes encoded at once, before the loop gets a chance to send them and to read answers.
_BYTES_PER_WRITE = 128 * 1024
#: Shares of the deadline for a confirm (10 s): a topic that is unanswered for half of it, and for a tenth of it when others
#: were answered, is silent. After a quarter of it one that stops the whole connection, or is about to, is left with it.
_SILENT, _STUCK, _BY, _BY_AT_LEAST = 1 / 2, 1 / 4, 1 / 10, 1 / 500
#: How many times as long as usual a message must be unanswered, while others are answered, to be what stopped a connection.
_UNUSUAL = 20.0
#: How often that is looked at; and the share after which a first message without an answer keeps no others waiting.
_LOOK, _ALONE = 1 / 40, 1 / 10
#: How long the broker may take to open our channel, once it has let us in.
_CHANNEL_SECONDS = 10.0
#: How long pika may take to end a connection that is dropped.
_DROP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Terms:
    """Where and how to publish."""

    url: AmqpUrl
    exchange: str
    app_id: str
    #: Longest silence of the broker while messages wait for an answer.
    confirm_timeout_seconds: float
    parameters: pika.ConnectionParameters


class _Waiting(NamedTuple):
    """A message that is not written yet."""

    outgoing: Outgoing
    message_id: str


def unanswered(link: Link, end: Ending) -> list[Answer]:
    """Return an answer for every message that *link*, which ended like that, still had."""
    in_flight, unwritten = link.abandon()
    lost = Outcome.REFUSED if end.cause is Cause.MESSAGE and len(in_flight) == 1 else Outcome.LOST
    return [Answer(token, lost, end.detail, cause=end.cause) for token in in_flight] + [
        Answer(token, Outcome.NOT_SENT, end.detail, cause=end.cause) for token in unwritten
    ]


class Owner(Protocol):
    """Who is told what happens on a link, in its I/O thread."""

    def ready(self) -> None:
        """The link takes messages."""

    def answered(self, answers: list[Answer]) -> None:
        """The broker answered messages, or our encoder refused them."""

    def proven(self) -> None:
        """The link got its first confirm."""

    def blocked(self, reason: str) -> None:
        """The broker reads nothing from us."""

    def unblocked(self) -> None:
        """The broker reads again."""


class Link:
    """One connection from its first byte to its last. Everything but `hand_over` and `request_close` runs in the I/O thread."""

    def __init__(self, terms: Terms, owner: Owner) -> None:
        self._terms = terms
        self._owner = owner
        self._loop = IOLoop()
        self._connection: Any = None
        self._encoder: PublishEncoder
        self._confirms = Confirms()
        #: Handed over by the other thread; taken into `_turns` by this one.
        self._inbox: deque[Sequence[Outgoing]] = deque()
        #: Not written yet.
        self._turns: Turns[_Waiting] = Turns()
        #: Topics given up, of which the relay does not know yet: what it hands over meanwhile is not written.
        self._silent: set[str] = set()
        self._end: Ending | None = None
        self._write_scheduled = False
        #: Whether what was written last may still be on its way.
        self._in_time: Callable[[], bool] = lambda: True
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

    def known_to_be_silent(self) -> None:
        """Write what is handed over from now on, also of topics that were given up: the relay knows of them."""
        self._loop.add_callback_threadsafe(self._silent.clear)

    def request_close(self, seconds: float) -> None:
        """Say goodbye to the broker if all is answered; end in any case within about *seconds*."""
        self._loop.add_callback_threadsafe(lambda: self._close(seconds))

    # --- from beginning to end --------------------------------------------------------------------------------------------

    def run(self) -> Ending:
        """Connect, publish what is handed over, and return when the connection has ended."""
        try:
            self._connection = Connection(
                self._terms.parameters,
                on_open_callback=self._on_connected,
                on_open_error_callback=self._on_closed,
                on_close_callback=self._on_closed,
                custom_ioloop=self._loop,
            )
            self._loop.start()
        finally:
            self._loop.close()
        return self._end or Ending(f"the connection to {self._terms.url} ended without a reason", cause=Cause.OURS)

    def abandon(self) -> tuple[list[int], list[int]]:
        """Return the tokens of all messages without an answer: those written, those not."""
        unwritten = [each.outgoing.token for each in self._turns]
        unwritten += [outgoing.token for batch in self._inbox for outgoing in batch]
        self._turns.clear()
        self._inbox.clear()
        return self._confirms.abandon(), unwritten

    def _finish(self, end: Ending) -> None:
        """End the link without another word to the broker; the first reason given is the one that counts."""
        if self._end is None:
            self._end = end
            self._loop.call_later(_DROP_SECONDS, self._loop.stop)  # in case pika finds no way out
            self._connection.drop()

    def _close(self, seconds: float) -> None:
        goodbye = Ending(f"disconnected from {self._terms.url}", cause=Cause.OURS, expected=True)
        if self.ready and self._end is None and not self.blocked and not self._unanswered:
            self._end = goodbye
            self._loop.call_later(seconds, self._loop.stop)
            self._connection.close()
        else:  # who reads nothing answers no farewell
            self._finish(goodbye)

    def _on_connected(self, connection: Any) -> None:
        self.was_open = True
        self._loop.call_later(_CHANNEL_SECONDS, self._give_up_waiting)
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        connection.channel(CHANNEL, on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_close_callback(self._on_channel_closed)
        channel.add_on_return_callback(self._on_return)
        # Passive: only asks. A missing exchange shall be known before the first message, not by it.
        channel.exchange_declare(
            self._terms.exchange,
            passive=True,
            callback=lambda _: channel.confirm_delivery(self._on_confirm, callback=self._on_confirms_on),
        )

    def _on_confirms_on(self, _: Any) -> None:
        self._encoder = PublishEncoder(
            channel=CHANNEL,
            exchange=self._terms.exchange,
            app_id=self._terms.app_id,
            frame_max=self._connection.params.frame_max,
        )
        self.ready = True
        self._watch()
        self._owner.ready()
        if self.blocked:
            self._owner.blocked(self.blocked)

    def _give_up_waiting(self) -> None:
        if not self.ready:
            self._finish(Ending(f"{self._terms.url} opened no channel within {_CHANNEL_SECONDS:g} s"))

    def _on_closed(self, connection: Any, error: Exception) -> None:
        if self._end is None:
            url = self._terms.url
            if connection.last_words is not None:
                self._end = close_reasons.closed_by_broker(url, *connection.last_words, was_open=self.was_open)
            else:
                self._end = close_reasons.failed(url, error, was_open=self.was_open)
        self._loop.stop()

    def _on_channel_closed(self, _: Any, error: Exception) -> None:
        if isinstance(error, pika.exceptions.ChannelClosedByBroker):
            self._finish(close_reasons.channel_closed(self._terms.url, error.reply_code, error.reply_text))

    # --- publishing -------------------------------------------------------------------------------------------------------

    @property
    def _unanswered(self) -> bool:
        return bool(self._confirms or self._turns)

    def _take(self) -> None:
        if not self._unanswered:
            self._heard_at = time.monotonic()
        while self._inbox:
            for outgoing in self._inbox.popleft():
                if outgoing.message.topic in self._silent:
                    self._owner.answered([self._not_sent(outgoing)])
                else:
                    self._turns.add(outgoing.message.topic, _Waiting(outgoing, str(outgoing.message.id)))
        self._write()

    def _write(self) -> None:
        """Write one portion of what waits, as far as may be, and come back for the rest."""
        self._write_scheduled = False
        if self._end is not None or self.blocked:
            return
        portion: list[bytes] = []
        size = 0
        now = time.monotonic()
        while size < _BYTES_PER_WRITE and (waiting := self._next(now)) is not None:
            outgoing, message_id = waiting
            frames = self._encoded(outgoing, message_id)
            if frames is not None:
                self._in_time = outgoing.may_go
                self._confirms.sent(Flight(outgoing.token, message_id, outgoing.message.topic, len(frames), now))
                portion.append(frames)
                size += len(frames)
        if portion:
            self._connection.write(b"".join(portion))
            if failpoints.armed("R2"):  # pika writes in the next turn of the loop, before the timers
                self._loop.call_later(0, lambda: failpoints.reached("R2"))
        if size >= _BYTES_PER_WRITE and self._turns and not self._write_scheduled:
            self._write_scheduled = True
            self._loop.add_callback_threadsafe(self._write)

    def _next(self, now: float) -> _Waiting | None:
        """Take the next message that may be written out of those that wait."""
        if not self._turns or self._confirms.bytes_in_flight >= _MAX_BYTES_IN_FLIGHT:
            return None
        alone = bool(self._confirms) and not self.proven
        if alone and now - self._heard_at < _ALONE * self._terms.confirm_timeout_seconds:
            return None
        # Who is not answered when alone may be of a silent topic: one of each other topic may show it.
        may_topic = (lambda topic: not self._confirms.waits_for(topic)) if alone else self._confirms.room_for
        # A second message of an id waits for the first one's answer: a return names nothing but the id.
        return self._turns.next(may_topic, lambda waiting: not self._confirms.holds(waiting.message_id))

    def _encoded(self, outgoing: Outgoing, message_id: str) -> bytes | None:
        if not outgoing.may_go():
            self._owner.answered([Answer(outgoing.token, Outcome.NOT_SENT, "its lease ended before it could be written")])
            return None
        try:
            return self._encoder.encode(outgoing.message, message_id)
        except FrameTooLarge as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this message's fault alone, and no byte is out
            problem = type(error).__name__  # not the error's text: that may quote what it choked on
        self._owner.answered([Answer(outgoing.token, Outcome.REFUSED, f"AMQP can't carry it: {problem}")])
        return None

    def _on_confirm(self, frame: Any) -> None:
        if self._end is not None:
            return
        method, now = frame.method, time.monotonic()
        take = self._confirms.acked if isinstance(method, pika.spec.Basic.Ack) else self._confirms.nacked
        try:
            answers = take(method.delivery_tag, multiple=method.multiple, now=now)
        except Unexpected as breach:
            self._distrust(breach)
            return
        self._heard_at = now
        self._owner.answered(answers)
        if not self.proven:
            self.proven = True
            self._owner.proven()
        if self._turns and not self._write_scheduled:
            self._write()

    def _on_return(self, _channel: Any, method: Any, properties: Any, _body: bytes) -> None:
        if self._end is not None:
            return
        try:
            self._confirms.returned(properties.message_id, f"{method.reply_code} {method.reply_text}")
        except Unexpected as breach:
            self._distrust(breach)

    def _distrust(self, breach: Unexpected) -> None:
        self._drop(f"it sent {breach}", Cause.OURS)

    # --- silence ----------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """See whether a topic, or the whole connection, is silent while messages wait; look again soon."""
        deadline = self._terms.confirm_timeout_seconds
        now = time.monotonic()
        silence = now - self._heard_at if self._unanswered else 0.0
        if silence >= deadline:
            cause, what = (Cause.BLOCKED, "it takes no messages") if self.blocked else (Cause.SILENCE, "no confirm came")
            self._drop(f"{what} for {deadline:g} s", cause)
        elif self._confirms and not self._in_time():
            self._connection.forget_unsent()
            self._drop("the lease ended while messages were unanswered", Cause.OURS)
        elif not self.blocked and self._confirms:
            self._leave_silent_topics(now, silence)
            self._write()
        if self._end is None:
            self._loop.call_later(_LOOK * deadline, self._watch)

    def _leave_silent_topics(self, now: float, silence: float) -> None:
        """Give up the topics that are silent while others are answered; and the connection, if they stop it or soon will."""
        deadline, overtaken = self._terms.confirm_timeout_seconds, self._confirms.overtaken
        silent = overtaken(now, unanswered=_SILENT * deadline, by=_BY * deadline)
        much = [
            topic
            for topic in overtaken(now, unanswered=_STUCK * deadline, by=_BY * deadline)
            if self._confirms.waits_for(topic) > ROOM
        ]
        if silence >= _STUCK * deadline:  # what was answered before it stopped says who stopped it
            by = max(_BY_AT_LEAST * deadline, _UNUSUAL * self._confirms.usual_seconds)
            silent += overtaken(now, unanswered=_STUCK * deadline, by=by)
        for topic in {*silent, *much}:
            self._give_up(topic)
        given_up = self._confirms.given_up()
        if much or (given_up and self._confirms and silence >= _STUCK * deadline):
            self._drop(f"no confirm came for {', '.join(sorted(given_up))}, which stops all others", Cause.SILENCE)

    def _give_up(self, topic: str) -> None:
        self._silent.add(topic)
        unwritten = self._turns.remove(topic)
        detail = "no confirm came, though later messages of other topics were answered"
        self._owner.answered(
            [Answer(token, Outcome.SILENT, detail, cause=Cause.SILENCE) for token in self._confirms.give_up(topic)]
            + [self._not_sent(each.outgoing) for each in unwritten]
        )

    def _not_sent(self, outgoing: Outgoing) -> Answer:
        return Answer(outgoing.token, Outcome.NOT_SENT, f"{outgoing.message.topic} is silent", cause=Cause.SILENCE)

    def _drop(self, why: str, cause: Cause) -> None:
        self._finish(Ending(f"dropped the connection to {self._terms.url}: {why}", cause=cause))

    def _on_blocked(self, _: Any, frame: Any) -> None:
        self.blocked = frame.method.reason or "it is out of some resource"
        if self.ready:
            self._owner.blocked(self.blocked)

    def _on_unblocked(self, _connection: Any, _frame: Any) -> None:
        self.blocked = ""
        if self.ready:
            self._owner.unblocked()
            self._write()
