"""What an operator does with a service: its tables, its state, its parked messages, its queues.

Each function is one command of `outbox consumer`; none prints, asks or exits.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox import database, migrations
from outbox.consumer import parking, tables
from outbox.consumer.migrations import history
from outbox.consumer.tables import State
from outbox.consumer.transaction import reading
from outbox.consumer.upkeep import SEEN_SECONDS
from outbox.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import Engine, Row

    from outbox.consumer.service import Service
    from outbox.settings import Settings

_parked, _key, _counter, _process = tables.parked, tables.key, tables.counter, tables.process
_SUMS = [sa.func.coalesce(sa.func.sum(_counter.c[name]), 0).label(name) for name in ("applied", "duplicates", "late", "gaps")]
_ALIVE = timedelta(seconds=8 * SEEN_SECONDS)


def open_engine(service: Service, settings: Settings) -> Engine:
    """Return an engine for the service's own database, `CONSUMER_DATABASE_URL` with `{service}` filled in."""
    settings.require("CONSUMER_DATABASE_URL")
    url = str(settings.consumer_database_url).replace("{service}", service.name)
    if sa.make_url(url).get_backend_name() == "sqlite":
        return database.create_engine(url)
    # One connection for each worker, the redriver, upkeep, and one to spare.
    return database.create_engine(url, pool_size=settings.consumer_workers + 3)


# --- tables --------------------------------------------------------------------------------------------------------------


def migrate(service: Service, engine: Engine) -> int:
    """Create or upgrade inbox and parking, create the service's own tables that are missing; return the steps it took."""
    steps = migrations.upgrade(engine, history(service.name))
    missing = _missing_tables(service, engine)
    if missing and service.tables is not None:
        service.tables.create_all(engine)
    return steps + len(missing)


def check(service: Service, engine: Engine, *, migrate_first: bool = False) -> None:
    """Raise SchemaError, saying what to type, unless all tables are there and of this code's version."""
    if migrate_first:
        migrate(service, engine)
    migrations.check(engine, history(service.name))
    if missing := _missing_tables(service, engine):
        raise SchemaError(
            f"tables of service {service.name!r} do not exist: {', '.join(missing)}; run: {history(service.name).command}"
        )


def _missing_tables(service: Service, engine: Engine) -> list[str]:
    if service.tables is None:
        return []
    with reading(engine) as connection:
        look = sa.inspect(connection)
        return [table.fullname for table in service.tables.sorted_tables if not look.has_table(table.name, schema=table.schema)]


# --- state ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """How a service stands. `dataclasses.asdict` of it is `outbox consumer status --json`."""

    service: str
    applied_total: int
    duplicates_total: int
    #: Applied after a later message of their key.
    late_total: int
    #: Jumps in the sequence of a key; a service that takes some of a key's topics sees many.
    gaps_total: int
    #: Parked messages, by what they wait for; discarded ones are not counted.
    parked: int
    waiting_for_a_person: int
    held_keys: int
    #: While the service runs: age of the oldest message it was given and has not settled, 0 when there is none. While it
    #: does not: seconds since it last had nothing left to do, because what was sent from then on may be waiting. None: it
    #: never ran.
    lag_seconds: float | None
    running: bool
    processes: list[dict[str, Any]]


def status(engine: Engine, service: Service, now: datetime | None = None) -> Status:
    """Return how *service* stands, from its own database alone."""
    now = now or datetime.now(UTC)
    name = service.name
    with reading(engine) as connection:
        totals = connection.execute(sa.select(*_SUMS).where(_counter.c.service == name)).one()
        parked = parking.count(connection, name)
        person = connection.scalar(sa.select(sa.func.count()).where(_parked.c.service == name, _parked.c.state == State.PARKED))
        held = connection.scalar(sa.select(sa.func.count()).where(_key.c.service == name, _key.c.held))
        processes = connection.execute(sa.select(_process).where(_process.c.service == name)).all()
    alive = [each for each in processes if each.state == "running" and now - each.seen_at < _ALIVE]
    return Status(
        service=name,
        applied_total=int(totals.applied),
        duplicates_total=int(totals.duplicates),
        late_total=int(totals.late),
        gaps_total=int(totals.gaps),
        parked=parked,
        waiting_for_a_person=int(person or 0),
        held_keys=int(held or 0),
        lag_seconds=_lag(processes, alive, now),
        running=bool(alive),
        processes=[
            {
                "id": each.id,
                "host": each.host,
                "pid": each.pid,
                "connected": each.connected,
                "seen_age_seconds": round((now - each.seen_at).total_seconds(), 3),
            }
            for each in alive
        ],
    )


def _lag(processes: Sequence[Row[Any]], alive: Sequence[Row[Any]], now: datetime) -> float | None:
    if any(each.connected for each in alive):
        moments = [each.oldest_at for each in alive if each.oldest_at is not None]
        return max(0.0, (now - min(moments)).total_seconds()) if moments else 0.0
    moments = [each.caught_up_at or each.started_at for each in processes]
    return max(0.0, (now - max(moments)).total_seconds()) if moments else None
