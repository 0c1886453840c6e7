"""A whole installation for one test: outbox, broker, relays, services and writers, as processes of the public commands.

What the test learns of it comes from outside: `--json` of the public commands, ordinary SQL, and the *tap*, a queue bound to
everything that is read without our runtime.
"""

from __future__ import annotations

import base64
import json
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pika
import sqlalchemy as sa

from outbox.database import create_engine
from outbox.embedded import path_of
from outbox.embedded.queues import Queues
from tests.kit import recorder, writers
from tests.kit.commands import Commands
from tests.kit.history import Entry, fingerprint
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.conftest import Spawn
    from tests.kit.processes import Process

EXCHANGE = "openevent"
TAP = "tap"
#: Short, so that the shards of a killed relay are free soon; longer than a busy machine's pauses.
LEASE, CONFIRM_TIMEOUT = "2s", "1500ms"


@dataclass
class World:
    """Settings, and what can be done with them."""

    env: dict[str, str]
    spawn: Spawn
    #: What is asked of the commands; `Commands.json("status")`.
    ask: Commands = field(init=False)

    def __post_init__(self) -> None:
        self.env = {
            "OUTBOX_EXCHANGE": EXCHANGE,
            "OUTBOX_SOURCE": "/tests",
            "OUTBOX_LEASE": LEASE,
            "OUTBOX_CONFIRM_TIMEOUT": CONFIRM_TIMEOUT,
            **self.env,
        }
        self.ask = Commands(self.env)

    @property
    def embedded(self) -> bool:
        return self.env["BROKER_URL"].startswith("embedded:")

    # --- processes ---

    def start(self, *command: str, failpoints: str = "", **env: str) -> Process:
        """Start one of the project's commands."""
        return self.spawn(*command, env={**self.env, "OUTBOX_FAILPOINTS": failpoints, **env})

    def relay(self, *options: str, failpoints: str = "", **env: str) -> Process:
        return self.start("outbox", "relay", *options, failpoints=failpoints, **env)

    def service(self, *options: str, name: str = recorder.NAME, failpoints: str = "", **env: str) -> Process:
        return self.start("outbox", "consumer", "run", name, *options, failpoints=failpoints, **env)

    def writer(self, seed: object, failpoints: str = "") -> Process:
        return self.start("python", "-m", "tests.kit.writers", str(seed), failpoints=failpoints)

    # --- before ---

    def prepare(self, *, tap: Sequence[str] = ("#",)) -> World:
        """Make the tables, the exchange, the recorder's queue and the tap, bound to the patterns *tap*."""
        self.ask.fine("migrate")
        self.ask.fine("consumer", "migrate", recorder.NAME)
        self.ask.fine("topology", "apply")
        self.ask.fine("consumer", "topology", recorder.NAME, "--apply")
        with self.engine() as engine:
            writers.metadata.create_all(engine)
        self.make_tap(*tap)
        return self

    def make_tap(self, *patterns: str) -> None:
        """Declare the tap. Nothing consumes it during a run: it simply keeps what arrived, in order."""
        if self.embedded:
            with Queues(path_of(self.env["BROKER_URL"])) as queues:
                queues.declare_queue(TAP)
                for pattern in patterns:
                    queues.bind(TAP, pattern, exchange=EXCHANGE)
            return
        with self.channel() as channel:
            channel.queue_declare(TAP, durable=True, arguments={"x-queue-type": "quorum"})
            for pattern in patterns:
                channel.queue_bind(TAP, EXCHANGE, pattern)

    def bind_again(self) -> None:
        """Bind the recorder and the tap, after the exchange was lost and made again."""
        self.ask.fine("consumer", "topology", recorder.NAME, "--apply")
        self.make_tap("#")

    @contextmanager
    def channel(self) -> Iterator[Any]:
        """A channel to RabbitMQ that has nothing to do with the project."""
        connection = pika.BlockingConnection(pika.URLParameters(self.env["BROKER_URL"]))
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()

    @contextmanager
    def engine(self, name: str = "DATABASE_URL") -> Iterator[sa.Engine]:
        """An engine for ordinary SQL on the outbox's database, or with CONSUMER_DATABASE_URL on the recorder's."""
        engine = create_engine(self.env[name].replace("{service}", recorder.service.name))
        try:
            yield engine
        finally:
            engine.dispose()

    # --- what is seen from outside ---

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask.json("status")
        return found

    def service_status(self, name: str = recorder.NAME) -> dict[str, Any]:
        found: dict[str, Any] = self.ask.json("consumer", "status", name)
        return found

    def rows(self, statement: str, name: str = "DATABASE_URL") -> list[Any]:
        """The rows of an ordinary SELECT."""
        with self.engine(name) as engine, engine.connect().execution_options(outbox_read_only=True) as connection:
            return list(connection.execute(sa.text(statement)))

    def ledger(self, where: str = "1 = 1") -> list[Entry]:
        """What committed; the sequence is for the tap to say."""
        found = self.rows(f"SELECT message_id, key, digest FROM ledger WHERE {where} ORDER BY id")
        return [Entry(id=row.message_id, key=row.key, sequence=None, digest=row.digest) for row in found]

    def effects(self) -> list[Entry]:
        """What the recorder applied, in the order in which it did for each key."""
        found = self.rows("SELECT * FROM effects ORDER BY id", "CONSUMER_DATABASE_URL")
        return [Entry(id=row.message_id, key=row.key, sequence=row.sequence, digest=row.digest) for row in found]

    def tap(self) -> list[Entry]:
        """Everything that arrived, in order; call it once, when nothing more can come."""
        return [arrival(body) for body in (self._embedded_tap() if self.embedded else self._rabbit_tap())]

    def _embedded_tap(self) -> list[bytes]:
        query = "SELECT body FROM message JOIN queue ON queue.id = message.queue WHERE name = ? ORDER BY message.id"
        with closing(sqlite3.connect(path_of(self.env["BROKER_URL"]))) as connection:
            return [body for (body,) in connection.execute(query, (TAP,))]

    def _rabbit_tap(self) -> list[bytes]:
        bodies: list[bytes] = []
        with self.channel() as channel:
            expected = channel.queue_declare(TAP, passive=True).method.message_count
            for _, _, body in channel.consume(TAP, auto_ack=True, inactivity_timeout=30) if expected else ():
                assert body is not None, f"{len(bodies)} of {expected} messages in the tap"
                bodies.append(body)
                if len(bodies) == expected:
                    break
        return bodies

    # --- the end of a run ---

    def drain(self) -> None:
        """Send and apply everything that is left; a run that can't be drained is no proof of anything."""
        relay, service = self.relay("--drain"), self.service("--drain")
        assert relay.wait(60) == 0, relay.output
        # The first one may have found its queue empty before the relay had sent everything.
        assert service.wait(60) == 0, service.output
        if self.backlog():
            last = self.service("--drain")
            assert last.wait(60) == 0, last.output

    def backlog(self) -> int:
        """How many messages wait for the recorder."""
        queue = f"{EXCHANGE}.recorder"
        if self.embedded:
            with Queues(path_of(self.env["BROKER_URL"])) as queues:
                depth = queues.depth(queue)
                return depth.ready + depth.leased
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count)

    def settled(self, timeout: float = 60.0) -> None:
        """Wait until running relays and services have nothing left to do."""

        def quiet() -> bool:
            status, service = self.status(), self.service_status()
            left = status["pending"] + status["retrying"] + status["unroutable"]
            return bool(left == 0 and service["applied_total"] + service["parked"] >= self._committed())

        eventually(quiet, timeout, "everything to be sent and applied", interval=0.2)

    def _committed(self) -> int:
        return int(self.rows("SELECT count(*) AS n FROM ledger")[0].n)


