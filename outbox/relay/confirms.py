"""Which message each answer of the broker belongs to: publisher confirms by delivery tag. Pure: no I/O, no clock.

One `Confirms` lives as long as one channel. Tags count from 1 on every channel, so a tracker that outlived its connection
would take the new connection's answers for the old one's messages: it is thrown away instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from outbox.relay.broker import Answer, Outcome


class Unexpected(Exception):
    """The broker answered something that was not asked. Nothing on this channel can be trusted any more."""


@dataclass(slots=True)
class Flight:
    """A message that was written and has no answer yet."""

    token: int
    message_id: str
    #: Bytes on the wire, frames included.
    size: int
    #: By the caller's clock, in seconds.
    sent_at: float
    #: The broker's words when it gave the message back; its ack will then mean "nobody has it".
    returned: str = ""


class Confirms:
    """What one channel has been sent and has not answered. `len()` is the number of messages in flight."""

    def __init__(self) -> None:
        self._flights: dict[int, Flight] = {}
        self._tags: dict[str, int] = {}
        self._last = 0
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def bytes_in_flight(self) -> int:
        """The bytes of all messages in flight, frames included."""
        return self._bytes

    def holds(self, message_id: str) -> bool:
        """Whether a message of that id is in flight. A second one must wait: a return could not be told apart."""
        return message_id in self._tags

    def sent(self, flight: Flight) -> None:
        """Say that *flight* is the next message written on the channel. Its id must not be in flight."""
        if flight.message_id in self._tags:
            raise ValueError(f"message {flight.message_id} is in flight already")
        self._last += 1
        self._flights[self._last] = flight
        self._tags[flight.message_id] = self._last
        self._bytes += flight.size

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
            for flight in self._answered("ack", tag, multiple)
        ]

    def nacked(self, tag: int, *, multiple: bool, now: float) -> list[Answer]:
        """Take `basic.nack`: a queue refused the message. Raises Unexpected."""
        return [
            Answer(flight.token, Outcome.NACKED, "a queue refused it (basic.nack)", now - flight.sent_at)
            for flight in self._answered("nack", tag, multiple)
        ]

    def abandon(self) -> list[int]:
        """Forget everything in flight and return its tokens, in the order it was sent."""
        tokens = [flight.token for flight in self._flights.values()]
        self._flights.clear()
        self._tags.clear()
        self._bytes = 0
        return tokens

    def _answered(self, kind: str, tag: int, multiple: bool) -> list[Flight]:
        # RabbitMQ never confirms with tag 0 ("all so far"), and never names a tag again, not even under `multiple`.
        if tag not in self._flights:
            what = "was answered before" if 0 < tag <= self._last else "was never sent"
            raise Unexpected(f"a {kind} of delivery tag {tag}, which {what}")
        if not multiple:
            return [self._forget(self._flights.pop(tag))]
        tags = range(next(iter(self._flights)), tag + 1)  # dictionaries keep the order of sending: the first is the lowest
        return [self._forget(flight) for t in tags if (flight := self._flights.pop(t, None)) is not None]

    def _forget(self, flight: Flight) -> Flight:
        del self._tags[flight.message_id]
        self._bytes -= flight.size
        return flight
