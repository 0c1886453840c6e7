"""The tap: a queue bound to every topic, read by another client library while the run goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pika
from pika.exceptions import AMQPError

from tests.kit.world import EXCHANGE, arrival
from tests.lab.background import Background
from tests.lab.topics import CANARY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.kit.history import Entry


@dataclass(frozen=True, slots=True)
class Arrival:
    """One delivery to the tap."""

    entry: Entry
    topic: str


class Tap(Background):
    """A thread that keeps everything that arrives, in order, and knows when the canary's messages did."""

    QUEUE = "tap"

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.arrivals: list[Arrival] = []
        self._seen: set[str] = set()
        #: Message id → time.monotonic() of its first arrival, for the canary's topic.
        self.canaries: dict[str, float] = {}

    @classmethod
    def declare(cls, channel: Any, patterns: Iterable[str]) -> None:
        """Make the queue; call it before anything is sent."""
        channel.queue_declare(cls.QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        for pattern in patterns:
            channel.queue_bind(cls.QUEUE, EXCHANGE, pattern)

    def work(self) -> None:
        while not self.stopping.is_set():
            try:
                self._read()
            except (AMQPError, OSError):
                self.stopping.wait(0.2)

    def _read(self) -> None:
        parameters = pika.URLParameters(self._url)
        parameters.heartbeat = 5
        parameters.blocked_connection_timeout = 5
        connection = pika.BlockingConnection(parameters)
        try:
            channel = connection.channel()
            channel.basic_qos(prefetch_count=200)
            for method, _, body in channel.consume(self.QUEUE, inactivity_timeout=0.2):
                if self.stopping.is_set():
                    return
                if method is not None:
                    self._take(method, body)
                    channel.basic_ack(method.delivery_tag)
        finally:
            if connection.is_open:
                connection.close()

    def _take(self, method: Any, body: bytes) -> None:
        now, entry = time.monotonic(), arrival(body)
        if method.redelivered and entry.id in self._seen:
            return  # the queue's repetition, not the relay's: our acknowledgement was lost
        if method.routing_key == CANARY:
            self.canaries.setdefault(entry.id, now)
        self._seen.add(entry.id)
        self.arrivals.append(Arrival(entry, method.routing_key))
