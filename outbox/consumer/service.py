"""A service: a name, and what it does with the messages of each topic.

    service = Service("exports")

    @service.on("session.modified", "speaker.modified")
    def rebuild(message, db_session, /, *, event_id, **extra): ...

Known fields of the message's data come by keyword, all others in `**extra`, which every handler must take: a publisher may
add fields at any time. Data that is no JSON object (a list, a text, bytes) brings no keywords; it is `message.data`. What
is written through `db_session` commits together with the inbox row: once for each message, however often it is delivered.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar

from outbox.consumer import handlers
from outbox.errors import ConfigurationError, InvalidMessage
from outbox.message import check_name

if TYPE_CHECKING:
    from blinker import NamedSignal
    from sqlalchemy import MetaData
    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

    from outbox.consumer.handlers import Function, Handler
    from outbox.consumer.outcomes import Outcome
    from outbox.message import Message, Received

#: A piece of background work: takes the service's engine, returns whether there may be more to do.
Background = Callable[["Engine"], bool]
F = TypeVar("F", bound="Function")
B = TypeVar("B", bound=Background)
C = TypeVar("C", bound=Callable[[], object])
Order = Literal["late-ok", "strict"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_MAX_BATCH = 1_000


class Service:
    """An independent consumer: its own queue, its own database, its own inbox.

    *batch* is how many waiting messages may share a transaction (default: `CONSUMER_BATCH`); give 1 where handlers have
    effects outside their session, because a batch that fails is rolled back and handled again one by one. *order* says
    what becomes of a message that comes after a later one of its key was applied: `late-ok` applies it with
    `message.late`, `strict` parks it. *tables* are the service's own, created by `outbox consumer migrate`.
    """

    def __init__(
        self, name: str, *, batch: int | None = None, order: Order = "late-ok", tables: MetaData | None = None
    ) -> None:
        problems = []
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(f"service name {name!r} is not 1 to 63 of a-z, 0-9, - and _, starting with a letter or digit")
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= _MAX_BATCH):
            problems.append(f"batch={batch!r} is not a whole number from 1 to {_MAX_BATCH}")
        if order not in ("late-ok", "strict"):
            problems.append(f"order={order!r} is neither 'late-ok' nor 'strict'")
        if tables is not None and not hasattr(tables, "sorted_tables"):
            problems.append(f"tables={tables!r} is no MetaData; of a declarative base give Base.metadata")
        if problems:
            raise ConfigurationError("\n".join(problems))
        self.name = name
        #: What `outbox consumer …` takes for it (`shop.mail:service`): every advice must work as it is printed.
        self.typed = name
        self.batch = batch
        self.strict = order == "strict"
        self.tables = tables
        self._handlers: dict[str, Handler] = {}
        self._signals: dict[str, NamedSignal] = {}
        self.backgrounds: list[Background] = []
        self._checks: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        return f"<Service {self.name!r}: {', '.join(self.topics) or 'no topics'}>"

    # --- what it does -------------------------------------------------------------------------------------------------

    def on(self, *topics: str) -> Callable[[F], F]:
        """Register the decorated function for *topics*: `(message, db_session, /, *, field, …, **extra)`.

        Raises ConfigurationError, naming the function and the fix, for a signature that can't work, a topic that is none
        (patterns are not), and one that has a handler.
        """
        if not topics or not all(isinstance(topic, str) for topic in topics):
            raise ConfigurationError("name the topics: @service.on('session.modified')")

        def register(function: F) -> F:
            for topic in topics:
                self._add(topic, handlers.of_function(topic, function))
            return function

        return register

    def emit(self, signal: NamedSignal, *, topic: str) -> None:
        """Let messages of *topic* arrive as *signal*, as `Outbox.capture` took them: same keywords, this service as sender.

        Every receiver runs, also while the signal is muted; the first one that raises fails the message. Receivers find
        the transaction's session in `service.db_session` and the envelope in `service.message`.
        """
        self._add(topic, handlers.of_signal(topic, signal, self))
        self._signals[topic] = signal

    def background(self, function: B) -> B:
        """Register *function* for work that handlers leave behind in tables: files to write, deliveries to make.

        The runtime calls `function(engine)` in a thread of its own: at start, after each commit of handlers, and again
        at once while it returns True ("there may be more"). What it raises is logged and tried again after a pause; so it
        must be able to start over at any point. `--drain` and a graceful stop let it finish.
        """
        self.backgrounds.append(function)
        return function

    def at_start(self, function: C) -> C:
        """Register *function* for looking at the settings of the service's own when a process of it starts.

        It is called without arguments, before anything is connected to, and raises ConfigurationError for what can't work: the
        process ends with that text and exit code 1, instead of failing message by message.
        """
        self._checks.append(function)
        return function

    def _add(self, topic: str, handler: Handler) -> None:
        try:
            check_name("topic", topic, forbidden="*#", blanks=False)
        except InvalidMessage as error:
            raise ConfigurationError(f"{handler.name}: {error}") from error
        if topic in self._handlers:
            raise ConfigurationError(
                f"topic {topic!r} has a handler in service {self.name!r}: {self._handlers[topic].name}; "
                "call both from one function"
            )
        self._handlers[topic] = handler

    @property
    def topics(self) -> list[str]:
        """The topics it has handlers for, sorted."""
        return sorted(self._handlers)

    def handler(self, topic: str) -> Handler | None:
        """Return the handler of *topic*."""
        return self._handlers.get(topic)

    def check(self) -> None:
        """Raise ConfigurationError, with every problem, unless the service is ready to run.

        It has topics, each signal has receivers, and what was registered with `at_start` finds nothing wrong.
        """
        problems = [handlers.check_receivers(signal, topic, self) for topic, signal in self._signals.items()]
        problems += [_problem_of(each) for each in self._checks]
        if not self._handlers:
            problems.append(f"service {self.name!r} has no handlers; register one: @service.on('session.modified')")
        if any(problems):
            raise ConfigurationError("\n".join(filter(None, problems)))

    # --- while handling -----------------------------------------------------------------------------------------------

    @property
    def message(self) -> Received:
        """The message that this thread is handling. Raises LookupError elsewhere."""
        return handlers.current.get().message

    @property
    def db_session(self) -> Session:
        """The session of the message that this thread is handling; the runtime commits it. Raises LookupError elsewhere."""
        return handlers.current.get().db_session

    # --- for tests ----------------------------------------------------------------------------------------------------

    def deliver(self, message: Message | Received | bytes, engine: Engine) -> Outcome:
        """Apply *message* as the runtime would, in one transaction on *engine*, without a broker: for a service's tests.

        Takes what was sent, what is received, or bytes from the wire; makes missing tables. What the handler raises is
        raised here and leaves nothing behind; at run time it would be tried again and then parked. Returns `applied`,
        `duplicate`, or `parked` (no handler, unreadable, late under `strict`, its key is held).
        """
        from outbox.consumer.batch import deliver_once

        return deliver_once(self, message, engine)


def _problem_of(check: Callable[[], object]) -> str | None:
    try:
        check()
    except ConfigurationError as error:
        return str(error)
    return None
