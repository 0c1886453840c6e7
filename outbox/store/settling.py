"""The statements by which a relay records what the broker answered.

A row is known by the id of its message, never by its number alone: a database that was restored, or a standby that lacked
the last commits, draws the same numbers again.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from outbox.process import failpoints
from outbox.store import locks
from outbox.store.clock import clock, now
from outbox.store.lists import among, as_list
from outbox.store.witness import Witness, columns
from outbox.tables import State, message, pending, receipt, shard

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from sqlalchemy.engine import Connection

    from outbox.store.witness import World


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
def _lock(dialect: str) -> sa.Select[Any]:
    return (
        sa.select(pending.c.id, _message_id(), pending.c.state, pending.c.attempts)
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
def _delete(dialect: str) -> sa.Executable:
    # A common table expression: in a join PostgreSQL might look up the messages of all that waits, and a subquery may be run,
    # and lock, more often than once.
    there = (
        sa.select(pending.c.id, _message_id().label("message_id"))
        .where(among(pending.c.id, "ids", sa.BigInteger(), dialect))
        .with_for_update(skip_locked=True)
        .cte("there")
    )
    answer = _pairs(dialect)
    same = sa.and_(answer.c.id == there.c.id, sa.type_coerce(answer.c.message_id, sa.Uuid()) == there.c.message_id)
    ours = sa.select(there.c.id).join(answer, same)
    return sa.delete(pending).where(pending.c.id.in_(ours)).returning(pending.c.id)


def _pairs(dialect: str) -> sa.FromClause:
    """Return the ids that `_delete_rows` binds, each with its message id, as a table."""
    if dialect == "postgresql":
        ids = sa.bindparam("ids", type_=ARRAY(sa.BigInteger()))
        message_ids = sa.bindparam("message_ids", type_=ARRAY(sa.Uuid()))
        return sa.func.unnest(ids, message_ids).table_valued("id", "message_id", name="a").render_derived()
    pair = sa.func.json_each(sa.bindparam("pairs", type_=sa.String())).table_valued("value").c.value
    id_, message_id = (sa.func.json_extract(pair, f"$[{n}]") for n in (0, 1))
    return sa.select(id_.label("id"), message_id.label("message_id")).subquery("a")


def _message_id() -> sa.ScalarSelect[UUID]:
    # Not a join: PostgreSQL might merge it with all messages that are kept.
    return sa.select(message.c.message_id).where(message.c.id == pending.c.message_row).scalar_subquery()


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
    deleted = _delete_rows(connection, confirmed) if confirmed else frozenset()
    done = [each for each in confirmed if each.id in deleted]
    answers: list[Confirmed | Change] = [*confirmed, *changes]
    others = [each for each in answers if each.id not in deleted]
    message_ids = {each.id: each.message_id for each in others}
    rows = _locked_rows(connection, message_ids) if others else {}
    absent = message_ids.keys() - rows.keys()
    locked = _still_there(connection, absent) if absent else frozenset()
    ours = {id_ for id_, row in rows.items() if row.message_id == message_ids[id_]}
    locked |= ours & {each.id for each in confirmed}  # its lock went in between
    _make(connection, relay, [each for each in changes if each.id in ours - locked and each.was == rows[each.id][1:]])
    witness = Witness(relay, receipt_id)
    written, found = _write_receipt(connection, witness, done) if done else (None, witness.ask(connection))
    failpoints.reached("R5")
    return Settled(found, len(done), locked, frozenset(absent - locked), frozenset(rows.keys() - ours), written)


def _ids(connection: Connection, ids: Collection[int]) -> dict[str, Any]:
    return {"ids": as_list(ids, connection.dialect.name)}


def _delete_rows(connection: Connection, confirmed: Sequence[Confirmed]) -> frozenset[int]:
    """Delete the rows of *confirmed* messages that nobody has locked, and return their ids."""
    parameters = _ids(connection, [each.id for each in confirmed])
    if connection.dialect.name == "postgresql":
        parameters["message_ids"] = [each.message_id for each in confirmed]
    else:
        parameters["pairs"] = json.dumps([(each.id, each.message_id.hex) for each in confirmed])
    return frozenset(connection.scalars(_delete(connection.dialect.name), parameters))


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


@cache
def _receipt(dialect: str) -> sa.Executable:
    return sa.insert(receipt).values(settled_at=now(dialect)).returning(receipt.c.id, *columns(dialect))


def _write_receipt(connection: Connection, witness: Witness, settled: Sequence[Confirmed]) -> tuple[int, World]:
    """Write a receipt; return its id, and whether the one before it is there."""
    dialect = connection.dialect.name
    values = {
        "relay": witness.relay,
        "messages": len(settled),
        "first_row": min(each.message_row for each in settled),
        "last_row": max(each.message_row for each in settled),
        "pending_ids": struct.pack(f">{len(settled)}q", *(each.id for each in settled)),
        "message_ids": b"".join(each.message_id.bytes for each in settled),
        "oldest_age_seconds": max(each.age_seconds for each in settled),
        "duration_seconds": max(each.flight_seconds for each in settled),
        **clock(dialect),
    }
    id_, *answer = connection.execute(_receipt(dialect), values | witness.parameters).one()
    return int(id_), witness.world(*answer)
