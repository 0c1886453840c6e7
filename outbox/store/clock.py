"""The database's clock: what leases, heartbeats and due times are measured by, whatever the clocks of the hosts say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox.tables import Timestamp

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


def now(dialect: str, offset: str | None = None) -> sa.ColumnElement[datetime]:
    """Return the database's clock, plus the seconds bound to *offset*; `clock` gives the parameters that go with it."""
    if dialect == "postgresql":
        moment = sa.func.clock_timestamp(type_=Timestamp())
        if offset is None:
            return moment
        return moment + sa.func.make_interval(0, 0, 0, 0, 0, 0, sa.bindparam(offset, type_=sa.Float()))
    # SQLite is a library: its clock is this host's.
    return sa.bindparam("now" if offset is None else offset, type_=Timestamp())


def clock(dialect: str, **offsets: float) -> dict[str, Any]:
    """Return the parameters of `now`: the bare clock and each of *offsets* in seconds."""
    if dialect == "postgresql":
        return offsets
    moment = datetime.now(UTC)
    return {"now": moment, **{name: moment + timedelta(seconds=seconds) for name, seconds in offsets.items()}}
