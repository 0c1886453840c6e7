"""Doubles of what lies beyond our own code."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from outbox.relay.broker import Answer, BrokerState, Cause, Outcome, Outgoing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from outbox.message import Message


class FakeBroker:
    """A broker in memory that does as told: *script* says what becomes of each message, None keeps it unanswered.

    `delivered` is what a queue bound to everything would hold, in order of arrival. By itself it confirms everything.
    """

    def __init__(
        self,
        script: Callable[[Message], Outcome | None] | None = None,
        *,
        connected: bool = True,
        patient: bool = True,
        whole_batches: bool = False,
    ) -> None:
        """Without *patient* it never waits for an answer: for tests that turn the relay by hand, by a clock of theirs."""
        self._patient = patient
        self.whole_batches = whole_batches
        self.script = script or (lambda _message: Outcome.CONFIRMED)
        self.sent: list[Message] = []
        self.delivered: list[Message] = []
        self.probes: list[Message] = []
        self.batches: list[list[Message]] = []
        self._connected = connected
        self._blocked = False
        self._started = False
        self._flying: dict[int, Message] = {}
        self._answers: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._news = False

    # --- the Broker protocol ---

    def start(self) -> None:
        self._started = True

    def send(self, batch: Sequence[Outgoing]) -> None:
        with self._changed:
            self.batches.append([outgoing.message for outgoing in batch])
            for outgoing in batch:
                if not self.state().connected:
                    self._answers.append(Answer(outgoing.token, Outcome.NOT_SENT, "no connection"))
                    continue
                self.sent.append(outgoing.message)
                self._flying[outgoing.token] = outgoing.message
                outcome = self.script(outgoing.message)
                if outcome is Outcome.LOST:
                    self._lose("the connection was closed")
                elif outcome is Outcome.SILENT:  # a notice: it stays in flight
                    self._answers.append(Answer(outgoing.token, Outcome.SILENT, "no confirm came", cause=Cause.SILENCE))
                elif outcome is not None:
                    self._answer(outgoing.token, outcome)
            self._changed.notify_all()

    def probe(self, outgoing: Outgoing) -> None:
        self.probes.append(outgoing.message)
        if self.state().connected and self.script(outgoing.message) is Outcome.SILENT:
            with self._changed:
                self.sent.append(outgoing.message)
                self._answers.append(Answer(outgoing.token, Outcome.LOST, "no confirm came", cause=Cause.SILENCE))
            return
        self.send([outgoing])

    def answers(self, timeout: float) -> list[Answer]:
        with self._changed:
            if self._patient:
                self._changed.wait_for(lambda: self._answers or self._news, max(timeout, 0.0))
            self._news = False
            found = list(self._answers)
            self._answers.clear()
            return found

    def wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def state(self) -> BrokerState:
        connected = self._connected and self._started
        return BrokerState(connected, self._blocked, "" if connected else "the fake is not connected")

    def stop(self, timeout: float) -> None:
        with self._changed:
            self._lose("stopped", Cause.OURS)
            self._started = False

    # --- what a test does to it ---

    @property
    def flying(self) -> list[Message]:
        """What was sent and not answered."""
        with self._changed:
            return list(self._flying.values())

    def answer(self, message: Message, outcome: Outcome = Outcome.CONFIRMED, detail: str = "") -> None:
        """Answer *message*, which is in flight."""
        with self._changed:
            token = next(token for token, flying in self._flying.items() if flying.id == message.id)
            self._answer(token, outcome, detail)
            self._changed.notify_all()

    def disconnect(self, detail: str = "the connection was closed", cause: Cause = Cause.CLOSED) -> None:
        """Lose the connection and all that is in flight; it stays away until `connect`."""
        with self._changed:
            self._connected = False
            self._lose(detail, cause)
            self._news = True
            self._changed.notify_all()

    def connect(self) -> None:
        """Come back."""
        with self._changed:
            self._connected = self._news = True
            self._changed.notify_all()

    def block(self, blocked: bool = True) -> None:
        """Have an alarm, or have it no more."""
        with self._changed:
            self._blocked = self._news = blocked
            self._changed.notify_all()

    def _answer(self, token: int, outcome: Outcome, detail: str = "") -> None:
        message = self._flying.pop(token)
        if outcome is Outcome.CONFIRMED:
            self.delivered.append(message)
        self._answers.append(Answer(token, outcome, detail, 0.001))

    def _lose(self, detail: str, cause: Cause = Cause.CLOSED) -> None:
        for token in self._flying:
            self._answers.append(Answer(token, Outcome.LOST, detail, cause=cause))
        self._flying.clear()
