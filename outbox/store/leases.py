"""Statements about who works: the shards and their leases, the relays and their heartbeats. All by the database's clock.

Each is one statement that commits by itself: a relay that is stopped in the middle must leave no lock behind.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from outbox import __version__
from outbox.store.clock import clock, now
from outbox.tables import SHARDS, relay, shard

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

#: Rows of relays that ended without a word are kept this long.
_FORGET_AFTER_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Another relay that has shards."""

    #: Empty when it has just given them back.
    relay: str
    #: Until its lease runs out, if it is not renewed.
    remaining_seconds: float


@dataclass(frozen=True, slots=True)
class Damaged:
    """outbox_shard is not whole: nobody can have all shards, and waiting does not help."""

    #: How many of its rows are gone.
    missing: int


def take(connection: Connection, relay_id: str, lease_seconds: float) -> dict[int, int] | Holder | Damaged:
    """Take all shards if all are there and free, and return the epoch of each; otherwise why not."""
    dialect = connection.dialect.name
    other = shard.alias("other")
    taken = connection.execute(
        sa.update(shard)
        # The row itself is looked at too: after waiting for another taker the subquery would not see what that one wrote.
        .where(_free(shard, relay_id, dialect), ~sa.exists(sa.literal(1)).where(~_free(other, relay_id, dialect)), _whole())
        .values(owner=relay_id, epoch=shard.c.epoch + 1, lease_until=now(dialect, "lease"))
        .returning(shard.c.id, shard.c.epoch),
        clock(dialect, lease=lease_seconds),
    )
    epochs = {id_: epoch for id_, epoch in taken}  # noqa: C416 - typed
    return epochs or _damage(connection) or _holder(connection, relay_id)


def _whole() -> sa.ColumnElement[bool]:
    return sa.select(sa.func.count()).select_from(shard.alias("all")).scalar_subquery() == SHARDS


def _damage(connection: Connection) -> Damaged | None:
    rows = connection.scalar(sa.select(sa.func.count()).select_from(shard)) or 0
    return Damaged(SHARDS - rows) if rows < SHARDS else None


def _free(row: sa.FromClause, relay_id: str, dialect: str) -> sa.ColumnElement[bool]:
    return sa.or_(row.c.owner.is_(None), row.c.owner == relay_id, row.c.lease_until <= now(dialect))


def _holder(connection: Connection, relay_id: str) -> Holder:
    dialect = connection.dialect.name
    row = connection.execute(
        sa.select(shard.c.owner, shard.c.lease_until, now(dialect).label("now"))
        .where(shard.c.owner != relay_id, shard.c.lease_until.is_not(None))
        .order_by(shard.c.lease_until.desc())
        .limit(1),
        clock(dialect),
    ).first()
    if row is None:  # it has just given them back
        return Holder("", 0.0)
    return Holder(row.owner, (row.lease_until - row.now).total_seconds())


def renew(connection: Connection, relay_id: str, lease_seconds: float) -> bool:
    """Prolong the leases of *relay_id*; False when a shard is not its own any more."""
    dialect = connection.dialect.name
    renewed = connection.execute(
        sa.update(shard).where(shard.c.owner == relay_id).values(lease_until=now(dialect, "lease")),
        clock(dialect, lease=lease_seconds),
    )
    return renewed.rowcount == SHARDS


def release(connection: Connection, relay_id: str) -> None:
    """Give the shards back, so that another relay need not wait for the leases to run out."""
    connection.execute(sa.update(shard).where(shard.c.owner == relay_id).values(owner=None, lease_until=None))


def beat(
    connection: Connection, relay_id: str, state: str, *, connected: bool, blocked: bool, detail: str, trouble: str = ""
) -> None:
    """Write the heartbeat of *relay_id*, with how it finds the broker and what else hinders it."""
    dialect = connection.dialect.name
    values = {
        "state": state,
        "broker_connected": connected,
        "broker_blocked": blocked,
        "broker_detail": detail[:1000] or None,
        "trouble": trouble[:1000] or None,
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
    """Remove the heartbeat of a relay that ends."""
    connection.execute(sa.delete(relay).where(relay.c.id == relay_id))


def forget_old(connection: Connection) -> None:
    """Remove the rows of relays unheard of for a day."""
    dialect = connection.dialect.name
    connection.execute(
        sa.delete(relay).where(relay.c.seen_at < now(dialect, "day_ago")), clock(dialect, day_ago=-_FORGET_AFTER_SECONDS)
    )
