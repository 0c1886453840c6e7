"""Rows as capture writes them, for tests of what comes after."""

from __future__ import annotations

import zlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox import tables
from outbox.message import Message, new_id
from outbox.tables import SHARDS, State

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection


def message(topic: str = "session.modified", key: str | None = None, body: bytes = b'{"id":1}', **values: Any) -> Message:
    """Return a valid message."""
    given = {"id": new_id(), "source": "/tests", "created_at": datetime.now(UTC), **values}
    return Message(topic=topic, key=key, body=body, **given)


def shard_of(key: str | None, message_id: object) -> int:
    """Return the shard of a key, or of a message without one."""
    return zlib.crc32((key if key is not None else str(message_id)).encode()) % SHARDS


def write(
    connection: Connection,
    *messages: Message,
    state: State = State.PENDING,
    available_in: float = 0.0,
    attempts: int = 0,
    unheard: str = "hold",
) -> list[int]:
    """Insert *messages* in order, numbering those with a key, and return the ids of their pending rows."""
    return [
        write_pending(
            connection,
            write_message(connection, each, number),
            each,
            number,
            state=state,
            available_in=available_in,
            attempts=attempts,
            unheard=unheard,
        )
        for each in messages
        for number in [each.sequence or next_sequence(connection, each.key)]
    ]


def next_sequence(connection: Connection, key: str | None) -> int | None:
    """Draw the next number of *key*; the row of the key stays locked until the transaction ends."""
    if key is None:
        return None
    counter = tables.key
    bumped = connection.execute(
        sa.update(counter).where(counter.c.key == key).values(sequence=counter.c.sequence + 1).returning(counter.c.sequence)
    ).scalar()
    if bumped is None:
        connection.execute(sa.insert(counter).values(key=key, sequence=1))
        return 1
    return int(bumped)


def write_message(connection: Connection, each: Message, sequence: int | None) -> int:
    """Insert the row of outbox_message and return its number."""
    row = tables.message
    return int(
        connection.execute(
            sa.insert(row)
            .values(
                message_id=each.id,
                source=each.source,
                topic=each.topic,
                key=each.key,
                sequence=sequence,
                content_type=each.content_type,
                headers=None,
                body=each.body,
                created_at=each.created_at,
            )
            .returning(row.c.id)
        ).scalar_one()
    )


def write_pending(
    connection: Connection,
    message_row: int,
    each: Message,
    sequence: int | None,
    *,
    state: State = State.PENDING,
    available_in: float = 0.0,
    attempts: int = 0,
    unheard: str = "hold",
    id: int | None = None,
) -> int:
    """Insert the row of outbox_pending and return its id (or use *id*)."""
    row = tables.pending
    values: dict[str, Any] = {} if id is None else {"id": id}
    return int(
        connection.execute(
            sa.insert(row)
            .values(
                message_row=message_row,
                shard=shard_of(each.key, each.id),
                topic=each.topic,
                key=each.key,
                sequence=sequence,
                available_at=datetime.now(UTC) + timedelta(seconds=available_in),
                state=state.value,
                attempts=attempts,
                unheard=unheard,
                **values,
            )
            .returning(row.c.id)
        ).scalar_one()
    )
