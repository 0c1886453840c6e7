"""Connections to a database whose other end is gone without a word: a power cut, a firewall that forgot, a lost address."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Spawn
    from tests.kit.netns import Machine
    from tests.kit.servers import PostgresServer

pytestmark = pytest.mark.faults

#: Promised are 30 seconds; the machine may be slow.
_SECONDS = 45

_HOLD = """
import signal, sys, sqlalchemy as sa
from outbox.database import Role, create_engine
with create_engine(sys.argv[1], role=Role.SERVICE).begin() as connection:
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(1)"))
    print("holds", flush=True)
    signal.pause()
"""
_WAIT = """
import sys, sqlalchemy as sa
from outbox.database import Role, create_engine, meaning
with create_engine(sys.argv[1], role=Role[sys.argv[2]]).connect() as connection:
    print("waits", flush=True)
    try:
        connection.execute(sa.text("SELECT pg_sleep(600)"))
    except sa.exc.DBAPIError as error:
        print("ended:", meaning(error).name, flush=True)
"""


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_cable_that_is_pulled_is_noticed_at_both_of_its_ends(
    driver: str, machine: Machine, private_postgres: Callable[..., PostgresServer], spawn: Spawn
) -> None:
    server = private_postgres(listen_addresses=f"127.0.0.1,{machine.outer_address}")
    server.admit(machine.network)
    url = f"postgresql+{driver}://postgres@{machine.outer_address}:{server.port}/postgres"
    python = (*machine.inside, sys.executable, "-c")
    holder = spawn(*python, _HOLD, url)
    waiting = [spawn(*python, _WAIT, url, role) for role in ("RELAY", "SERVICE")]
    eventually(lambda: "holds" in holder.output and all("waits" in each.output for each in waiting), 30, "the connections")
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as observer:
        sleeping = "SELECT count(*) = 2 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND pid <> pg_backend_pid()"
        eventually(lambda: (observer.execute(sleeping).fetchone() or (False,))[0], 30, "statements that the server works on")
        machine.pull()
        begun = time.monotonic()
        observer.execute(f"SET statement_timeout = '{_SECONDS}s'")
        observer.execute("SELECT pg_advisory_lock(1)")  # the lost machine's transaction is rolled back
        left = _SECONDS - (time.monotonic() - begun)
    for each in waiting:
        eventually(lambda each=each: "ended: AWAY" in each.output, max(left, 1), "the client to notice")  # type: ignore[misc]
