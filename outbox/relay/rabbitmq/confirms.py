"""Which message each answer of the broker belongs to: publisher confirms by delivery tag. Pure: no I/O, no clock.

One `Confirms` lives as long as one channel. Tags count from 1 on every channel, so a tracker that outlived its connection
would take the new connection's answers for the old one's messages: it is thrown away instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice, takewhile

from outbox.relay.broker import Answer, Outcome


class Unexpected(Exception):
    """The broker answered something that was not asked. Nothing on this channel can be trusted any more."""


#: How many messages of a topic may be unanswered before its first answers have come. RabbitMQ stops reading from a whole
#: connection a few hundred messages after 32 commands to one quorum queue were left unanswered (`quorum_commands_soft_limit`).
ROOM = 24
#: How far that room grows while answers come quickly and more of the topic waits. The broker reads at least 200 messages
#: more once those 32 are unanswered: beside others the topic leaves half of them to those, alone a few, for whoever comes.
_MOST_ROOM, _MOST_ROOM_ALONE = 128, 160
#: An answer that took longer shows a queue that must not be given more at once.
_QUICK_SECONDS = 1.0
#: Of about how many answers the usual time is the mean.
_MEMORY = 50.0


@dataclass(slots=True)
class Flight:
    """A message that was written and has no answer yet."""

    token: int
    message_id: str
    topic: str
    #: Bytes on the wire, frames included.
    size: int
    #: By the caller's clock, in seconds.
    sent_at: float
    #: The broker's words when it gave the message back; its ack will then mean "nobody has it".
    returned: str = ""


@dataclass(slots=True)
class _Topic:
    """What is unanswered of one topic, by delivery tag, the first written first."""

    flights: dict[int, Flight] = field(default_factory=dict)
    room: int = ROOM
    #: Something waited for room when it was last asked for.
    full: bool = False


class Confirms:
    """What one channel has been sent and has not answered. `len()` is the number of messages that are waited for."""

    def __init__(self) -> None:
        self._flights: dict[int, Flight] = {}
        self._tags: dict[str, int] = {}
        self._topics: dict[str, _Topic] = {}
        #: Tags of those that nobody waits for any more. Their answers may still come.
        self._given_up: set[int] = set()
        #: By topic: the highest tag that was answered, and when.
        self._heard: dict[str, tuple[int, float]] = {}
        self._last = 0
        self._bytes = 0
        #: How long an answer usually takes, in seconds.
        self.usual_seconds = 0.0

    def __len__(self) -> int:
        return len(self._flights) - len(self._given_up)

    @property
    def bytes_in_flight(self) -> int:
        """The bytes of all messages that are waited for, frames included."""
        return self._bytes

    def holds(self, message_id: str) -> bool:
        """Whether a message of that id is in flight. A second one must wait: a return could not be told apart."""
        return message_id in self._tags

    def waits_for(self, topic: str) -> int:
        """Return how many messages of *topic* are waited for."""
        return len(self._topics[topic].flights) if topic in self._topics else 0

    def room_for(self, topic: str) -> bool:
        """Whether one more message of *topic* may be written. Where one may not, quick answers make more room."""
        known = self._topics.get(topic)
        if known is None:
            return True
        known.full = len(known.flights) >= min(known.room, self._most_room)
        return not known.full

    @property
    def _most_room(self) -> int:
        return _MOST_ROOM_ALONE if len(self._topics) == 1 and not self._given_up else _MOST_ROOM

    def sent(self, flight: Flight) -> None:
        """Say that *flight* is the next message written on the channel. Its id must not be in flight."""
        if flight.message_id in self._tags:
            raise ValueError(f"message {flight.message_id} is in flight already")
        self._last += 1
        self._flights[self._last] = flight
        self._tags[flight.message_id] = self._last
        self._topics.setdefault(flight.topic, _Topic()).flights[self._last] = flight
        self._bytes += flight.size

    def overtaken(self, now: float, *, unanswered: float, by: float) -> list[str]:
        """Return the topics of which a message is *unanswered* for that many seconds, though others were heard of since.

        Heard of: a message of another topic, written later, was answered when the first one was unanswered for *by* seconds
        already. A broker that stands still as a whole names nobody.
        """
        return [
            topic
            for topic, known in self._topics.items()
            for tag, flight in islice(known.flights.items(), 1)
            if now - flight.sent_at >= unanswered
            and any(other != topic and heard > tag and at - flight.sent_at >= by for other, (heard, at) in self._heard.items())
        ]

    def give_up(self, topic: str) -> list[int]:
        """Wait no more for what is unanswered of *topic* and return its tokens; if answers come after all, they count."""
        known = self._topics.pop(topic, _Topic())
        self._given_up |= known.flights.keys()
        self._bytes -= sum(flight.size for flight in known.flights.values())
        return [flight.token for flight in known.flights.values()]

    def given_up(self) -> set[str]:
        """Return the topics of which messages that nobody waits for are still in flight."""
        return {self._flights[tag].topic for tag in self._given_up}

    def returned(self, message_id: str | None, words: str) -> None:
        """Take `basic.return`. The message stays in flight: its ack follows. Raises Unexpected."""
        tag = self._tags.get(message_id or "")
        if tag is None:
            raise Unexpected(f"a return of message {message_id}, which is not in flight")
        flight = self._flights[tag]
        if flight.returned:
            raise Unexpected(f"a second return of message {message_id}")
        flight.returned = words or "returned"

    def acked(self, tag: int, *, multiple: bool, now: float) -> list[Answer]:
        """Take `basic.ack`: confirmed, or returned if a return came before. Raises Unexpected."""
        return [
            Answer(flight.token, Outcome.RETURNED, flight.returned, now - flight.sent_at)
            if flight.returned
            else Answer(flight.token, Outcome.CONFIRMED, "", now - flight.sent_at)
            for flight in self._answered("ack", tag, multiple, now)
        ]

    def nacked(self, tag: int, *, multiple: bool, now: float) -> list[Answer]:
        """Take `basic.nack`: a queue refused the message. Raises Unexpected."""
        return [
            Answer(flight.token, Outcome.NACKED, "a queue refused it (basic.nack)", now - flight.sent_at)
            for flight in self._answered("nack", tag, multiple, now)
        ]

    def abandon(self) -> list[int]:
        """Forget everything in flight, given up or not, and return its tokens, in the order it was sent."""
        tokens = [flight.token for flight in self._flights.values()]
        self._flights.clear()
        self._tags.clear()
        self._topics.clear()
        self._given_up.clear()
        self._bytes = 0
        return tokens

    def _answered(self, kind: str, tag: int, multiple: bool, now: float) -> list[Flight]:
        # RabbitMQ never confirms with tag 0 ("all so far"), and never names a tag again, not even under `multiple`.
        if tag not in self._flights:
            what = "was answered before" if 0 < tag <= self._last else "was never sent"
            raise Unexpected(f"a {kind} of delivery tag {tag}, which {what}")
        if not multiple:
            return [self._land(tag, now)]
        # Dictionaries keep the order of sending: the first is the lowest.
        return [self._land(each, now) for each in list(takewhile(lambda each: each <= tag, self._flights))]

    def _land(self, tag: int, now: float) -> Flight:
        flight = self._flights.pop(tag)
        del self._tags[flight.message_id]
        if tag > self._heard.get(flight.topic, (0, 0.0))[0]:
            self._heard[flight.topic] = (tag, now)
        if tag in self._given_up:
            self._given_up.remove(tag)
            return flight
        self.usual_seconds += (now - flight.sent_at - self.usual_seconds) / _MEMORY
        self._bytes -= flight.size
        known = self._topics[flight.topic]
        del known.flights[tag]
        if now - flight.sent_at > _QUICK_SECONDS:
            known.room = ROOM
        elif known.full:
            known.room = min(known.room + 1, self._most_room)
        if not known.flights and not known.full:
            del self._topics[flight.topic]
        return flight
