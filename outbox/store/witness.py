"""Which database answers: after a restore or a failover another one does, at the same address.

A relay knows it again by the last receipt that it wrote there: whatever has that one has all that was settled before it, too.
The question rides in statements that are made anyhow (`columns`), so that it costs no round trip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from outbox.tables import receipt

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection


class World(NamedTuple):
    """What a database says of itself."""

    #: The server process and the database in it; always the same for SQLite, which is a file.
    server: str
    #: Whether it has the receipt it was asked for. One that has not went back in time.
    remembers: bool


@dataclass(frozen=True, slots=True)
class Witness:
    """The last receipt that a relay wrote; None: it wrote none yet, and every database remembers that."""

    relay: str = ""
    receipt: int | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What `columns` are asked with."""
        return {"witness_relay": self.relay, "witness_receipt": self.receipt or 0}

    def world(self, server: str, found: bool) -> World:
        """Say what the values of `columns` mean."""
        return World(server, self.receipt is None or bool(found))

    def ask(self, connection: Connection) -> World:
        """Ask in a statement of its own, where there is no other."""
        server, found = connection.execute(_question(connection.dialect.name), self.parameters).one()
        return self.world(server, found)


def columns(dialect: str) -> tuple[sa.ColumnElement[str], sa.ColumnElement[bool]]:
    """Return what a statement selects beside its own columns to learn which database answers: its server, and "found"."""
    kept = receipt.alias("w")
    found = sa.exists(sa.literal_column("1")).where(
        kept.c.id == sa.bindparam("witness_receipt", type_=sa.BigInteger()),
        kept.c.relay == sa.bindparam("witness_relay", type_=sa.String()),
    )
    if dialect != "postgresql":
        return sa.literal_column("''", sa.String()), found
    databases = sa.table("pg_database", sa.column("oid"), sa.column("datname"))
    this = sa.select(sa.cast(databases.c.oid, sa.Text())).where(databases.c.datname == sa.func.current_database())
    started = sa.cast(sa.func.pg_postmaster_start_time(), sa.Text())
    return started + sa.literal_column("' '") + this.scalar_subquery(), found


@cache
def _question(dialect: str) -> sa.Select[str, bool]:
    return sa.select(*columns(dialect))
