"""The relay's side of the embedded broker: the same seam as RabbitMQ, on one SQLite file."""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import TYPE_CHECKING

from outbox.embedded.file import BrokerFileError, BrokerFileUnavailable
from outbox.embedded.queues import Publication, Queues
from outbox.embedded.urls import path_of
from outbox.message import cloud_event
from outbox.process import failpoints
from outbox.process.backoff import Backoff
from outbox.relay.broker import Answer, BrokerState, Outcome
from outbox.relay.broker_log import News
from outbox.relay.rabbitmq.frames import CONTENT_TYPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outbox.message import Message
    from outbox.relay.broker import Outgoing

_REOPEN = Backoff(base_seconds=0.1, maximum_seconds=5.0)


class EmbeddedBroker:
    """The relay's `Broker` on `embedded:///…`. Raises ConfigurationError for a URL that can't be used.

    A batch is one transaction, within `send`: its messages are confirmed when it has committed, or none was sent. After a
    failure the file is closed, and opened again from `answers`, so that a disk that was full is found empty again.
    """

    whole_batches = True

    def __init__(self, url: str, *, exchange: str, app_id: str = "outbox", reopen: Backoff = _REOPEN) -> None:
        self._path = path_of(url)
        self._exchange = exchange
        self._app_id = app_id
        self._reopen = reopen
        self._random = random.Random()  # noqa: S311
        self._queues: Queues | None = None
        self._answers: list[Answer] = []
        self._woken = threading.Event()
        self._state = BrokerState(connected=False, detail=f"{self._path} is not open yet")
        self._failures = 0
        self._next_try = 0.0  # time.monotonic()
        self._news = News()
        self._proven = False  # whether anything was published since the file was opened

    def start(self) -> None:
        """Open the file. Whatever is wrong with it is said by `state`, and it is tried again."""
        self._open()

    def send(self, batch: Sequence[Outgoing]) -> None:
        """Publish *batch*; the answers are there when this returns."""
        began = time.monotonic()
        publications: list[Publication] = []
        tokens: list[int] = []
        refused: set[str | None] = set()
        for outgoing in batch:
            key = outgoing.message.key
            if key in refused:
                self._answers.append(Answer(outgoing.token, Outcome.NOT_SENT, "an earlier message of its key was refused"))
                continue
            try:
                publications.append(self._publication(outgoing.message))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this message's fault and must not stop the others
                self._answers.append(Answer(outgoing.token, Outcome.REFUSED, f"can't be encoded: {type(error).__name__}"))
                if key is not None:
                    refused.add(key)
            else:
                tokens.append(outgoing.token)
        reached = self._publish(publications)
        seconds = time.monotonic() - began
        if reached is None:
            self._answers += [Answer(token, Outcome.NOT_SENT, self._state.detail) for token in tokens]
        else:
            self._answers += [self._answer(token, queues, seconds) for token, queues in zip(tokens, reached, strict=True)]

    def probe(self, outgoing: Outgoing) -> None:
        """Publish one message: nobody waits for another here."""
        self.send([outgoing])

    def answers(self, timeout: float) -> list[Answer]:
        """Return the answers; without any, wait for *timeout* seconds, `wake`, or until the file could be opened again."""
        deadline = time.monotonic() + timeout
        while not self._answers and not self._woken.is_set() and time.monotonic() < deadline:
            until = deadline if self._queues is not None else min(deadline, self._next_try)
            self._woken.wait(max(0.0, until - time.monotonic()))
            if self._queues is None and time.monotonic() >= self._next_try and self._open():
                break
        self._woken.clear()
        answers, self._answers = self._answers, []
        return answers

    def wake(self) -> None:
        """Make a waiting `answers` return; from any thread."""
        self._woken.set()

    def state(self) -> BrokerState:
        """Return whether the file is open, or why not."""
        return self._state

    def stop(self, timeout: float) -> None:  # noqa: ARG002 - nothing is ever under way
        """Close the file for good."""
        self._close()
        self._next_try = float("inf")
        self._state = BrokerState(connected=False, detail=f"{self._path} is closed")

    # --- the file -----------------------------------------------------------------------------------------------------------

    def _open(self) -> bool:
        try:
            self._queues = Queues(self._path)
        except (BrokerFileUnavailable, BrokerFileError) as error:
            self._fail(error)
            return False
        self._proven = False
        self._state = BrokerState(connected=True)
        self._news.connected(f"opened {self._path}, exchange {self._exchange}")
        return True

    def _publish(self, publications: Sequence[Publication]) -> list[int] | None:
        """Return how many queues each got into; None when the transaction failed, and with it all of them."""
        if self._queues is None:
            return None
        try:
            reached = self._queues.publish(self._exchange, publications)
            failpoints.reached("R2")
        except (BrokerFileUnavailable, BrokerFileError) as error:
            self._fail(error)
            return None
        self._failures = 0
        self._proven = True
        self._news.confirmed(f"{self._path} takes messages again")
        return reached

    def _fail(self, error: BrokerFileError | BrokerFileUnavailable) -> None:
        refused = isinstance(error, BrokerFileError)
        self._news.doubt(self._queues is not None and not self._proven)
        self._news.trouble("refused" if refused else "lost", str(error), logging.ERROR if refused else logging.WARNING)
        self._close()
        self._failures += 1
        self._next_try = time.monotonic() + self._reopen.wait(self._failures, self._random)
        self._state = BrokerState(connected=False, detail=str(error), refused=refused)

    def _close(self) -> None:
        if self._queues is not None:
            self._queues.close()
            self._queues = None

    # --- messages -----------------------------------------------------------------------------------------------------------

    def _answer(self, token: int, queues: int, seconds: float) -> Answer:
        if queues:
            return Answer(token, Outcome.CONFIRMED, seconds=seconds)
        return Answer(token, Outcome.RETURNED, f"no queue on exchange {self._exchange!r} takes this topic", seconds)

    def _publication(self, message: Message) -> Publication:
        """Return *message* with the bytes and the AMQP properties that it has on RabbitMQ."""
        headers = dict(message.headers)
        properties: dict[str, object] = {
            "content_type": CONTENT_TYPE,
            "delivery_mode": 2,
            "message_id": str(message.id),
            "timestamp": int(message.created_at.timestamp()),
            "type": message.topic,
            "app_id": self._app_id,
        }
        if "correlationid" in headers:
            properties["correlation_id"] = headers["correlationid"]
        if message.key is not None:
            headers["partitionkey"] = message.key
        if headers:
            properties["headers"] = headers
        return Publication(topic=message.topic, body=cloud_event(message), properties=properties)
