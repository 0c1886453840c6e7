"""What the relay asks of a broker: the seam that RabbitMQ and the embedded broker fill.

Sending is pipelined: `send` hands messages over and returns, `answers` brings what became of them, in any order. An
adapter only says what happened; what that means for the row is decided in `verdict`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from outbox.message import Message


class Outcome(Enum):
    """What the broker said of one message. Exactly one for each message that was sent."""

    #: It has the message, durably, in every queue bound to the topic.
    CONFIRMED = auto()
    #: No queue is bound to the topic; nobody has it.
    RETURNED = auto()
    #: A queue refused it (mostly because it is full); others may have it.
    NACKED = auto()
    #: The message itself can't be sent: it failed before its first byte, or the broker closed the channel over it (406)
    #: while it was alone in flight.
    REFUSED = auto()
    #: Undecided: the connection ended while it was in flight. It may have been delivered.
    LOST = auto()
    #: A notice, not an answer: for the deadline nobody has answered it, although messages of other topics that were written
    #: later were answered. Its queue says nothing (a quorum queue without a majority). What became of it is said later.
    SILENT = auto()
    #: It never left: there was no connection, or it ended before the first byte of this message.
    NOT_SENT = auto()


class Cause(Enum):
    """Why a connection ended, as far as that says something about the messages in flight."""

    #: The broker or the network ended it: one of the messages in flight may have been the reason.
    CLOSED = auto()
    #: The broker closed the channel over one of the messages in flight (406). Sent one by one, the culprit comes back as
    #: REFUSED.
    MESSAGE = auto()
    #: We ended it, because no confirm came for too long.
    SILENCE = auto()
    #: We ended it, because the broker took no messages for too long.
    BLOCKED = auto()
    #: We ended it for another reason, or there was none.
    OURS = auto()

    @property
    def may_be_a_message(self) -> bool:
        """Whether one of the messages in flight may be to blame. A deadline of our own is no evidence against any."""
        return self in (Cause.CLOSED, Cause.MESSAGE)


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message on its way; `token`, a number of this process, comes back with the answer."""

    token: int
    message: Message
    #: Asked when its first byte is about to be written, from any thread: what was handed over may have waited, or the whole
    #: process, until somebody else had the message to send. Then it is NOT_SENT.
    may_go: Callable[[], bool] = _always


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one message."""

    token: int
    outcome: Outcome
    #: The broker's words, or what happened to the connection, for people; no payload.
    detail: str = ""
    #: From writing it to the broker's answer; 0 where the broker did not answer.
    seconds: float = 0.0
    #: Why the connection ended; for LOST and NOT_SENT.
    cause: Cause = Cause.OURS


@dataclass(frozen=True, slots=True)
class BrokerState:
    """How the broker stands, for logs, status and the decision whether sending makes sense."""

    connected: bool
    #: The broker has an alarm and reads nothing from publishers.
    blocked: bool = False
    #: Why not connected, or why blocked, and the next step; empty when all is well. Secrets masked.
    detail: str = ""
    #: The broker is there and refuses us as configured (password, virtual host, exchange, permission): waiting alone won't
    #: help. The adapter keeps trying, slowly.
    refused: bool = False
    #: It is not connected now, but let us in before: with this user, password and virtual host it can become well again.
    let_in: bool = False


class Broker(Protocol):
    """A connection to a broker that keeps itself up. Its methods are called from one thread, except `wake`."""

    @property
    def whole_batches(self) -> bool:
        """Whether a batch arrives whole and in order, save for what no queue takes, or not at all.

        Then several messages of one key may be in it; otherwise the broker could refuse one and take the next.
        """

    def start(self) -> None:
        """Begin to connect, in the background; the broker need not be up. Reconnects by itself, with jitter, until `stop`."""

    def send(self, batch: Sequence[Outgoing]) -> None:
        """Hand over *batch*, in order within a topic. Each message gets one answer; without a connection NOT_SENT, at once."""

    def probe(self, outgoing: Outgoing) -> None:
        """Hand over a message of a topic that was refused or silent: whatever becomes of it, it keeps no others waiting.

        It gets one answer, as others do. LOST with the cause SILENCE says that none came within the deadline.
        """

    def answers(self, timeout: float) -> list[Answer]:
        """Wait until an answer is there, the state changes, `wake` is called or *timeout* seconds pass; return the answers."""

    def wake(self) -> None:
        """Make a waiting `answers` return; from any thread."""

    def state(self) -> BrokerState:
        """Return the present state, without I/O."""

    def stop(self, timeout: float) -> None:
        """Close within *timeout* seconds; what is still unanswered is LOST or NOT_SENT."""
