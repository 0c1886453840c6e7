"""A PostgreSQL that goes back in time: it crashes, and a copy that lacks its last commits comes up at the same address.

That is what the promotion of an asynchronous standby looks like to its clients, and a restore from a backup as well.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from tests.kit.ports import free_port
from tests.kit.servers import PostgresServer
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator


class FailingOverPostgres(PostgresServer):
    """A primary with a streaming standby. `fail_over` replaces it, whatever the standby has not heard of."""

    def __init__(self, **settings: str | int) -> None:
        super().__init__(**{"max_wal_senders": 5, "wal_keep_size": "256MB", "hot_standby": "on", **settings})
        self._generation = 0
        self._standby: _Standby | None = None

    def add_standby(self) -> None:
        """Copy the primary and let the copy follow it; returns when it does."""
        self._generation += 1
        data = self.folder / f"standby-{self._generation}"
        origin = f"host=127.0.0.1 port={self.port} user=postgres"
        self._run([self._bin / "pg_basebackup", "-D", data, "-d", origin, "-R", "-c", "fast", "--no-sync"], self._env)
        self._standby = _Standby(self, data)
        self._standby.start()
        eventually(self._followed, 60, "the standby to follow")

    def _followed(self) -> bool:
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            return bool(connection.execute("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'").fetchone()[0])  # type: ignore[index]

    def cut_replication(self) -> None:
        """The standby hears of nothing from now on: what commits after this is lost by `fail_over`."""
        assert self._standby is not None
        self._standby.deafen()
        eventually(lambda: not self._followed(), 30, "the replication to end")

    def fail_over(self) -> Path:
        """Crash, promote the standby, and let it answer at the primary's address; returns the folder of what was before."""
        standby, self._standby = self._standby, None
        assert standby is not None
        self.kill()
        standby.promote()
        standby.stop()
        before, self._data = self._data, standby.data
        self.start()
        return before

    def rows_of(self, data: Path, database: str, statement: str) -> Iterator[tuple[object, ...]]:
        """Ask a cluster that was replaced, on a port of its own; then remove it."""
        late = _Standby(self, data)
        late.start()
        try:
            with psycopg.connect(late.dsn(database)) as connection:
                yield from connection.execute(statement.encode())
        finally:
            late.stop()
            shutil.rmtree(data, ignore_errors=True)

    def discard(self) -> None:
        if self._standby is not None:
            self._standby.stop()
            self._standby = None
        super().discard()


class _Standby(PostgresServer):
    """Another cluster in the folder *data*, with the settings of *primary* and a port of its own."""

    def __init__(self, primary: FailingOverPostgres, data: Path) -> None:
        super().__init__(**{**primary._settings, "port": free_port()})
        self.port = int(self._settings["port"])
        self._data = self.data = data

    def deafen(self) -> None:
        """End the stream from the primary, for good."""
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1 port=1'")
            connection.execute("SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Become a primary; returns when it takes writes."""
        self._run([self._bin / "pg_ctl", "promote", "-D", self.data, "-w"], self._env)
