"""Leases: one relay works, another waits and takes over; all by the database's clock."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox import database, migrations, tables
from outbox.errors import SchemaError
from outbox.relay.shards import Shards, boottime
from outbox.store import leases
from outbox.store.clock import clock, now
from outbox.store.leases import Holder
from outbox.tables import SHARDS
from tests.integration.relay.stage import Stage
from tests.kit.builders import message

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.engine import Engine


class Clock:
    """Stands still until moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def expire(engine: Engine) -> None:
    """Let all leases have run out, by the database's clock."""
    with engine.begin() as connection:
        connection.execute(
            sa.update(tables.shard).values(lease_until=now(engine.dialect.name, "ago")),
            clock(engine.dialect.name, ago=-0.001),
        )


def owners(engine: Engine) -> set[str | None]:
    with engine.connect() as connection:
        return set(connection.scalars(sa.select(tables.shard.c.owner)))


def test_the_first_relay_takes_every_shard_and_the_second_is_told_who_has_them(engine: Engine) -> None:
    first, second = Shards(engine, "first", 15.0), Shards(engine, "second", 15.0)
    assert first.keep()
    assert len(first.epochs) == SHARDS
    assert first.valid()
    assert not second.keep()
    assert not second.valid()
    assert second.holder is not None
    assert second.holder.relay == "first"
    assert 14.0 < second.holder.remaining_seconds <= 15.0


def test_a_lease_is_renewed_when_a_third_of_it_has_passed_and_not_before(engine: Engine) -> None:
    time = Clock()
    shards = Shards(engine, "me", 15.0, time)
    shards.keep()
    until = lease_end(engine)
    time.now += 4.9
    assert not shards.keep()
    assert lease_end(engine) == until
    time.now += 0.2
    assert not shards.keep()
    assert lease_end(engine) > until


def lease_end(engine: Engine) -> datetime:
    with engine.connect() as connection:
        until: datetime = connection.execute(sa.select(sa.func.min(tables.shard.c.lease_until))).scalar_one()
        return until


def test_a_lease_counts_from_before_its_renewal_was_sent(engine: Engine) -> None:
    """A database that takes long to answer must not make the lease seem longer than it is."""
    time = Clock()

    @sa.event.listens_for(engine, "before_cursor_execute")
    def slow(*_: object) -> None:
        time.now += 6.0

    try:
        shards = Shards(engine, "me", 15.0, time)
        shards.keep()
    finally:
        sa.event.remove(engine, "before_cursor_execute", slow)
    assert time.now >= 1006.0
    time.now = 1014.9
    assert shards.valid()
    time.now = 1015.0
    assert not shards.valid()


def test_a_relay_that_was_stopped_too_long_may_not_publish_until_it_has_renewed(engine: Engine) -> None:
    time = Clock()
    shards = Shards(engine, "me", 15.0, time)
    shards.keep()
    epochs = dict(shards.epochs)
    time.now += 60.0
    assert not shards.valid()
    assert not shards.keep()  # nobody took them: the same epoch goes on
    assert shards.valid()
    assert shards.epochs == epochs


def test_what_a_paused_relay_had_handed_over_may_not_be_written_when_it_wakes(engine: Engine) -> None:
    stage = Stage(engine, lambda _: None, lease_seconds=15.0)
    stage.write(message(), message())
    stage.until(lambda: stage.broker.flying)
    outgoing = stage.relay.forwarder.lanes.flights()[0].outgoing
    assert outgoing is not None
    assert outgoing.may_go()
    stage.clock.now += 13.4
    assert outgoing.may_go()
    stage.clock.now += 0.2  # a tenth of the lease before its end
    assert not outgoing.may_go()
    stage.turn()  # nobody took over: the lease is renewed, and goes on
    assert outgoing.may_go()
    stage.expire_leases()
    assert Shards(engine, "next", 15.0).keep()
    stage.clock.now += 5.1
    stage.turn()  # it hears of it
    assert not outgoing.may_go()
    stage.expire_leases()
    stage.clock.now += 5.1
    stage.turn()
    assert stage.relay.shards.valid()
    assert not outgoing.may_go()  # what it did not hear of lies in between


