"""The rows of outbox_shard: the tables are not whole without them, and who empties all tables takes them, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from outbox.tables import SHARDS, shard

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection


def missing(connection: Connection) -> list[int]:
    """Return the shards that have no row."""
    return sorted(set(range(SHARDS)) - set(connection.scalars(sa.select(shard.c.id))))


def restore(connection: Connection) -> int:
    """Put the missing rows back, free for any relay; return how many."""
    rows = [{"id": number} for number in missing(connection)]
    if rows:
        connection.execute(sa.insert(shard), rows)
    return len(rows)
