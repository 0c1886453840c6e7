"""PostgreSQL's notifications as each driver hands them out, on a connection in autocommit."""

from __future__ import annotations

import select
from typing import Any

from outbox.database.dialects import backend_pid


def is_pooled(connection: Any) -> bool:
    """Say whether a pooler stands between: the server process that answers is not the one that was named at connecting."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0]) != backend_pid(connection)


def listen(connection: Any, channel: str) -> None:
    """Ask for the notifications of *channel*, a name of ours."""
    with connection.cursor() as cursor:
        cursor.execute(f"LISTEN {channel}")


def unlisten(connection: Any, channel: str) -> None:
    """Ask for the notifications of *channel* no longer."""
    with connection.cursor() as cursor:
        cursor.execute(f"UNLISTEN {channel}")


def heard(connection: Any, seconds: float) -> list[str]:
    """Return the payloads of what was notified, as soon as there is something, at the latest after *seconds*."""
    if not hasattr(connection, "poll"):
        return [each.payload for each in connection.notifies(timeout=seconds, stop_after=1)]
    if not connection.notifies and select.select([connection], [], [], seconds)[0]:  # psycopg2
        connection.poll()
    found, connection.notifies[:] = [each.payload for each in connection.notifies], []
    return found
