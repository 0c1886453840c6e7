"""The database's clock as a process of a service knows it: what is written, due or forgotten hangs on no host's clock."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from outbox.store.clock import database_now

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection


class DatabaseClock:
    """Asked of the database now and then (`set`); in between, time goes on by the monotonic clock, which nobody sets.

    Read by all threads, set by one at a time. SQLite has no clock of its own: there it is this host's.
    """

    def __init__(self) -> None:
        self._known: tuple[datetime, float] | None = None

    def set(self, connection: Connection) -> datetime:
        """Ask the database, and return what it says."""
        moment = database_now(connection)
        self._known = (moment, time.monotonic())
        return moment

    def __call__(self) -> datetime:
        """Return the present moment."""
        if self._known is None:  # nothing is decided before the first look at the database
            return datetime.now(UTC)
        moment, at = self._known
        return moment + timedelta(seconds=time.monotonic() - at)
