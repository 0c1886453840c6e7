"""The relay's `Broker` on RabbitMQ: a thread that keeps a link up, and the queue its answers come through."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from outbox import amqp_url
from outbox.process.backoff import Backoff
from outbox.relay.broker import Answer, BrokerState, Cause, Outcome
from outbox.relay.broker_log import News
from outbox.relay.rabbitmq.close_reasons import Ending
from outbox.relay.rabbitmq.pika_connection import parameters
from outbox.relay.rabbitmq.prober import Prober
from outbox.relay.rabbitmq.publishing import Link, Terms, unanswered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outbox.relay.broker import Outgoing

log = logging.getLogger(__name__)

_RECONNECT = Backoff(0.2, 5.0)
_REFUSED = Backoff(1.0, 30.0)  # the broker logs every refused login
#: How long the broker may take to answer our farewell.
_GOODBYE_SECONDS = 1.0


class RabbitBroker:
    """The relay's `Broker` on RabbitMQ. Raises ConfigurationError for a URL or certificates that can't be used."""

    whole_batches = False

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
        parsed = amqp_url.parse(url)
        self._terms = Terms(parsed, exchange, app_id, confirm_timeout_seconds, parameters(parsed, app_id))
        self._reconnect, self._refused = reconnect, refused
        self._random = random.Random()  # noqa: S311
        #: Lists of answers; an empty one only wakes.
        self._answers: SimpleQueue[list[Answer]] = SimpleQueue()
        self._state = BrokerState(connected=False, detail=f"not connected to {self._terms.url} yet")
        #: The present link; the lock keeps a batch from slipping into one that has just ended.
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rabbitmq", daemon=True)
        self._news = News()
        probing = replace(self._terms, parameters=parameters(parsed, f"{app_id} probing"))
        self._prober = Prober(probing, self._answers.put)

    # --- the Broker protocol, called from the relay's thread --------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def send(self, batch: Sequence[Outgoing]) -> None:
        with self._lock:
            state = self._state
            if self._link is not None and state.connected:
                self._link.hand_over(batch)
                return
        self._answers.put([Answer(each.token, Outcome.NOT_SENT, state.detail) for each in batch])

    def probe(self, outgoing: Outgoing) -> None:
        self._prober.ask(outgoing)

    def answers(self, timeout: float) -> list[Answer]:
        found: list[Answer] = []
        with contextlib.suppress(Empty):
            found += self._answers.get(timeout=max(timeout, 0.0))
            while True:
                found += self._answers.get_nowait()
        if any(answer.outcome is Outcome.SILENT for answer in found):
            with self._lock:
                if self._link is not None:
                    self._link.known_to_be_silent()
        return found

    def wake(self) -> None:
        self._answers.put([])

    def state(self) -> BrokerState:
        return self._state

    def stop(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._stopping.set()
        self._prober.request_close()
        with self._lock:
            if self._link is not None:
                self._link.request_close(min(timeout / 2, _GOODBYE_SECONDS))
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._prober.join(max(0.0, deadline - time.monotonic()))

    # --- the I/O thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        attempt = 0
        while (link := self._next_link()) is not None:
            try:
                end = link.run()
            except Exception as mistake:
                log.exception("the connection to %s ended by a mistake of this program", self._terms.url)
                end = Ending(f"a mistake of this program: {type(mistake).__name__}", cause=Cause.OURS)
            with self._lock:
                self._link = None
                let_in = self._state.let_in or link.was_open
                self._state = BrokerState(connected=False, detail=end.detail, refused=end.refused, let_in=let_in)
            self._settle(link, end)
            self._tell(end, was_ready=link.ready)
            attempt = 1 if link.proven else attempt + 1
            # Only a login is asked for slowly: an exchange may be declared any moment, by a service that starts.
            backoff = self._refused if end.refused and not link.was_open else self._reconnect
            self._stopping.wait(backoff.wait(attempt, self._random))

    def _next_link(self) -> Link | None:
        """Return a new link, which takes messages once it is ready; None when it is time to stop."""
        while True:
            try:
                with self._lock:
                    if self._stopping.is_set():
                        return None
                    self._link = Link(self._terms, self)
                    return self._link
            except OSError as error:  # no file descriptors left
                self._news.trouble(
                    "unreachable", f"no connection to {self._terms.url}: {error}; trying again until it is there"
                )
            self._stopping.wait(self._reconnect.maximum_seconds)

    def _settle(self, link: Link, end: Ending) -> None:
        """Give every message that *link* still had its answer."""
        answers = unanswered(link, end)
        self._news.doubt(link.ready and bool(link.blocked or (not link.proven and answers)))
        self._answers.put(answers)

    def _tell(self, end: Ending, *, was_ready: bool) -> None:
        if end.expected:
            self._news.trouble("stopped", end.detail, logging.INFO)
        elif end.refused:
            again = "; trying again until it is allowed" if self._state.let_in else ""
            self._news.trouble("refused", end.detail + again, logging.ERROR)
        else:
            self._news.trouble("lost" if was_ready else "unreachable", f"{end.detail}; trying again until it is back")

    # --- what a link reports, in the I/O thread ---------------------------------------------------------------------------

    def ready(self) -> None:
        """The link takes messages."""
        self._state = BrokerState(connected=True)
        self._news.connected(f"connected to {self._terms.url}, exchange {self._terms.exchange}")
        self.wake()

    def answered(self, answers: list[Answer]) -> None:
        """The broker answered messages, or our encoder refused them."""
        self._answers.put(answers)

    def proven(self) -> None:
        """The link got its first confirm."""
        self._news.confirmed(f"{self._terms.url} takes messages again")

    def blocked(self, reason: str) -> None:
        """The broker reads nothing from us."""
        detail = f"{self._terms.url} takes no messages: {reason}; free memory or disk on the broker"
        self._state = BrokerState(connected=True, blocked=True, detail=detail)
        self._news.trouble("blocked", detail)
        self.wake()

    def unblocked(self) -> None:
        """The broker reads again."""
        self._state = BrokerState(connected=True)
        self._news.well(f"{self._terms.url} takes messages again")
        self.wake()
