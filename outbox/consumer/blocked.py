"""For whom the transactions of this process wait in PostgreSQL: said, because from outside it looks as if nothing happened."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox.process.logs import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import Connection, Row

log = logging.getLogger(__name__)

#: A transaction of a service that is well takes no longer.
_PATIENCE_SECONDS = 5.0
#: Our connections are known by their name, which holds host and process (`outbox.database.dialects`).
_BLOCKERS = sa.text(
    """
    SELECT DISTINCT blocker.pid, blocker.application_name, blocker.usename, host(blocker.client_addr) AS address,
        blocker.application_name = waiting.application_name AS own
    FROM pg_stat_activity AS waiting
    CROSS JOIN LATERAL unnest(pg_blocking_pids(waiting.pid)) AS blocking (pid)
    JOIN pg_stat_activity AS blocker ON blocker.pid = blocking.pid
    WHERE waiting.datname = current_database() AND waiting.application_name = current_setting('application_name')
        AND waiting.wait_event_type = 'Lock' AND waiting.query_start < clock_timestamp() - make_interval(secs => :patience)
    ORDER BY blocker.pid
    """
)


class Blocked:
    """Says once that the service waits for others, and for whom; once that it goes on."""

    def __init__(self, service: str, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self._service = service
        self._patience = patience_seconds
        self._said: tuple[int, ...] = ()

    def look(self, connection: Connection) -> None:
        """Look once; only on PostgreSQL, where it is one cheap query."""
        if connection.dialect.name == "postgresql":
            self._say(connection.execute(_BLOCKERS, {"patience": self._patience}).all())

    def _say(self, found: Sequence[Row[Any]]) -> None:
        pids = tuple(each.pid for each in found)
        if found and pids != self._said:
            whom = ", ".join(_words(each) for each in found)
            sentence = f"service {self._service!r} waits for {whom}; it goes on when that transaction ends"
            say(log, logging.WARNING, "consumer.blocked", sentence, service=self._service)
        elif self._said and not found:
            say(log, logging.INFO, "consumer.unblocked", f"service {self._service!r} goes on", service=self._service)
        self._said = pids


def _words(blocker: Row[Any]) -> str:
    if blocker.own:
        return f"another transaction of its own (server process {blocker.pid})"
    name = blocker.application_name or f"user {blocker.usename}"
    return f"{name!r} at {blocker.address or 'this host'} (server process {blocker.pid})"
