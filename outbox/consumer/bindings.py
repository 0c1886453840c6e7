"""The bindings of a running service: they go with a deleted exchange, or by hand, and a broker tells no consumer so.

Every half minute they are made again, which changes nothing where they are there. Whether one was missing AMQP does not
tell: the management API does (`BROKER_MANAGEMENT_URL`), and the file of the embedded broker; where they are known it is said.
That the exchange is gone is seen without them. A running service does not make it anew: messages would flow as soon as the
first service is bound, past all the others. It looks every second, so that all are bound soon after `outbox topology apply`.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from outbox import topology as brokers
from outbox.consumer.amqp_errors import NotFound
from outbox.errors import BrokerError, OutboxError
from outbox.process.logs import say

if TYPE_CHECKING:
    from outbox.consumer.link import Link
    from outbox.consumer.service import Service
    from outbox.consumer.topology import Topology
    from outbox.settings import Settings

log = logging.getLogger(__name__)

#: How often bindings are looked at and made again.
_USUAL_SECONDS = 30.0
#: While there is no exchange to bind to.
_MISSING_SECONDS = 1.0


class Bindings:
    """Keeps a process of a service bound. A thread of its own looks; the receiving thread, which has the connection, binds."""

    def __init__(self, service: Service, topology: Topology, settings: Settings) -> None:
        self._service = service
        self._topology = topology
        self._settings = settings
        self._ended = threading.Event()
        self._due = threading.Event()
        self._exchange_is_gone = False
        #: What was said last of each thing: an unchanged state is said once.
        self._said: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="bindings", daemon=True)

    def start(self) -> None:
        """Begin to look; called when the service is connected, and bound, for the first time. Again: changes nothing."""
        if self._thread.ident is None and not self._ended.is_set():
            self._thread.start()

    def stop(self) -> None:
        """End; doing so again changes nothing. A look that is under way ends by itself, and is not waited for."""
        self._ended.set()

    def keep(self, link: Link) -> None:
        """Bind again where that is due; called by the receiving thread at every turn."""
        if not self._due.is_set():
            return
        self._due.clear()
        try:
            link.bind(self._topology)
        except NotFound as error:
            if f"no exchange '{self._topology.main.exchange}'" not in str(error):
                raise  # the queue went: another connection declares it
            self._gone()
        except BrokerError as error:  # it may go on with the bindings that it has
            self._say("consumer.may_not_bind", str(error))
        else:
            self._there()

    def _gone(self) -> None:
        self._exchange_is_gone = True
        queue = self._topology.main
        sentence = f"exchange {queue.exchange!r} is gone: nothing comes into {queue.name!r}; it is bound as soon as somebody"
        self._say("consumer.exchange_gone", f"{sentence} makes the exchange: outbox topology apply")

    def _there(self) -> None:
        self._said.pop("consumer.exchange_gone", None)
        self._said.pop("consumer.may_not_bind", None)
        if self._exchange_is_gone:
            self._exchange_is_gone = False
            queue = self._topology.main
            sentence = (
                f"exchange {queue.exchange!r} is there again, and {queue.name!r} bound to it: what others were sent before"
            )
            say(log, logging.WARNING, "consumer.bound_again", f"{sentence} did not reach it", service=self._service.name)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended.is_set():
            if not self._exchange_is_gone:
                self._look()
            self._due.set()
            self._ended.wait(_MISSING_SECONDS if self._exchange_is_gone else _USUAL_SECONDS)

    def _look(self) -> None:
        queue = self._topology.main
        try:
            found = brokers.bound(self._settings, queue.name)
        except OutboxError as error:
            self._say("consumer.bindings_unknown", f"whether {queue.name!r} is bound can't be seen: {error}")
            return
        self._said.pop("consumer.bindings_unknown", None)
        if found is None or self._ended.is_set():
            return
        missing, others = sorted(set(queue.routing_keys) - found), sorted(found - set(queue.routing_keys))
        lost = f"{queue.name!r} was not bound to {', '.join(missing)}: what was sent there meanwhile did not reach it"
        self._say("consumer.unbound", f"{lost}; it is bound again" if missing else "")
        step = f"such messages are parked; outbox consumer topology {self._service.typed} --apply --prune"
        names = f"{queue.name!r} is bound to {', '.join(others)}, for which this version has no handler"
        self._say("consumer.bound_without_handler", f"{names}: {step}" if others else "")

    def _say(self, event: str, sentence: str) -> None:
        """Say it unless it was the last thing said of that kind; an empty *sentence*: it is over."""
        if sentence and self._said.get(event) != sentence:
            say(log, logging.WARNING, event, sentence, service=self._service.name)
        self._said[event] = sentence
