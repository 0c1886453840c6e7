"""The database of an application, and one session for each application context (a request, a command)."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flask import current_app, g
from sqlalchemy.orm import Session, sessionmaker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask import Flask
    from sqlalchemy.engine import Engine

_EXTENSION = "publisher"
_SESSION = "_publisher_session"


@dataclass(frozen=True, slots=True)
class Database:
    """What an application keeps: see `of`."""

    engine: Engine
    factory: sessionmaker[Session]


def init_app(app: Flask, engine: Engine) -> None:
    """Let *app* use *engine*."""
    # Objects stay readable after the commit: answers are written from them without another query.
    app.extensions[_EXTENSION] = Database(engine, sessionmaker(engine, expire_on_commit=False))
    app.teardown_appcontext(_close)


def of(app: Flask) -> Database:
    """Return the database of *app*."""
    database: Database = app.extensions[_EXTENSION]
    return database


def session() -> Session:
    """Return the session of the current application context, made when first asked for."""
    found: Session | None = g.get(_SESSION)
    if found is None:
        found = of(current_app).factory()
        setattr(g, _SESSION, found)
    return found


@contextmanager
def changing() -> Iterator[Session]:
    """Run the block in one transaction: committed at its end, rolled back when it raises."""
    db = session()
    with db.begin():
        yield db


@contextmanager
def reading() -> Iterator[Session]:
    """Run the block in one transaction that only reads. On SQLite it waits for no writer, and no writer for it."""
    db = session()
    with db.begin():
        db.connection(execution_options={"outbox_read_only": True})
        yield db


def _close(_error: BaseException | None) -> None:
    found: Session | None = g.pop(_SESSION, None)
    if found is not None:
        found.close()
