"""An outbox with a database of its own, its session, and what is in its tables."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import prometheus_client
import pytest
import sqlalchemy as sa
from blinker import Namespace
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from outbox import Outbox, migrations, tables
from outbox.database import create_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blinker import NamedSignal
    from sqlalchemy.engine import Engine


class Base(DeclarativeBase):
    """The application's own tables."""


class Talk(Base):
    """A row of the application; its title is unique, so that a flush can fail."""

    __tablename__ = "talk"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(sa.String(100), unique=True)


#: The truth: a row beside each message, by ordinary SQL in the same transaction.
ledger = sa.Table(
    "ledger",
    sa.MetaData(),
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("message_id", sa.Uuid, nullable=False),
    sa.Column("key", sa.String(50)),
)


def empty(engine: Engine) -> None:
    """Delete all rows."""
    with engine.begin() as connection:
        for table in (ledger, Base.metadata.tables["talk"], tables.pending, tables.message, tables.key):
            connection.execute(sa.delete(table))


def counted(name: str, topic: str) -> float:
    """Return the value of a counter of this process."""
    return prometheus_client.REGISTRY.get_sample_value(name, {"topic": topic}) or 0.0


@dataclass
class World:
    """What a test of capture works with."""

    engine: Engine
    sessions: scoped_session[Session]
    outbox: Outbox
    signal: NamedSignal

    @property
    def session(self) -> Session:
        return self.sessions()

    def begin(self) -> Session:
        """Return the session with a transaction begun."""
        self.session.begin()
        return self.session

    def send(self, **data: Any) -> None:
        self.signal.send(None, **{"event_id": 1, **data})

    def numbers(self) -> list[Any]:
        """Return the field `n` of each message, in the order in which a relay reads them."""
        return [json.loads(row.body)["n"] for row in self.rows()]

    def rows(self) -> list[Any]:
        """Return the pending rows with their messages, in the order in which a relay reads them."""
        query = (
            sa.select(tables.pending, tables.message.c.body, tables.message.c.headers, tables.message.c.message_id)
            .join(tables.message, tables.message.c.id == tables.pending.c.message_row)
            .order_by(tables.pending.c.id)
        )
        with self.engine.connect() as connection:
            return list(connection.execute(query))

    def numbered(self) -> list[tuple[str | None, int | None]]:
        return [(row.key, row.sequence) for row in self.rows()]


@pytest.fixture(scope="package", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def shared_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A database with all tables that the tests of capture share, one after the other."""
    with ExitStack() as stack:
        if request.param == "postgres":
            url = stack.enter_context(request.getfixturevalue("postgres_server").database())
        else:
            url = f"sqlite:///{tmp_path_factory.mktemp('capture')}/outbox.db"
        engine = create_engine(url)
        stack.callback(engine.dispose)
        migrations.upgrade(engine)
        Base.metadata.create_all(engine)
        ledger.create(engine)
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared database, empty."""
    empty(shared_engine)
    yield shared_engine
    shared_engine.dispose()


@pytest.fixture
def world(engine: Engine) -> Iterator[World]:
    sessions = scoped_session(sessionmaker(engine))
    outbox = Outbox(session=sessions, source="/tests")
    signal = Namespace().signal("talks_modified")
    outbox.capture(signal, topic="talk.modified", key="event:{event_id}")
    yield World(engine, sessions, outbox, signal)
    sessions.remove()
