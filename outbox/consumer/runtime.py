"""A running service: connect, receive, acknowledge, stop. The receiving thread is the process's main one.

It alone talks to the broker; workers (`pool`) settle messages, the redriver (`redrive`) replays parked ones, upkeep
(`upkeep`) writes the process's row and forgets old ids. Whatever goes wrong with the connection ends it, and a new one
begins: the broker delivers again what was not acknowledged, and the inbox knows what was applied.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from concurrent import futures
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from outbox.consumer import background, heartbeat, operating, topology
from outbox.consumer.amqp_errors import ConsumerCancelled
from outbox.consumer.batch import Deliveries
from outbox.consumer.bindings import Bindings
from outbox.consumer.exclusive import Turnstile
from outbox.consumer.failures import is_refusal, is_transient
from outbox.consumer.heartbeat import Upkeep
from outbox.consumer.key_lanes import Waiting
from outbox.consumer.link import Link, shown
from outbox.consumer.redrive import Redriver
from outbox.consumer.retries import Attempts, Pause, Policy
from outbox.consumer.watch import Watch
from outbox.consumer.workers import Pool
from outbox.errors import BrokerError, ConfigurationError, Unavailable
from outbox.process import failpoints, probes, stopping
from outbox.process.backoff import Backoff
from outbox.process.logs import say
from outbox.process.masking import mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Engine

    from outbox.consumer.delivery import Arrival
    from outbox.consumer.service import Service
    from outbox.settings import Settings

log = logging.getLogger(__name__)

_RECONNECT = Backoff(0.2, 5.0)
_DATABASE_SECONDS = 1.0
#: How often a start that waits for a silent database asks whether it is still wanted.
_ASK_SECONDS = 0.1
#: Who drains waits for an end: a server that is away for so long is said, with the exit code of "try later".
_DRAIN_PATIENCE_SECONDS = 20.0
#: How long the loop waits for the broker before it looks around.
_TURN_SECONDS = 0.5
_LAST_TURN_SECONDS = 0.05
#: Different reasons said while the broker is away; more are the same one in ever other words.
_REASONS = 20
#: How often it looks whether the queue is empty, while that makes a difference.
_EMPTY_SECONDS = 1.0
#: A loop that did not turn for so long is stuck.
_STUCK_SECONDS = 60.0


def run(service: Service, settings: Settings, *, drain: bool = False) -> int:
    """Run *service* until SIGTERM or SIGINT, with *drain* until its queue is empty; return the exit code.

    0: ended as asked. 1: a worker crashed, or work in hand did not end within `OUTBOX_SHUTDOWN_TIMEOUT`. A second signal
    ends the process at once. Raises ConfigurationError, SchemaError and BrokerError for what waiting would not mend. Where
    *drain* finds a server away for 20 seconds it raises Unavailable for the broker, the database's own error at the start.
    """
    settings.require("BROKER_URL", "CONSUMER_DATABASE_URL")
    service.check()
    engine = operating.open_engine(service, settings)
    try:
        return Runtime(service, settings, engine, drain=drain).run()
    finally:
        engine.dispose()


class Runtime:
    """One process of a service."""

    def __init__(
        self, service: Service, settings: Settings, engine: Engine, *, drain: bool = False, policy: Policy | None = None
    ) -> None:
        self._service = service
        self._settings = settings
        self._url = str(settings.broker_url)
        self._drain = drain
        self._engine = engine
        self._topology = topology.of(service, settings.exchange)
        self._rng = random.Random()  # noqa: S311 - spreads reconnects, keeps no secret
        self._stopping = threading.Event()
        self._link: Link | None = None
        self._consuming = self._consumed_before = False
        self._prefetch = settings.consumer_prefetch
        self._asked_at = 0.0
        self._lost = ""
        #: What was said of the broker since it was last there.
        self._said: set[str] = set()
        self._turned_at = time.monotonic()
        policy = policy or Policy(max_attempts=settings.consumer_max_attempts)
        self._waiting = Waiting(self._expected_seconds)
        self._watch = Watch(service)
        self._pause = Pause(service.name, policy, self._stopping, self._rng)
        turnstile = self._turnstile = Turnstile()
        # SQLite has one writer: more workers would only wait for each other's lock, in ever longer naps.
        workers = 1 if engine.dialect.name == "sqlite" else settings.consumer_workers
        batch = service.batch or settings.consumer_batch
        # What one worker takes no other has: of a small prefetch each gets its share.
        share = max(1, settings.consumer_prefetch // workers)
        self._upkeep = Upkeep(service, engine, self._topology, retention_seconds=settings.inbox_retention_seconds)
        replayers = min(workers, operating.REPLAYERS)
        attempts = [self._attempts(number, policy) for number in range(2 * workers + replayers)]
        own, replaying, spares = attempts[:workers], attempts[workers:-workers], attempts[-workers:]
        self._pool = Pool(own, self._waiting, batch=min(batch, share), wake=self._wake, spares=spares)
        self._redriver = Redriver(replaying, turnstile, self._stopping, batch=batch, process=self._upkeep.id)
        self._bindings = Bindings(service, self._topology, settings)
        self._backgrounds = [background.Worker(service.name, each, engine) for each in service.backgrounds]

    def _expected_seconds(self, arrival: Arrival) -> float:
        handler = self._service.handler(arrival.topic) if arrival.message is not None else None
        return 0.0 if handler is None else handler.calls.expected_seconds()

    def _attempts(self, number: int, policy: Policy) -> Attempts:
        deliveries = Deliveries(self._service, self._engine, number, clock=self._upkeep.clock)
        return Attempts(deliveries, policy, self._pause, self._rng, self._turnstile)

    # --- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """See `run`."""
        with stopping.on_signals(self.stop), self._probes():
            try:
                if self._prepare_database():
                    self._pool.start()
                    self._redriver.start()
                    self._upkeep.start()
                    for each in self._backgrounds:
                        each.start()
                    self._say("consumer.started", f"service {self._service.name!r} takes {', '.join(self._service.topics)}")
                    self._receive()
                    return self._end()
                return 0
            finally:
                self.stop()
                self._bindings.stop()
                self._drop()
                self._upkeep.stop()

    def stop(self) -> None:
        """Finish the transaction in hand, acknowledge, and end; from any thread."""
        self._stopping.set()
        self._waiting.close()
        self._wake()

    def _prepare_database(self) -> bool:
        """Wait for the database; return True when its tables are right, False when stopped meanwhile."""
        begun_at = time.monotonic()
        while not self._stopping.is_set():
            try:
                if not self._check_database():
                    break
            except SQLAlchemyError as error:
                impatient = self._drain and time.monotonic() - begun_at > _DRAIN_PATIENCE_SECONDS
                if impatient or is_refusal(error) or not is_transient(error):
                    raise
                self._pause.database_failed(error)
                self._stopping.wait(_DATABASE_SECONDS)
            else:
                self._pause.over()
                return True
        return False

    def _check_database(self) -> bool:
        """Raise what is wrong with the tables; return False when stopped meanwhile.

        In a thread of its own: a server that accepts and then is silent must not keep the process from ending.
        """
        answer: futures.Future[None] = futures.Future()

        def ask() -> None:
            try:
                operating.check(self._service, self._engine, migrate_first=self._url.startswith("embedded:"))
                self._upkeep.prepare()
                self._choose_prefetch()
            except BaseException as error:  # noqa: BLE001 - raised again by who waits for the answer
                answer.set_exception(error)
            else:
                answer.set_result(None)

        threading.Thread(target=ask, name="start", daemon=True).start()
        while not self._stopping.is_set():
            if futures.wait([answer], timeout=_ASK_SECONDS).done:
                answer.result()
                return True
        return False

    def _choose_prefetch(self) -> None:
        """Never take fewer messages at once than an earlier process may have given back.

        RabbitMQ returns what a process held to the front of the queue, and what its successor held behind the rest of that:
        a successor that takes fewer, and ends too, has changed the order.
        """
        wanted = self._settings.consumer_prefetch
        # The embedded broker starts from the lowest row, however many somebody held.
        earlier = 0 if self._url.startswith("embedded:") else heartbeat.largest_prefetch(self._engine, self._service.name)
        self._prefetch = self._upkeep.prefetch = max(wanted, earlier)
        if earlier > wanted:
            sentence = f"CONSUMER_PREFETCH={wanted} begins when the queue has been empty; until then {earlier}, as before"
            self._say("consumer.prefetch_kept", sentence)

    def _lower_prefetch(self, link: Link) -> bool:
        """Say whether a smaller prefetch may begin now, with another connection; asks the broker at most once a second."""
        wanted = self._settings.consumer_prefetch
        if self._prefetch <= wanted or time.monotonic() - self._asked_at < _EMPTY_SECONDS:
            return False
        self._asked_at = time.monotonic()
        if not link.has_emptied(self._topology):
            return False
        self._prefetch = self._upkeep.prefetch = wanted
        self._upkeep.queue_was_empty()
        self._say("consumer.prefetch_lowered", f"the queue was empty: from now on CONSUMER_PREFETCH={wanted}")
        return True

    def _end(self) -> int:
        """Wait for the work in hand, acknowledge it, drop the connection; return the exit code."""
        self._say("consumer.stopping", "finishing the transactions in hand")
        deadline = time.monotonic() + self._settings.shutdown_timeout_seconds
        while self._busy and time.monotonic() < deadline:
            self._last_turn()
        cut_short = self._busy
        self._last_turn()
        self._leave_broker()  # before the background work: a successor may begin
        unfinished = [each for each in self._backgrounds if not each.stop(max(0.0, deadline - time.monotonic()))]
        self._upkeep.stop()
        if cut_short:
            who = f": {named}" if (named := self._watch.named()) else ""
            sentence = f"a handler did not end in time; its transaction is rolled back{who}"
            self._say("consumer.cut_short", sentence, logging.ERROR)
        if unfinished:
            self._say("consumer.cut_short", "background work did not end in time; the next process goes on", logging.ERROR)
        if cut_short or unfinished or self._pool.crash is not None:
            return 1
        self._say("consumer.stopped", f"service {self._service.name!r} ended; what it had not finished stays in its queue")
        return 0

    def _leave_broker(self) -> None:
        if self._link is None:
            return
        self._upkeep.look(self._link, now=True)
        try:
            self._link.flush()
        except Exception as error:
            log.debug("the last acknowledgements may be lost", exc_info=error)
        self._drop()

    @property
    def _busy(self) -> bool:
        return self._pool.working or self._redriver.working

    def _last_turn(self) -> None:
        if self._link is None:
            self._pool.join(_LAST_TURN_SECONDS)
            self._redriver.join(_LAST_TURN_SECONDS)
            return
        try:
            self._turn(self._link, _LAST_TURN_SECONDS)
        except Exception as error:  # noqa: BLE001 - as for any lost connection; there won't be another
            self._drop()
            self._say_lost(_words(error))

    # --- connections ------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Receive until the process is to stop, over as many connections as that takes."""
        failures, connected_at = 0, time.monotonic()
        while not self._stopping.is_set():
            try:
                link = self._connect()
                failures = 0
                while not self._stopping.is_set():
                    self._turn(link, _TURN_SECONDS)
                    connected_at = time.monotonic()
                    if self._pool.crash is not None or (self._drain and self._is_drained(link)):
                        self.stop()
                    elif self._lower_prefetch(link):
                        self._drop()
                        link = self._connect()
            except (ConfigurationError, BrokerError) as error:
                self._drop()
                if not self._consumed_before:
                    raise
                self._say_lost(str(error))
            except Exception as error:  # noqa: BLE001 - whatever a client library raised: the connection is of no more use
                self._drop()
                self._say_lost(_words(error))
            else:
                return
            failures += 1
            self._upkeep.look(None)
            self._watch.look()
            if self._drain and time.monotonic() - connected_at > _DRAIN_PATIENCE_SECONDS:
                raise Unavailable(f"no connection to {shown(self._url)}: {self._lost}; start the broker and drain again")
            self._stopping.wait(_RECONNECT.wait(failures, self._rng))

    def _connect(self) -> Link:
        self._link = link = Link(self._url, name=f"{self._service.name} {socket.gethostname()}:{os.getpid()}")
        link.consume(self._topology, self._prefetch, self._arrived)
        self._bindings.start()
        self._consuming = self._consumed_before = True
        self._lost = ""
        self._said.clear()
        self._say("consumer.connected", f"consuming {self._topology.main.name!r} on {shown(self._url)}")
        return link

    def _drop(self) -> None:
        self._consuming = False
        link, self._link = self._link, None
        if link is not None:
            link.drop()
        self._waiting.clear()  # all of it comes again, in order

    def _say_lost(self, words: str) -> None:
        """Say each reason once: a second one, such as a changed password, is what an operator has to mend."""
        if words not in self._said and len(self._said) < _REASONS:
            sentence = f"no connection to {shown(self._url)}: {words}; trying again"
            self._say("consumer.disconnected", sentence, logging.WARNING)
        self._said.add(words)
        self._lost = words

    def _arrived(self, arrival: Arrival) -> None:
        failpoints.reached("K1")
        self._waiting.add(arrival)

    def _turn(self, link: Link, timeout: float) -> None:
        """Receive for a while, then acknowledge what was settled."""
        self._turned_at = time.monotonic()
        link.receive(timeout)
        finished = self._pool.finished()
        for arrival in finished:
            if arrival.receipt is not None:
                arrival.receipt.settled()  # that of an older connection tells nobody
        if finished:
            for each in self._backgrounds:
                each.wake()
        if link.acknowledge():
            failpoints.reached("K5")
        self._bindings.keep(link)
        self._upkeep.look(link)
        self._watch.look()

    def _is_drained(self, link: Link) -> bool:
        quiet = self._redriver.idle and not link.in_hand() and link.backlog(self._topology) == 0 and not link.in_hand()
        return quiet and all(each.idle for each in self._backgrounds)

    def _wake(self) -> None:
        link = self._link
        if link is not None:
            link.wake()

    # --- seen from outside --------------------------------------------------------------------------------------------

    @contextmanager
    def _probes(self) -> Iterator[None]:
        if self._settings.http_address is None:
            yield
            return
        server = probes.Server(self._settings.http_address, live=self.live, ready=self.ready)
        server.start()
        try:
            yield
        finally:
            server.stop()

    def live(self) -> probes.Health:
        """Whether the loop turns and handlers end, whatever the servers do."""
        age, longest = time.monotonic() - self._turned_at, self._watch.oldest_seconds()
        stuck = self._link is not None and age > _STUCK_SECONDS
        hung = longest > self._settings.handler_limit_seconds
        detail = {"service": self._service.name, "turned_seconds_ago": age, "oldest_handler_seconds": longest}
        return probes.Health(not stuck and not hung and self._pool.crash is None, detail)

    def ready(self) -> probes.Health:
        """Whether messages can be received and applied."""
        connected, problem = self._consuming, self._pause.problem
        detail = {"service": self._service.name, "connected": connected, "broker": self._lost, "database": problem}
        return probes.Health(connected and not problem and not self._stopping.is_set(), detail)

    def _say(self, event: str, sentence: str, level: int = logging.INFO) -> None:
        say(log, level, event, sentence, service=self._service.name)


def _words(error: BaseException) -> str:
    """Return what a client library said, without the password it may have put there."""
    if isinstance(error, ConsumerCancelled):
        return f"the broker delivers no more: {error.reply_text}"
    return mask(str(getattr(error, "reply_text", None) or error) or type(error).__name__)
