"""The statements by which a relay records what the broker answered.

A row is known by the id of its message, never by its number alone: a database that was restored, or a standby that lacked
the last commits, draws the same numbers again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from outbox.process import failpoints
from outbox.store import locks
from outbox.store.clock import clock, now
from outbox.store.lists import among, as_list
from outbox.tables import State, message, pending, receipt, shard

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from sqlalchemy.engine import Connection


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A message the broker has: its pending row goes, whoever owns the shard by now."""

    id: int
    message_row: int
    message_id: UUID
    age_seconds: float
    flight_seconds: float


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a row whose message was not delivered.

    Void unless the relay still owns the shard in that epoch, and the row is as it was when it was read.
    """

    id: int
    #: None where outbox_message has no row for it.
    message_id: UUID | None
    shard: int
    epoch: int
    #: State and attempts of the row when it was read: a person may have decided since.
    was: tuple[str, int]
    state: State
    attempts: int
    wait_seconds: float
    error: str


class Present(NamedTuple):
    """A row as it is now, locked by us; not `Row`, which is as it was read."""

    message_id: UUID | None
    state: str
    attempts: int


class World(NamedTuple):
    """Which database answers: after a restore or a failover another one does, at the same address."""

    #: The server process and the database in it; always the same for SQLite, which is a file.
    server: str
    #: Whether it has the receipt it was asked for. One that has not went back in time.
    remembers: bool


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of answers that were to be recorded."""

    world: World
    #: How many rows of confirmed messages were there, and are deleted.
    deleted: int
    #: Rows that somebody else has locked: to be tried again, nothing is recorded of them.
    locked: frozenset[int]
    #: Ids without a row. Another relay settled it, or we did and never heard of the commit; or the database went back.
    gone: frozenset[int]
    #: Ids under which there is the row of another message: the database went back in time, and drew the ids again.
    strangers: frozenset[int]
    #: The receipt written, if one was.
    receipt: int | None


@cache
def _world(dialect: str) -> sa.Select[str, bool]:
    found = sa.exists(sa.literal(1)).where(
        receipt.c.id == sa.bindparam("receipt", type_=sa.BigInteger()),
        receipt.c.relay == sa.bindparam("relay", type_=sa.String()),
    )
    if dialect != "postgresql":
        return sa.select(sa.literal(""), found)
    databases = sa.table("pg_database", sa.column("oid"), sa.column("datname"))
    this = sa.select(sa.cast(databases.c.oid, sa.Text())).where(databases.c.datname == sa.func.current_database())
    started = sa.cast(sa.func.pg_postmaster_start_time(), sa.Text())
    return sa.select(started + sa.literal_column("' '") + this.scalar_subquery(), found)


def world(connection: Connection, relay: str, receipt_id: int | None) -> World:
    """Say which database answers, and whether it has receipt *receipt_id* of *relay*: all that was settled before, too."""
    parameters = {"receipt": receipt_id or 0, "relay": relay}
    server, found = connection.execute(_world(connection.dialect.name), parameters).one()
    return World(server, receipt_id is None or bool(found))


@cache
def _lock(dialect: str) -> sa.Select[Any]:
    # Not a join: PostgreSQL might merge it with all messages that are kept.
    message_id = sa.select(message.c.message_id).where(message.c.id == pending.c.message_row).scalar_subquery()
    return (
        sa.select(pending.c.id, message_id, pending.c.state, pending.c.attempts)
        .where(among(pending.c.id, "ids", sa.BigInteger(), dialect))
        .with_for_update(skip_locked=True)
    )


@cache
def _present(dialect: str) -> sa.Select[Any]:
    return sa.select(pending.c.id).where(among(pending.c.id, "ids", sa.BigInteger(), dialect))


@cache
def _owned(dialect: str) -> sa.Select[Any]:
    return (
        sa.select(shard.c.id, shard.c.epoch)
        .where(
            shard.c.owner == sa.bindparam("relay", type_=sa.String()),
            among(shard.c.id, "shards", sa.SmallInteger(), dialect),
        )
        .order_by(shard.c.id)
        # Looking is not enough: another relay could take the shard between this and our commit.
        .with_for_update(read=True)
    )


