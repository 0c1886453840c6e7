"""`Outbox`: the one object an application makes.

outbox = Outbox()
outbox.capture(sessions_modified, topic="session.modified", key="event:{event_id}")
...
outbox.init_app(app)                                                      # in the application factory
...
sessions_modified.send(current_app._get_current_object(), event_id=1)     # in a view, before the commit
db.session.commit()                                                       # both, or neither
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import UUID
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from outbox import database, message, settings
from outbox.capture import outcomes, sessions, trace, transactions
from outbox.capture.outcomes import Sent
from outbox.capture.signals import Capture, captures, connect
from outbox.errors import CaptureError, ConfigurationError, InvalidMessage
from outbox.message import JSON, Message
from outbox.process import failpoints
from outbox.settings import Settings

if TYPE_CHECKING:
    from blinker import Signal
    from flask import Flask
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import SessionTransaction

    from outbox.capture.sessions import Source

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
#: Where an application context keeps its `fates.Context`, and a WeakSet of the sessions that began in it.
_CONTEXT, _BEGUN = "_outbox_context", "_outbox_begun"


@dataclass(frozen=True, slots=True)
class State:
    """What `init_app` found for one app: `app.extensions["outbox"]`."""

    outbox: Outbox
    settings: Settings
    #: Gives the session of the current request or command.
    session: Source
    #: Gives the engine that the outbox tables are in, for commands.
    engine: Callable[[], Engine]
    #: The same where it was given; None: where the session puts its tables.
    given_engine: Engine | None

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that are captured or known, sorted."""
        return self.outbox.topics


