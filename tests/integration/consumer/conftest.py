"""Databases that hold nothing: a service makes its own tables there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox.database import create_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Engine

    from tests.kit.servers import ExternalPostgres, PostgresServer


@pytest.fixture(scope="session")
def _one_postgres(postgres_server: PostgresServer | ExternalPostgres) -> Iterator[Engine]:
    """Made once, because making a database takes a second."""
    with postgres_server.database() as url:
        engine = create_engine(url, pool_size=20)
        yield engine
        engine.dispose()


@pytest.fixture
def postgres_engine(_one_postgres: Engine) -> Iterator[Engine]:
    """An empty PostgreSQL database."""
    yield _one_postgres
    with _one_postgres.begin() as connection:
        there = sa.MetaData()
        there.reflect(connection)
        there.drop_all(connection)
    _one_postgres.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An empty database of each kind."""
    if request.param == "postgres":
        yield request.getfixturevalue("postgres_engine")
        return
    engine = create_engine(request.getfixturevalue("sqlite_url"))
    yield engine
    engine.dispose()
