"""Hear of commits on PostgreSQL: LISTEN on a connection of its own, in a thread. Only a hint; without it the relay polls."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox import database
from outbox.database import notifications
from outbox.process import duration
from outbox.process.backoff import Backoff
from outbox.relay.telemetry import Announcer
from outbox.store.relaying import describe
from outbox.store.wakeup import CHANNEL

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Engine

log = logging.getLogger(__name__)

#: How long the thread waits for a notification before it looks whether it should end.
_WAIT_SECONDS = 0.2
#: How long a notification to itself may take.
_TRIAL_SECONDS = 5.0
_ADVICE = "let the relay's DATABASE_URL name the server itself"


class _Deaf(Exception):
    """LISTEN can't work on this connection."""


class Listener:
    """Calls *wake* whenever a writer says that it committed; says once that it can't, and tries again."""

    def __init__(self, engine: Engine, wake: Callable[[], None], poll_seconds: float) -> None:
        self._engine = engine
        self._wake = wake
        self._otherwise = f"new messages are looked for every {duration.format(poll_seconds)}"
        self._announcer = Announcer(log)
        self._backoff = Backoff(0.5, 30.0)
        self._heard = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox-listen", daemon=True)

    def start(self) -> None:
        """Begin to listen, if the database can tell."""
        if self._engine.dialect.name == "postgresql":
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                self._listen()
            except Exception as error:  # noqa: BLE001 - whatever it is, the relay works without
                failures = 1 if self._heard else failures + 1
                self._say_deaf(describe(error))
                self._stopping.wait(self._backoff.ceiling(failures))

    def _listen(self) -> None:
        self._heard = False
        pooled = self._engine.raw_connection()
        connection: Any = pooled.driver_connection
        pooled.detach()  # it is this thread's alone, and stays open while the pool's come and go
        try:
            connection.autocommit = True
            # Through a pooler LISTEN would succeed, hear nothing, and stay on a connection that others use.
            if notifications.is_pooled(connection):
                raise _Deaf(f"there is a pooler between, which hands on no notifications; {_ADVICE}")
            notifications.listen(connection, CHANNEL)
            if not self._hears(connection):
                notifications.unlisten(connection, CHANNEL)  # most likely the same server connection, if there are several
                raise _Deaf(f"a notification to itself did not come back, as through a pooler; {_ADVICE}")
            self._heard = True
            self._announcer.state("wakeup", "listening", logging.INFO, "commits are heard of at once")
            self._wake()  # for what was committed before
            while not self._stopping.is_set():
                if notifications.heard(connection, _WAIT_SECONDS):
                    self._wake()
        finally:
            connection.close()

    def _hears(self, connection: Any) -> bool:
        """Say whether a notification that another connection sends arrives here."""
        token = secrets.token_hex(8)
        with database.autocommitting(self._engine).connect() as another:
            another.execute(sa.select(sa.func.pg_notify(CHANNEL, token)))
        deadline = time.monotonic() + _TRIAL_SECONDS
        while time.monotonic() < deadline and not self._stopping.is_set():
            if token in notifications.heard(connection, _WAIT_SECONDS):
                return True
        return False

    def _say_deaf(self, problem: str) -> None:
        self._announcer.state(
            "wakeup", "polling", logging.WARNING, f"commits can't be heard of; {self._otherwise}", problem=problem
        )