class Outbox:
    """Captures signals into the outbox tables, in the transaction of whoever sends them.

    With Flask: `Outbox()` and `init_app(app)`; the session is Flask-SQLAlchemy's or -Lite's unless *session* says
    otherwise. Without: `Outbox(session=…, source="/shop")`, where *session* is a Session, a scoped_session, a sessionmaker, or
    a function that returns the current session (an AsyncSession too). A signal whose sender is a session, or an object of
    one, belongs to that session. For any other sender, where several sessions are open in a request, the one that wrote is
    meant; where that does not tell, the message is refused. *engine* is needed only where one session uses several.
    Other arguments are settings, by their lower-case names without prefix: `Outbox(max_body="64KiB")`.

    A SQLite engine that can be found here or in `init_app` is given to `outbox.database.prepare`.
    Raises ConfigurationError for an argument that is no setting or can't be one.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        session: Source | None = None,
        engine: Engine | AsyncEngine | None = None,
        **options: object,
    ) -> None:
        self._arguments = {_setting_name(name): value for name, value in options.items()}
        settings.check(self._arguments)
        self._session = None if session is None else sessions.source(session)
        self._engine = _engine(engine)
        self._in_app = False
        self._captures: list[tuple[Signal, Capture]] = []
        self._recorders: list[list[Message]] = []
        self._standalone: State | None = None
        _prepare(self._engine or sessions.engine_of(self._session))
        if app is not None:
            self.init_app(app)

    # --- registering --------------------------------------------------------------------------------------------------

    def init_app(self, app: Flask, session: Source | None = None, engine: Engine | AsyncEngine | None = None) -> None:
        """Read the settings of *app*, find its session, add `flask outbox …`; one outbox may serve several apps.

        *session* is as in `Outbox(session=…)`; the app's Flask-SQLAlchemy is found, and may be given all the same.
        Raises ConfigurationError with all that is wrong, before anything is sent.
        """
        if not hasattr(app, "extensions"):
            raise ConfigurationError(
                f"init_app got {type(app).__name__}, no Flask app; make the outbox with Outbox(), then outbox.init_app(app)"
            )
        if "outbox" in app.extensions:
            raise ConfigurationError(f"app {app.name!r} has an outbox already; call init_app once for each app")
        if session is None:
            source = self._session or _FlaskSession(app)
        elif _is_flask_sqlalchemy(session):
            source = _FlaskSession(app)
        else:
            source = sessions.source(session)
        loaded = settings.load(self._arguments, config=app.config, environ=os.environ, for_app=True)
        if loaded.source is None:
            loaded = settings.override(loaded, {"OUTBOX_SOURCE": f"/{app.name}"})
        given = _engine(engine) or self._engine
        known = given or sessions.engine_of(source)
        app.extensions["outbox"] = State(self, loaded, source, _FlaskEngine(app, source, loaded, known), given)
        self._in_app = True
        _prepare(known)
        _prepare_flask_engines(app)
        app.cli.add_command(import_module("outbox.cli").group)
        app.teardown_appcontext(_end_context)

    def capture(self, signal: Signal, *, topic: str, key: str | None = None, unheard: str = "hold") -> None:
        """From now on hold a message for *topic* each time *signal* is sent; again with the same changes nothing.

        *key* is a template of the signal's keywords, `event:{event_id}`: messages of one key arrive in commit order, and
        their writers wait for one another's commit. Without a key there is no order. `unheard="drop"`: a message that no
        service is bound to is done; otherwise it waits for one. Raises ConfigurationError.
        """
        capture = Capture(signal, topic, key, unheard, outbox=self, hold=self._hold)
        for existing in captures(signal):
            if existing.topic == topic and existing.outbox is self:
                if (existing.key, existing.unheard) != (capture.key, capture.unheard):
                    raise ConfigurationError(
                        f"signal {capture.signal_name!r} is captured as {topic!r} already, with another key or `unheard`; "
                        "capture it once"
                    )
                return
        connect(signal, capture)
        self._captures.append((signal, capture))

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that were captured, sorted."""
        return tuple(sorted({capture.topic for _, capture in self._captures}))

    @property
    def captures(self) -> tuple[tuple[Signal, Capture], ...]:
        """Every captured signal with its capture, in the order in which they were registered."""
        return tuple(self._captures)

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(
        self,
        topic: str,
        data: Any = None,
        *,
        key: str | None = None,
        session: Any = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        content_type: str = JSON,
        unheard: str = "hold",
    ) -> UUID:
        """Hold a message without a signal, and return its id.

        *data* is anything JSON, or bytes with another *content_type*; *key* is the key itself. *session* is a session, or a
        Core connection on which it is written at once (that of a session stands for the session); left out, it is the
        current session. Raises InvalidMessage and CaptureError; after either the transaction can only be rolled back.
        """
        state = self._state(None)
        if state.outbox is not self:
            raise CaptureError("outbox.send(): the current app has another outbox; send with that one")
        by = "outbox.send()"
        target = self._target(state, session, by)
        with transactions.dooming(target, by):
            sent = self._sent(state, _build(state.settings, topic, data, key, headers, content_type), unheard, by)
            if isinstance(target, Connection):
                transactions.hold_on_connection(target, sent)
            else:
                transactions.hold(target, state.given_engine, sent)
        self._record(sent)
        return sent.message.id

    @contextmanager
    def record(self) -> Iterator[list[Message]]:
        """For tests: a list of the messages that this outbox is sent inside the block, by any thread, in order of sending.

        A message is in it from its `send()` on and leaves it when its transaction or savepoint is rolled back or its session
        is closed without commit, also after the block: in the end the list holds what committed. What is refused is never in
        it. Rows are written as always.
        """
        messages: list[Message] = []
        self._recorders.append(messages)
        try:
            yield messages
        finally:
            # By identity: two lists that hold the same messages are equal, and the other one may be still in use.
            self._recorders[:] = [recorder for recorder in self._recorders if recorder is not messages]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _hold(self, capture: Capture, sender: object, unnamed: tuple[object, ...], data: dict[str, object]) -> UUID | None:
        by = f"signal {capture.signal_name!r}"
        own = sessions.of_sender(sender)
        with nullcontext() if own is None else transactions.dooming(own, by):
            state = self._state(sender)
            if state.outbox is not self:
                return None  # the app that sends has another outbox, and that one captures
            failpoints.reached("C1")
            db_session = own or self._current(state, by)
        with transactions.dooming(db_session, by):
            capture.check(sender, unnamed, data)
            key = None if capture.key is None else capture.key.fill(data)
            built = _build(state.settings, capture.topic, data, key, _NO_HEADERS, JSON)
            sent = self._sent(state, built, capture.unheard, by)
            transactions.hold(db_session, state.given_engine, sent)
        self._record(sent)
        return built.id

    def _current(self, state: State, by: str) -> Session:
        """Return the session of what names none: the application's own, unless another one of this context is at work."""
        usual = sessions.current(state.session)
        begun = _begun_here(state)
        others = [
            each for each in begun if each is not usual and transactions.uses_database_of(each, usual, state.given_engine)
        ]
        return sessions.meant(usual, others, by)

    def _target(self, state: State, given: Any, by: str) -> Session | Connection:
        if given is None:
            return self._current(state, by)
        target = sessions.connection_of(given)
        if isinstance(target, Connection):
            return transactions.session_of(target) or target
        return sessions.current(target)

    def _sent(self, state: State, built: Message, unheard: str, by: str) -> Sent:
        return Sent(message=built, unheard=unheard, by=by, recorders=tuple(self._recorders), context=_context_of(state))

    def _record(self, sent: Sent) -> None:
        for recorder in sent.recorders:
            recorder.append(sent.message)

    def _state(self, sender: object) -> State:
        """Return the state of the app that *sender* is, else of the current app, else of this outbox without Flask.

        An outbox that no app has is without Flask everywhere: another outbox of the app does not speak for it.
        """
        app = _app_of(sender)
        state: State | None = None if app is None else app.extensions.get("outbox")
        if state is not None and (self._in_app or state.outbox is self):
            return state
        if self._standalone is None:
            self._standalone = self._without_flask(app)
        return self._standalone

    def _without_flask(self, app: Flask | None) -> State:
        loaded = settings.load(self._arguments, environ=os.environ, for_app=True)
        if loaded.source is None:
            if app is not None:
                has = "another" if "outbox" in app.extensions else "no"
                raise CaptureError(f"app {app.name!r} has {has} outbox; call outbox.init_app(app) in its factory")
            raise ConfigurationError(
                "OUTBOX_SOURCE is not set: which application says it; make the outbox with Outbox(source='/shop'), or send "
                "inside `with app.app_context():`"
            )
        return State(self, loaded, self._session or _no_session, lambda: _known(self._engine), self._engine)


