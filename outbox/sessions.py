"""Finding the session that a message belongs to, whatever the application uses for sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outbox.errors import CaptureError, ConfigurationError

#: A session, or something that gives the current one when called: a scoped_session, a function.
Source = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any] | Callable[[], Any]


def check(source: object) -> None:
    """Raise ConfigurationError unless *source* can give the current session."""
    if isinstance(source, (sessionmaker, async_sessionmaker)):
        raise ConfigurationError(
            "session= got a sessionmaker, which makes a new session each time; give a scoped_session, or a function that "
            "returns the session of the current request"
        )
    if not isinstance(source, (Session, AsyncSession)) and not callable(source):
        raise ConfigurationError(f"session={source!r} is no session and nothing that returns one when called")


def current(source: Source) -> Session:
    """Return the session behind *source*; raise CaptureError if it gives none."""
    found: Any = source
    if not isinstance(found, (Session, AsyncSession)) and callable(found):
        found = found()
    if isinstance(found, (scoped_session, async_scoped_session)):
        found = found()
    if isinstance(found, AsyncSession):
        return found.sync_session
    if isinstance(found, Session):
        return found
    raise CaptureError(f"session= gave {type(found).__name__} instead of a session; let it return the session in use")


def connection_of(target: Any) -> Any:
    """Return the synchronous connection behind an AsyncConnection, anything else as it is."""
    return target.sync_connection if isinstance(target, AsyncConnection) else target