@cache
def _delete(dialect: str) -> sa.Delete:
    return sa.delete(pending).where(among(pending.c.id, "ids", sa.BigInteger(), dialect))


@cache
def _change(dialect: str) -> sa.Update:
    return (
        sa.update(pending)
        .where(pending.c.id == sa.bindparam("of_id", type_=sa.BigInteger()))
        .values(
            state=sa.bindparam("new_state", type_=sa.String()),
            attempts=sa.bindparam("new_attempts", type_=sa.Integer()),
            error=sa.bindparam("new_error", type_=sa.Text()),
            available_at=now(dialect, "wait"),
        )
    )


def settle(
    connection: Connection,
    relay: str,
    confirmed: Sequence[Confirmed],
    changes: Sequence[Change],
    *,
    receipt_id: int | None = None,
) -> Settled:
    """Record what the broker answered, in the open transaction. Waits for nobody: rows that are locked are left for later.

    A row is ours only if it is of our message: a database that went back in time draws the same ids again. Safe to repeat
    when a commit's outcome is unknown: only rows deleted here are written into the receipt. *receipt_id*: the last one of
    this relay.
    """
    locks.be_brief(connection)
    found = world(connection, relay, receipt_id)
    answers: list[Confirmed | Change] = [*confirmed, *changes]
    message_ids = {each.id: each.message_id for each in answers}
    rows = _locked_rows(connection, message_ids)
    absent = message_ids.keys() - rows.keys()
    locked = _still_there(connection, absent) if absent else frozenset()
    ours = {id_ for id_, row in rows.items() if row.message_id == message_ids[id_]}
    done = [each for each in confirmed if each.id in ours]
    if done:
        connection.execute(_delete(connection.dialect.name), _ids(connection, [each.id for each in done]))
    written = _write_receipt(connection, relay, done) if done else None
    _make(connection, relay, [each for each in changes if each.id in ours and each.was == rows[each.id][1:]])
    failpoints.reached("R5")
    return Settled(found, len(done), locked, frozenset(absent - locked), frozenset(rows.keys() - ours), written)


def _ids(connection: Connection, ids: Collection[int]) -> dict[str, Any]:
    return {"ids": as_list(ids, connection.dialect.name)}


def _locked_rows(connection: Connection, ids: Collection[int]) -> dict[int, Present]:
    rows = connection.execute(_lock(connection.dialect.name), _ids(connection, ids))
    return {id_: Present(*values) for id_, *values in rows}


def _still_there(connection: Connection, ids: Collection[int]) -> frozenset[int]:
    return frozenset(connection.scalars(_present(connection.dialect.name), _ids(connection, ids)))


def _make(connection: Connection, relay: str, changes: Sequence[Change]) -> None:
    """Make those of *changes* that are still ours to make."""
    if not changes:
        return
    dialect = connection.dialect.name
    asked = {"relay": relay, "shards": as_list({each.shard for each in changes}, dialect)}
    owned = {(id_, epoch) for id_, epoch in connection.execute(_owned(dialect), asked)}
    values = [
        {
            "of_id": each.id,
            "new_state": each.state.value,
            "new_attempts": each.attempts,
            "new_error": each.error,
            **clock(dialect, wait=each.wait_seconds),
        }
        for each in changes
        if (each.shard, each.epoch) in owned
    ]
    if values:
        connection.execute(_change(dialect), values)


def _write_receipt(connection: Connection, relay: str, settled: Sequence[Confirmed]) -> int:
    dialect = connection.dialect.name
    written = connection.execute(
        sa.insert(receipt).values(settled_at=now(dialect)).returning(receipt.c.id),
        {
            "relay": relay,
            "messages": len(settled),
            "first_row": min(each.message_row for each in settled),
            "last_row": max(each.message_row for each in settled),
            "pending_ids": struct.pack(f">{len(settled)}q", *(each.id for each in settled)),
            "message_ids": b"".join(each.message_id.bytes for each in settled),
            "oldest_age_seconds": max(each.age_seconds for each in settled),
            "duration_seconds": max(each.flight_seconds for each in settled),
            **clock(dialect),
        },
    )
    return int(written.scalar_one())