def _engine(given: object) -> Engine | None:
    found = database.synchronous(given)
    if found is not None and not isinstance(found, Engine):  # its value is not shown: a URL holds a password
        raise ConfigurationError(f"engine= got {type(given).__name__}, no engine; give what create_engine returned")
    return found


def _prepare(engine: Engine | None) -> None:
    if engine is not None:
        database.prepare(engine)


def _no_session() -> Any:
    raise CaptureError(
        "no session can be found for it; send inside `with app.app_context():`, make the outbox with Outbox(session=…), or say "
        "which: signal.send(session, …), outbox.send(…, session=session)"
    )


def _known(engine: Engine | None) -> Engine:
    if engine is None:
        raise ConfigurationError("no engine is known; make the outbox with Outbox(engine=…)")
    return engine


def _build(given: Settings, topic: str, data: Any, key: str | None, headers: Mapping[str, str], content_type: str) -> Message:
    """Return the message, complete and final: later changes of what *data* holds change nothing."""
    if not isinstance(headers, Mapping):
        raise InvalidMessage(f"headers is a {type(headers).__name__}; give a mapping of names to texts")
    limit = given.max_body_bytes
    body = message.encode(data, limit=limit) if content_type == JSON else message.encoded(data, content_type, limit=limit)
    built = Message(
        id=message.new_id(),
        source=given.source or "/",
        topic=topic,
        key=key,
        body=body,
        content_type=content_type,
        headers=MappingProxyType({**trace.headers(), **headers}),
        created_at=datetime.now(UTC),
    )
    message.check_headers(built.headers)
    return built


def _setting_name(argument: str) -> str:
    """`max_body` is OUTBOX_MAX_BODY; names that have no prefix, such as `database_url`, are just upper-cased."""
    name = argument.upper()
    return name if name in settings.NAMES else f"OUTBOX_{name}"


# --- with Flask ---------------------------------------------------------------------------------------------------------


def _app_of(sender: object) -> Flask | None:
    """Return the app that *sender* is (also behind the `current_app` proxy), else the current app, else None."""
    flask = sys.modules.get("flask")  # without flask in the process nothing can be a Flask app
    if flask is None:
        return None
    if isinstance(sender, flask.Flask):
        unwrap = getattr(sender, "_get_current_object", None)
        return unwrap() if unwrap else sender  # type: ignore[no-any-return]
    if flask.has_app_context():
        return flask.current_app._get_current_object()  # type: ignore[no-any-return]
    return None


