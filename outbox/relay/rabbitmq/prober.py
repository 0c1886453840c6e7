"""A second connection for topics in trouble: what a silent queue does to it, it does to nobody else."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from outbox.relay.broker import Answer, Cause, Outcome
from outbox.relay.rabbitmq.close_reasons import Ending
from outbox.relay.rabbitmq.publishing import Link, unanswered

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox.relay.broker import Outgoing
    from outbox.relay.rabbitmq.publishing import Terms

log = logging.getLogger(__name__)


def _first_alone_silent(answers: list[Answer]) -> list[Answer]:
    """A channel waits for a silent queue with all that came later: only the first one without an answer shows a silence."""
    return [*answers[:1], *(replace(each, cause=Cause.OURS) for each in answers[1:])]


#: How long the broker may take to answer our farewell.
_GOODBYE_SECONDS = 1.0


class Prober:
    """Sends single messages on a connection that is opened for them and closed when they are answered."""

    def __init__(self, terms: Terms, answer: Callable[[list[Answer]], None]) -> None:
        """*answer* takes the answers, in the I/O thread."""
        self._terms = terms
        self._answer = answer
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._thread: threading.Thread | None = None
        #: The link has nothing left to ask, and goes: what is asked now waits for the next one.
        self._closing = False
        self._stopped = False
        #: Not handed to a link yet.
        self._waiting: list[Outgoing] = []
        #: Tokens that nothing was said of yet.
        self._open: set[int] = set()

    def ask(self, outgoing: Outgoing) -> None:
        """Send *outgoing*. It gets its answer, whatever becomes of the connection."""
        with self._lock:
            self._waiting.append(outgoing)
            if self._link is None:
                self._begin()
            elif self._link.ready and not self._closing:
                self._hand_over(self._link)

    def request_close(self) -> None:
        """Close soon and for good; what is unanswered gets its answer."""
        with self._lock:
            self._stopped = True
            if self._link is not None:
                self._link.request_close(0.0)

    def join(self, timeout: float) -> None:
        """Wait at most *timeout* seconds for the connection to be gone."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _begin(self) -> None:
        try:
            self._link = Link(self._terms, self)
        except OSError as error:  # no file descriptors left
            self._refuse(Ending(f"no connection to {self._terms.url}: {error}", cause=Cause.OURS))
            return
        self._thread = threading.Thread(target=self._run, args=(self._link,), name="rabbitmq-prober", daemon=True)
        self._thread.start()

    def _hand_over(self, link: Link) -> None:
        self._open |= {outgoing.token for outgoing in self._waiting}
        link.hand_over(self._waiting)
        self._waiting = []

    def _refuse(self, end: Ending) -> None:
        """Answer what was never handed to a link."""
        self._answer([Answer(outgoing.token, Outcome.NOT_SENT, end.detail, cause=end.cause) for outgoing in self._waiting])
        self._waiting = []

    def _run(self, link: Link) -> None:
        try:
            end = link.run()
        except Exception as mistake:
            log.exception("the probing connection to %s ended by a mistake of this program", self._terms.url)
            end = Ending(f"a mistake of this program: {type(mistake).__name__}", cause=Cause.OURS)
        with self._lock:
            self._answer(_first_alone_silent(unanswered(link, end)))
            if self._stopped or not self._closing:
                self._refuse(end)
            self._link = None
            self._closing = False
            self._open.clear()
            if self._waiting:
                self._begin()

    # --- what the link reports, in its thread ------------------------------------------------------------------------------

    def ready(self) -> None:
        """The link takes messages."""
        with self._lock:
            if self._link is not None:
                self._hand_over(self._link)

    def answered(self, answers: list[Answer]) -> None:
        """Something was said of messages; when nothing is left to ask, the connection goes."""
        with self._lock:
            self._answer(answers)
            self._open -= {answer.token for answer in answers}
            if self._link is None:
                return
            self._link.known_to_be_silent()  # whoever asks again knows
            if not self._open and not self._waiting:
                self._closing = True
                self._link.request_close(_GOODBYE_SECONDS)

    def proven(self) -> None:
        """The link got its first confirm."""

    def blocked(self, reason: str) -> None:
        """The broker reads nothing from us: what was asked will get no answer."""

    def unblocked(self) -> None:
        """The broker reads again."""
