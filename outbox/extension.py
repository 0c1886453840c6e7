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
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy.engine import Connection, Engine

from outbox import database, failpoints, holding, message, sessions, settings, trace
from outbox.capture import Capture, captures, connect
from outbox.errors import CaptureError, ConfigurationError, InvalidMessage
from outbox.message import JSON, Message
from outbox.settings import Settings
from outbox.store.write import Held

if TYPE_CHECKING:
    from blinker import Signal
    from flask import Flask
    from sqlalchemy.orm import Session

    from outbox.sessions import Source

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class State:
    """What `init_app` found for one app: `app.extensions["outbox"]`."""

    outbox: Outbox
    settings: Settings
    #: Gives the session of the current request or command.
    session: Source
    #: Gives the engine that the outbox tables are in.
    engine: Callable[[], Engine]

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that are captured or known, sorted."""
        return self.outbox.topics


class Outbox:
    """Captures signals into the outbox tables, in the transaction of whoever sends them.

    With Flask: `Outbox()` and `init_app(app)`; the session is Flask-SQLAlchemy's or -Lite's unless *session* says
    otherwise. Without: `Outbox(session=…, source="/shop")`, where *session* is a Session, a scoped_session, or a function
    that returns the current session (an AsyncSession too). *engine* is needed only where one session uses several.
    Other arguments are settings, by their lower-case names without prefix: `Outbox(max_body="64KiB")`.

    Raises ConfigurationError for a setting that is none or can't be.
    """

    def __init__(
        self, app: Flask | None = None, *, session: Source | None = None, engine: Engine | None = None, **options: object
    ) -> None:
        self._arguments = {_setting_name(name): value for name, value in options.items()}
        self._session = session
        self._engine = engine
        self._captures: list[tuple[Signal, Capture]] = []
        self._standalone: State | None = None
        if session is not None:
            sessions.check(session)
        if engine is not None:
            database.prepare(engine)
        if app is not None:
            self.init_app(app)

    # --- registering --------------------------------------------------------------------------------------------------

    def init_app(self, app: Flask, session: Source | None = None, engine: Engine | None = None) -> None:
        """Read the settings of *app*, find its session, add `flask outbox …`; one outbox may serve several apps.

        Raises ConfigurationError with all that is wrong, before anything is sent.
        """
        source = session or self._session or _FlaskSession(app)
        sessions.check(source)
        loaded = settings.load(self._arguments, config=app.config, environ=os.environ)
        if loaded.source is None:
            loaded = settings.override(loaded, {"OUTBOX_SOURCE": f"/{app.name}"})
        found = engine or self._engine
        if found is not None:
            database.prepare(found)
        find_engine = _FlaskEngine(app, source) if found is None else lambda: found
        app.extensions["outbox"] = State(self, loaded, source, find_engine)
        _prepare_flask_engine(app)
        app.cli.add_command(import_module("outbox.cli").group)
        app.teardown_appcontext(partial(_warn_of_uncommitted, source))

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
        Core connection on which it is written at once; left out, it is the current session. Raises InvalidMessage and
        CaptureError; after either the transaction can only be rolled back.
        """
        target = sessions.connection_of(session)
        state = self._state(None)
        if isinstance(target, Connection):
            built = _build(state.settings, topic, data, key, headers, content_type)
            holding.hold_on_connection(target, Held(built, unheard))
            return built.id
        db_session = sessions.current(target if target is not None else state.session)
        with _dooming(db_session):
            built = _build(state.settings, topic, data, key, headers, content_type)
            holding.hold(db_session, self._engine, Held(built, unheard))
        return built.id

    @contextmanager
    def record(self) -> Iterator[list[Message]]:
        """For tests: collect the messages whose transactions commit inside the block, in order of commit.

        Rows are written as always. What is rolled back, or still open, is not in the list; a message sent on a Core
        connection is in it as soon as it is written.
        """
        with holding.recording() as messages:
            yield messages

    # --- inside -------------------------------------------------------------------------------------------------------

    def _hold(self, capture: Capture, sender: object, data: dict[str, object]) -> UUID | None:
        state = self._state(sender)
        if state.outbox is not self:
            return None  # the app that sends has another outbox, and that one captures
        failpoints.reached("C1")
        db_session = sessions.current(state.session)
        with _dooming(db_session):
            key = None if capture.key is None else capture.key.fill(data)
            built = _build(state.settings, capture.topic, data, key, _NO_HEADERS, JSON)
            holding.hold(db_session, self._engine, Held(built, capture.unheard))
        return built.id

    def _state(self, sender: object) -> State:
        """Return the state of the app that *sender* is, else of the current app, else of this outbox without Flask."""
        app = _app_of(sender)
        if app is not None:
            state: State | None = app.extensions.get("outbox")
            if state is None:
                raise CaptureError(f"app {app.name!r} has no outbox; call outbox.init_app(app) in its factory")
            return state
        if self._standalone is None:
            if not self._arguments and self._session is None:
                raise CaptureError(
                    "no session can be found for it: it was sent outside an application context; send it inside "
                    "`with app.app_context():`, or make the outbox with Outbox(session=…)"
                )
            self._standalone = self._without_flask()
        return self._standalone

    def _without_flask(self) -> State:
        loaded = settings.load(self._arguments, environ=os.environ)
        loaded.require("OUTBOX_SOURCE")
        return State(self, loaded, self._session or _no_session, lambda: _known(self._engine))


