"""Connections after a fork: parent, child and siblings would talk on one socket, and read each other's answers.

A web server that loads the application before it forks its workers (`gunicorn --preload`) leaves them whatever connections
the application has made so far.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import SingletonThreadPool, StaticPool

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

#: On a connection: the process that made it, as far as is known.
_PROCESS = "outbox_process"
_watched: WeakSet[Engine] = WeakSet()


def watch(engine: Engine) -> None:
    """Let no other process use connections that this one makes with *engine*: it gets its own."""
    if isinstance(engine.pool, (SingletonThreadPool, StaticPool)):
        return  # a database in memory is its connection, and a child has a copy of it
    here = os.getpid()  # who made what is in the pool already

    def refuse_foreign(_connection: DBAPIConnection, record: ConnectionPoolEntry, proxy: PoolProxiedConnection) -> None:
        if record.info.setdefault(_PROCESS, here) != os.getpid():
            # Forgotten, not closed: a goodbye on the socket would end the other process's session.
            record.dbapi_connection = proxy.dbapi_connection = None  # type: ignore[misc]
            raise DisconnectionError("this connection was made by another process")

    event.listen(engine, "connect", _note_process)
    event.listen(engine, "checkout", refuse_foreign, insert=True)
    _watched.add(engine)


def is_foreign(connection: Connection) -> bool:
    """Say whether *connection*, which is in use, was made by another process; one that was lost is nobody's."""
    return not connection.invalidated and bool(connection.info.get(_PROCESS, os.getpid()) != os.getpid())


def _note_process(_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    record.info[_PROCESS] = os.getpid()


def _forget_connections() -> None:
    """Empty the pools of a child; some servers fork without a word to Python, for them there is the check above."""
    for engine in list(_watched):
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_connections)
