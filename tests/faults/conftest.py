"""Worlds to break: made, empty, and with nothing running yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from outbox import migrations
from outbox.database import create_engine
from tests.kit.world import World, embedded_world, rabbit_world

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy.engine import Engine

    from tests.conftest import Spawn
    from tests.kit.servers import ExternalPostgres, PostgresServer


@pytest.fixture
def shared_world(spawn: Spawn, postgres_server: PostgresServer | ExternalPostgres, broker_url: str) -> Iterator[World]:
    """On the servers that ordinary tests share: processes may be killed, the servers not."""
    with postgres_server.database() as url, postgres_server.database() as service_url:
        yield rabbit_world(spawn, url, broker_url, service_url).prepare()


@pytest.fixture
def small_world(spawn: Spawn, tmp_path: Path) -> World:
    """In files, without any server."""
    return embedded_world(spawn, tmp_path).prepare()


@pytest.fixture
def new_engine(tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    """Make engines on empty outboxes."""
    made: list[Engine] = []

    def make() -> Engine:
        engine = create_engine(f"sqlite:///{tmp_path / f'outbox-{len(made)}.db'}")
        migrations.upgrade(engine)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.dispose()
