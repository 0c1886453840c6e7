"""What the measurements run on: private PostgreSQL (with fsync) and RabbitMQ, the public commands as processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from outbox import Outbox, database, migrations
from tests.kit.servers import PostgresServer, RabbitServer

CHECKOUT = Path(__file__).resolve().parent.parent
BODY = {"text": "x" * 1000}  # with its envelope about 1 KiB on the wire


@dataclass(frozen=True)
class Stage:
    """One database with the outbox tables, one virtual host, and how to start a process on them."""

    database_url: str
    service_url: str
    broker_url: str

    @property
    def environ(self) -> dict[str, str]:
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("OUTBOX_", "CONSUMER_"))},
            "DATABASE_URL": self.database_url,
            "CONSUMER_DATABASE_URL": self.service_url,
            "BROKER_URL": self.broker_url,
            "OUTBOX_EXCHANGE": "bench",
            "OUTBOX_SOURCE": "/bench",
        }

    def outbox(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `outbox …` from the checkout."""
        command = [str(Path(sys.executable).parent / "outbox"), *arguments]
        return subprocess.Popen(command, cwd=CHECKOUT, env=self.environ, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def engine(self, **options: Any) -> sa.Engine:
        return database.create_engine(self.database_url, **options)


@contextmanager
def servers() -> Iterator[tuple[PostgresServer, RabbitServer]]:
    """Start both servers; PostgreSQL waits for the disk at each commit, as in production."""
    postgres, rabbit = PostgresServer(fsync="on", synchronous_commit="on", full_page_writes="on"), RabbitServer()
    try:
        postgres.start()
        rabbit.start()
        yield postgres, rabbit
    finally:
        postgres.discard()
        rabbit.discard()


@contextmanager
def stage(postgres: PostgresServer, rabbit: RabbitServer) -> Iterator[Stage]:
    """Lend databases and a virtual host of their own to one measurement."""
    with postgres.database() as own, postgres.database() as services, rabbit.vhost() as broker:
        engine = database.create_engine(own)
        migrations.upgrade(engine)
        engine.dispose()
        yield Stage(own, services, broker)


def new_outbox() -> Outbox:
    """Return an outbox that is given its session at each send."""
    return Outbox(source="/bench")


def percentile(values: list[float], share: int) -> float:
    """Return the value that *share* percent of *values* are below."""
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]