def test_when_a_lease_has_run_out_another_relay_takes_over_in_the_next_epoch_and_the_old_one_hears_of_it(
    engine: Engine,
) -> None:
    time = Clock()
    hung, next_one = Shards(engine, "hung", 15.0, time), Shards(engine, "next", 15.0)
    hung.keep()
    next_one.keep()
    expire(engine)
    next_one = Shards(engine, "next", 15.0)
    assert next_one.keep()
    assert all(next_one.epochs[shard] == epoch + 1 for shard, epoch in hung.epochs.items())
    time.now += 60.0
    assert not hung.valid()
    assert hung.keep()
    assert not hung.owned
    assert not hung.keep()
    assert hung.holder is not None
    assert hung.holder.relay == "next"


def test_released_shards_are_free_at_once(engine: Engine) -> None:
    first = Shards(engine, "first", 15.0)
    first.keep()
    first.release()
    assert owners(engine) == {None}
    assert not first.valid()
    assert Shards(engine, "second", 15.0).keep()


def test_releasing_gives_nothing_of_another_relays_back(engine: Engine) -> None:
    hung = Shards(engine, "hung", 15.0)
    hung.keep()
    expire(engine)
    Shards(engine, "next", 15.0).keep()
    hung.release()
    assert owners(engine) == {"next"}


@pytest.mark.parametrize("kept", [0, 63])
def test_shards_without_rows_are_taken_by_nobody_and_put_back_by_a_migration(
    engine: Engine, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(engine)
    stage.write(message())
    with engine.begin() as connection:
        connection.execute(sa.delete(tables.shard).where(tables.shard.c.id >= kept))
    with pytest.raises(SchemaError, match=f"lacks {SHARDS - kept} of its {SHARDS} rows.* run: outbox migrate"):
        migrations.check(engine)
    stage.turn(3, seconds=2.0)
    assert not stage.relay.shards.owned
    assert [event for event in events(caplog) if event.startswith("shards.")] == ["shards.missing"]
    assert migrations.upgrade(engine) == 0
    migrations.check(engine)
    stage.until(lambda: stage.delivered())


def test_a_relay_whose_shard_rows_go_while_it_works_says_what_is_missing(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(engine)
    stage.turn()
    assert stage.relay.shards.owned
    with engine.begin() as connection:
        connection.execute(sa.delete(tables.shard).where(tables.shard.c.id == 7))
    stage.turn(4, seconds=6.0)
    assert [event for event in events(caplog) if event.startswith("shards.")] == ["shards.lost", "shards.missing"]
    migrations.upgrade(engine)
    stage.until(lambda: stage.relay.shards.owned)


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [getattr(record, "outbox_event", "") for record in caplog.records]


@pytest.mark.parametrize("round", range(5))
def test_of_relays_that_start_at_once_one_gets_all_shards(postgres: Engine, round: int) -> None:
    found: list[dict[int, int] | Holder | leases.Damaged] = []
    together = threading.Barrier(4)

    def start(name: str) -> None:
        with database.autocommitting(postgres).connect() as connection:
            together.wait(10.0)
            found.append(leases.take(connection, name, 15.0))

    threads = [threading.Thread(target=start, args=(f"relay-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert sorted(len(each) for each in found if isinstance(each, dict)) == [SHARDS]
    assert len(owners(postgres)) == 1


def test_a_heartbeat_says_who_runs_and_how_it_finds_the_broker(engine: Engine) -> None:
    with engine.begin() as connection:
        leases.beat(connection, "me", "running", connected=True, blocked=False, detail="")
        leases.beat(connection, "me", "running", connected=False, blocked=True, detail="alarm " + "x" * 5000)
        row = connection.execute(sa.select(tables.relay)).one()
    assert (row.id, row.state, row.broker_connected, row.broker_blocked) == ("me", "running", False, True)
    assert row.broker_detail.startswith("alarm x")
    assert row.seen_at >= row.started_at


def test_relays_unheard_of_for_a_day_are_forgotten_and_one_that_leaves_takes_its_row_along(engine: Engine) -> None:
    with engine.begin() as connection:
        for name in ("me", "another", "old"):
            leases.beat(connection, name, "running", connected=True, blocked=False, detail="")
        connection.execute(
            sa.update(tables.relay).where(tables.relay.c.id == "old").values(seen_at=now(engine.dialect.name, "ago")),
            clock(engine.dialect.name, ago=-86_401.0),
        )
        leases.forget_old(connection)
        assert set(connection.scalars(sa.select(tables.relay.c.id))) == {"me", "another"}
        leases.depart(connection, "me")
        assert set(connection.scalars(sa.select(tables.relay.c.id))) == {"another"}


def test_the_clock_of_leases_runs_on() -> None:
    assert boottime() <= boottime()
