"""Statements about who works: the shards and their leases, the relays and their heartbeats. All by the database's clock."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from outbox import __version__
from outbox.store.drain import clock, now
from outbox.tables import SHARDS, relay, shard

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

#: Rows of relays that ended without a word are kept this long.
_FORGET_AFTER_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Another relay that has shards."""

    relay: str
    #: Until its lease runs out, if it is not renewed.
    remaining_seconds: float


def take(connection: Connection, relay_id: str, lease_seconds: float) -> dict[int, int] | Holder:
    """Take all shards if all are free, and return the epoch of each; otherwise who has them."""
    dialect = connection.dialect.name
    rows = connection.execute(
        sa.select(shard.c.id, shard.c.owner, shard.c.epoch, shard.c.lease_until, now(dialect).label("now"))
        .order_by(shard.c.id)
        .with_for_update(),
        clock(dialect),
    ).all()
    others = [row for row in rows if row.owner not in (None, relay_id) and row.lease_until is not None]
    latest = max(others, key=lambda row: row.lease_until, default=None)
    if latest is not None and latest.lease_until > latest.now:
        return Holder(latest.owner, (latest.lease_until - latest.now).total_seconds())
    connection.execute(
        sa.update(shard).values(owner=relay_id, epoch=shard.c.epoch + 1, lease_until=now(dialect, "lease")),
        clock(dialect, lease=lease_seconds),
    )
    return {row.id: row.epoch + 1 for row in rows}


def renew(connection: Connection, relay_id: str, lease_seconds: float) -> bool:
    """Prolong the leases of *relay_id*; False when another relay has taken a shard."""
    dialect = connection.dialect.name
    renewed = connection.execute(
        sa.update(shard).where(shard.c.owner == relay_id).values(lease_until=now(dialect, "lease")),
        clock(dialect, lease=lease_seconds),
    )
    return renewed.rowcount == SHARDS


def release(connection: Connection, relay_id: str) -> None:
    """Give the shards back, so that another relay need not wait for the leases to run out."""
    connection.execute(sa.update(shard).where(shard.c.owner == relay_id).values(owner=None, lease_until=None))


def beat(connection: Connection, relay_id: str, state: str, *, connected: bool, blocked: bool, detail: str) -> None:
    """Write the heartbeat of *relay_id*, with how it finds the broker."""
    dialect = connection.dialect.name
    values = {
        "state": state,
        "broker_connected": connected,
        "broker_blocked": blocked,
        "broker_detail": detail[:1000] or None,
    }
    found = connection.execute(
        sa.update(relay).where(relay.c.id == relay_id).values(seen_at=now(dialect), **values), clock(dialect)
    )
    if found.rowcount:
        return
    connection.execute(
        sa.insert(relay).values(
            id=relay_id,
            host=socket.gethostname()[:255],
            pid=os.getpid(),
            version=__version__,
            started_at=now(dialect),
            seen_at=now(dialect),
            **values,
        ),
        clock(dialect),
    )


def depart(connection: Connection, relay_id: str) -> None:
    """Remove the heartbeat of a relay that ends, and those of relays unheard of for a day."""
    dialect = connection.dialect.name
    connection.execute(
        sa.delete(relay).where(sa.or_(relay.c.id == relay_id, relay.c.seen_at < now(dialect, "day_ago"))),
        clock(dialect, day_ago=-_FORGET_AFTER_SECONDS),
    )


def forget_old(connection: Connection) -> None:
    """Remove the rows of relays unheard of for a day."""
    dialect = connection.dialect.name
    connection.execute(
        sa.delete(relay).where(relay.c.seen_at < now(dialect, "day_ago")), clock(dialect, day_ago=-_FORGET_AFTER_SECONDS)
    )
