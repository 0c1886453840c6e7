"""Finding the session that a message belongs to, whatever the application uses for sessions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import ref

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import InstanceState, Session, SessionTransaction, scoped_session, sessionmaker

from outbox import database
from outbox.capture import transactions
from outbox.errors import CaptureError, ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    #: A session, or something that gives the current one when called: a scoped_session, a function.
    Source = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any] | Callable[[], Any]


def source(given: Source) -> Source:
    """Return what gives the current session for *given*; raise ConfigurationError, saying why, where nothing can."""
    if isinstance(given, sessionmaker):
        return OpenSessions(given)
    if isinstance(given, _asyncio("async_sessionmaker")):
        raise ConfigurationError(
            "session= got an async_sessionmaker, which makes a new session each time; give an async_scoped_session, or a "
            "function that returns the session in use"
        )
    if isinstance(given, type):
        raise ConfigurationError(
            f"session= got the class {given.__name__}, which makes a new session each time; give a scoped_session, a "
            "sessionmaker, or a function that returns the session in use"
        )
    if not isinstance(given, (Session, _asyncio("AsyncSession"))) and not callable(given):
        raise ConfigurationError(f"session={given!r} is no session and nothing that returns one when called")
    return given


def current(given: Source) -> Session:
    """Return the session behind *given*; raise CaptureError if it gives none."""
    found: Any = given
    if not _is_session(found) and callable(found):
        found = found()
    if isinstance(found, (scoped_session, _asyncio("async_scoped_session"))):
        found = found()
    if isinstance(found, _asyncio("AsyncSession")):
        return found.sync_session  # type: ignore[no-any-return]
    if isinstance(found, Session):
        return found
    raise CaptureError(f"session= gave {type(found).__name__} instead of a session; let it return the session in use")


def of_sender(sender: object) -> Session | None:
    """Return the session that *sender* is, or that it is an object of; None for any other sender."""
    if _is_session(sender) or isinstance(sender, (scoped_session, _asyncio("async_scoped_session"))):
        return current(sender)  # type: ignore[arg-type]
    state = sa.inspect(sender, raiseerr=False)
    return state.session if isinstance(state, InstanceState) else None


def meant(usual: Session, others: Iterable[Session], by: str) -> Session:
    """Return the session that a message of *by* belongs to which names none: the one that wrote, else the one that is open.

    *usual* is the application's own. Raises CaptureError, naming them, where several of them and *others* could be meant; then
    none of these can commit.
    """
    begun = [session for session in (usual, *others) if session.in_transaction()]
    if begun in ([], [usual]):
        return usual
    found = [session for session in begun if transactions.has_written(session)] or begun
    if len(found) == 1:
        transactions.pass_over((session for session in (usual, *begun) if session is not found[0]), found[0])
        return found[0]
    reason = (
        f"{len(found)} sessions are open here and could be meant: {' and '.join(map(_named, found))}; say which one: "
        "signal.send(session, …) or outbox.send(…, session=session)"
    )
    for session in found:
        transactions.doom(session, f"{by}: {reason}")
    raise CaptureError(reason)


def _named(session: Session) -> str:
    """Return how a person knows *session* from others: its class, and where it is connected."""
    try:
        url = session.get_bind().engine.url.set(query={}).render_as_string()
    except UnboundExecutionError:
        url = "several databases"
    return f"{type(session).__name__} on {url}"


def engine_of(given: Source | None) -> Engine | None:
    """Return the engine that *given* says its sessions are bound to; None where only a session in use would say it."""
    found: Any = given
    if isinstance(found, scoped_session):
        found = found.session_factory
    if isinstance(found, OpenSessions):
        found = found.maker
    bind = found.kw.get("bind") if isinstance(found, sessionmaker) else getattr(found, "bind", None)
    bind = database.synchronous(bind)
    return bind if isinstance(bind, Engine) else None


def connection_of(target: Any) -> Any:
    """Return the synchronous connection behind an AsyncConnection, anything else as it is."""
    return target.sync_connection if isinstance(target, _asyncio("AsyncConnection")) else target


class OpenSessions:
    """Gives the one session of a sessionmaker that has a transaction open in this thread or task."""

    def __init__(self, maker: sessionmaker[Any]) -> None:
        self.maker = maker
        self._begun: ContextVar[tuple[ref[Session], ...]] = ContextVar("begun", default=())
        event.listen(maker, "after_transaction_create", self._note)

    def __call__(self) -> Session:
        found = self._open()
        if len(found) == 1:
            return found[0]
        if not found:
            raise CaptureError(
                "no session of the sessionmaker has a transaction open here; send before its commit, after the first query or "
                "flush, or inside `with session.begin():`"
            )
        raise CaptureError(
            f"{len(found)} sessions of the sessionmaker are open here; say which one: signal.send(session, …) or "
            "outbox.send(…, session=session)"
        )

    def _note(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            others = [other for other in self._open() if other is not session]
            self._begun.set(tuple(ref(each) for each in (*others, session)))

    def _open(self) -> list[Session]:
        begun = (weak() for weak in self._begun.get())
        return [session for session in begun if session is not None and session.in_transaction()]


def _is_session(found: object) -> bool:
    return isinstance(found, (Session, _asyncio("AsyncSession")))


class _Nobody:
    """Stands for a class that nothing can be an instance of, because its module was never imported."""


def _asyncio(name: str) -> Any:
    """Return a class of SQLAlchemy's asyncio module without importing it: it needs greenlet, which only its users have."""
    return getattr(sys.modules.get("sqlalchemy.ext.asyncio"), name, _Nobody)
