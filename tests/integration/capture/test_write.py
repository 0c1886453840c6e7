"""The statements that write a batch: order, clocks, wake-up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest
import sqlalchemy as sa

from outbox import tables
from outbox.message import Message, new_id
from outbox.store.capturing import Held, shard_of, write
from outbox.store.wakeup import CHANNEL

if TYPE_CHECKING:
    from tests.integration.capture.conftest import World


def held(key: str | None = None, *, topic: str = "a.b", created_at: datetime | None = None) -> Held:
    return Held(Message(id=new_id(), source="/s", topic=topic, key=key, body=b"1", created_at=created_at or datetime.now(UTC)))


def test_row_ids_and_numbers_follow_the_order_of_the_batch(world: World) -> None:
    batch = [held(key, topic=f"number.{n}") for n, key in enumerate(["z", None, "a", "z", "m", None, "a", "z"] * 30)]
    with world.engine.begin() as connection:
        write(connection, batch)
    rows = world.rows()
    assert [row.topic for row in rows] == [f"number.{n}" for n in range(240)]
    assert [row.message_row for row in rows] == sorted(row.message_row for row in rows)
    for key in ("a", "m", "z"):
        numbers = [row.sequence for row in rows if row.key == key]
        assert numbers == list(range(1, len(numbers) + 1))


def test_a_row_knows_the_shard_of_its_key_or_else_of_its_id(world: World) -> None:
    batch = [held("k"), held("k"), held(), held()]
    with world.engine.begin() as connection:
        write(connection, batch)
    assert [row.shard for row in world.rows()] == [shard_of(each.message) for each in batch]
    assert shard_of(batch[0].message) == 29  # crc32 of the key modulo 64, today and for ever: rows outlive versions


def test_a_clock_that_is_fast_puts_no_message_off(world: World) -> None:
    if world.engine.dialect.name == "sqlite":  # one host, one clock
        return
    with world.engine.begin() as connection:
        for count in (1, 2):  # one message has a statement of its own
            write(connection, [held(created_at=datetime.now(UTC) + timedelta(hours=1)) for _ in range(count)])
    due = sa.select(sa.func.count()).where(tables.pending.c.available_at <= sa.func.clock_timestamp())
    with world.engine.connect() as connection:
        assert connection.scalar(due) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_a_commit_wakes_whoever_listens_and_a_rollback_does_not(world: World, count: int) -> None:
    if world.engine.dialect.name == "sqlite":  # nobody can listen there
        return
    url = world.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as listener:
        listener.execute(f"LISTEN {CHANNEL}")
        for notify, end in ((True, "rollback"), (False, "commit"), (True, "commit")):
            with world.engine.connect() as connection:
                connection.begin()
                write(connection, [held() for _ in range(count)], notify=notify)
                getattr(connection, end)()
        listener.execute("NOTIFY outbox, 'the end'")
        heard = [note.payload for note in listener.notifies(timeout=10, stop_after=2)]
    assert heard == ["", "the end"]


def test_a_message_written_at_once_wakes_at_the_commit_too(world: World) -> None:
    if world.engine.dialect.name == "sqlite":
        return
    url = world.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as listener:
        listener.execute(f"LISTEN {CHANNEL}")
        with world.engine.begin() as connection:
            world.outbox.send("a.b", 1, session=connection)
        listener.execute("NOTIFY outbox, 'the end'")
        heard = [note.payload for note in listener.notifies(timeout=10, stop_after=2)]
    assert heard == ["", "the end"]


def test_a_burst_of_commits_notifies_seldom(world: World) -> None:
    if world.engine.dialect.name == "sqlite":
        return
    url = world.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as listener:
        listener.execute(f"LISTEN {CHANNEL}")
        started = datetime.now(UTC)
        for _ in range(200):
            world.begin()
            world.send()
            world.session.commit()
        most = 1 + (datetime.now(UTC) - started) / timedelta(milliseconds=5)
        listener.execute("NOTIFY outbox, 'the end'")
        heard = 0
        for note in listener.notifies(timeout=10):
            if note.payload == "the end":
                break
            heard += 1
    assert 1 <= heard <= most