def rabbit_world(spawn: Spawn, database_url: str, broker_url: str, service_url: str, **env: str) -> World:
    """A world on PostgreSQL and RabbitMQ."""
    given = {"DATABASE_URL": database_url, "BROKER_URL": broker_url, "CONSUMER_DATABASE_URL": service_url}
    return World(given | env, spawn)


def embedded_world(spawn: Spawn, folder: Path, **env: str) -> World:
    """A world in files."""
    given = {
        "DATABASE_URL": f"sqlite:///{folder / 'outbox.db'}",
        "BROKER_URL": f"embedded:///{folder / 'broker.db'}",
        "CONSUMER_DATABASE_URL": f"sqlite:///{folder / '{service}.db'}",
    }
    return World(given | env, spawn)


def end(*processes: Process) -> None:
    """Let relays, services and writers end in order, once they are there to be told."""
    for process in processes:
        process.wait_for_line("started|writing")
        process.terminate()
    for process in processes:
        assert process.wait(60) == 0, process.output


def arrival(body: bytes) -> Entry:
    """What the CloudEvent *body* says, read without our code."""
    event = json.loads(body)
    data = base64.b64decode(event["data_base64"]) if "data_base64" in event else event.get("data")
    sequence = event.get("sequence")
    return Entry(
        id=event["id"],
        key=event.get("partitionkey"),
        sequence=None if sequence is None else int(sequence),
        digest=fingerprint(data),
    )