def _no_session() -> Any:
    raise CaptureError("no session is known; give session= to send(), or make the outbox with Outbox(session=…)")


def _known(engine: Engine | None) -> Engine:
    if engine is None:
        raise ConfigurationError("no engine is known; make the outbox with Outbox(engine=…)")
    return engine


def _build(given: Settings, topic: str, data: Any, key: str | None, headers: Mapping[str, str], content_type: str) -> Message:
    """Return the message, complete and final: later changes of what *data* holds change nothing."""
    limit = given.max_body_bytes
    if content_type == JSON:
        body = message.encode(data, limit=limit)
    elif isinstance(data, (bytes, bytearray)) and len(data) <= limit:
        body = bytes(data)
    else:
        raise InvalidMessage(f"data of content type {content_type!r} must be bytes, at most OUTBOX_MAX_BODY={limit} of them")
    return Message(
        id=message.new_id(),
        source=given.source or "/",
        topic=topic,
        key=key,
        body=body,
        content_type=content_type,
        headers=MappingProxyType({**trace.headers(), **headers}),
        created_at=datetime.now(UTC),
    )


@contextmanager
def _dooming(db_session: Session) -> Iterator[None]:
    """Whatever goes wrong inside, the transaction must not commit without the message."""
    try:
        yield
    except Exception as error:
        holding.doom(db_session, str(error))
        raise


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


@dataclass(frozen=True, slots=True)
class _FlaskSession:
    """The session of Flask-SQLAlchemy or Flask-SQLAlchemy-Lite, looked up when it is needed: `db` may be set up later."""

    app: Flask

    def __call__(self) -> Any:
        extension = self.app.extensions.get("sqlalchemy")
        if extension is None or not hasattr(extension, "session"):
            raise CaptureError(
                f"app {self.app.name!r} has no Flask-SQLAlchemy; say where its sessions are: outbox.init_app(app, session=…)"
            )
        return extension.session


@dataclass(frozen=True, slots=True)
class _FlaskEngine:
    """The engine of the app, for commands: that of its SQLAlchemy extension, else the one its session is bound to."""

    app: Flask
    source: Source

    def __call__(self) -> Engine:
        extension = self.app.extensions.get("sqlalchemy")
        with self.app.app_context():
            if extension is not None and hasattr(extension, "engine"):
                return extension.engine  # type: ignore[no-any-return]
            return sessions.current(self.source).get_bind().engine


def _prepare_flask_engine(app: Flask) -> None:
    """Prepare the engine where it exists already; one that is made later is checked when it is used."""
    extension = app.extensions.get("sqlalchemy")
    if extension is not None and hasattr(extension, "engine"):
        with app.app_context():
            database.prepare(extension.engine)


def _warn_of_uncommitted(source: Source, error: BaseException | None) -> None:
    """At the end of a request or command: messages in a transaction that nobody ended will never be sent."""
    try:
        db_session = sessions.current(source)
    except (CaptureError, RuntimeError):  # no session was ever used here
        return
    holding.warn_of_uncommitted(db_session, failed=error is not None)
