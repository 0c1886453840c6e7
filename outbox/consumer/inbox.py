"""What a service has taken: message ids, and beside them the highest sequence of each key. Every statement on both.

Only the id says *duplicate*. The sequence says whether an unseen message is late or jumped, nothing else: as a duplicate
test it would drop messages after a restored database, a released hold or a replay.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from outbox.consumer import tables
from outbox.database.errors import Meaning, meaning

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.engine import Connection

    from outbox.consumer.delivery import Identity, Key
    from outbox.consumer.seal import Seal

_inbox, _key, _attempt = tables.inbox, tables.key, tables.attempt
#: Returns how long a lock was waited for before.
_LIMIT_WAIT = sa.text("SELECT current_setting('lock_timeout'), set_config('lock_timeout', :limit, true)")


@dataclass(slots=True)
class Mark:
    """What is known of a key."""

    #: The highest sequence that arrived; 0: none.
    sequence: int = 0
    #: Later messages must wait in `consumer_parked`.
    held: bool = False


def insert(dialect: str, table: sa.Table) -> Any:
    """Return the INSERT of *dialect*, with its `on_conflict_…`."""
    return (postgresql.insert if dialect == "postgresql" else sqlite.insert)(table)


# --- one statement for a batch -----------------------------------------------------------------------------------------
#
# All rows of a batch are one parameter for each column (PostgreSQL: arrays; SQLite: a JSON text). With a parameter for each
# value the statement would be another text for each number of rows: never prepared, always parsed, most of a batch's work.


def given(dialect: str, **columns: sa.types.TypeEngine[Any]) -> sa.Subquery:
    """Return the table of the rows that are passed with `passed`."""
    if dialect == "postgresql":
        arrays = [sa.bindparam(f"{name}s", type_=postgresql.ARRAY(kind)) for name, kind in columns.items()]
        return sa.select(*sa.func.unnest(*arrays).table_valued(*columns).render_derived().c).subquery("given")
    each = sa.func.json_each(sa.bindparam("rows", type_=sa.Text())).table_valued("value")
    picked = [
        sa.func.json_extract(each.c.value, f"$[{index}]", type_=kind).label(name)
        for index, (name, kind) in enumerate(columns.items())
    ]
    return sa.select(*picked).subquery("given")


def passed(dialect: str, names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Return *rows*, with columns *names*, as the parameters of a statement that is `given` them."""
    if dialect == "postgresql":
        return {f"{name}s": list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    return {"rows": json.dumps(rows)}


@cache
def _take(dialect: str) -> Any:
    each = given(dialect, source=sa.Text(), message_id=sa.Text())
    now = sa.bindparam("now", type_=_inbox.c.taken_at.type)
    values = sa.select(sa.bindparam("service", type_=sa.Text()), each.c.source, each.c.message_id, now)
    values = values.where(sa.true())  # SQLite would take ON CONFLICT for the ON of a join
    statement = insert(dialect, _inbox).from_select(list(_inbox.c.keys()), values).on_conflict_do_nothing()
    if dialect == "postgresql":
        statement = statement.add_cte(sa.insert(tables.seal).values(id=sa.bindparam("seal")).cte("sealed"))
    return statement.returning(_inbox.c.source, _inbox.c.message_id)


@cache
def _marks(dialect: str) -> Any:
    each = given(dialect, source=sa.Text(), key=sa.Text())
    return (
        sa.select(_key.c.source, _key.c.key, _key.c.sequence, _key.c.held)
        .where(_key.c.service == sa.bindparam("service"))
        # Not a join: SQLite would read all keys of the service, and for each of them all rows of the batch.
        .where(sa.tuple_(_key.c.source, _key.c.key).in_(sa.select(*each.c)))
        .order_by(_key.c.source, _key.c.key)
    )


@cache
def _lock_marks(dialect: str) -> Any:
    return _marks(dialect).with_for_update(of=_key)


@cache
def _lock_free_marks(dialect: str) -> Any:
    return _marks(dialect).with_for_update(of=_key, skip_locked=True)


@cache
def _write_marks(dialect: str) -> Any:
    each = given(dialect, source=sa.Text(), key=sa.Text(), sequence=sa.BigInteger(), held=sa.Boolean())
    values = sa.select(sa.bindparam("service", type_=sa.Text()), *each.c).where(sa.true())
    statement = insert(dialect, _key).from_select(list(_key.c.keys()), values)
    new = statement.excluded
    higher = sa.case((new.sequence > _key.c.sequence, new.sequence), else_=_key.c.sequence)
    return statement.on_conflict_do_update(
        index_elements=[_key.c.service, _key.c.source, _key.c.key],
        set_={"sequence": higher, "held": sa.or_(_key.c.held, new.held)},
    )


def take(connection: Connection, service: str, identities: Collection[Identity], now: datetime, seal: Seal) -> set[Identity]:
    """Write *identities* into the inbox and return those that were not in it: one statement, which puts *seal* too.

    Waits for another transaction that is writing one of them. Sorted, so that two processes given the same messages can't
    lock each other out.
    """
    dialect = connection.dialect.name
    rows = passed(dialect, ("source", "message_id"), sorted(set(identities)))
    written = connection.execute(_take(dialect), {"service": service, "now": now, "seal": seal.number, **rows})
    seal.is_put = dialect == "postgresql"
    return {(source, message_id) for source, message_id in written}


def lock_marks(connection: Connection, service: str, keys: Collection[Key]) -> dict[Key, Mark]:
    """Return what is known of *keys*, locked until the transaction ends: nobody else moves, holds or frees them."""
    if not keys:
        return {}
    dialect = connection.dialect.name
    marks = {key: Mark() for key in keys}
    rows = passed(dialect, ("source", "key"), sorted(keys))
    for source, key, sequence, held in connection.execute(_lock_marks(dialect), {"service": service, **rows}):
        marks[source, key] = Mark(sequence, held)
    return marks


def lock_free_marks(connection: Connection, service: str, keys: Collection[Key]) -> dict[Key, Mark]:
    """Return what is known of those of *keys* that no other transaction has locked, locked as `lock_marks` does."""
    if not keys:
        return {}
    dialect = connection.dialect.name
    wanted = {"service": service, **passed(dialect, ("source", "key"), sorted(keys))}
    rows = connection.execute(_lock_free_marks(dialect), wanted)
    locked = {(source, key): Mark(sequence, held) for source, key, sequence, held in rows}
    if len(locked) == len(keys):
        return locked
    known = {(row.source, row.key) for row in connection.execute(_marks(dialect), wanted)}
    return {key: locked.get(key, Mark()) for key in keys if key in locked or key not in known}


def lock_mark_in_turn(connection: Connection, service: str, key: Key, seconds: float) -> bool:
    """Lock what is known of *key* as soon as those who asked before are done; False where that takes over *seconds*.

    Who only looks whether a key is free never finds it so while its messages come without a break.
    """
    if connection.dialect.name != "postgresql":  # one writer: nobody else has a lock
        return False
    before = connection.execute(_LIMIT_WAIT, {"limit": f"{seconds * 1000:.0f}ms"}).scalar_one()
    try:
        with connection.begin_nested():
            lock_marks(connection, service, [key])
    except SQLAlchemyError as error:
        if meaning(error) is not Meaning.BUSY:
            raise
        locked = False
    else:
        locked = True
    connection.execute(_LIMIT_WAIT, {"limit": before})  # the handlers of this transaction wait as they like
    return locked


def write_marks(connection: Connection, service: str, marks: Mapping[Key, Mark]) -> None:
    """Write *marks*. A sequence only rises and a hold only begins here; `free` ends it."""
    if not marks:
        return
    dialect = connection.dialect.name
    rows = sorted((source, key, mark.sequence, mark.held) for (source, key), mark in marks.items())
    values = passed(dialect, ("source", "key", "sequence", "held"), rows)
    connection.execute(_write_marks(dialect), {"service": service, **values})


@cache
def _free(dialect: str) -> Any:
    each = given(dialect, source=sa.Text(), key=sa.Text())
    theirs = sa.tuple_(_key.c.source, _key.c.key).in_(sa.select(*each.c))
    return sa.update(_key).where(_key.c.service == sa.bindparam("of"), theirs).values(held=False)


def free(connection: Connection, service: str, keys: Collection[Key]) -> None:
    """End the hold of *keys*."""
    if keys:
        dialect = connection.dialect.name
        connection.execute(_free(dialect), {"of": service, **passed(dialect, ("source", "key"), sorted(keys))})


# --- attempts that a process may not survive ---------------------------------------------------------------------------


def begin_attempt(connection: Connection, service: str, identity: Identity, now: datetime) -> int:
    """Record that *identity* is about to be handled and return how often that began without an end, this time included."""
    statement = insert(connection.dialect.name, _attempt).values(
        service=service, source=identity[0], message_id=identity[1], attempts=1, begun_at=now
    )
    statement = statement.on_conflict_do_update(
        index_elements=[_attempt.c.service, _attempt.c.source, _attempt.c.message_id],
        set_={"attempts": _attempt.c.attempts + 1, "begun_at": now},
    ).returning(_attempt.c.attempts)
    return int(connection.execute(statement).scalar_one())


def end_attempts(connection: Connection, service: str, identities: Iterable[Identity]) -> None:
    """Forget the attempts at *identities*: they were settled."""
    for source, message_id in identities:
        connection.execute(
            sa.delete(_attempt).where(
                _attempt.c.service == service, _attempt.c.source == source, _attempt.c.message_id == message_id
            )
        )


# --- forgetting --------------------------------------------------------------------------------------------------------


def newest(connection: Connection, service: str) -> datetime | None:
    """Return when the last id was taken; None: none was."""
    moment: datetime | None = connection.scalar(sa.select(sa.func.max(_inbox.c.taken_at)).where(_inbox.c.service == service))
    return moment


def prune(connection: Connection, service: str, before: datetime, limit: int) -> int:
    """Forget at most *limit* ids taken before *before* and return how many; an id that is still parked is kept."""
    parked = tables.parked
    still_parked = sa.exists().where(
        parked.c.service == _inbox.c.service,
        parked.c.message_id == _inbox.c.message_id,
        parked.c.source == _inbox.c.source,
    )
    old = (
        sa.select(_inbox.c.source, _inbox.c.message_id)
        .where(_inbox.c.service == service, _inbox.c.taken_at < before, ~still_parked)
        .order_by(_inbox.c.taken_at)
        .limit(limit)
    )
    identity = sa.tuple_(_inbox.c.source, _inbox.c.message_id)
    gone = connection.execute(sa.delete(_inbox).where(_inbox.c.service == service, identity.in_(old)))
    connection.execute(sa.delete(_attempt).where(_attempt.c.service == service, _attempt.c.begun_at < before))
    return gone.rowcount
