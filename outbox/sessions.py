"""Finding the session that a message belongs to, whatever the application uses for sessions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox.errors import CaptureError, ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    #: A session, or something that gives the current one when called: a scoped_session, a function.
    Source = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any] | Callable[[], Any]


def check(source: object) -> None:
    """Raise ConfigurationError unless *source* can give the current session."""
    if isinstance(source, (sessionmaker, _asyncio("async_sessionmaker"))):
        raise ConfigurationError(
            "session= got a sessionmaker, which makes a new session each time; give a scoped_session, or a function that "
            "returns the session of the current request"
        )
    if not isinstance(source, (Session, _asyncio("AsyncSession"))) and not callable(source):
        raise ConfigurationError(f"session={source!r} is no session and nothing that returns one when called")


def current(source: Source) -> Session:
    """Return the session behind *source*; raise CaptureError if it gives none."""
    async_session = _asyncio("AsyncSession")
    found: Any = source
    if not isinstance(found, (Session, async_session)) and callable(found):
        found = found()
    if isinstance(found, (scoped_session, _asyncio("async_scoped_session"))):
        found = found()
    if isinstance(found, async_session):
        return found.sync_session  # type: ignore[no-any-return]
    if isinstance(found, Session):
        return found
    raise CaptureError(f"session= gave {type(found).__name__} instead of a session; let it return the session in use")


def connection_of(target: Any) -> Any:
    """Return the synchronous connection behind an AsyncConnection, anything else as it is."""
    return target.sync_connection if isinstance(target, _asyncio("AsyncConnection")) else target


class _Nobody:
    """Stands for a class that nothing can be an instance of, because its module was never imported."""


def _asyncio(name: str) -> Any:
    """Return a class of SQLAlchemy's asyncio module without importing it: it needs greenlet, which only its users have."""
    return getattr(sys.modules.get("sqlalchemy.ext.asyncio"), name, _Nobody)
