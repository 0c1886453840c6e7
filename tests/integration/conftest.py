"""One migrated database of each kind for all tests here; each test finds it empty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox import migrations, tables
from outbox.relay.daemon import open_database

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Engine

    from tests.kit.servers import ExternalPostgres, PostgresServer


@pytest.fixture(scope="session")
def _sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    yield from _migrated(f"sqlite:///{tmp_path_factory.mktemp('integration') / 'outbox.db'}")


@pytest.fixture(scope="session")
def _postgres(postgres_server: PostgresServer | ExternalPostgres) -> Iterator[Engine]:
    with postgres_server.database() as url:
        yield from _migrated(url)


def _migrated(url: str) -> Iterator[Engine]:
    engine = open_database(url)
    migrations.upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def postgres(_postgres: Engine) -> Engine:
    """A migrated, empty PostgreSQL database."""
    return _emptied(_postgres)


@pytest.fixture
def sqlite(_sqlite: Engine) -> Engine:
    """A migrated, empty SQLite database."""
    return _emptied(_sqlite)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def engine(request: pytest.FixtureRequest) -> Engine:
    """A migrated, empty database: the test runs once per kind."""
    engine: Engine = request.getfixturevalue(request.param)
    return engine


def _emptied(engine: Engine) -> Engine:
    with engine.begin() as connection:
        for table in (tables.pending, tables.message, tables.key, tables.receipt, tables.relay):
            connection.execute(sa.delete(table))
        connection.execute(sa.update(tables.shard).values(owner=None, epoch=0, lease_until=None))
    return engine
