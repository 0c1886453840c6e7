"""Locks on rows: how long we keep ours, how long we wait for those of others, and who they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox.tables import pending

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy.engine import Connection

#: For one transaction. Whoever is stopped in it must not keep its locks from everybody else, and whoever has to wait for
#: somebody's locks must come back and say so: a relay has leases to renew, a person wants to know.
_BRIEF = sa.select(
    sa.func.set_config("idle_in_transaction_session_timeout", "5s", True), sa.func.set_config("lock_timeout", "2s", True)
)


def be_brief(connection: Connection) -> None:
    """Bound the open transaction: it ends after 5 idle seconds, and waits 2 seconds for a lock. SQLite has its own bound."""
    if connection.dialect.name == "postgresql":
        connection.execute(_BRIEF)


def holders(connection: Connection, ids: Collection[int]) -> list[str]:
    """Say in words which sessions have locked the pending rows *ids*; empty where the database can't tell.

    PostgreSQL writes the transaction that locked a row into the row; a row that several share is not told apart.
    """
    if connection.dialect.name != "postgresql":
        return []
    lockers = sa.select(sa.literal_column("xmax", sa.BigInteger())).select_from(pending).where(pending.c.id.in_(list(ids)))
    return [_words(row) for row in connection.execute(_sessions(lockers))]


def _sessions(transactions: sa.Select[Any]) -> sa.Select[Any]:
    locks = sa.table("pg_locks", *map(sa.column, ("pid", "locktype", "transactionid", "granted")))
    activity = sa.table("pg_stat_activity", *map(sa.column, ("pid", "usename", "application_name", "xact_start")))
    since = sa.func.timezone("UTC", activity.c.xact_start).label("xact_start")
    return (
        sa.select(activity.c.pid, activity.c.usename, activity.c.application_name, since)
        .join_from(locks, activity, activity.c.pid == locks.c.pid)
        .where(locks.c.locktype == "transactionid", locks.c.granted, locks.c.transactionid.in_(transactions))
        .order_by(activity.c.xact_start)
        .limit(3)
    )


def _words(session: sa.Row[Any]) -> str:
    name = f" {session.application_name!r}" if session.application_name else ""
    since = f", in a transaction since {session.xact_start:%H:%M:%S} UTC" if session.xact_start is not None else ""
    return f"process {session.pid}{name} of user {session.usename}{since}"
