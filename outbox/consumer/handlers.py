"""A handler: checked when it is registered, called with what a message holds."""

from __future__ import annotations

import inspect
import threading
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from outbox.consumer.calls import Calls
from outbox.consumer.outcomes import HandlerMistake, Incomplete
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from blinker import NamedSignal
    from sqlalchemy.orm import Session

    from outbox.message import Received

Function = Callable[..., object]
#: Names of fields in an error.
_SHOWN = 12
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Current:
    """The message being handled in this thread, and the session of its transaction."""

    message: Received
    db_session: Session


current: ContextVar[Current] = ContextVar("outbox_consumer_current")


@dataclass(frozen=True, slots=True)
class Handler:
    """What a service does with the messages of one topic."""

    topic: str
    function: Function
    name: str
    #: Fields without which the function can't be called.
    required: frozenset[str]
    calls: Calls = field(default_factory=Calls, compare=False, repr=False)

    def __call__(self, message: Received, db_session: Session) -> None:
        """Handle *message*. Raises Incomplete for missing fields, and whatever the function raises."""
        fields = message.data if isinstance(message.data, Mapping) else {}
        if missing := sorted(self.required - fields.keys()):
            found = "its data is no JSON object" if fields is not message.data else f"it has {_listed(fields)}"
            raise Incomplete(f"{self.name} needs {_listed(missing)}; {found}")
        call = self.calls.begin(message, self.name)
        try:
            self._call(message, db_session, fields)
        finally:
            self.calls.end(call)

    def _call(self, message: Received, db_session: Session, fields: Mapping[str, Any]) -> None:
        token = current.set(Current(message, db_session))
        try:
            result = self.function(message, db_session, **fields)
        except Exception:
            raise
        except BaseException as error:  # it would end the process: this worker's, and everybody's
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # Ctrl-C, in a test or a shell: signals come to no other thread
            raise HandlerMistake(f"{self.name} {_way_out(error)}") from error
        finally:
            current.reset(token)
        if problem := _not_run(result):
            raise HandlerMistake(f"{self.name} {problem}")
        db_session.flush()  # now, so that an error is this message's and the next one sees what this one wrote
        if db_session.in_nested_transaction():
            raise HandlerMistake(f"{self.name} left a savepoint open; use it as `with db_session.begin_nested():`")


def _way_out(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "called sys.exit(); raise Reject or Retry, or let an error out"
    if isinstance(error, CancelledError):
        return "was cancelled by what it called (asyncio.CancelledError)"
    return f"raised {type(error).__name__}, which is no Exception: it would end the process"


def _not_run(result: object) -> str:
    """Say what is wrong when a function, under a decorator or as an object, turned out to be async or a generator."""
    if not (inspect.iscoroutine(result) or inspect.isgenerator(result) or inspect.isasyncgen(result)):
        return ""
    if inspect.iscoroutine(result):
        result.close()  # without Python's warning
    return f"returned a {type(result).__name__}, which nothing would run; write a plain function"


def _listed(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "") or "no fields"


def of_function(topic: str, function: Function) -> Handler:
    """Return the handler that calls *function*; raise ConfigurationError, with the fix, for a signature that can't work."""
    name = getattr(function, "__qualname__", repr(function))
    where = _place(function)
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(f"{where} is async or a generator: nothing would run it; write a plain function")
    parameters = list(inspect.signature(function).parameters.values())
    fields = [p for p in parameters[2:] if p.kind in (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)]
    required = frozenset(p.name for p in fields if p.default is inspect.Parameter.empty)
    by_keyword = ["*", *(p.name for p in fields)] if fields else []  # Python refuses a bare `*` before `**extra`
    right = ", ".join(["message, db_session, /", *by_keyword, "**extra"])
    fix = f"write: def {name.rpartition('.')[2]}({right})"
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ConfigurationError(f"{where} has no **extra: a field added to {topic!r} later would stop it; {fix}")
    if len(parameters) < 2 or any(p.kind is not inspect.Parameter.POSITIONAL_ONLY for p in parameters[:2]):
        raise ConfigurationError(f"{where} must take the message and the session by position, before a `/`; {fix}")
    if any(p.kind is inspect.Parameter.POSITIONAL_ONLY for p in parameters[2:]):
        raise ConfigurationError(f"{where} takes more than two arguments by position; fields come by keyword; {fix}")
    return Handler(topic, function, name, required)


def of_signal(topic: str, signal: NamedSignal, sender: object) -> Handler:
    """Return the handler that passes a message on to the receivers that *signal* has for *sender*."""

    def emit(_message: Received, _db_session: Session, /, **fields: Any) -> None:
        # Not signal.send(): whoever mutes the signal in another thread would mute it here, and the effect be missing.
        receivers = list(signal.receivers_for(sender))
        if not receivers:
            raise HandlerMistake(f"signal {signal.name!r} has no receivers any more; connect them with weak=False")
        for receiver in receivers:
            if problem := _not_run(receiver(sender, **fields)):
                raise HandlerMistake(f"{_place(receiver)} {problem}")

    return Handler(topic, emit, f"signal {signal.name!r}", frozenset())


def check_receivers(signal: NamedSignal, topic: str, sender: object) -> str | None:
    """Return what is wrong with the receivers that *signal* has for *sender*, None if nothing is."""
    receivers = list(signal.receivers_for(sender))
    if not receivers:
        return (
            f"signal {signal.name!r} has no receivers for the service, and messages of {topic!r} would have no effect; connect "
            "them before the service runs, to any sender, with weak=False unless something else keeps them alive"
        )
    for receiver in receivers:
        if inspect.iscoroutinefunction(receiver):
            return f"{_place(receiver)} is async: nothing would run it; connect a plain function to signal {signal.name!r}"
    return None


def _place(function: Function) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"handler {getattr(function, '__qualname__', repr(function))}{where}"
