"""The database's clock: what leases, heartbeats and due times are measured by, whatever the clocks of the hosts say."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

_NOW = {
    "postgresql": sa.func.clock_timestamp(),  # now() would be the begin of the transaction
    "mysql": sa.func.utc_timestamp(sa.literal_column("6")),
    "mariadb": sa.func.utc_timestamp(sa.literal_column("6")),
}


def database_now(connection: Connection) -> datetime:
    """Return the present moment by the database's clock, in UTC. SQLite has none of its own: it is this host's."""
    expression = _NOW.get(connection.dialect.name)
    if expression is None:
        return datetime.now(UTC)
    moment: datetime = connection.execute(sa.select(expression)).scalar_one()
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
