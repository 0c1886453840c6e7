"""A process that forks while connections are open: each process has its own, and nobody reads another's answers."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from outbox import CaptureError, Outbox, database, migrations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import Engine

_BACKEND = sa.text("SELECT pg_backend_pid()")


def fork_in_python() -> int:
    return os.fork()


def fork_past_python() -> int:
    """As servers written in C do: no hook of Python's runs."""
    return int(ctypes.PyDLL(None).fork())


FORKS = pytest.mark.parametrize("fork", [fork_in_python, fork_past_python])


def in_child(fork: Callable[[], int], work: Callable[[], object]) -> str:
    """Return what *work* returns in a child of this process, as text; an error's text where it raises one."""
    reading, writing = os.pipe()
    child = fork()
    if child == 0:
        signal.alarm(30)
        try:
            said = str(work())
        except BaseException as error:  # noqa: BLE001 - the child must not go on with the tests
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def engine(postgres_url: str) -> Iterator[Engine]:
    """An engine whose pool holds a connection that was made before `prepare`."""
    engine = sa.create_engine(postgres_url)
    backend(engine)
    yield database.prepare(engine)
    engine.dispose()


def backend(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(_BACKEND) or 0)


@FORKS
def test_a_child_makes_connections_of_its_own_and_leaves_its_parents_alone(engine: Engine, fork: Callable[[], int]) -> None:
    parents = backend(engine)
    childs = int(in_child(fork, lambda: backend(engine)))
    assert childs != parents
    assert backend(engine) == parents  # the child has not said goodbye on it


@FORKS
def test_a_child_does_not_send_in_a_transaction_of_its_parent(engine: Engine, fork: Callable[[], int]) -> None:
    migrations.upgrade(engine)
    outbox = Outbox(source="/tests", engine=engine)
    with Session(engine) as session, engine.connect() as connection:
        session.execute(sa.text("SELECT 1"))
        connection.begin()
        for target in (session, connection):
            said = in_child(fork, lambda target=target: outbox.send("a.b", 1, session=target))  # type: ignore[misc]
            assert said.startswith(f"{CaptureError.__name__}: the connection was made by the process that this one was forked")
        outbox.send("a.b", 1, session=session)
        in_child(fork, session.commit)
        session.commit()
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM outbox_message")) == 1


def test_a_database_in_memory_goes_with_the_child() -> None:
    engine = database.create_engine("sqlite://", poolclass=StaticPool)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE t (n INTEGER)"))

    def look() -> object:
        with engine.connect() as connection:
            return connection.scalar(sa.text("SELECT count(*) FROM t"))

    assert in_child(os.fork, look) == "0"
    engine.dispose()


def test_a_child_asks_nothing_on_a_connection_of_its_parent(engine: Engine) -> None:
    """`pool_pre_ping` would, before anybody looks whose connection it is."""
    assert engine.pool.checkedin() == 1  # type: ignore[attr-defined]
    assert in_child(os.fork, lambda: engine.pool.checkedin()) == "0"  # type: ignore[attr-defined]