def _is_flask_sqlalchemy(given: object) -> bool:
    """Say whether *given* is a Flask-SQLAlchemy or -Lite, as other extensions are given them: `init_app(app, db)`."""
    classes = (getattr(sys.modules.get(name), "SQLAlchemy", None) for name in ("flask_sqlalchemy", "flask_sqlalchemy_lite"))
    return isinstance(given, tuple(cls for cls in classes if cls is not None))


@dataclass(frozen=True, slots=True)
class _FlaskSession:
    """The session of Flask-SQLAlchemy or Flask-SQLAlchemy-Lite, looked up when it is needed: `db` may be set up later."""

    app: Flask

    def __call__(self) -> Any:
        # Their session is that of the current context, whichever app is asked for.
        current = _app_of(None)
        if current is not self.app:
            where = "outside an application context" if current is None else f"in the context of app {current.name!r}"
            raise CaptureError(f"it was sent for app {self.app.name!r} {where}; send it inside `with app.app_context():`")
        extension = self.app.extensions.get("sqlalchemy")
        if extension is None or not hasattr(extension, "session"):
            raise CaptureError(
                f"app {self.app.name!r} has no Flask-SQLAlchemy; say where its sessions are: outbox.init_app(app, session=…)"
            )
        if not extension.engines and getattr(extension, "async_engines", None):
            return extension.async_session
        return extension.session


@dataclass(frozen=True, slots=True)
class _FlaskEngine:
    """The engine of the app, for commands: the one that was given, that of its SQLAlchemy extension, or its session's."""

    app: Flask
    source: Source
    settings: Settings
    known: Engine | None

    def __call__(self) -> Engine:
        found = self.known or self._found()
        if not found.dialect.is_async:
            return found
        if self.settings.database_url is None:
            raise ConfigurationError(
                f"app {self.app.name!r} uses {found.dialect.driver}, which commands can't; set DATABASE_URL to the same "
                "database with another driver, such as postgresql+psycopg://"
            )
        return database.create_engine(self.settings.database_url)

    def _found(self) -> Engine:
        with self.app.app_context():
            extension = self.app.extensions.get("sqlalchemy")
            return next(_default_engines(extension), None) or sessions.current(self.source).get_bind().engine


def _default_engines(extension: Any) -> Iterator[Engine]:
    """Give the default engine of Flask-SQLAlchemy, or those of Flask-SQLAlchemy-Lite: the asynchronous one last."""
    for engines, default in (("engines", None), ("engines", "default"), ("async_engines", "default")):
        found = getattr(extension, engines, {}).get(default)
        if found is not None:
            yield getattr(found, "sync_engine", found)


def _prepare_flask_engines(app: Flask) -> None:
    """Prepare the engines that exist already; one that is made later is checked when it is used."""
    extension = app.extensions.get("sqlalchemy")
    if extension is not None:
        with app.app_context():
            for engine in _default_engines(extension):
                database.prepare(engine)


def _context_of(state: State) -> outcomes.Context | None:
    """Return what follows the messages of the current application context, if that is the context of *state*'s app."""
    flask = sys.modules.get("flask")
    if flask is None or not flask.has_app_context() or flask.current_app.extensions.get("outbox") is not state:
        return None
    if _CONTEXT not in flask.g:
        setattr(flask.g, _CONTEXT, outcomes.Context())
    return flask.g.get(_CONTEXT)  # type: ignore[no-any-return]


@event.listens_for(Session, "after_transaction_create")
def _note_begun(session: Session, transaction: SessionTransaction) -> None:
    """Remember in the application context who begins in it: what is sent for the app may be meant for that session."""
    flask = sys.modules.get("flask")
    if transaction.parent is None and flask is not None and flask.has_app_context():
        flask.g.setdefault(_BEGUN, WeakSet()).add(session)


def _begun_here(state: State) -> list[Session]:
    """Return the sessions whose transaction was begun in the current application context and is open, if it is of *state*."""
    if _context_of(state) is None:
        return []
    return [session for session in sys.modules["flask"].g.get(_BEGUN, ()) if session.in_transaction()]


def _end_context(error: BaseException | None) -> None:
    """At the end of a request or command: messages in a transaction that nobody ended will never be sent."""
    context: outcomes.Context | None = sys.modules["flask"].g.pop(_CONTEXT, None)
    if context is not None:
        context.end(failed=error is not None)
